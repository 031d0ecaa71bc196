"""OpenVINO models on a CPU: latency, size, export and compile time, and what 8 bits cost, beside anomalib's models.

PatchCore's memory is filled with random vectors of its features' length, as many as in a coreset of 10 % of the
training images of ``mtd``: its own selection would take hours, and does not change the latency.
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
from training import CONFIGS, images, their_csflow

from anomalib_csflow.benchmark.run import config
from anomalib_csflow.benchmark.run.baselines import patchcore

PATCHCORE_LAYERS = ("blocks.2", "blocks.4")  # strides 8 and 16, like layer2 and layer3 of its default backbone
TINY = {"backbone": "tf_efficientnet_lite0", "image_size": 128, "hidden_channels": 8}
TRAINING_IMAGES = 761  # in mtd
CORESET = 0.1
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
    model = core.read_model(path)
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


def latencies(requests: dict[str, Any], image: np.ndarray, repeats: int) -> dict[str, float]:
    """Median ms for one image, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in requests}
    for turn in range(repeats + 3):
        for name, request in requests.items():
            start = time.perf_counter()
            request.infer({0: image})
            if turn >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


def export(model: AnomalibModule, root: Path, **options: Any) -> tuple[Path, float]:
    """The path of the OpenVINO model, and the seconds of its export."""
    start = time.perf_counter()
    path = model.eval().to_openvino(root, **options)
    return path, time.perf_counter() - start


def with_random_memory(model: Any, size: int, training_images: int) -> AnomalibModule:
    """PatchCore with a memory as large as a coreset."""
    with torch.no_grad():
        model.model.train()
        embedding = model.model(torch.rand(1, 3, size, size))
        model.model.embedding_store.clear()
    positions, length = embedding.shape
    model.model.memory_bank = torch.randn(int(CORESET * training_images * positions), length)
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
        theirs, _ = export(their_csflow(model | {"layer": "blocks.5"}), root / "csflow", input_size=(size, size))
        bank, _ = export(
            with_random_memory(
                patchcore(
                    model["backbone"],
                    model["weights"],
                    size,
                    layers=PATCHCORE_LAYERS,
                    coreset_sampling_ratio=CORESET,
                ),
                size,
                1 if arguments.quick else TRAINING_IMAGES,
            ),
            root / "patchcore",
            onnx_kwargs={"dynamic_shapes": None},
            input_size=(size, size),
        )
        request, compile_s = compiled(path, size, arguments)
        requests = {
            "ours": request,
            "ours in bfloat16": compiled(path, size, arguments, "bf16")[0],
            "int8": compiled(int8, size, arguments)[0],
            "csflow": compiled(theirs, size, arguments)[0],
            "patchcore": compiled(bank, size, arguments)[0],
        }
        image = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
        ms = latencies(requests, image, 10 * arguments.repeats)
        rows += [
            row("latency: ours, PatchCore (coreset 10 %)", ms["ours"], ms["patchcore"], 1 / 3),
            row("latency: ours, Csflow", ms["ours"], ms["csflow"], 1 / 2),
            row("latency: ours in bfloat16, Csflow in float32", ms["ours in bfloat16"], ms["csflow"], 1 / 2),
            row("latency: ours in 8 bits, Csflow in float32", ms["int8"], ms["csflow"], 1 / 2),
            row("latency: 8 bits, float32", ms["int8"], ms["ours"], 0.6),
        ]
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
