"""A fixed affine layer that standardizes each channel with statistics of the training features."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from FrEIA.modules import InvertibleModule
from torch import Tensor

from .pyramid import Pyramid, check_pyramid
from .running_statistics import RunningStatistics, check_varying


class ChannelStandardization(InvertibleModule):
    r"""Map each channel to mean 0 and standard deviation 1: :math:`y_c = (x_c - \mu_c) / \sigma_c`.

    The statistics are buffers, one set of channels per level; until :meth:`fit` they are 0 and 1
    and the layer is the identity. Nothing is learned, so the log-det is exact and constant:
    :math:`-\sum_i H_i W_i \sum_c \log \sigma_{ic}` (for vectors, :math:`H_i = W_i = 1`).

    Args:
        dims_in: ``(C, H, W)`` of each level, finest first, or ``(D,)`` of vectors.
        dims_c: unused, part of FrEIA's interface.

    Shape:
        maps ``(N, C_i, H_i, W_i)`` or vectors ``(N, D_i)`` to the same shapes, and a log-det ``(N,)`` in nats.

    Example:
        >>> layer = ChannelStandardization([(2, 4, 4)])
        >>> features = torch.randn(8, 2, 4, 4) * 5 + 3
        >>> layer.fit([(features,)])
        >>> (standardized,), log_det = layer((features,))
        >>> round(float(standardized.std(correction=0)), 3), bool(log_det[0] < 0)
        (1.0, True)
    """

    def __init__(self, dims_in: Sequence[tuple[int, ...]], dims_c: Sequence[tuple[int, ...]] | None = None) -> None:
        super().__init__(dims_in, dims_c)
        self.channels = [dims[0] for dims in self.dims_in]
        self.ndim = len(self.dims_in[0]) + 1
        for scale, channels in enumerate(self.channels):
            self.register_buffer(f"mean_{scale}", torch.zeros(channels))
            self.register_buffer(f"log_std_{scale}", torch.zeros(channels))
        self.register_buffer("is_fitted", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def fit(
        self,
        pyramids: Iterable[Pyramid],
        floor: float = 1e-3,
        gather: Callable[[Tensor], Iterable[Tensor]] | None = None,
    ) -> None:
        """Measure mean and standard deviation of each channel over all samples and positions.

        Args:
            pyramids: batches of pyramids of training features.
            floor: least standard deviation, as a share of the root mean square over the level's channels,
                so that a constant channel is not divided by almost zero.
            gather: collects a tensor from all processes, if several processes share the features.

        Raises:
            ValueError: if there are no pyramids, or a level's channels do not vary at all or are not finite.
        """
        seen = [RunningStatistics(channels) for channels in self.channels]
        for pyramid in pyramids:
            for statistics, level in zip(
                seen, check_pyramid(pyramid, self.channels, self.ndim, halved=False), strict=True
            ):
                statistics.update(level)
        if gather is not None:
            seen = [RunningStatistics.merged(gather(statistics.state)) for statistics in seen]
        if not all(statistics.count for statistics in seen):
            msg = "there are no features to measure: the training set is empty"
            raise ValueError(msg)
        for scale, statistics in enumerate(seen):
            variance = statistics.variance
            check_varying(scale, statistics.mean, variance)
            least = floor * variance.mean().sqrt()
            self.get_buffer(f"mean_{scale}").copy_(statistics.mean)
            self.get_buffer(f"log_std_{scale}").copy_(variance.sqrt().clamp(min=least).log())
        self.get_buffer("is_fitted").fill_(value=True)

    @property
    def stds(self) -> list[Tensor]:
        """Standard deviation of each level's channels, ``(C_i,)``; 1 until they are measured."""
        return [self.get_buffer(f"log_std_{level}").exp() for level in range(len(self.channels))]

    def forward(
        self, x_or_z: Iterable[Tensor], c: Iterable[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Pyramid, Tensor]:
        """Standardize, or with ``rev`` undo it."""
        del c
        pyramid = check_pyramid(tuple(x_or_z), self.channels, self.ndim, halved=False)
        output = []
        log_det = pyramid[0].new_zeros(pyramid[0].shape[0])
        for scale, level in enumerate(pyramid):
            shape = (-1,) + (1,) * (self.ndim - 2)
            mean = self.get_buffer(f"mean_{scale}").view(shape)
            log_std = self.get_buffer(f"log_std_{scale}").view(shape)
            output.append(level * log_std.exp() + mean if rev else (level - mean) * (-log_std).exp())
            if jac:
                scale_log_det = log_std.sum() * math.prod(level.shape[2:])
                log_det = log_det + (scale_log_det if rev else -scale_log_det)
        return tuple(output), log_det

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The shapes do not change (FrEIA's shape inference)."""
        return input_dims
