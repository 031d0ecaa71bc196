"""A bundle's detector: an image to its verdict."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from anomalib_csflow.calibration import Kind, joint_thresholds

from .boxes import Box, boxes
from .bundle import Bundle, BundleError
from .engines import Outputs, Precision, Runtime, open_engine

AnyImage = str | Path | Image.Image | NDArray[np.uint8]
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Of image files: those that anomalib reads."""
WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "F")
"""Pillow's modes of more than 8 bits, which ``convert`` and anomalib's reader clip at 255."""


def images_in(folder: Path, without: Path | None = None) -> Iterator[Path]:
    """Files with an image's suffix in a folder and its subfolders; links to folders are not followed, as in anomalib.

    Args:
        folder: where to look.
        without: one of its subfolders, where not to.
    """
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(path, name) != without]
        yield from (Path(path, name) for name in names if Path(name).suffix.lower() in SUFFIXES)


class ImageError(ValueError):
    """An image cannot be read, or is none of 8 bits per channel."""


@dataclass(frozen=True)
class Result:
    """The verdict on an image.

    Attributes:
        score: calibrated, within (0, 1); 0.5 is the threshold.
        p_value: share of good images that look as unusual; None without a calibration.
        label: whether the image is anomalous; None without a calibration.
        anomaly_map: calibrated, ``(h, w)`` at the model's resolution; None if the detector has no map.
        mask: where the map is above its threshold, ``(h, w)``; None without a map or a calibration.
        boxes: around the mask's regions, in pixels of the image.
        size: height and width of the image.
    """

    score: float
    p_value: float | None
    label: bool | None
    anomaly_map: NDArray[np.float32] | None
    mask: NDArray[np.bool_] | None
    boxes: list[Box]
    size: tuple[int, int]


class Detector:
    """Judges images with a bundle's model.

    Args:
        path: the bundle, a folder or a zip file; or one that is open.
        runtime: ``openvino`` or ``onnx``; the first that is installed if None.
        precision: of OpenVINO: ``f32`` for the detector's own scores; for speed ``bf16`` where the processor has it,
            or ``int8`` if the bundle has an 8-bit model.
        num_threads: of the processor; the runtime's own choice if None.
        false_alarm_rate: another rate than the one that the bundle was made with: the thresholds move, and
            ``promise`` says what they promise.

    Attributes:
        bundle: verified.
        precision: of the runtime.
        promise: in a sentence, or None without a calibration.

    Raises:
        FileNotFoundError: if there is no bundle.
        BundleError: if it is damaged, no runtime fits, or a rate is asked for that has no calibration behind it.
    """

    def __init__(
        self,
        path: str | Path | Bundle,
        runtime: Runtime | None = None,
        precision: Precision = "f32",
        num_threads: int | None = None,
        false_alarm_rate: float | None = None,
    ) -> None:
        self.bundle = path if isinstance(path, Bundle) else Bundle(path)
        self.precision = precision
        self.engine = open_engine(self.bundle, runtime, precision, num_threads)
        self.score_scale, self.map_scale = self.bundle.scale("score"), self.bundle.scale("map")
        self.promise: str | None = self.bundle.manifest["calibration"]["sentence"]
        self._moved: tuple[float, float] | None = None
        if false_alarm_rate is not None:
            self._move(false_alarm_rate)

    def __call__(self, image: AnyImage) -> Result:
        """Judge an image: a file, a PIL image, or an array ``(H, W, 3)`` or ``(H, W)`` of 8-bit values.

        Raises:
            ImageError: if it cannot be read.
        """
        pixels = read(image)
        return self.judge(self.engine(pixels), pixels.shape[1:3])

    def stream(self, images: Iterable[AnyImage]) -> Iterator[Result]:
        """Judge many images in their order, several at once: the most images per second."""
        sizes: list[tuple[int, ...]] = []

        def batches() -> Iterator[NDArray[np.uint8]]:
            for image in images:
                pixels = read(image)
                sizes.append(pixels.shape[1:3])
                yield pixels

        for outputs in self.engine.stream(batches()):
            yield self.judge(outputs, sizes.pop(0))

    def judge(self, outputs: Outputs, size: tuple[int, ...]) -> Result:
        """The verdict that a model's outputs for one image of this size are."""
        score = float(np.ravel(outputs["pred_score"])[0])
        found = outputs.get("anomaly_map")
        anomaly_map = None if found is None else np.asarray(found, np.float32).reshape(found.shape[-2:])
        label, mask = self._label(outputs), None
        if "pred_mask" in outputs:
            mask = np.asarray(outputs["pred_mask"]).reshape(outputs["pred_mask"].shape[-2:]).astype(bool)
        if self._moved is not None:
            mask = None if anomaly_map is None or self.map_scale is None else anomaly_map > self._moved[1]
            label = score > self._moved[0] or bool(mask is not None and mask.any())
        p_value = None if self.score_scale is None else self.score_scale.p_value(score)
        whole = (size[0], size[1])
        return Result(score, p_value, label, anomaly_map, mask, [] if mask is None else boxes(mask, whole), whole)

    @staticmethod
    def _label(outputs: Outputs) -> bool | None:
        return bool(np.ravel(outputs["pred_label"])[0]) if "pred_label" in outputs else None

    def _move(self, rate: float) -> None:
        """Take thresholds for another rate from the good images that the bundle was calibrated on."""
        if self.score_scale is None:
            msg = "this bundle was never calibrated, so no false-alarm rate can be chosen: calibrate its model first"
            raise BundleError(msg)
        kind: Kind = self.bundle.manifest["calibration"]["promise"]["kind"]
        maxima = None if self.map_scale is None else self.map_scale.good
        found = joint_thresholds(self.score_scale.good, maxima, rate, kind)
        score = float(self.score_scale.scale.calibrated([found.score.threshold])[0])
        is_mapped = self.map_scale is not None and found.map is not None
        of_map = float(self.map_scale.scale.calibrated([found.map.threshold])[0]) if is_mapped else 1.0  # type: ignore[union-attr]
        self._moved = score, of_map
        self.promise = str(found.promise)


def read(image: AnyImage) -> NDArray[np.uint8]:
    """Pixels ``(1, H, W, 3)``, RGB, of an image of 8 bits per channel.

    Raises:
        ImageError: if it cannot be read, or has more bits.
    """
    if isinstance(image, np.ndarray):
        is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
        if image.dtype != np.uint8 or not is_image or not image.size:
            msg = f"an array must be (H, W) or (H, W, 3) of uint8, and not empty, got {image.shape} of {image.dtype}"
            raise ImageError(msg)
        array = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    else:
        array = np.asarray(_opened(image))
    return np.ascontiguousarray(array)[None]


def _opened(image: str | Path | Image.Image) -> Image.Image:
    if not isinstance(image, (str, Path, Image.Image)):
        msg = f"an image is a file, a PIL image or an array, got {type(image).__name__}"
        raise ImageError(msg)
    name = "the image" if isinstance(image, Image.Image) else f"the image {image}"
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(image)
        opened.load()
    except FileNotFoundError as error:
        msg = f"there is no image {image}"
        raise ImageError(msg) from error
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        msg = f"{name} cannot be read ({error})"
        raise ImageError(msg) from error
    if opened.mode in WIDE_MODES:
        msg = f"{name} has more than 8 bits per channel ({opened.mode}): scale it to 8 bits, as for training"
        raise ImageError(msg)
    return opened.convert("RGB")
