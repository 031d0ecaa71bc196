"""The contents of a bundle's ``bundle.json`` and ``requirements.txt``."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import timm

from anomalib_csflow.engine.detector import FlowDetector
from anomalib_csflow.engine.good_images import GoodScale
from anomalib_csflow.engine.post_processing import ConformalPostProcessor
from anomalib_csflow.features import weights
from anomalib_csflow.runtime.bundle import FORMAT, VERSION, Format, sha256
from anomalib_csflow.runtime.engines import PACKAGES

TOLERANCE = 1e-3
"""Largest difference of a calibrated score or map that a runtime in float32 may have from torch's."""
ANTIALIASED = (
    "The detector was fitted with antialias=True, and exported models resize without antialiasing: for images larger "
    "than the model's input, the thresholds do not fit. Fit it with antialias=False, as the small recipes do"
)


def manifest(detector: FlowDetector, checkpoint: Path, models: Mapping[Format, str]) -> dict[str, Any]:
    """The contents of ``bundle.json``, without the reference and the list of files."""
    options, processor = detector.image_options, detector.post_processor
    is_conformal = isinstance(processor, ConformalPostProcessor)
    made = processor.made if isinstance(processor, ConformalPostProcessor) else None
    scales = (processor.score_scale, processor.map_scale) if isinstance(processor, ConformalPostProcessor) else ()
    score, of_map = (_scale(scale) for scale in scales) if is_conformal else (None, None)
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
            "licence": licence(options.backbone, options.weights),
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


def licence(backbone: str, source: str) -> str:
    """Licence of the backbone's weights, as far as it is known; those of one architecture differ."""
    if source in {"hub", "package"} and timm.is_model(backbone):
        configured = timm.models.get_pretrained_cfg(backbone)
        found = getattr(configured, "license", None)
        if found:
            return str(found)
    return "unknown"


def requirements(formats: Sequence[Format]) -> str:
    """What the line needs beside ``pip install --no-deps anomalib-csflow``."""
    lines = ["numpy>=1.26.4", "Pillow"]
    for name in [name for name in PACKAGES if name in formats]:
        with contextlib.suppress(PackageNotFoundError):
            lines.append(f"{PACKAGES[name]}>={version(PACKAGES[name])}")
    return "\n".join(lines) + "\n"
