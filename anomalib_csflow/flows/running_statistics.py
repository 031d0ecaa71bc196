"""Statistics of values that arrive in batches."""

from collections.abc import Iterable

import torch
from torch import Tensor

LEAST_VARIATION = 1e-5
"""Of a level's features, relative to their size: what varies less is rounding, of equal images in other batches."""


def check_varying(level: int, mean: Tensor, variance: Tensor) -> None:
    """Check mean and variance of a level's channels, ``(C,)`` each.

    Raises:
        ValueError: if the features were not finite, or do not vary at all, so that there is nothing to scale them by.
    """
    if not (mean.isfinite().all() and variance.isfinite().all()):
        msg = f"level {level}: the training images' features are not finite: look for NaN in the backbone's weights"
        raise ValueError(msg)
    if not variance.mean() > LEAST_VARIATION**2 * mean.square().mean():
        msg = f"level {level}: the training images' features do not vary: are the images all alike, or blank?"
        raise ValueError(msg)


class RunningStatistics:
    """Mean, variance and maximum of each channel over batches, in float64, on the CPU because not every device has it.

    Args:
        channels: number of channels of each batch.

    Attributes:
        count: number of values of each channel so far.
        mean: ``(channels,)``.
        highest: ``(channels,)``, minus infinity until there are values.

    Example:
        >>> seen = RunningStatistics(1)
        >>> seen.update(torch.tensor([[1.0], [2.0]]))
        >>> seen.update(torch.tensor([[6.0]]))
        >>> seen.count, seen.mean.item(), round(seen.variance.item(), 3), seen.highest.item()
        (3, 3.0, 4.667, 6.0)
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.highest = torch.full((channels,), -torch.inf, dtype=torch.float64)
        self._squares = torch.zeros(channels, dtype=torch.float64)  # of deviations, summed

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Add a batch ``(N, channels, ...)``."""
        others = [dim for dim in range(values.ndim) if dim != 1]
        variance, mean = torch.var_mean(values.float(), others, correction=0)
        mean, variance, highest = (row.cpu().double() for row in (mean, variance, values.amax(others)))
        self.merge(torch.stack([torch.full_like(mean, values.numel() // values.shape[1]), mean, variance, highest]))

    @property
    def state(self) -> Tensor:
        """Count, mean, variance and maximum of each channel's values so far, ``(4, channels)``."""
        count = torch.full_like(self.mean, self.count)
        return torch.stack([count, self.mean, self._squares / count.clamp(min=1), self.highest])

    def merge(self, state: Tensor) -> None:
        """Add the :attr:`state` of other values, ``(4, channels)``, as in Chan et al. (1983)."""
        counts, mean, variance, highest = state.cpu()
        n = int(counts[0])
        if n == 0:
            return
        delta, total = mean - self.mean, self.count + n
        self._squares += n * variance + delta.square() * (self.count * n / total)
        self.mean += delta * (n / total)
        self.highest = torch.maximum(self.highest, highest)
        self.count = total

    @classmethod
    def merged(cls, states: Iterable[Tensor]) -> "RunningStatistics":
        """Statistics of all values together, from their states, ``(4, channels)`` each."""
        first, *others = states
        whole = cls(first.shape[1])
        for state in (first, *others):
            whole.merge(state)
        return whole

    @property
    def variance(self) -> Tensor:
        """Mean squared deviation from the mean, ``(channels,)``."""
        return self._squares / self.count


class RunningCovariance:
    """Mean and covariance of the channels over batches, in float64 on the CPU.

    Args:
        channels: number of channels of each batch.

    Attributes:
        count: number of values of each channel so far.
        mean: ``(channels,)``.

    Example:
        >>> seen = RunningCovariance(2)
        >>> seen.update(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
        >>> seen.update(torch.tensor([[2.0, 2.0]]))
        >>> seen.count, seen.mean.tolist(), seen.covariance.round(decimals=3).tolist()
        (3, [2.0, 2.0], [[0.667, 1.333], [1.333, 2.667]])
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self._products = torch.zeros(channels, channels, dtype=torch.float64)  # of deviations, summed

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Add a batch ``(N, channels, ...)``, merged with the earlier ones as in Chan et al. (1983)."""
        rows = values.movedim(1, -1).flatten(0, -2).float()
        mean = rows.mean(0)
        covariance = (rows - mean).T @ (rows - mean) / len(rows)
        parts = (part.cpu().double() for part in (torch.full_like(mean, len(rows))[None], mean[None], covariance))
        self.merge(torch.cat([*parts]))

    @property
    def state(self) -> Tensor:
        """Count, mean and covariance of the values so far, ``(2 + channels, channels)``."""
        return torch.cat([torch.full_like(self.mean, self.count)[None], self.mean[None], self.covariance])

    def merge(self, state: Tensor) -> None:
        """Add the :attr:`state` of other values, as in Chan et al. (1983)."""
        n, mean, covariance = int(state[0, 0]), state[1].cpu(), state[2:].cpu()
        if n == 0:
            return
        delta, total = mean - self.mean, self.count + n
        self._products += n * covariance + torch.outer(delta, delta) * (self.count * n / total)
        self.mean += delta * (n / total)
        self.count = total

    @classmethod
    def merged(cls, states: Iterable[Tensor]) -> "RunningCovariance":
        """Statistics of all values together, from their states."""
        first, *others = states
        whole = cls(first.shape[1])
        for state in (first, *others):
            whole.merge(state)
        return whole

    @property
    def covariance(self) -> Tensor:
        """Mean product of two channels' deviations from their means, ``(channels, channels)``."""
        return self._products / max(self.count, 1)
