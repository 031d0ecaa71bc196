"""CFLOW-AD's flow: on the vector at one position at a time, given where the position is.

Gudovskiy, Ishizaka, Kozuka, "CFLOW-AD: Real-Time Unsupervised Anomaly Detection with Localization via
Conditional Normalizing Flows", WACV 2022, https://arxiv.org/abs/2107.12571, section 4.
"""

from collections.abc import Iterable, Sequence

import torch
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

from .all_in_one import all_in_one_chain
from .positional_encoding import check_encoding, positional_encoding
from .pyramid import Pyramid, check_pyramid


def _subnet(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(nn.Linear(in_channels, 2 * in_channels), nn.ReLU(), nn.Linear(2 * in_channels, out_channels))


class FiberFlow(InvertibleModule):
    """Transform the vector at each position of each level (a fiber), by one conditional decoder per level.

    Given where they are, positions are independent of each other, so the log-det of a level is the sum of
    the log-dets of its positions.

    Args:
        dims_in: ``(C, H, W)`` of each level; only the channels matter.
        dims_c: unused, part of FrEIA's interface.
        num_blocks: number of blocks of each decoder.
        condition_channels: number of channels of the positional encoding, a multiple of 4.
        clamp: bound of the log-scales.
        permute_soft: rotate between blocks instead of permuting.

    Shape:
        maps ``(N, C_i, H_i, W_i)`` to maps of the same shapes, and a log-det ``(N,)`` in nats.

    Raises:
        ValueError: if a level has one channel or no blocks, or the encoding's channels do not fit.

    Example:
        >>> flow = FiberFlow([(4, 8, 8), (6, 4, 4)], num_blocks=2, condition_channels=8)
        >>> latents, log_det = flow((torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)))
        >>> tuple(latents[1].shape), tuple(log_det.shape)
        ((2, 6, 4, 4), (2,))
    """

    def __init__(
        self,
        dims_in: Sequence[tuple[int, int, int]],
        dims_c: Sequence[tuple[int, int, int]] | None = None,
        *,
        num_blocks: int = 8,
        condition_channels: int = 128,
        clamp: float = 1.9,
        permute_soft: bool = True,
    ) -> None:
        super().__init__(dims_in, dims_c)
        check_encoding(condition_channels)
        self.channels = [dims[0] for dims in self.dims_in]
        self.condition_channels = condition_channels
        self.decoders = nn.ModuleList(
            all_in_one_chain(
                channels,
                [_subnet] * num_blocks,
                maps=False,
                condition_channels=condition_channels,
                clamp=clamp,
                permute_soft=permute_soft,
                seed=level * num_blocks,
            )
            for level, channels in enumerate(self.channels)
        )

    def forward(
        self, x_or_z: Iterable[Tensor], c: Iterable[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Pyramid, Tensor]:
        """Transform a pyramid; ``rev`` inverts. Returns the maps and the log-det (zeros if not ``jac``)."""
        del c
        output, log_dets = self.positions(x_or_z, rev=rev)
        if not jac:
            return output, output[0].new_zeros(output[0].shape[0])
        return output, torch.stack([log_det.flatten(1).sum(1) for log_det in log_dets]).sum(0)

    def positions(self, x_or_z: Iterable[Tensor], rev: bool = False) -> tuple[Pyramid, Pyramid]:
        """Transform a pyramid; returns the maps and each position's log-det, ``(N, 1, H_i, W_i)``."""
        output, log_dets = [], []
        for index, level in enumerate(check_pyramid(tuple(x_or_z), self.channels, halved=False)):
            count, channels, height, width = level.shape
            vectors, log_det = self.decode(index, *self.fibers(level), rev=rev)
            output.append(vectors.reshape(count, height, width, channels).permute(0, 3, 1, 2))
            log_dets.append(log_det.reshape(count, 1, height, width))
        return tuple(output), tuple(log_dets)

    def fibers(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors at a level's positions ``(N * H * W, C)``, and their conditions ``(N * H * W, P)``."""
        count, channels, height, width = level.shape
        encoding = positional_encoding(self.condition_channels, height, width, like=level)
        conditions = encoding.flatten(1).T.expand(count, -1, -1).flatten(0, 1)
        return level.permute(0, 2, 3, 1).reshape(-1, channels), conditions

    def decode(self, level: int, fibers: Tensor, conditions: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        """Transform fibers ``(F, C)`` of a level under their conditions; the log-det is ``(F,)``."""
        vectors, log_det = self.decoders[level](fibers, c=[conditions], rev=rev)
        return vectors, log_det

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The shapes do not change (FrEIA's shape inference)."""
        return input_dims
