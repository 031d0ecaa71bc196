"""The conditioners of MSFlow: a level's network, and the one that joins all levels.

Zhou, Xu, Song, Shen, Shen, "MSFlow: Multi-Scale Flow-based Framework for Unsupervised Anomaly
Detection", IEEE TNNLS 2024, https://arxiv.org/abs/2308.15300, section III.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .pyramid import Pyramid


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels at each position of a map ``(N, C, H, W)``, of any size.

    Example:
        >>> ChannelNorm(8)(torch.randn(2, 8, 3, 5)).mean(1).abs().max() < 1e-6
        tensor(True)
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize each position."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def normalized_convolutions(in_channels: int, out_channels: int) -> nn.Module:
    """The network of one level's block: convolution, norm, ReLU, convolution, as wide as the input."""
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, padding=1),
        ChannelNorm(in_channels),
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
    )


class FusionConditioner(nn.Module):
    r"""Join all levels at the size of the coarsest, and add the result to each.

    .. math::
        h = \mathrm{ReLU}(\mathrm{conv}(\mathrm{ReLU}(\mathrm{norm}(\mathrm{conv}([\mathrm{pool}(x_i)]_i))))), \qquad
        y_i = [\mathrm{conv}(x_i + \mathrm{up}(h_i)), \; \mathrm{conv}(x_i + \mathrm{up}(h_i))]

    All convolutions are 3x3; the first narrows the joined channels to a quarter.

    Args:
        in_channels: channels of each level's input, finest first.
        out_channels: channels of each level's output, even.

    Shape:
        maps ``(N, in_channels[i], H_i, W_i)`` to maps ``(N, out_channels[i], H_i, W_i)``.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: Sequence[int]) -> None:
        super().__init__()
        self.in_channels = list(in_channels)
        joined = sum(in_channels)
        hidden = max(joined // 4, 4)  # a norm over one channel gives 0, and over two only a sign
        self.join = nn.Sequential(
            nn.Conv2d(joined, hidden, 3, padding=1),
            ChannelNorm(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, joined, 3, padding=1),
            nn.ReLU(),
        )
        pairs = [(c_in, c_out // 2) for c_in, c_out in zip(in_channels, out_channels, strict=True)]
        self.log_scale = nn.ModuleList(nn.Conv2d(c_in, half, 3, padding=1) for c_in, half in pairs)
        self.shift = nn.ModuleList(nn.Conv2d(c_in, half, 3, padding=1) for c_in, half in pairs)

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Map a pyramid to a pyramid of the same sizes."""
        coarsest = (pyramid[-1].shape[2], pyramid[-1].shape[3])
        joined = self.join(torch.cat([F.adaptive_avg_pool2d(level, coarsest) for level in pyramid], dim=1))
        outputs = []
        for index, (level, part) in enumerate(zip(pyramid, joined.split(self.in_channels, dim=1), strict=True)):
            raised = level + F.interpolate(part, level.shape[-2:], mode="bilinear", align_corners=True)
            outputs.append(torch.cat([self.log_scale[index](raised), self.shift[index](raised)], dim=1))
        return tuple(outputs)
