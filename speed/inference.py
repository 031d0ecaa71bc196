"""OpenVINO models on a CPU: latency, size, export and compile time, and what 8 bits cost, beside anomalib's models.

PatchCore's memory is filled with 10,000 random vectors of its features' length, as many as the benchmark's baselines
have at most: the latency does not depend on the vectors. Each model has the image size that it has in the benchmark.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import openvino
import torch
from anomalib.data import Folder
from anomalib.deploy import CompressionType
from anomalib.engine import Engine
from anomalib.models import get_model
from anomalib.models.components import AnomalibModule
from lightning.pytorch import seed_everything
from side_by_side import begin, parser, row, write
from torchmetrics.functional.classification import binary_auroc
from training import CONFIGS, THEIR_SIZE, images, their_csflow

from anomalib_csflow.benchmark.run import config
from anomalib_csflow.benchmark.run.baselines import patchcore
from anomalib_csflow.runtime.precision import read_model

PATCHCORE = {"PatchCore, stride 16": ("blocks.4",), "PatchCore, strides 8 + 16": ("blocks.2", "blocks.4")}
TINY = {"backbone": "tf_efficientnet_lite0", "image_size": 128, "hidden_channels": 8}
VECTORS = 10_000
IMPORT = (
    "import time; import {}; start = time.perf_counter(); import anomalib_csflow; print(time.perf_counter() - start)"
)


def compiled(path: Path, size: int, arguments: argparse.Namespace, precision: str = "f32") -> tuple[Any, float]:
    """A model compiled for low latency at one image size, and the seconds that this took."""
    hints = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": arguments.threads,
    }
    start = time.perf_counter()
    core = openvino.Core()
    model = read_model(core, path, precision)
    model.reshape([1, 3, size, size])
    request = core.compile_model(model, "CPU", hints).create_infer_request()
    return request, time.perf_counter() - start


def throughput(path: Path, size: int, hint: str, images: int = 64) -> float:
    """Images per second, with the number of parallel requests that OpenVINO chooses for a performance hint."""
    core = openvino.Core()
    model = core.read_model(path)
    model.reshape([1, 3, size, size])
    queue = openvino.AsyncInferQueue(core.compile_model(model, "CPU", {"PERFORMANCE_HINT": hint}))
    image = np.zeros((1, 3, size, size), np.float32)

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            queue.start_async({0: image})
        queue.wait_all()
        return count / (time.perf_counter() - start)

    run(8)
    return run(images)


def latencies(requests: dict[str, Any], repeats: int) -> dict[str, float]:
    """Median ms for one image, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in requests}
    generator = np.random.default_rng(0)
    inputs = {name: generator.random(tuple(r.get_input_tensor().shape), np.float32) for name, r in requests.items()}
    for turn in range(repeats + 3):
        for name, request in requests.items():
            start = time.perf_counter()
            request.infer({0: inputs[name]})
            if turn >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


def export(model: AnomalibModule, root: Path, **options: Any) -> tuple[Path, float]:
    """The path of the OpenVINO model, and the seconds of its export."""
    start = time.perf_counter()
    path = model.eval().to_openvino(root, **options)
    return path, time.perf_counter() - start


def with_random_memory(model: Any, size: int, vectors: int) -> AnomalibModule:
    """PatchCore with a memory of that many vectors."""
    with torch.no_grad():
        model.model.train()
        embedding = model.model(torch.rand(1, 3, size, size))
        model.model.embedding_store.clear()
    model.model.memory_bank = torch.randn(vectors, embedding.shape[1])
    return model


def scores(request: Any, data: Folder, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Image scores and labels of a test set."""
    found, labels = [], []
    test_data: Any = data.test_data
    for item in (test_data[index] for index in range(len(test_data))):
        pixels = torch.nn.functional.interpolate(item.image[None], (size, size), mode="bilinear")
        found.append(float(np.ravel(request.infer({0: pixels.numpy()})["pred_score"])[0]))
        labels.append(int(item.gt_label))
    return torch.tensor(found), torch.tensor(labels)


def import_seconds() -> tuple[float, float]:
    """Seconds to import the package after anomalib (median of five processes), and the limit."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        IMPORT.format("anomalib.models, anomalib.engine, anomalib.cli.cli"),
    ]
    runs = [
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])  # noqa: S603
        for _ in range(5)
    ]
    return median(runs), 0.3


