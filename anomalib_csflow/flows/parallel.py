"""One flow per level, side by side: all of FastFlow's flow, and the first part of MSFlow's."""

from collections.abc import Iterable, Sequence

from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

from .all_in_one import Subnet, all_in_one_chain
from .positional_encoding import check_encoding, positional_encoding
from .pyramid import Pyramid, check_pyramid


class ParallelFlow(InvertibleModule):
    """Transform each level of a pyramid by its own chain of all-in-one blocks.

    Levels may have any sizes, also equal ones. With ``condition_channels``, all blocks are conditioned on the
    positional encoding.

    Args:
        dims_in: ``(C, H, W)`` of each level; only the channels matter.
        dims_c: unused, part of FrEIA's interface.
        subnets: for each level, what makes the network of each block.
        condition_channels: number of channels of the positional encoding, a multiple of 4, or 0 for none.
        clamp: bound of the log-scales.
        permute_soft: rotate between blocks instead of permuting.

    Shape:
        maps ``(N, C_i, H_i, W_i)`` to maps of the same shapes, and a log-det ``(N,)`` in nats.

    Raises:
        ValueError: if a level has one channel or no blocks, or the encoding's channels do not fit.

    Example:
        >>> import torch
        >>> subnet = lambda c_in, c_out: nn.Conv2d(c_in, c_out, 1)
        >>> flow = ParallelFlow([(4, 8, 8), (6, 4, 4)], subnets=[[subnet] * 2, [subnet] * 3], condition_channels=4)
        >>> latents, log_det = flow((torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)))
        >>> tuple(latents[1].shape), tuple(log_det.shape)
        ((2, 6, 4, 4), (2,))
    """

    def __init__(
        self,
        dims_in: Sequence[tuple[int, int, int]],
        dims_c: Sequence[tuple[int, int, int]] | None = None,
        *,
        subnets: Sequence[Sequence[Subnet]],
        condition_channels: int = 0,
        clamp: float = 2.0,
        permute_soft: bool = False,
    ) -> None:
        super().__init__(dims_in, dims_c)
        if condition_channels:
            check_encoding(condition_channels)
        self.channels = [dims[0] for dims in self.dims_in]
        self.condition_channels = condition_channels
        seeds = [
            sum(len(blocks) for blocks in subnets[:level]) for level in range(len(subnets))
        ]  # each block has its own
        self.levels = nn.ModuleList(
            all_in_one_chain(
                channels,
                blocks,
                maps=True,
                condition_channels=condition_channels,
                clamp=clamp,
                permute_soft=permute_soft,
                seed=seed,
            )
            for channels, blocks, seed in zip(self.channels, subnets, seeds, strict=True)
        )

    def forward(
        self, x_or_z: Iterable[Tensor], c: Iterable[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Pyramid, Tensor]:
        """Transform a pyramid; ``rev`` inverts. Returns the maps and the log-det (zeros if not ``jac``)."""
        del c
        pyramid = check_pyramid(tuple(x_or_z), self.channels, halved=False)
        output = []
        log_det = pyramid[0].new_zeros(pyramid[0].shape[0])
        for chain, level in zip(self.levels, pyramid, strict=True):
            transformed, level_log_det = chain(level, c=self._conditions(level), rev=rev)
            output.append(transformed)
            log_det = log_det + level_log_det if jac else log_det
        return tuple(output), log_det

    def _conditions(self, level: Tensor) -> list[Tensor]:
        if not self.condition_channels:
            return []
        count, _, height, width = level.shape
        encoding = positional_encoding(self.condition_channels, height, width, like=level)
        return [encoding.expand(count, -1, -1, -1)]

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The shapes do not change (FrEIA's shape inference)."""
        return input_dims
