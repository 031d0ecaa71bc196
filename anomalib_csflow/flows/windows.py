"""Convolutions of small maps in the way that is fastest on a CPU, forward and backward.

A convolution library copies weights into its own layout, and their gradients back. For a map with few
positions, this takes longer than the multiplications, and one matrix product with the map's windows is faster.
On other devices, and in graphs that are compiled or exported, everything here is the plain convolution.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F  # noqa: N812

FEW_POSITIONS = 1024
"""Positions N * H * W below which one matrix product beats the convolution (speed/coupling.py)."""

MANY_CHANNELS = 256
"""From this number of input channels on, it is faster to multiply before resizing than to resize before convolving."""


def convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Convolve ``(N, C, H, W)`` to ``(N, out_channels, ceil(H / stride), ceil(W / stride))``."""
    stride = conv.stride[0]
    few = x.shape[0] * x.shape[2] * x.shape[3] < FEW_POSITIONS
    if _is_plain(x) or not (few or stride > 1):
        return conv(x)
    dtype = _product_dtype(x)
    weight = conv.weight.to(dtype).permute(0, 2, 3, 1).flatten(1)
    rows = _Gather.apply(x.to(dtype).permute(0, 2, 3, 1), weight, conv.kernel_size[0], stride)
    return (rows + _bias(conv, dtype)).permute(0, 3, 1, 2)


def convolve_resized(x: Tensor, size: tuple[int, int], conv: nn.Conv2d) -> Tensor:
    """Resize ``(N, C, H, W)`` bilinearly to a larger size and convolve it with stride 1.

    Resizing acts on positions and the matrices of a kernel act on channels, so the two commute: the small map is
    multiplied by each matrix, the products are resized, then added up at their places. For twice the size, this
    takes a quarter of the multiplications.
    """
    if conv.kernel_size == (1, 1):  # the small map has fewer positions, and its output often fewer channels
        resized = F.interpolate(convolve(x, conv), size=size, mode="bilinear", align_corners=False)
        if resized.requires_grad and not _is_plain(x):  # torch's backward pass is several times as fast in this order
            resized.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
        return resized
    if _is_plain(x) or conv.in_channels < MANY_CHANNELS:
        return convolve(F.interpolate(x, size=size, mode="bilinear", align_corners=False), conv)
    dtype = _product_dtype(x)
    weight = conv.weight.to(dtype).permute(2, 3, 0, 1).flatten(0, 2)
    taps = (x.to(dtype).permute(0, 2, 3, 1) @ weight.t()).permute(0, 3, 1, 2)
    taps = F.interpolate(taps, size=size, mode="bilinear", align_corners=False)
    rows = _Spread.apply(taps.permute(0, 2, 3, 1), conv.kernel_size[0])
    return (rows + _bias(conv, dtype)).permute(0, 3, 1, 2)


def lay_out(conv: nn.Conv2d, *, resized: bool = False) -> nn.Conv2d:
    """Store a convolution's weight in the order in which the products read it; its shape does not change."""
    order = (2, 3, 0, 1) if resized and conv.in_channels >= MANY_CHANNELS else (0, 2, 3, 1)
    back = [order.index(dim) for dim in range(4)]
    conv.weight.data = conv.weight.data.permute(order).contiguous().permute(back)
    return conv


def _is_plain(x: Tensor) -> bool:
    return x.device.type != "cpu" or torch.compiler.is_compiling()


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _bias(conv: nn.Conv2d, dtype: torch.dtype) -> Tensor | float:
    return 0.0 if conv.bias is None else conv.bias.to(dtype)


def _windows(x: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Windows of zero-padded ``(N, H, W, C)``: ``(N, ceil(H / stride), ceil(W / stride), k * k * C)``."""
    n, height, width, channels = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    before = (kernel_size - 1) // 2
    below, right = (
        max(0, (count - 1) * stride + kernel_size - before - size) for count, size in ((rows, height), (columns, width))
    )
    padded = F.pad(x, (0, 0, before, right, before, below)) if before or right or below else x
    of_n, of_row, of_column, of_channel = padded.stride()
    return padded.as_strided(
        (n, rows, columns, kernel_size, kernel_size, channels),
        (of_n, stride * of_row, stride * of_column, of_row, of_column, of_channel),
        padded.storage_offset(),
    ).flatten(3)


def _add_windows(windows: Tensor, size: tuple[int, int], kernel_size: int, stride: int) -> Tensor:
    """The adjoint of :func:`_windows`: each window is added to a map of ``size`` at its place."""
    n, rows, columns, _ = windows.shape
    height, width = size
    windows = windows.unflatten(-1, (kernel_size, kernel_size, -1))
    if kernel_size == stride <= 2:  # side by side from the first position on
        return windows.transpose(2, 3).reshape(n, rows * stride, columns * stride, -1)[:, :height, :width]
    before = (kernel_size - 1) // 2
    padded = windows.new_zeros(n, height + kernel_size - 1, width + kernel_size - 1, windows.shape[-1])
    for i in range(kernel_size):
        for j in range(kernel_size):
            padded[:, i : i + stride * rows : stride, j : j + stride * columns : stride] += windows[:, :, :, i, j]
    return padded[:, before : before + height, before : before + width]


class _Gather(Function):
    """Windows of ``(N, H, W, C)`` times a weight ``(out_channels, k * k * C)``.

    The windows are made again in the backward pass, because keeping them would take k * k times the map's memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kernel_size: int, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.window = kernel_size, stride
        return _windows(x, kernel_size, stride) @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _add_windows(gradient @ weight, x.shape[1:3], *ctx.window)
        if ctx.needs_input_grad[1]:
            of_weight = gradient.flatten(0, 2).t() @ _windows(x, *ctx.window).flatten(0, 2)
        return of_x, of_weight, None, None


class _Spread(Function):
    """Sum of a convolution's taps ``(N, H, W, k * k * C)``.

    Tap (i, j) of a position contributes to the output whose window has the position at (i, j).
    """

    @staticmethod
    def forward(ctx: Any, taps: Tensor, kernel_size: int) -> Tensor:
        ctx.kernel_size = kernel_size
        n, height, width, _ = taps.shape
        taps = taps.unflatten(-1, (kernel_size, kernel_size, -1))
        last = kernel_size - 1
        padded = taps.new_zeros(n, height + last, width + last, taps.shape[-1])
        for i in range(kernel_size):
            for j in range(kernel_size):
                padded[:, last - i : last - i + height, last - j : last - j + width] += taps[:, :, :, i, j]
        after = kernel_size // 2
        return padded[:, after : after + height, after : after + width]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        last, after = ctx.kernel_size - 1, ctx.kernel_size // 2
        n, height, width, channels = gradient.shape
        padded = F.pad(gradient, (0, 0, after, last - after, after, last - after))
        taps = gradient.new_empty(n, height, width, ctx.kernel_size, ctx.kernel_size, channels)
        for i in range(ctx.kernel_size):
            for j in range(ctx.kernel_size):
                taps[:, :, :, i, j] = padded[:, last - i : last - i + height, last - j : last - j + width]
        return taps.flatten(3), None