def main() -> None:
    """Fit the small recipe, export it in all formats, measure."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, help="a data set in MVTec AD's layout, to fit on and to score")
    arguments = options.parse_args()
    begin(arguments)
    recipe = config.read_detector({"config": "cs_flow_small.yaml"}, CONFIGS)
    model = recipe.init_args | (TINY if arguments.quick else {})
    size, count = model["image_size"], 16 if arguments.quick else 48
    their_size = min(size, THEIR_SIZE)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if arguments.data:
            (data_set,) = config.folders(arguments.data)
            data = Folder(**data_set.init_args, train_batch_size=16, eval_batch_size=16, num_workers=0)
        else:
            data = Folder(name="noise", root=images(root, count, size), normal_dir="good", num_workers=0)
        seed_everything(0, verbose=False)
        ours = get_model({"class_path": "anomalib_csflow.CSFlow", "init_args": model})
        length: dict[str, Any] = recipe.length if arguments.data else {"max_epochs": 1}
        Engine(default_root_dir=root, **length, accelerator="cpu", limit_val_batches=0, enable_model_summary=False).fit(
            ours, datamodule=data
        )

        path, export_s = export(ours, root / "ours")
        int8, _ = export(ours, root / "int8", compression_type=CompressionType.INT8_PTQ, datamodule=data)
        csflow = their_csflow(model | {"layer": "blocks.5", "image_size": their_size})
        theirs, _ = export(csflow, root / "csflow", input_size=(their_size, their_size))
        request, compile_s = compiled(path, size, arguments)
        requests = {
            "ours": request,
            "ours in bfloat16": compiled(path, size, arguments, "bf16")[0],
            "int8": compiled(int8, size, arguments)[0],
            "csflow": compiled(theirs, their_size, arguments)[0],
        }
        rivals = dict([*PATCHCORE.items()][:1]) if arguments.quick else PATCHCORE
        for name, layers in rivals.items():
            rival = patchcore(model["backbone"], model["weights"], their_size, layers=layers)
            bank, _ = export(
                with_random_memory(rival, their_size, 100 if arguments.quick else VECTORS),
                root / f"patchcore_{len(layers)}",
                onnx_kwargs={"dynamic_shapes": None},
                input_size=(their_size, their_size),
            )
            requests[name] = compiled(bank, their_size, arguments)[0]
            requests[f"{name}, in bfloat16"] = compiled(bank, their_size, arguments, "bf16")[0]
        ms = latencies(requests, 10 * arguments.repeats)
        for name in rivals:
            both = ms["ours in bfloat16"], ms[f"{name}, in bfloat16"]
            rows.append(row(f"latency in float32: ours, {name}", ms["ours"], ms[name], 1))
            rows.append(row(f"latency in bfloat16: ours, {name}", *both, 1))
        rows.append(row("latency in float32: ours, Csflow with three image sizes", ms["ours"], ms["csflow"], 1 / 2))
        rows.append(row("latency: 8 bits, float32", ms["int8"], ms["ours"], 0.6))
        hints = {hint: throughput(path, size, hint, 4 if arguments.quick else 64) for hint in ("LATENCY", "THROUGHPUT")}
        rows.append(
            {
                "what": "images per second on all cores: throughput mode, latency mode",
                "ours": f"{hints['THROUGHPUT']:.1f}",
                "theirs": f"{hints['LATENCY']:.1f}",
                "ratio": f"{hints['THROUGHPUT'] / hints['LATENCY']:.3f}",
                "target": "",
                "met": "",
            }
        )
        small, large = (p.with_suffix(".bin").stat().st_size / 1e6 for p in (int8, path))
        rows.append(row("file: 8 bits, float32", small, large, 0.3, "MB"))
        rows.append(row("export to OpenVINO, limit", export_s, 30, 1, "s"))
        rows.append(row("compile, limit", compile_s, 2, 1, "s"))
        rows.append(row("import after anomalib, limit", *import_seconds(), 1, "s"))
        if arguments.data:
            data.setup("test")
            areas = {
                name: float(binary_auroc(*scores(requests[name], data, size)))
                for name in ("ours", "ours in bfloat16", "int8")
            }
            rows.extend(
                {
                    "what": f"image AUROC on {arguments.data.name}: {name}, float32",
                    "ours": f"{areas[name]:.4f}",
                    "theirs": f"{areas['ours']:.4f}",
                    "ratio": f"{areas[name] - areas['ours']:+.4f}",
                    "target": "-0.0050",
                    "met": "yes" if areas["ours"] - areas[name] <= 0.005 else "NO",
                }
                for name in ("ours in bfloat16", "int8")
            )
    write("inference", rows, arguments)


if __name__ == "__main__":
    main()
