"""Large images, with the backbone in strips beside the whole backbone: peak memory and time, each in its own process.

"Ours" is the small recipe in strips, "theirs" the same without them. The process holds the image and its map too.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from side_by_side import begin, parser, row, write

from anomalib_csflow import from_recipe
from anomalib_csflow.features import strips

SIDES = (512, 1024, 2048)
ONE = """
import json, sys, time
from statistics import median
import numpy as np
from pathlib import Path
from anomalib_csflow.runtime.precision import read_model
from anomalib_csflow.runtime.validate import peak_mb
what, path, side, threads, repeats = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
if what == "torch":
    sys.path.insert(0, sys.argv[6])
    import torch
    from large import make
    torch.set_num_threads(threads)
    model = make(side, whole=path == "whole").model
    run = torch.inference_mode()(lambda image: model(torch.from_numpy(image)))
else:
    import openvino
    settings = {"INFERENCE_PRECISION_HINT": what, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    core = openvino.Core()
    model = read_model(core, Path(path), what)
    model.reshape([1, 3, side, side])
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    run = lambda image: request.infer({0: image}, share_inputs=True)
image = np.random.default_rng(0).random((1, 3, side, side), dtype=np.float32)
times = []
for _ in range(repeats + 1):
    start = time.perf_counter()
    run(image)
    times.append(1e3 * (time.perf_counter() - start))
print(json.dumps({"MiB": 1e6 * peak_mb() / 2**20, "ms": median(times[1:])}))
"""
WAYS = {"f32": "OpenVINO, float32", "bf16": "OpenVINO, bfloat16", "torch": "torch"}
QUICK_SIDE = 704  # the least that is divided


def make(side: int, *, whole: bool) -> Any:
    """The detector for square images, with random weights of the flow, which would be the identity otherwise."""
    if whole:
        strips.STRIP_VALUES = sys.maxsize
    torch.manual_seed(0)
    detector = from_recipe("cs_flow_small", image_size=side)
    with torch.no_grad():
        for parameter in detector.model.flow.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return detector.eval()


def main() -> None:
    """Measure both sides at each size."""
    arguments = parser(__doc__).parse_args()
    begin(arguments)

    def measure(what: str, path: Path | str, side: int) -> dict[str, float]:
        settings = (side, arguments.threads, arguments.repeats, Path(__file__).parent)
        command = [sys.executable, "-W", "ignore", "-c", ONE, what, str(path), *map(str, settings)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603

    sides = (QUICK_SIDE,) if arguments.quick else SIDES
    found: dict[tuple[str, int, str], dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as root:
        for kind in ("strips", "whole"):  # in this order: the whole backbone has no strips from then on
            for side in sides:
                model = make(side, whole=kind == "whole").to_openvino(Path(root) / kind / str(side))
                for what in WAYS:
                    found[what, side, kind] = measure(what, kind if what == "torch" else model, side)
    rows = []
    for what, name in WAYS.items():
        for side in sides:
            ours, theirs = found[what, side, "strips"], found[what, side, "whole"]
            rows.append(row(f"{name}, {side} x {side}: peak memory", ours["MiB"], theirs["MiB"], None, "MiB"))
            rows.append(row(f"{name}, {side} x {side}: time of an image", ours["ms"], theirs["ms"], None))
        if not arguments.quick:
            large, small = (found[what, side, "strips"]["MiB"] for side in (SIDES[-1], SIDES[0]))
            rows.append(row(f"{name}, {SIDES[-1]} beside {SIDES[0]} pixels: peak memory", large, small, 1.5, "MiB"))
    write("large", rows, arguments)


if __name__ == "__main__":
    main()
