"""A bundle's 8-bit model, and how much it changes the scores of good images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from anomalib.data.utils import get_image_filenames
from numpy.typing import NDArray

from anomalib_csflow.calibration import Scale
from anomalib_csflow.engine.quantization import CALIBRATION_IMAGES, quantized
from anomalib_csflow.runtime.detector import read
from anomalib_csflow.runtime.engines import planes

MAX_SHIFT = 0.25
"""Largest change that nine out of ten good images may have: of the value that decides the label, in units of the
distance from the median good image to the threshold."""
NUM_FIRST = (1, 12, 24)
"""Numbers of the backbone's first products to leave in float, in the order in which they are tried."""
LEAST_IMAGES = 10


def good_images(folder: str | Path | None) -> list[Path]:
    """At most :data:`~anomalib_csflow.engine.quantization.CALIBRATION_IMAGES` images of a folder, evenly chosen.

    Raises:
        ValueError: if there are too few.
    """
    files = [] if folder is None else get_image_filenames(folder)
    if len(files) < LEAST_IMAGES:
        msg = f"an 8-bit model needs {LEAST_IMAGES} good images or more, got {len(files)}: give --reference more"
        raise ValueError(msg)
    return files[:: -(-len(files) // CALIBRATION_IMAGES)]


def write_int8(model: Path, out: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Write the 8-bit model with the fewest products in float that keeps good images' scores.

    Every second good image measures the ranges of activations, the others measure the change.

    Args:
        model: in float, calibrated.
        out: for the 8-bit model.
        files: good images.

    Returns:
        The entry of ``bundle.json`` for this model.

    Raises:
        ValueError: if the scores change too much.
    """
    import openvino  # noqa: PLC0415 (optional)

    ranges, others = files[::2], files[1::2]
    core = openvino.Core()
    expected = _levels(core, core.read_model(model), others)
    shift = float("nan")
    for num_first in NUM_FIRST:
        made = quantized(core.read_model(model), ranges, _pixels, num_first)
        found = _levels(core, made, others)
        shift = float(np.quantile(np.abs(found - expected), 0.9))
        if shift <= MAX_SHIFT:
            openvino.save_model(made, out, compress_to_fp16=False)
            flips = int(((found > 0) != (expected > 0)).sum())
            return {
                "num_first": num_first,
                "shift": shift,
                "max_shift": MAX_SHIFT,
                "images": len(others),
                "flips": flips,
            }
    msg = (
        f"in 8 bits, a tenth of the good images move by {shift:.2f} or more of the distance from their median to the "
        f"threshold, and at most {MAX_SHIFT:g} is allowed: leave int8 out of --formats"
    )
    raise ValueError(msg)


def _pixels(file: Path) -> NDArray[np.float32]:
    return planes(read(file))


def _levels(core: Any, model: Any, files: Sequence[Path]) -> NDArray[np.float64]:
    """What decides each image's label, its score or its map's maximum: 0 at the threshold, about -1 if it is good."""
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    levels = []
    for file in files:
        outputs = compiled(_pixels(file))
        names = {name for output in compiled.outputs for name in output.names}
        levels.append(max(float(outputs[name].max()) for name in ("pred_score", "anomaly_map") if name in names))
    return Scale(0.0, 1.0).raw(levels)
