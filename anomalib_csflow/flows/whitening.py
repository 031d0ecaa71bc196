"""A fixed linear layer that whitens each position's channels with statistics of the training features."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from FrEIA.modules import InvertibleModule
from torch import Tensor

from .pyramid import Pyramid, check_pyramid
from .running_statistics import RunningCovariance, check_varying


class ChannelWhitening(InvertibleModule):
    r"""Map each position's channels to mean 0 and covariance 1: :math:`y = W (x - \mu)`.

    With :math:`D` the channels' standard deviations and :math:`R` their correlations,
    :math:`W = (R + \epsilon^2 1)^{-1/2} D^{-1}`, the symmetric (ZCA) root: of all whitening matrices it changes the
    standardized channels least (Kessy, Lewin, Strimmer, "Optimal whitening and decorrelation", 2018,
    https://arxiv.org/abs/1512.00809). A flow that begins with it starts from the Gaussian that fits the features best,
    and only has to learn what is not Gaussian in them.

    The statistics are buffers; until :meth:`fit` the layer is the identity. Nothing is learned, so the log-det is exact
    and constant: :math:`\sum_i H_i W_i \log \det W_i`.

    Args:
        dims_in: ``(C, H, W)`` of each level, finest first.
        dims_c: unused, part of FrEIA's interface.

    Shape:
        maps ``(N, C_i, H_i, W_i)`` to maps of the same shapes, and a log-det ``(N,)`` in nats.

    Example:
        >>> layer = ChannelWhitening([(2, 4, 4)])
        >>> independent = torch.randn(64, 2, 4, 4)
        >>> features = torch.stack([independent[:, 0], independent[:, 0] + 0.5 * independent[:, 1]], dim=1)
        >>> layer.fit([(features,)], shrinkage=0.0)
        >>> (white,), log_det = layer((features,))
        >>> torch.cov(white.transpose(0, 1).flatten(1), correction=0).round(decimals=3).abs()
        tensor([[1., 0.],
                [0., 1.]])
    """

    def __init__(self, dims_in: Sequence[tuple[int, ...]], dims_c: Sequence[tuple[int, ...]] | None = None) -> None:
        super().__init__(dims_in, dims_c)
        self.channels = [dims[0] for dims in self.dims_in]
        for level, channels in enumerate(self.channels):
            self.register_buffer(f"mean_{level}", torch.zeros(channels))
            self.register_buffer(f"std_{level}", torch.ones(channels))
            self.register_buffer(f"matrix_{level}", torch.eye(channels))
        self.register_buffer("is_fitted", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def fit(
        self,
        pyramids: Iterable[Pyramid],
        shrinkage: float = 0.1,
        gather: Callable[[Tensor], Iterable[Tensor]] | None = None,
    ) -> None:
        r"""Measure mean and covariance over all samples and positions.

        Args:
            pyramids: batches of pyramids of training features.
            shrinkage: :math:`\epsilon`, with the effect of noise of this standard deviation on the standardized
                channels: directions in which a few images hardly vary are not divided by almost zero.
            gather: collects a tensor from all processes, if several processes share the features.

        Raises:
            ValueError: if there are no pyramids, or a level's channels do not vary at all or are not finite.
        """
        seen = [RunningCovariance(channels) for channels in self.channels]
        for pyramid in pyramids:
            for statistics, level in zip(seen, check_pyramid(pyramid, self.channels, halved=False), strict=True):
                statistics.update(level)
        if gather is not None:
            seen = [RunningCovariance.merged(gather(statistics.state)) for statistics in seen]
        if not all(statistics.count for statistics in seen):
            msg = "there are no features to measure: the training set is empty"
            raise ValueError(msg)
        for index, statistics in enumerate(seen):
            covariance = statistics.covariance
            variance = covariance.diagonal()
            check_varying(index, statistics.mean, variance)
            std = variance.clamp(min=1e-6 * variance.mean().item()).sqrt()
            values, vectors = torch.linalg.eigh(covariance / torch.outer(std, std))
            values = values.clamp(min=0) + max(shrinkage, 1e-3) ** 2
            self.get_buffer(f"mean_{index}").copy_(statistics.mean)
            self.get_buffer(f"std_{index}").copy_(std)
            self.get_buffer(f"matrix_{index}").copy_(vectors * values.rsqrt() @ vectors.T / std)
        self.get_buffer("is_fitted").fill_(value=True)

    @property
    def stds(self) -> list[Tensor]:
        """Standard deviation of each level's channels, ``(C_i,)``; 1 until they are measured."""
        return [self.get_buffer(f"std_{level}") for level in range(len(self.channels))]

    def forward(
        self, x_or_z: Iterable[Tensor], c: Iterable[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Pyramid, Tensor]:
        """Whiten, or with ``rev`` undo it."""
        del c
        pyramid = check_pyramid(tuple(x_or_z), self.channels, halved=False)
        output = []
        log_det = pyramid[0].new_zeros(pyramid[0].shape[0])
        for index, level in enumerate(pyramid):
            mean = self.get_buffer(f"mean_{index}").view(1, -1, 1, 1)
            matrix = self.get_buffer(f"matrix_{index}")
            if rev:
                output.append(torch.conv2d(level, torch.linalg.inv(matrix)[:, :, None, None]) + mean)
            else:
                output.append(torch.conv2d(level - mean, matrix[:, :, None, None]))
            if jac:
                level_log_det = torch.linalg.slogdet(matrix).logabsdet * math.prod(level.shape[2:])
                log_det = log_det + (-level_log_det if rev else level_log_det)
        return tuple(output), log_det

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The shapes do not change (FrEIA's shape inference)."""
        return input_dims
