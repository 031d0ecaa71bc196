"""Levels on one scale: in standard deviations of good images'."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from anomalib_csflow.flows.pyramid import Pyramid
from anomalib_csflow.flows.running_statistics import RunningStatistics


class LevelScale(nn.Module):
    r"""Put each level's map into good images' standard deviations: :math:`(m_i - \mu_i) / \sigma_i`.

    Maps of different levels have different spreads; fused as they are, the widest would hide the others. The
    statistics are buffers, which checkpoints and exported models hold; until :meth:`fit` the maps stay as they are.

    Args:
        num_levels: of the maps.

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
            gather: a tensor of this process to those of all, where several have a share of the images each.

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
            msg = "there are no good images to measure the levels' scale of"
            raise ValueError(msg)
        self.mean.copy_(torch.cat([statistics.mean for statistics in seen]))
        self.std.copy_(torch.cat([statistics.variance.sqrt() for statistics in seen]).clamp(min=1e-6))
        self.is_fitted.fill_(value=True)

    def forward(self, maps: Sequence[Tensor]) -> Pyramid:
        """Standardize."""
        return tuple((level - mean) / std for level, mean, std in zip(maps, self.mean, self.std, strict=True))
