"""From a checkpoint to a bundle for the line; :mod:`anomalib_csflow.runtime` reads it."""

import contextlib
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data.utils import get_image_filenames, read_image
from anomalib.post_processing import PostProcessor
from numpy.typing import NDArray
from PIL import Image

import anomalib_csflow
from anomalib_csflow.engine.checkpoint_files import CHECKPOINT_KEY
from anomalib_csflow.engine.checkpoints import LeanCheckpoints, read_checkpoint
from anomalib_csflow.engine.detector import FlowDetector
from anomalib_csflow.engine.images import check_images
from anomalib_csflow.engine.whole_files import partial_folder, whole_file
from anomalib_csflow.runtime.bundle import DIGEST, FORMATS, MANIFEST, Format, digest, sha256

from .int8 import good_images, write_int8
from .manifest import manifest, requirements

NUM_REFERENCE = 4
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
    """The detector of a checkpoint, whatever its class.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is not a checkpoint of this package.
    """
    detector = getattr(anomalib_csflow, read_checkpoint(checkpoint)[CHECKPOINT_KEY]["detector"])
    loaded: FlowDetector = super(LeanCheckpoints, detector).load_from_checkpoint(checkpoint, map_location="cpu")
    return loaded.eval()  # LeanCheckpoints' own loading would check the file once more


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
        formats: models to include; ``int8`` is OpenVINO's in 8 bits, made from all images of ``reference``.

    Returns:
        The folder, or the zip file.

    Raises:
        FileExistsError: if there is something at ``out``.
        FileNotFoundError: if there is no checkpoint or no reference folder.
        CheckpointError: if it is not a checkpoint of this package.
        ValueError: for an unknown format, a folder without images, a post-processor that does not normalize, or an
            8-bit model that loses too much.
        UnreadableImageError: names the first reference image that cannot be read.
        OSError: if the bundle cannot be written.
    """
    out = Path(out)
    if out.exists():
        msg = f"{out} exists already: choose another --out, or delete it"
        raise FileExistsError(msg)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        msg = f"unknown format {unknown[0]!r}: choose from {', '.join(FORMATS)}" if unknown else "give a format"
        raise ValueError(msg)
    if reference is not None and not Path(reference).exists():
        msg = f"there is no folder {reference}: give one with good images as reference"
        raise FileNotFoundError(msg)
    if "int8" in formats:
        formats = [name for name in FORMATS if name in {*formats, "openvino"}]  # the 8-bit model is made from it
    good = good_images(reference) if "int8" in formats else []
    if reference is not None:
        check_images(good or _reference_files(reference))
    detector = load_detector(checkpoint)
    if isinstance(detector.post_processor, PostProcessor) and not detector.post_processor.enable_normalization:
        msg = "a bundle needs calibrated scores: fit again without enable_normalization=False in the post-processor"
        raise ValueError(msg)
    images = _reference_images(detector, reference)
    with partial_folder("the bundle", out) as temporary:
        folder = temporary / "bundle"
        (folder / "reference").mkdir(parents=True)
        models: dict[Format, str] = {name: _export(detector, name, folder) for name in formats if name != "int8"}
        names = []
        for index, image in enumerate(images):
            names.append(f"reference/{index}.png")
            Image.fromarray(image).save(folder / names[-1])
        np.savez(folder / OUTPUTS, **_expected(detector, [folder / name for name in names]))  # type: ignore[arg-type]
        (folder / "requirements.txt").write_text(requirements(formats))
        extra = {}
        if "int8" in formats:
            with contextlib.redirect_stdout(io.StringIO()):  # NNCF's progress
                extra["int8"] = write_int8(folder / "model.xml", folder / "model_int8.xml", good)
            models["int8"] = "model_int8.xml"
        described = manifest(detector, Path(checkpoint), models) | extra
        kind = "good images" if reference else "test patterns"
        described["reference"] = {"images": names, "outputs": OUTPUTS, "kind": kind, "made_by": "torch, float32"}
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        described["files"] = {
            path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
            for path in files
        }
        described[DIGEST] = digest(described)
        (folder / MANIFEST).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
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
    del model  # it has the old weights file open
    described.replace(path)
    described.with_suffix(".bin").replace(path.with_suffix(".bin"))


def _reference_files(reference: str | Path) -> list[Path]:
    return [Path(file) for file in get_image_filenames(reference)[:NUM_REFERENCE]]


def _reference_images(detector: FlowDetector, reference: str | Path | None) -> list[NDArray[np.uint8]]:
    """Good images as 8-bit RGB, or two test patterns: stripes and noise."""
    if reference is not None:
        return [np.asarray(Image.open(file).convert("RGB")) for file in _reference_files(reference)]
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


def _zip(folder: Path, out: Path) -> None:
    with whole_file("the bundle", out) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder).as_posix())
