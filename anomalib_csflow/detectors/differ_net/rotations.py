"""Images rotated about their centres, with torch operations that can be exported."""

import torch
from torch import Tensor


def fixed_angles(count: int) -> list[float]:
    """Evenly spaced angles in degrees, the first of them 0.

    Example:
        >>> fixed_angles(4)
        [0.0, 90.0, 180.0, 270.0]
    """
    return [360.0 * index / count for index in range(count)]


def rotate_each(images: Tensor, degrees: Tensor, fill: Tensor) -> Tensor:
    """Rotate each image by its own angle, counter-clockwise, with the nearest pixel.

    Args:
        images: ``(N, C, H, W)``.
        degrees: ``(N,)``.
        fill: ``(C,)``, the colour of pixels from outside the image.

    Returns:
        ``(N, C, H, W)``.
    """
    source, inside = _sources(degrees, *images.shape[2:])
    turned = images.flatten(2).gather(2, source[:, None].expand(-1, images.shape[1], -1))
    return torch.where(inside[:, None], turned, fill[:, None]).view_as(images)


def rotate_all(images: Tensor, degrees: Tensor, fill: Tensor) -> Tensor:
    """Rotate each image by every angle, counter-clockwise, with the nearest pixel.

    Args:
        images: ``(N, C, H, W)``.
        degrees: ``(V,)``.
        fill: ``(C,)``, the colour of pixels from outside the image.

    Returns:
        ``(N * V, C, H, W)``: the V views of the first image, then those of the second.

    Example:
        >>> image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
        >>> rotate_all(image, torch.tensor([0.0, 90.0]), torch.zeros(1))[1]
        tensor([[[2., 4.],
                 [1., 3.]]])
    """
    _, channels, height, width = images.shape
    source, inside = _sources(degrees, height, width)
    turned = images.flatten(2)[:, :, source.flatten()].unflatten(2, (len(degrees), height * width))
    turned = torch.where(inside, turned, fill[:, None, None])
    return turned.movedim(2, 1).reshape(-1, channels, height, width)


def _sources(degrees: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Source of each pixel, ``(V, H * W)`` as index into the flattened image, and whether it is inside the image."""
    x = torch.arange(width, device=degrees.device) - (width - 1) / 2
    y = (torch.arange(height, device=degrees.device) - (height - 1) / 2)[:, None]
    radians = torch.deg2rad(degrees)[:, None, None]
    cos, sin = radians.cos(), radians.sin()
    column = torch.round(x * cos - y * sin + (width - 1) / 2)
    row = torch.round(x * sin + y * cos + (height - 1) / 2)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    source = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    return source.flatten(1).long(), inside.flatten(1)
