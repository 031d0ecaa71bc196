"""How images are pre-processed for the backbone, and checks of image files before any long work starts."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from anomalib.data import Folder
from anomalib.data.utils import TestSplitMode, ValSplitMode
from anomalib.pre_processing import PreProcessor
from PIL import Image
from rich.progress import track
from torch.utils.data import Dataset
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_csflow.features import weights

MANY = 500  # from this number of files on, the check takes seconds and shows its progress
WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "F")  # modes that anomalib's reader clips at 255


@dataclass(frozen=True)
class ImageOptions:
    """Those of a detector's arguments that define its backbone and the pre-processing of images for it.

    anomalib rebuilds a model from its checkpoint with the default pre-processor, which is made from these.

    Args:
        backbone: a timm model with its tag, or ``torchvision/NAME``.
        weights: the backbone's, see :func:`~anomalib_csflow.features.weights.create_backbone`.
        image_size: height and width in pixels to which images are resized, or one number for both.
        antialias: whether to resize with antialiasing.
    """

    backbone: str
    weights: str
    image_size: int | tuple[int, int]
    antialias: bool

    @property
    def size(self) -> list[int]:
        """Height and width in pixels."""
        return [self.image_size] * 2 if isinstance(self.image_size, int) else list(self.image_size)

    def pre_processor(self, size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to ``size`` (default: ``image_size``), and normalize with the backbone's mean and standard deviation.

        Raises:
            ValueError: on an unknown backbone, or a size that is not positive.
        """
        weights.check_backbone(self.backbone)
        pixels = list(size or self.size)
        if min(pixels) < 1:
            msg = f"image_size must be positive, got {pixels}"
            raise ValueError(msg)
        mean, std = weights.normalization(self.backbone)
        return PreProcessor(Compose([Resize(pixels, antialias=self.antialias), Normalize(mean, std)]))


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
            f"{needed} or more: add good images (thresholds that are worth having take 20), or name a folder of others "
            "to validate on as --data.normal_test_dir"
        )
        raise TooFewImagesError(msg)


class UnreadableImageError(OSError):
    """An image file is missing, empty, truncated, not an image, or would be read as blank."""


def image_files(dataset: Dataset[object] | None) -> Iterator[str]:
    """Image and mask files of an anomalib data set; files that are not still images are left out."""
    suffixes = Image.registered_extensions()
    samples = getattr(dataset, "samples", None)  # a table in data sets; PredictDataset has a list instead
    columns = [samples[name] for name in ("image_path", "mask_path") if name in samples] if samples is not None else []
    for files in (*columns, getattr(dataset, "image_filenames", ())):
        yield from (str(file) for file in files if Path(str(file)).suffix.lower() in suffixes)


def check_images(paths: Sequence[str | Path]) -> None:
    """Decode every image once, so that a broken one is found before the training starts.

    JPEGs are decoded at 1/8 of their size, which still reads the whole file.

    Args:
        paths: of the images.

    Raises:
        UnreadableImageError: names the first file that cannot be read.
    """
    with ThreadPoolExecutor(max_workers=4) as pool:  # decoding releases the interpreter lock
        checks = pool.map(_check_image, paths)
        for _ in track(checks, "Checking images", len(paths), transient=True, disable=len(paths) < MANY):
            pass


def _check_image(path: str | Path) -> None:
    try:
        with Image.open(path) as image:
            image.draft("L", (1, 1))
            image.load()
            brightest = image.getextrema()[1] if image.mode in WIDE_MODES else 0
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        msg = f"cannot read the image {path} ({error}): repair it or remove it from the folder"
        raise UnreadableImageError(msg) from error
    if isinstance(brightest, (int, float)) and brightest > 255:
        msg = (
            f"the image {path} has values up to {brightest:g}, and anomalib reads all values above 255 as white: "
            "scale it to 8 bits per channel"
        )
        raise UnreadableImageError(msg)
