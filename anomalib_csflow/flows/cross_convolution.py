"""The conditioner of CS-Flow: convolutions at each level, with links between neighbouring levels.

Rudolph et al., "Fully Convolutional Cross-Scale-Flows for Image-based Defect Detection", WACV 2022,
https://arxiv.org/abs/2110.02855, section 3.2 and figure 4.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .pyramid import Pyramid
from .windows import convolve, convolve_resized, lay_out

NEGATIVE_SLOPE = 0.1


class SameConv2d(nn.Conv2d):
    """Zero-padded convolution whose output is ``ceil(size / stride)`` for every kernel size.

    Odd kernels are padded equally on both sides, even ones with one more at the end than at the start.

    Example:
        >>> SameConv2d(2, 3, kernel_size=4, stride=2)(torch.zeros(1, 2, 7, 6)).shape
        torch.Size([1, 3, 4, 3])
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=(kernel_size - 1) // 2)
        self.is_even = kernel_size % 2 == 0

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``(N, C, H, W)``."""
        return super().forward(F.pad(input, (0, 1, 0, 1)) if self.is_even else input)


class CrossConvolution(nn.Module):
    r"""Two convolutions per level, the second also fed by the neighbouring levels.

    .. math::
        h_i &= \mathrm{LeakyReLU}(\mathrm{conv}(x_i)) \\
        y_i &= \gamma_i \, [\mathrm{conv}(h_i) + \mathrm{conv}(\mathrm{up}(h_{i+1}))
               + \mathrm{conv}_{\mathrm{stride}\,2}(h_{i-1})]

    An up link resizes bilinearly to exactly the finer map's size; a down link gives exactly the
    coarser map's, by a kernel of at least 2, so that it sees every position. Each :math:`\gamma_i` is
    learned, starting from 0, so an untrained coupling is the identity.

    Args:
        in_channels: channels of each level's input, finest first.
        out_channels: channels of each level's output.
        hidden_channels: channels of every hidden map.
        kernel_size: of the finest level's convolutions and of the links.
        coarse_kernel_size: of the other levels' convolutions; by default ``kernel_size``. A coarse level has few
            positions, so that a larger kernel costs little there.
        output_kernel_size: of the links and the finest level's second convolution, which have nearly half of the
            multiplications; by default ``kernel_size``. The other levels' second convolutions have kernels larger than
            this by as much as their first ones are larger than ``kernel_size``.

    Shape:
        maps ``(N, in_channels[i], H_i, W_i)`` to maps ``(N, out_channels[i], H_i, W_i)``.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        hidden_channels: int = 1024,
        kernel_size: int = 3,
        coarse_kernel_size: int | None = None,
        output_kernel_size: int | None = None,
    ) -> None:
        super().__init__()
        links = len(in_channels) - 1
        hidden = hidden_channels
        coarse_size, output_size = coarse_kernel_size or kernel_size, output_kernel_size or kernel_size
        first = [kernel_size, *[coarse_size] * links]
        second = [output_size, *[max(1, output_size + coarse_size - kernel_size)] * links]
        self.enter = nn.ModuleList(lay_out(SameConv2d(c, hidden, k)) for c, k in zip(in_channels, first, strict=True))
        self.leave = nn.ModuleList(lay_out(SameConv2d(hidden, c, k)) for c, k in zip(out_channels, second, strict=True))
        # up[i] leads from level i + 1 to level i, down[i] from level i to level i + 1
        self.up = nn.ModuleList(
            lay_out(SameConv2d(hidden, c, output_size), resized=True) for c in list(out_channels)[:links]
        )
        down = max(output_size, 2)
        self.down = nn.ModuleList(lay_out(SameConv2d(hidden, c, down, stride=2)) for c in list(out_channels)[1:])
        self.gamma = nn.Parameter(torch.zeros(len(in_channels)))

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Map a pyramid to a pyramid of the same sizes."""
        enter, leave, up, down = (
            cast("list[nn.Conv2d]", list(convs)) for convs in (self.enter, self.leave, self.up, self.down)
        )
        entered = (convolve(level, conv) for conv, level in zip(enter, pyramid, strict=True))
        hidden = [F.leaky_relu(level, NEGATIVE_SLOPE) for level in entered]
        outputs = [convolve(level, conv) for conv, level in zip(leave, hidden, strict=True)]
        for i in range(len(up)):
            (height, width), coarser = hidden[i].shape[-2:], hidden[i + 1].shape[-2:]
            outputs[i] = outputs[i] + convolve_resized(hidden[i + 1], (height, width), up[i])
            # the convolution gives ceil(size / 2); the crop is for coarser maps whose size was rounded down
            outputs[i + 1] = outputs[i + 1] + convolve(hidden[i], down[i])[..., : coarser[0], : coarser[1]]
        # in the parameters' precision, not the convolutions', because the outputs become log-scales and shifts
        return tuple(gamma * output.to(gamma.dtype) for gamma, output in zip(self.gamma, outputs, strict=True))
