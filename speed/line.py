"""A bundle on the line, from file to verdict: cold start, images per second and memory, beside anomalib's inferencer.

Both sides run the same OpenVINO model in float32, each in a process of its own.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import seed_everything
from side_by_side import begin, parser, row, write
from training import images

from anomalib_csflow import bundling, from_recipe

SIZE = 300
"""Height and width of the images in pixels."""
TINY = {"backbone": "tf_efficientnet_lite0", "image_size": 128, "hidden_channels": 8}
PRELUDE = """
import json, sys, time, warnings, logging
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
bundle, folder, threads, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
from pathlib import Path
files = sorted(Path(folder).rglob("*.png"))
files = [files[index % len(files)] for index in range(count)]
"""
OURS = f"""{PRELUDE}
from anomalib_csflow.runtime import Detector
detector = Detector(bundle, "openvino", num_threads=threads)
judge = detector
"""
THEIRS = f"""{PRELUDE}
from anomalib.deploy import OpenVINOInferencer
settings = {{"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}}
detector = OpenVINOInferencer(Path(bundle) / "model.xml", device="CPU", config=settings)
judge = detector.predict
"""
COLD = "judge(str(files[0]))"
ONE_BY_ONE = """
for file in files[:8]: judge(str(file))
start = time.perf_counter()
for file in files: judge(str(file))
print(json.dumps(len(files) / (time.perf_counter() - start)))
"""
STREAM = """
list(detector.stream(files[:8]))
start = time.perf_counter()
for result in detector.stream(files): pass
print(json.dumps(len(files) / (time.perf_counter() - start)))
"""
MEMORY = """
import resource
found = []
for part in (files[: len(files) // 10], files):
    for result in detector.stream(part): pass
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
print(json.dumps(found))
"""


def run(code: str, bundle: Path, folder: Path, threads: int, count: int) -> tuple[float, Any]:
    """Seconds from the start of a process to its end, and what it printed."""
    command = [sys.executable, "-c", code, bundle, folder, threads, count]
    timed = f"""
import subprocess, sys, time
start = time.perf_counter()
out = subprocess.run({[str(part) for part in command]!r}, check=True, capture_output=True, text=True).stdout
print(time.perf_counter() - start)
print(out)
"""
    done = subprocess.run([sys.executable, "-c", timed], check=True, capture_output=True, text=True, cwd=folder)  # noqa: S603
    lines = done.stdout.strip().splitlines()
    return float(lines[0]), json.loads(lines[-1]) if len(lines) > 1 else None


def ceiling(model: Path, threads: int, seconds: int) -> float:
    """Images per second of OpenVINO's ``benchmark_app``, which reads no files: the most that requests can reach."""
    program = Path(sys.executable).with_name("benchmark_app")
    options = f"-d CPU -hint none -nstreams {threads} -nthreads {threads} -infer_precision f32 -t {seconds}"
    options += f" -shape [1,3,{SIZE},{SIZE}]"
    done = subprocess.run([program, "-m", model, *options.split()], check=True, capture_output=True, text=True)  # noqa: S603
    found = re.search(r"Throughput: +([0-9.]+) FPS", done.stdout)
    if found is None:
        msg = f"benchmark_app gave no throughput: {done.stdout[-300:]}"
        raise RuntimeError(msg)
    return float(found[1])


def main() -> None:
    """Make a bundle of a detector that was hardly trained, and run it."""
    options = parser(__doc__)
    options.add_argument("--count", type=int, default=10_000, help="images of the run that measures memory")
    arguments = options.parse_args()
    begin(arguments)
    count, many = (8, 20) if arguments.quick else (200, arguments.count)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folder = images(root / "images", 8, SIZE)
        seed_everything(0, verbose=False)
        detector = from_recipe("cs_flow_small", **(TINY if arguments.quick else {}), max_steps=2)
        data = Folder("noise", root=folder, normal_dir="good", num_workers=0, train_batch_size=4)
        engine = Engine(default_root_dir=root, accelerator="cpu", logger=False, enable_progress_bar=False)
        engine.fit(detector, datamodule=data)
        bundle = bundling.bundle(str(engine.best_model_path), root / "part")
        threads = arguments.threads
        cold: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(arguments.repeats):
            cold["ours"].append(run(OURS + COLD, bundle, folder, threads, count)[0])
            cold["theirs"].append(run(THEIRS + COLD, bundle, folder, threads, count)[0])
        each = {
            name: run(code + ONE_BY_ONE, bundle, folder, threads, count)[1]
            for name, code in (("ours", OURS), ("theirs", THEIRS))
        }
        streamed = run(OURS + STREAM, bundle, folder, threads, count)[1]
        most = ceiling(bundle / "model.xml", threads, 1 if arguments.quick else 10)
        early, late = run(OURS + MEMORY, bundle, folder, threads, many)[1]
    rows = [
        row(
            "cold start, to the first verdict: ours, anomalib's inferencer",
            min(cold["ours"]),
            min(cold["theirs"]),
            1 / 5,
            "s",
        ),
        row(
            "time of an image, one by one: ours, anomalib's inferencer", 1e3 / each["ours"], 1e3 / each["theirs"], None
        ),
        row("time of an image: streamed, one by one", 1e3 / streamed, 1e3 / each["ours"], 1 / 1.5),
        row("time of an image: streamed, benchmark_app without files", 1e3 / streamed, 1e3 / most, None),
        row(f"memory: after {many} images, after {many // 10}", late, early, 1.02, "MB"),
    ]
    write("line", rows, arguments)


if __name__ == "__main__":
    main()
