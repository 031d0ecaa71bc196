"""Positions in a map as vectors: the condition of CFLOW-AD's and MSFlow's flows."""

import math

import torch
from torch import Tensor


def check_encoding(channels: int) -> None:
    """Check that an encoding can have this number of channels.

    Raises:
        ValueError: unless it is a positive multiple of 4: a sine and a cosine for each of x and y.
    """
    if channels < 4 or channels % 4:
        msg = f"the channels of a positional encoding must be a positive multiple of 4, got {channels}"
        raise ValueError(msg)


def positional_encoding(channels: int, height: int, width: int, like: Tensor) -> Tensor:
    r"""Sines and cosines of a position's column and row, at frequencies in geometric progression.

    .. math::
        e_{2k} = \sin(x \, \omega_k), \quad e_{2k+1} = \cos(x \, \omega_k), \qquad
        \omega_k = 10000^{-4k / P}, \quad 0 \le k < P / 4

    for the column :math:`x`; the second half of the :math:`P` channels is the same for the row.
    Vaswani et al., "Attention Is All You Need", 2017, section 3.5, in two dimensions.

    Args:
        channels: :math:`P`, a multiple of 4.
        height: of the map.
        width: of the map.
        like: a tensor with the type and device that the encoding should have.

    Returns:
        ``(channels, height, width)``.

    Example:
        >>> positional_encoding(4, 2, 3, torch.zeros(())).shape
        torch.Size([4, 2, 3])
    """
    steps = torch.arange(0, channels // 2, 2, device=like.device, dtype=like.dtype)
    frequencies = torch.exp(steps * (-2 * math.log(10000.0) / channels))
    halves = []
    for count in (width, height):
        angles = frequencies[:, None] * torch.arange(count, device=like.device, dtype=like.dtype)
        halves.append(torch.stack([angles.sin(), angles.cos()], dim=1).flatten(0, 1))
    columns, rows = halves
    return torch.cat([columns[:, None].expand(-1, height, -1), rows[:, :, None].expand(-1, -1, width)])
