"""A region of interest: the part of every image that is inspected."""

import base64
import binascii
import io
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.pre_processing import PreProcessor
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.tv_tensors import Image as ImageTensor
from torchvision.tv_tensors import TVTensor, wrap

HEAD = "data:image/png;base64,"
WHITE = 128  # the least grey that is inspected


class RegionError(ValueError):
    """The mask of a region cannot be read, or has no part that is inspected."""


def packed(region: str | PathLike[str]) -> str:
    """A mask as text, so that checkpoints contain it: a black and white PNG as a data URL.

    Args:
        region: file of an image whose white part is inspected, or what this function returned.

    Raises:
        RegionError: if it is not an image, or has no white part.
    """
    text = str(region)
    try:
        source = io.BytesIO(base64.b64decode(text[len(HEAD) :], validate=True)) if text.startswith(HEAD) else Path(text)
        with Image.open(source) as image:
            mask = image.convert("L").point(lambda grey: 255 * (grey >= WHITE)).convert("1")
    except (OSError, ValueError, binascii.Error, Image.DecompressionBombError) as error:
        what = "the region" if text.startswith(HEAD) else f"the region {text}"
        msg = f"{what} cannot be read ({error}): give the file of an image whose white part is to be inspected"
        raise RegionError(msg) from error
    if mask.getbbox() is None:
        msg = f"the region {text[:100]} has no white part, so that nothing would be inspected"
        raise RegionError(msg)
    file = io.BytesIO()
    mask.save(file, "PNG")
    return HEAD + base64.b64encode(file.getvalue()).decode()


class Region(v2.Transform):
    """Paint normalized images with the mean colour, 0, outside the region; nothing there can change a score.

    Args:
        region: mask, as :func:`packed` returns it.
        size: height and width of the images.
    """

    def __init__(self, region: str, size: tuple[int, int]) -> None:
        super().__init__()
        with Image.open(io.BytesIO(base64.b64decode(region[len(HEAD) :]))) as image:
            resized = image.resize(size[::-1], Image.Resampling.NEAREST)
        self.mask = torch.from_numpy(np.array(resized, dtype=np.float32))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Multiply an image ``(..., C, H, W)`` by the mask; anything else, such as a true mask, stays as it is."""
        del params
        if isinstance(inpt, TVTensor) and not isinstance(inpt, ImageTensor):
            return inpt
        found: Tensor = inpt * self.mask.to(device=inpt.device, dtype=inpt.dtype)
        return wrap(found, like=inpt) if isinstance(inpt, ImageTensor) else found


class RegionPreProcessor(PreProcessor):
    """anomalib's pre-processor, of which a checkpoint needs nothing: the detector's arguments make it again."""

    def checkpoint_config(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Keep what the arguments made."""
        del config
