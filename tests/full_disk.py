"""What happens on a disk that is full or read-only; ``test_disks.py`` runs it where it may mount one."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from anomalib.data import Folder
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from conftest import SMALL, folder_arguments
from lightning.pytorch.callbacks import ModelCheckpoint
from traced_once import trace_once

from anomalib_csflow import ConformalPostProcessor, CSFlow, FeatureCache, bundling
from anomalib_csflow.benchmark import __main__ as command_line
from anomalib_csflow.benchmark.rows import write_json
from anomalib_csflow.engine.recalibration import recalibrate
from anomalib_csflow.engine.visualizer import CalibratedVisualizer

torch.set_num_threads(1)
warnings.simplefilter("ignore")
fault, images, disk, elsewhere = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
saving = {"dirpath": disk / "saved", "filename": "model", "enable_version_counter": False, "every_n_train_steps": 3}


def detector() -> CSFlow:
    """Its pictures go to the disk."""
    pictures = CalibratedVisualizer(output_dir=disk / "images")
    post_processor = ConformalPostProcessor(num_folds=0)
    options: dict[str, Any] = {**SMALL, "image_size": 64}
    return CSFlow(**options, post_processor=post_processor, visualizer=pictures)


def fit(**options: Any) -> Engine:
    """Train for an epoch, with checkpoints on the disk."""
    engine = Engine(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=elsewhere,
        enable_progress_bar=False,
        callbacks=[ModelCheckpoint(**saving), FeatureCache(disk / options.get("cache", "cache"))],
    )
    engine.fit(detector(), datamodule=Folder(**folder_arguments(images)))
    return engine


def said(work: Callable[[], Any]) -> dict[str, Any]:
    """What was raised, warned of and returned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found, error = work(), ""
        except (Exception, SystemExit) as raised:  # whatever it is
            found, error = None, f"{type(raised).__name__}: {raised}"
    texts = [str(one.message) for one in caught if "written" in str(one.message) or "storing" in str(one.message)]
    return {"error": error, "warnings": texts, "found": found}


def contents() -> dict[str, bytes]:
    """All files of the disk, but for what fills it."""
    return {
        str(path.relative_to(disk)): path.read_bytes()
        for path in sorted(disk.rglob("*"))
        if path.is_file() and path.name not in {"filler", "lock"}
    }


def benchmark() -> None:
    """Run its command line as far as its first run."""
    entries = {"detectors": [{"class_path": "RealNVP", "epochs": 1}], "data": [str(elsewhere / "data/textures")]}
    (elsewhere / "benchmark.yaml").write_text(json.dumps(entries | {"seeds": [0], "accelerator": "cpu"}))
    sys.argv = ["benchmark", f"--config={elsewhere / 'benchmark.yaml'}", f"--out={disk / 'out'}"]
    command_line.main()


(elsewhere / "data/textures").mkdir(parents=True)
(elsewhere / "data/textures/train").symlink_to(images / "train")
(elsewhere / "data/textures/test").symlink_to(images / "test")
trace_once(elsewhere / "traced")
first = fit()
(disk / "out").mkdir()
write_json(disk / "out/results.json", {"rows": []})
checkpoint = disk / "saved/model.ckpt"
model = CSFlow.load_from_checkpoint(checkpoint)
for kind in (ExportType.TORCH, ExportType.OPENVINO):
    first.export(model, kind, export_root=disk)
bundling.bundle(checkpoint, disk / "bundle")

if fault == "full":
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (2**20, 2**12):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
else:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)  # noqa: S607 (of the system that runs the test)
before = contents()
engine = Engine(accelerator="cpu", default_root_dir=elsewhere, enable_progress_bar=False)
found = {
    "fit": said(lambda: fit() and None),
    "cache": said(lambda: fit(cache="another") and None),
    "torch": said(lambda: str(engine.export(model, ExportType.TORCH, export_root=disk))),
    "onnx": said(lambda: str(engine.export(model, ExportType.ONNX, export_root=disk))),
    "openvino": said(lambda: str(engine.export(model, ExportType.OPENVINO, export_root=disk))),
    "bundle": said(lambda: str(bundling.bundle(checkpoint, disk / "more"))),
    "zip": said(lambda: str(bundling.bundle(checkpoint, disk / "more.zip"))),
    "calibrate": said(lambda: str(recalibrate(CSFlow, checkpoint, images / "test/good", disk / "other.ckpt"))),
    "predict": said(
        lambda: [
            value
            for batch in engine.predict(detector(), data_path=images / "test/blob", ckpt_path=checkpoint)
            for value in batch.pred_score.tolist()
        ]
    ),
    "benchmark": said(benchmark),
}
after = contents()
found["changed"] = sorted(name for name in before | after if before.get(name) != after.get(name))
sys.stdout.write("\nfound " + json.dumps(found))
