"""How images are pre-processed for the backbone, and checks of image files before any long work starts."""

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from itertools import count, islice, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from anomalib.data import AnomalibDataModule, Folder
from anomalib.data.utils import TestSplitMode, ValSplitMode
from anomalib.pre_processing import PreProcessor
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from torch.utils.data import Dataset
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_csflow.features import weights
from anomalib_csflow.runtime.detector import WIDE_MODES

from .region import Region, RegionPreProcessor, packed

KeepAspect = bool | Literal["auto"]
"""Whether one number for the image size becomes two when a fit begins, from the training images' aspect ratio:

- ``False``: it is height and width;
- ``True``: it is the shorter side;
- ``auto``: height and width, or, for images at least 1.5 times as long as wide, the side of a square with about as many
  pixels, so that steps and predictions take no longer.
"""
LONG = 1.5
"""From this aspect ratio on, ``auto`` keeps it."""
MANY = 500  # from this number of files on, the check takes seconds and shows its progress


@dataclass(frozen=True)
class ImageOptions:
    """Those of a detector's arguments that define its backbone and the pre-processing of images for it.

    anomalib rebuilds a model from its checkpoint with the default pre-processor, which is made from these.

    Args:
        backbone: a timm model with its tag, or ``torchvision/NAME``.
        weights: the backbone's, see :func:`~anomalib_csflow.features.weights.create_backbone`.
        image_size: height and width in pixels to which images are resized, or one number for both.
        antialias: whether to resize with antialiasing.
        keep_aspect: what one number for ``image_size`` becomes when a fit begins, see
            :data:`anomalib_csflow.engine.images.KeepAspect`.
        region: mask of the part of the images that is inspected: a file, which becomes text that checkpoints contain.
    """

    backbone: str
    weights: str
    image_size: int | tuple[int, int]
    antialias: bool
    keep_aspect: KeepAspect = False
    region: str | None = None

    def __post_init__(self) -> None:
        """Read the region's file now, since a checkpoint may be loaded where there is no such file."""
        if self.region is not None:
            object.__setattr__(self, "region", packed(self.region))

    @property
    def is_open(self) -> bool:
        """Whether the training images decide the size."""
        return bool(self.keep_aspect) and isinstance(self.image_size, int)

    @property
    def size(self) -> list[int]:
        """Height and width in pixels."""
        return [self.image_size] * 2 if isinstance(self.image_size, int) else list(self.image_size)

    def pre_processor(self, size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to ``size`` (default: ``image_size``), normalize as for the backbone, and paint all but the region.

        Raises:
            ValueError: on an unknown backbone, or a size that is not positive.
        """
        weights.check_backbone(self.backbone)
        pixels = list(size or self.size)
        if min(pixels) < 1:
            msg = f"image_size must be positive, got {pixels}"
            raise ValueError(msg)
        mean, std = weights.normalization(self.backbone)
        steps = [Resize(pixels, antialias=self.antialias), Normalize(mean, std)]
        if self.region is None:
            return PreProcessor(Compose(steps))
        return RegionPreProcessor(Compose([*steps, Region(self.region, (pixels[0], pixels[1]))]))


def size_like(files: Iterable[str], shorter: int, multiple: int) -> tuple[int, int]:
    """Height and width with the images' median aspect ratio, rounded to multiples.

    Args:
        files: of images; the first hundred are looked at.
        shorter: pixels of the shorter side.
        multiple: of pixels.

    Raises:
        UnreadableImageError: if one of them is not an image.
    """
    ratio = _median_aspect(files)
    sides = (shorter * max(ratio, 1), shorter * max(1 / ratio, 1))
    height, width = (max(round(side / multiple), 1) * multiple for side in sides)
    return height, width


def as_large_as_square(files: Iterable[str], side: int, multiple: int) -> tuple[int, int]:
    """Height and width with about as many pixels as a square, and the aspect ratio of long images.

    Args:
        files: of images; the first hundred are looked at.
        side: of the square, in pixels; the result if the images' median aspect ratio is below :data:`LONG`.
        multiple: of pixels, for both sides. Of the multiples around them, those nearest to the aspect ratio are taken.

    Raises:
        UnreadableImageError: if one of them is not an image.
    """
    ratio = _median_aspect(files)
    if max(ratio, 1 / ratio) < LONG:
        return side, side
    exact = (side * ratio**0.5 / multiple, side * ratio**-0.5 / multiple)
    around = ({max(math.floor(count), 1) * multiple, math.ceil(count) * multiple} for count in exact)
    return min(product(*around), key=lambda size: abs(math.log(size[0] / size[1] / ratio)))


def _median_aspect(files: Iterable[str]) -> float:
    ratios = [_aspect(file) for file in islice(files, 100)]
    return float(np.median(ratios)) if ratios else 1.0


def _aspect(file: str) -> float:
    try:
        with Image.open(file) as image:
            return image.height / image.width
    except OSError as error:
        msg = f"{file} is not an image that can be read: repair or remove it"
        raise UnreadableImageError(msg) from error


def training_files(datamodule: object) -> Iterator[str]:
    """Files of the training images of one of anomalib's datamodules, before or after its ``setup``.

    Raises:
        ValueError: if it is not one of anomalib's.
    """
    if not isinstance(datamodule, AnomalibDataModule):
        msg = "keep_aspect=True needs one of anomalib's datamodules: give image_size as height and width instead"
        raise ValueError(msg)
    listed = copy(datamodule)
    if not hasattr(listed, "train_data"):
        listed._setup()  # lists the files, and divides nothing
    return image_files(listed.train_data)


class TooFewImagesError(ValueError):
    """There are fewer good images than anomalib can divide into those to train, validate and test on."""


def check_number(datamodule: object) -> None:
    """Check that a folder's good images can be divided as its datamodule wants, before it tries to.

    Args:
        datamodule: any; only anomalib's ``Folder`` is checked, before its ``setup``.

    Raises:
        TooFewImagesError: says how many there are, and how many are needed.
    """
    if not isinstance(datamodule, Folder) or hasattr(datamodule, "train_data"):
        return
    listed = copy(datamodule)
    listed._setup()  # lists the files, and divides nothing
    ratio, number = datamodule.test_split_ratio, len(listed.train_data)
    takes_from_train = not listed.test_data.has_normal and datamodule.test_split_mode != TestSplitMode.NONE
    needs_test = datamodule.val_split_mode == ValSplitMode.FROM_TEST and not len(listed.test_data)
    needs_test |= datamodule.test_split_mode == TestSplitMode.SYNTHETIC
    if takes_from_train and needs_test and not int(number * ratio):
        needed = next(n for n in count(number + 1) if int(n * ratio))
        where = Path(listed.train_data.samples.image_path[0]).parent
        msg = (
            f"there {'is' if number == 1 else 'are'} {number} good image{'' if number == 1 else 's'} in "
            f"{where}, and anomalib keeps {ratio:.0%} of them for validation and test, which takes "
            f"{needed} or more: add good images (useful thresholds need 20), or name a folder of others "
            "to validate on as --data.normal_test_dir"
        )
        raise TooFewImagesError(msg)


class UnreadableImageError(OSError):
    """An image file is missing, empty, truncated, not an image, or would be read as blank."""


def image_files(dataset: Dataset[object] | None) -> Iterator[str]:
    """Image files of an anomalib data set; files that are not still images are left out."""
    return _files(dataset, "image_path")


def good_files(dataset: Dataset[object] | None) -> Iterator[str]:
    """Files of the good images of an anomalib data set; of all its images if it has no labels."""
    samples = getattr(dataset, "samples", None)
    labels = samples["label_index"] if samples is not None and "label_index" in samples else None
    good = image_files(dataset) if labels is None else samples["image_path"][labels == 0]  # type: ignore[index]
    return (str(file) for file in good)


def mask_files(dataset: Dataset[object] | None) -> Iterator[str]:
    """Mask files of an anomalib data set."""
    return _files(dataset, "mask_path")


def _files(dataset: Dataset[object] | None, column: str) -> Iterator[str]:
    suffixes = Image.registered_extensions()
    samples = getattr(dataset, "samples", None)  # a table in data sets; PredictDataset has a list instead
    files = samples[column] if samples is not None and column in samples else ()
    if column == "image_path":
        files = [*files, *getattr(dataset, "image_filenames", ())]
    return (str(file) for file in files if Path(str(file)).suffix.lower() in suffixes)


def check_images(paths: Sequence[str | Path], masks: Sequence[str | Path] = ()) -> None:
    """Decode every image once, so that a broken one is found before the training starts.

    JPEGs are decoded at 1/8 of their size, which still reads the whole file.

    Args:
        paths: of the images.
        masks: of the masks, of which anomalib takes all that is not 0 as defective.

    Raises:
        UnreadableImageError: names the first file that cannot be read.
    """
    checked = [(path, False) for path in paths] + [(path, True) for path in masks]
    with ThreadPoolExecutor(max_workers=4) as pool:  # decoding releases the interpreter
        checks = pool.map(_check_image, *zip(*checked, strict=True)) if checked else ()
        for _ in track(checks, "Checking images", len(checked), transient=True, disable=len(checked) < MANY):
            pass


def check_variety(paths: Sequence[str | Path]) -> None:
    """Check that training images differ; if the first two differ, no more are decoded.

    Raises:
        UnreadableImageError: if all have the same pixels, or if there is only one image and it has one colour.
    """
    first = None
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        if first is not None and not np.array_equal(first, pixels):
            return
        first = pixels
    if first is not None and (len(paths) > 1 or (first == first[0, 0]).all()):
        what = f"all {len(paths)} training images have the same pixels" if len(paths) > 1 else "it has only one colour"
        msg = f"the training image {paths[0]} has nothing to learn from: {what}; are they the right files?"
        raise UnreadableImageError(msg)


def _check_image(path: str | Path, is_mask: bool) -> None:
    try:
        with Image.open(path) as image:
            image.draft("L", (1, 1))
            image.load()
            wrong = _misread(np.asarray(image), is_mask=is_mask) if image.mode in WIDE_MODES else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        msg = f"cannot read the image {path} ({error}): repair it or remove it from the folder"
        raise UnreadableImageError(msg) from error
    if wrong:
        msg = f"the {'mask' if is_mask else 'image'} {path} has {wrong}: scale it to 8 bits per channel"
        raise UnreadableImageError(msg)


def _misread(values: NDArray[Any], *, is_mask: bool) -> str | None:
    """What anomalib's reader would make of values that are not of 8 bits: it cuts them to whole numbers in [0, 255]."""
    if not np.isfinite(values).all():
        return "values that are not finite, which have no grey"
    low, high = values.min(), values.max()
    if low < 0:
        return f"values down to {low:g}, and anomalib reads all below 0 as black"
    if is_mask:
        return "values between 0 and 1, which anomalib reads as 0" if ((values > 0) & (values < 1)).any() else None
    if high > 255:
        return f"values up to {high:g}, and anomalib reads all above 255 as white"
    if values.dtype.kind == "f" and 0 < high <= 1:
        return "values in [0, 1] only, which anomalib reads as black"
    return None
