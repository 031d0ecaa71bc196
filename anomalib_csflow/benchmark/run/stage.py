"""One stage of a run, in its own process: ``python -m anomalib_csflow.benchmark.run.stage STAGE FOLDER``.

Stage ``fit`` trains, tests and keeps the weights; stage ``export`` loads them in a new process, so that the memory
of one does not count for the other. Each writes its measurements to ``FOLDER/STAGE.json``.
"""

import sys
import tempfile
import time
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.onnx import OnnxExporterError
from torchvision.transforms.v2 import Resize

from anomalib_csflow.benchmark.rows import write_json
from anomalib_csflow.engine.detector import FlowDetector

from . import accuracy, build, measure, samples, timing
from .plan import Run, datamodule
from .timing import cpu_seconds, latency, peak_mb

BATCHES = (1, 8)


def fit(run: Run, folder: Path) -> dict[str, Any]:
    """Train, test, keep curves, sample maps and weights."""
    seed_everything(run.seed)
    model, data = build.model(run), datamodule(run)
    trainer: dict[str, Any] = {"accelerator": run.accelerator, "devices": 1}
    length: dict[str, Any] = run.detector.length
    if not length and not {"max_epochs", "max_steps"} & model.trainer_arguments.keys():
        msg = f"{run.detector.name} does not say how long it trains: set epochs or steps in the configuration"
        raise ValueError(msg)
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        quiet: dict[str, Any] = {"enable_model_summary": False, "logger": False}
        before = cpu_seconds()
        row["fit_s"] = measure.fit(model, data, Path(root), limit_val_batches=0, **quiet, **length, **trainer)
        row |= {"fit_cpu_s": cpu_seconds() - before, "fit_peak_mb": peak_mb()}
        row |= {"epochs": model.trainer.current_epoch, "steps": model.trainer.global_step}
        if torch.cuda.is_available():
            row["fit_device_mb"] = torch.cuda.max_memory_allocated() / 1e6
        predictions = measure.predict(model, data, Path(root), logger=False, **trainer)
    row |= build.settings(run, model)  # after the fit, which may have set the size
    row |= {
        "threads": torch.get_num_threads(),
        "device": model.trainer.strategy.root_device.type,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "train_images": len(data.train_data),
        "test_good": int((~predictions.labels).sum()),
        "test_defective": int(predictions.labels.sum()),
        "threshold": accuracy.THRESHOLD,
        **accuracy.evaluate(predictions),
    }
    if predictions.maps is None:
        row["notes"].append("no heat maps: no pixel figures")
    if predictions.masks is None:
        row["notes"].append("no masks: no pixel figures")
    found = accuracy.curves(predictions)
    arrays: dict[str, Any] = {name: curve.numpy() for name, curve in found.items()}
    np.savez_compressed(folder / "curves.npz", **arrays)
    scores: dict[str, Any] = accuracy.scores(predictions)
    np.savez_compressed(folder / "scores.npz", **scores)
    if run.in_full:
        samples.save(predictions, folder, folder.parent.parent / "samples" / run.data.name)
    torch.save({"size": row["image_size"], "state": model.model.state_dict()}, folder / "model.pt")
    return row


def test_images(data: AnomalibDataModule, model: AnomalibModule, count: int) -> Tensor:
    """The first test images at the model's size, (count, 3, H, W); repeated from the start if there are too few."""
    data.test_augmentations = Resize(build.image_size(model) or [256, 256], antialias=True)
    data.setup()
    loader = data.test_dataloader()
    images = torch.cat([batch.image for batch in islice(loader, count)])
    return images[torch.arange(count) % len(images)]


def export(run: Run, folder: Path) -> dict[str, Any]:
    """Time the model in torch, export it to OpenVINO, and store the batches for timing it there."""
    model, data = build.model(run), datamodule(run)
    kept = torch.load(folder / "model.pt", weights_only=True)
    if isinstance(model, FlowDetector) and kept["size"] != build.image_size(model):  # the training images set it
        model.take_size((kept["size"][0], kept["size"][1]))
    model.model.load_state_dict(kept["state"])
    device = "cuda" if torch.cuda.is_available() and run.accelerator != "cpu" else "cpu"
    model.eval().to(device)
    row: dict[str, Any] = {}
    images = test_images(data, model, max(BATCHES))
    batches = {f"b{size}": images[:size] for size in BATCHES}
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    for name, batch in batches.items():
        on_device = batch.to(device)
        with torch.no_grad():
            timed = latency(lambda images=on_device: model(images), len(batch), synchronize)
        row |= {f"torch_{name}_{key}": value for key, value in timed.items()}
    if device == "cuda":
        row["inference_device_mb"] = torch.cuda.max_memory_allocated() / 1e6
    row["torch_peak_mb"] = peak_mb()
    write_json(folder / "export.json", row)  # stays if the export fails
    arrays: dict[str, Any] = {name: batch.numpy() for name, batch in batches.items()}
    np.savez(folder / "batches.npz", **arrays)
    start = time.perf_counter()
    xml, row["notes"] = export_openvino(model.cpu(), folder / "exported")
    row["export_s"] = time.perf_counter() - start
    row["file_mb"] = sum(path.stat().st_size for path in (xml, xml.with_suffix(".bin"))) / 1e6
    row["xml"] = str(xml)
    return row


def export_openvino(model: AnomalibModule, root: Path) -> tuple[Path, list[str]]:
    """Export for any number of images, or for one if a model does not support it; returns the file and notes."""
    import openvino as ov  # noqa: PLC0415 (an extra)

    options: dict[str, Any] = {"export_root": root, "input_size": build.image_size(model)}
    engine, notes = Engine(logger=False), []
    try:
        xml = engine.export(model, ExportType.OPENVINO, **options)
        is_for_any = xml is not None and ov.Core().read_model(xml).input(0).partial_shape[0].is_dynamic
    except OnnxExporterError:
        is_for_any = False
    # PatchCore's search branches on the batch size, which gives an error, or a model for the exporter's two images
    if not is_for_any:
        xml = engine.export(model, ExportType.OPENVINO, **options, onnx_kwargs={"dynamic_shapes": None})
        notes.append("exported for single images")
    assert xml is not None  # noqa: S101 (None is only for unknown formats)
    return xml, notes


def main() -> None:
    """Run a stage; the table shows the last line of an error."""
    stage, folder = sys.argv[1], Path(sys.argv[2])
    warnings.simplefilter("ignore")  # warnings of libraries, which would fill the log
    timing.end_with_parent()
    work = {"fit": fit, "export": export}[stage]
    write_json(folder / f"{stage}.json", work(Run.load(folder / "run.json"), folder))


if __name__ == "__main__":
    main()
