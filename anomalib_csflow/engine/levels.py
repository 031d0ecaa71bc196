"""Levels on one scale: maps in standard deviations of the good images' maps."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from anomalib_csflow.flows.pyramid import Pyramid
from anomalib_csflow.flows.running_statistics import RunningStatistics


class LevelScale(nn.Module):
    r"""Express each level's map in standard deviations of good images: :math:`(m_i - \mu_i) / \sigma_i`.

    Maps of different levels have different spreads; fused without this, the widest would hide the others. The
    statistics are buffers, part of checkpoints and exported models; until :meth:`fit` the maps do not change.

    Args:
        num_levels: number of maps.

    Shape:
        maps ``(N, 1, H_i, W_i)`` to maps of the same shapes.

    Example:
        >>> scale = LevelScale(1)
        >>> scale.fit([(torch.tensor([[[[1.0, 3.0]]]]),)])
        >>> scale((torch.tensor([[[[2.0, 5.0]]]]),))
        (tensor([[[[0., 3.]]]]),)
    """

    mean: Tensor
    std: Tensor
    is_fitted: Tensor

    def __init__(self, num_levels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_levels))
        self.register_buffer("std", torch.ones(num_levels))
        self.register_buffer("is_fitted", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def fit(self, maps: Iterable[Pyramid], gather: Callable[[Tensor], Iterable[Tensor]] | None = None) -> None:
        """Measure mean and standard deviation of each level over all images and positions.

        Args:
            maps: batches of good images' maps.
            gather: collects a tensor from all processes, if several processes share the images.

        Raises:
            ValueError: if there are no maps.
        """
        seen = [RunningStatistics(1) for _ in self.mean]
        for levels in maps:
            for statistics, level in zip(seen, levels, strict=True):
                statistics.update(level)
        if gather is not None:
            seen = [RunningStatistics.merged(gather(statistics.state)) for statistics in seen]
        if not all(statistics.count for statistics in seen):
            msg = "there are no good images to measure the scale of the levels"
            raise ValueError(msg)
        self.mean.copy_(torch.cat([statistics.mean for statistics in seen]))
        self.std.copy_(torch.cat([statistics.variance.sqrt() for statistics in seen]).clamp(min=1e-6))
        self.is_fitted.fill_(value=True)

    def forward(self, maps: Sequence[Tensor]) -> Pyramid:
        """Standardize."""
        return tuple((level - mean) / std for level, mean, std in zip(maps, self.mean, self.std, strict=True))
