"""From a checkpoint to a bundle for the line; :mod:`anomalib_csflow.runtime` reads it."""

import contextlib
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from anomalib.data.utils import get_image_filenames, read_image
from numpy.typing import NDArray
from PIL import Image

import anomalib_csflow
from anomalib_csflow.engine.checkpoints import model_of
from anomalib_csflow.engine.detector import FlowDetector
from anomalib_csflow.engine.good_images import GoodScale
from anomalib_csflow.engine.post_processing import ConformalPostProcessor
from anomalib_csflow.engine.whole_files import partial_folder, whole_file
from anomalib_csflow.features import weights
from anomalib_csflow.runtime.bundle import FORMAT, MANIFEST, VERSION, sha256
from anomalib_csflow.runtime.engines import PACKAGES

Format = Literal["openvino", "onnx"]
FORMATS: tuple[Format, ...] = ("openvino", "onnx")
TOLERANCE = 1e-3
"""Largest difference of a calibrated score or map that a runtime in float32 may have from torch's."""
NUM_REFERENCE = 4
ANTIALIASED = (
    "The detector was fitted with antialias=True, and exported models resize without antialiasing: for images larger "
    "than the model's input, the thresholds do not fit. Fit it with antialias=False, as the small recipes do"
)
OUTPUTS = "reference/outputs.npz"
MODEL_INFO = {
    "model_type": "AnomalyDetection",
    "task": "segmentation",
    "labels": "Good Anomaly",
    "reverse_input_channels": "False",  # RGB, as it reads images
    "image_threshold": "0.5",
    "pixel_threshold": "0.5",
    "normalization_scale": "1",
}


def load_detector(checkpoint: str | Path) -> FlowDetector:
    """The detector of a checkpoint, of whichever class it is.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is not a checkpoint of this package.
    """
    name = model_of(checkpoint)["class_path"].rpartition(".")[2]
    detector: FlowDetector = getattr(anomalib_csflow, name).load_from_checkpoint(checkpoint, map_location="cpu")
    return detector.eval()


