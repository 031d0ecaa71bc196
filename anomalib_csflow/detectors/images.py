"""Checks of the images on disk, before any long work begins."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from rich.progress import track

MANY = 500  # files whose check takes seconds, and so shows its progress


class UnreadableImageError(OSError):
    """An image file is missing, empty, truncated or not an image."""


def check_images(paths: Sequence[str | Path]) -> None:
    """Decode every image once, so that a broken one is found before the training and not in it.

    JPEGs are decoded at an eighth of their size, which reads the whole file all the same.

    Args:
        paths: of the images.

    Raises:
        UnreadableImageError: names the first file that cannot be read.
    """
    with ThreadPoolExecutor(max_workers=4) as pool:  # decoding releases the interpreter
        checks = pool.map(_check_image, paths)
        for _ in track(checks, "Checking images", len(paths), transient=True, disable=len(paths) < MANY):
            pass


def _check_image(path: str | Path) -> None:
    try:
        with Image.open(path) as image:
            image.draft("L", (1, 1))
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        msg = f"cannot read the image {path} ({error}): repair it or take it out of the folder"
        raise UnreadableImageError(msg) from error
