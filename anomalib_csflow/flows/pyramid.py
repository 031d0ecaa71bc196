"""What a pyramid is, and the check of pyramids that all layers use."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

Pyramid = tuple[Tensor, ...]
"""Maps ``(N, C, H, W)``, finest level first, each about half the size of the one before; or vectors ``(N, D)``."""


def check_sizes(sizes: Sequence[tuple[int, int]]) -> None:
    """Check that each map is half the one before it, rounded up or down.

    Args:
        sizes: (height, width) of each level, finest first.

    Raises:
        ValueError: if a map is empty, or not half the one before it.

    Example:
        >>> check_sizes([(9, 12), (5, 6), (2, 3)])
    """
    for level, (height, width) in enumerate(sizes):
        if height < 1 or width < 1:
            msg = f"level {level} of the pyramid is empty: its map is {height}x{width}"
            raise ValueError(msg)
    for level, (finer, coarser) in enumerate(pairwise(sizes)):
        if any(c not in {max(f // 2, 1), (f + 1) // 2} for f, c in zip(finer, coarser, strict=True)):
            msg = (
                f"level {level + 1} of the pyramid is {coarser[0]}x{coarser[1]}, which is not half of "
                f"level {level} ({finer[0]}x{finer[1]}), rounded up or down"
            )
            raise ValueError(msg)


def check_pyramid(pyramid: Sequence[Tensor], channels: Sequence[int], ndim: int = 4, *, halved: bool = True) -> Pyramid:
    """Check the number of levels, the channels and the sizes of a pyramid of maps or vectors.

    Args:
        pyramid: maps (N, C, H, W), finest first, or vectors (N, D).
        channels: the channels expected at each level.
        ndim: 4 for maps, 2 for vectors.
        halved: whether each map must be half the one before it, as layers that look across levels need.

    Returns:
        The levels as a tuple.

    Raises:
        ValueError: if the pyramid does not have these levels and channels, or maps do not halve.
    """
    if len(pyramid) != len(channels):
        msg = f"expected a pyramid of {len(channels)} levels, got {len(pyramid)}"
        raise ValueError(msg)
    for index, (level, expected) in enumerate(zip(pyramid, channels, strict=True)):
        if level.ndim != ndim or level.shape[1] != expected:
            shape = f"(N, {expected}, H, W)" if ndim == 4 else f"(N, {expected})"
            msg = f"level {index} should be {shape}, got {tuple(level.shape)}"
            raise ValueError(msg)
    if halved and ndim == 4:
        check_sizes([(level.shape[2], level.shape[3]) for level in pyramid])
    return tuple(pyramid)