def bundle(
    checkpoint: str | Path,
    out: str | Path,
    reference: str | Path | None = None,
    formats: Sequence[Format] = ("openvino",),
) -> Path:
    """Make a bundle of a checkpoint's detector.

    Args:
        checkpoint: the .ckpt file of a fit.
        out: a folder that does not exist yet, or a .zip file.
        reference: a folder of a few good images, which go into the bundle with the outputs that are expected for
            them; without it, two test patterns do.
        formats: models to include.

    Returns:
        The folder, or the zip file.

    Raises:
        FileExistsError: if there is something at ``out``.
        FileNotFoundError: if there is no checkpoint or no reference folder.
        CheckpointError: if it is not a checkpoint of this package.
        ValueError: for an unknown format or a folder without images.
        OSError: if it cannot be written; in a sentence.
    """
    out = Path(out)
    if out.exists():
        msg = f"{out} exists already: choose another --out, or delete it"
        raise FileExistsError(msg)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        msg = f"unknown format {unknown[0]!r}: choose from {', '.join(FORMATS)}" if unknown else "give a format"
        raise ValueError(msg)
    detector = load_detector(checkpoint)
    images = _reference_images(detector, reference)
    with partial_folder("the bundle", out) as temporary:
        folder = temporary / "bundle"
        (folder / "reference").mkdir(parents=True)
        models = {name: _export(detector, name, folder) for name in formats}
        names = []
        for index, image in enumerate(images):
            names.append(f"reference/{index}.png")
            Image.fromarray(image).save(folder / names[-1])
        np.savez(folder / OUTPUTS, **_expected(detector, [folder / name for name in names]))  # type: ignore[arg-type]
        (folder / "requirements.txt").write_text(_requirements(formats))
        manifest = _manifest(detector, Path(checkpoint), models)
        kind = "good images" if reference else "test patterns"
        manifest["reference"] = {"images": names, "outputs": OUTPUTS, "kind": kind, "made_by": "torch, float32"}
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        manifest["files"] = {
            path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
            for path in files
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if out.suffix == ".zip":
            _zip(folder, out)
        else:
            folder.rename(out)
    return out


def _export(detector: FlowDetector, name: Format, folder: Path) -> str:
    """Export into the folder; returns the model's file."""
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
        export = detector.to_openvino if name == "openvino" else detector.to_onnx
        path = Path(export(root))
        found = {".xml": "model.xml", ".bin": "model.bin", ".onnx": "model.onnx", ".data": "model.onnx.data"}
        for file in path.parent.iterdir():
            if file.suffix in found and (name == "onnx") == (".onnx" in file.name):
                shutil.copy(file, folder / found[file.suffix])
    if name == "openvino":
        _describe(folder / found[path.suffix])
    return found[path.suffix]


def _describe(path: Path) -> None:
    """Write into an OpenVINO model what ``openvino-model-api`` reads: it takes label and mask from the graph."""
    import openvino  # noqa: PLC0415 (optional)

    model = openvino.Core().read_model(path)
    for key, value in MODEL_INFO.items():
        model.set_rt_info(value, ["model_info", key])
    described = path.with_name(f"described_{path.name}")
    openvino.save_model(model, described, compress_to_fp16=False)
    del model  # which has the old weights open
    described.replace(path)
    described.with_suffix(".bin").replace(path.with_suffix(".bin"))


def _reference_images(detector: FlowDetector, reference: str | Path | None) -> list[NDArray[np.uint8]]:
    """Good images as 8-bit RGB, or two test patterns: stripes and noise."""
    if reference is not None:
        files = get_image_filenames(reference)[:NUM_REFERENCE]
        return [np.asarray(Image.open(file).convert("RGB")) for file in files]
    height, width = detector.image_options.size
    stripes = (127 + 100 * np.sin(np.arange(width) / 9)).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return [np.broadcast_to(stripes[None, :, None], (height, width, 3)).copy(), noise]


@torch.no_grad()
def _expected(detector: FlowDetector, files: Sequence[Path]) -> dict[str, NDArray[Any]]:
    """Torch's outputs for the reference images, by name."""
    found: dict[str, list[NDArray[Any]]] = {}
    for file in files:
        predictions = detector(read_image(file, as_tensor=True)[None])
        for name in ("pred_score", "pred_label", "anomaly_map", "pred_mask"):
            value = getattr(predictions, name)
            if value is not None:
                found.setdefault(name, []).append(value.cpu().numpy().squeeze())
    return {name: np.stack(values) for name, values in found.items()}


def _manifest(detector: FlowDetector, checkpoint: Path, models: dict[Format, str]) -> dict[str, Any]:
    """Everything but the reference and the list of files."""
    options, processor = detector.image_options, detector.post_processor
    is_conformal = isinstance(processor, ConformalPostProcessor)
    made = processor.made if isinstance(processor, ConformalPostProcessor) else None
    scales = (processor.score_scale, processor.map_scale) if isinstance(processor, ConformalPostProcessor) else ()
    score, of_map = (_scale(scale) for scale in scales) if is_conformal else (None, None)
    architecture = options.backbone.partition(".")[0]
    return {
        "format": FORMAT,
        "version": VERSION,
        "made_with": _versions(),
        "detector": {"class": type(detector).__name__, "arguments": dict(detector.hparams)},
        "checkpoint_sha256": sha256(checkpoint),
        "backbone": {
            "name": options.backbone,
            "weights": options.weights,
            "sha256": weights.fingerprint(detector.model.features.backbone),
            "licence": _licence(architecture, options.weights),
        },
        "input": {
            "layout": "NCHW",
            "colour": "RGB",
            "dtype": "float32",
            "range": [0, 1],
            "size": "any",
            "resized_to": options.size,
            "resize": "bilinear, without antialiasing, inside the model",
        },
        "calibration": {
            "threshold": 0.5,
            "promise": None if made is None else asdict(made),
            "sentence": None if made is None else str(made),
            "score": score,
            "map": of_map,
        },
        "models": dict(models),
        "tolerance": TOLERANCE,
        "notes": [ANTIALIASED] if options.antialias else [],
    }


def _scale(scale: GoodScale) -> dict[str, Any] | None:
    """A calibrated scale as plain numbers."""
    if not scale.is_calibrated:
        return None
    good = [float(value) for value in scale.good.sort().values]
    return {"threshold": float(scale.threshold), "width": float(scale.width), "good": good}


def _versions() -> dict[str, str]:
    found = {}
    for package in ("anomalib-csflow", "anomalib", "torch", "timm", "openvino", "onnx"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _licence(architecture: str, source: str) -> str:
    """Licence of the backbone's weights, as far as it is known."""
    if source in {"hub", "package"} and timm.is_model(architecture):
        configured = timm.models.get_pretrained_cfg(architecture)
        found = getattr(configured, "license", None)
        if found:
            return str(found)
    return "unknown"


def _requirements(formats: Sequence[Format]) -> str:
    """What the line needs beside ``pip install --no-deps anomalib-csflow``."""
    lines = ["numpy>=1.26.4", "Pillow"]
    for name in formats:
        with contextlib.suppress(PackageNotFoundError):
            lines.append(f"{PACKAGES[name]}>={version(PACKAGES[name])}")
    return "\n".join(lines) + "\n"


def _zip(folder: Path, out: Path) -> None:
    with whole_file("the bundle", out) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder).as_posix())
