"""Boxes around the defects of a mask: one for each connected region."""

from collections.abc import Iterator
from itertools import count

import numpy as np
from numpy.typing import NDArray

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels; right and bottom are the first pixels outside."""


def boxes(mask: NDArray[np.bool_], size: tuple[int, int] | None = None) -> list[Box]:
    """Boxes of the 8-connected regions of a mask, from top to bottom.

    Args:
        mask: ``(H, W)``.
        size: height and width of the image, if the boxes should be in its pixels and not in the mask's.

    Example:
        >>> mask = np.zeros((4, 6), bool); mask[0, :2] = mask[2:, 4:] = True
        >>> boxes(mask)
        [(0, 0, 2, 1), (4, 2, 6, 4)]
        >>> boxes(mask, (8, 12))
        [(0, 0, 4, 2), (8, 4, 12, 8)]
    """
    height, width = size or mask.shape
    down, right = height / mask.shape[0], width / mask.shape[1]
    found = []
    for left, top, end, bottom in _regions(mask):
        corner = (int(left * right), int(top * down))
        found.append((*corner, int(np.ceil(end * right)), int(np.ceil(bottom * down))))
    return sorted(found, key=lambda box: (box[1], box[0]))


def _regions(mask: NDArray[np.bool_]) -> list[Box]:
    """Merge each row's runs with those of the row above that they touch."""
    numbers = count()
    finished: list[Box] = []
    open_runs: list[tuple[int, int, int]] = []  # start and end in the row above, and index into regions
    regions: dict[int, Box] = {}
    for y, row in enumerate(mask):
        runs: list[tuple[int, int, int]] = []
        for start, end in _runs(row):
            touching = sorted({index for left, right, index in open_runs if left <= end and start <= right})
            index = touching[0] if touching else next(numbers)
            box = (start, y, end, y + 1)
            for other in touching:
                box = _union(box, regions.pop(other))
            regions[index] = box
            open_runs = [(a, b, index if i in touching else i) for a, b, i in open_runs]
            runs = [(a, b, index if i in touching else i) for a, b, i in runs]
            runs.append((start, end, index))
        alive = {index for _, _, index in runs}
        finished += [regions.pop(index) for index in list(regions) if index not in alive]
        open_runs = runs
    return finished + list(regions.values())


def _runs(row: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]]).astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _union(one: Box, other: Box) -> Box:
    return min(one[0], other[0]), min(one[1], other[1]), max(one[2], other[2]), max(one[3], other[3])
