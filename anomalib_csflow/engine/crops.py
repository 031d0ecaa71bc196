"""Random crops of training features, so that a step on large images costs as much as one on small ones."""

from collections.abc import Sequence

import torch

from anomalib_csflow.flows.pyramid import Pyramid


def random_crops(pyramid: Pyramid, side: int, strides: Sequence[int]) -> Pyramid:
    """A random square of each sample, at the same place in all levels; it begins at a position of the coarsest level.

    Squares that would reach beyond the image are moved inside, so that a fit sees the image's edges about as often as
    its middle. With places drawn evenly, it would hardly see its corners, and find them unusual.

    Args:
        pyramid: maps ``(N, C_i, H_i, W_i)``, finest first.
        side: height and width of the square in pixels of the image; a side of the image that is shorter is not cropped.
        strides: pixels of the image per position, for each level.

    Returns:
        Maps ``(N, C_i, h_i, w_i)`` with ``h_i``, ``w_i`` of ``side / strides[i]`` or less.

    Example:
        >>> fine, coarse = random_crops((torch.zeros(2, 1, 16, 40), torch.zeros(2, 1, 8, 20)), 64, [8, 16])
        >>> fine.shape, coarse.shape
        (torch.Size([2, 1, 8, 8]), torch.Size([2, 1, 4, 4]))
    """
    ratios = [strides[-1] // stride for stride in strides]
    cells = max(side // strides[-1], 1)
    # sizes of maps may be rounded up: the coarsest map can then have positions that the finest does not cover
    whole = [min(level.shape[axis] // k for level, k in zip(pyramid, ratios, strict=True)) for axis in (2, 3)]
    if max(whole) <= cells:
        return pyramid
    crops: list[Pyramid] = []
    for sample in zip(*pyramid, strict=True):
        top, left = (max(0, min(int(torch.randint(1 - cells, number, ())), number - cells)) for number in whole)
        rows, columns = (cells if number > cells else None for number in whole)
        crops.append(
            tuple(
                level[:, _range(top, rows, k), _range(left, columns, k)]
                for level, k in zip(sample, ratios, strict=True)
            )
        )
    return tuple(torch.stack(levels) for levels in zip(*crops, strict=True))


def _range(start: int, cells: int | None, ratio: int) -> slice:
    return slice(None) if cells is None else slice(start * ratio, (start + cells) * ratio)
