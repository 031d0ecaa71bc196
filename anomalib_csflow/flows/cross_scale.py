"""The cross-scale coupling layer.

Rudolph et al., "Fully Convolutional Cross-Scale-Flows for Image-based Defect Detection", WACV 2022,
https://arxiv.org/abs/2110.02855.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

from .cross_convolution import CrossConvolution
from .pyramid import Pyramid, check_pyramid, check_sizes

Conditioner = Callable[[Sequence[int], Sequence[int]], nn.Module]
"""Makes a module that maps a tuple of maps with the first channels to one with the second."""

Transform = Callable[[Pyramid, Pyramid, Pyramid], tuple[Pyramid, Pyramid, Pyramid]]
"""From both halves and the conditions to both halves and the log-scales."""

ATAN_FACTOR = 0.636
"""The published rounding of 2 / pi: with it, clamp * 0.636 * atan(s / clamp) stays within +-clamp."""


class CrossScaleCoupling(InvertibleModule):
    r"""Glow-type affine coupling of all levels at once, both halves transformed (eq. 3 and 4).

    Each level's channels are split into halves :math:`(u, v)`; the conditioners :math:`g, h` see one
    half of **every** level:

    .. math::
        u' &= u \odot e^{\sigma(s)} + t, \quad (s, t) = g(v) \\
        v' &= v \odot e^{\sigma(s')} + t', \quad (s', t') = h(u'), \qquad
        \sigma(s) = 0.636\, c \arctan(s / c)

    Args:
        dims_in: ``(C, H, W)`` of each level, finest first; C is 2 or more, even or odd. Only the channels are
            fixed: maps of other sizes may be passed later.
        dims_c: ``(C, H, W)`` of one condition per level, or none. Both conditioners get it, concatenated to their
            half.
        conditioner: makes the conditioners from (input channels, output channels) of the levels;
            each maps a tuple of maps to a tuple of maps. The default is :class:`CrossConvolution`.
        hidden_channels: of the default conditioner.
        kernel_size: of the default conditioner.
        coarse_kernel_size: of the default conditioner, for all levels but the finest; by default ``kernel_size``.
        output_kernel_size: of the default conditioner, for its links and the finest level's second convolution; by
            default ``kernel_size``.
        clamp: bound :math:`c` of the log-scales (the paper's alpha).
        conditioner_clamp: bound of the conditioners' inputs; by default they have none, as in the paper. With
            standardized channels, a bound of 2 hardly changes what is usual, and what is unusual has less effect on
            the latents of the positions around it.

    Shape:
        maps ``(N, C_i, H_i, W_i)`` to maps of the same shapes, and a log-det ``(N,)`` in nats.

    Raises:
        ValueError: if the levels, channels or sizes do not make a pyramid.

    Example:
        >>> coupling = CrossScaleCoupling([(4, 6, 8), (4, 3, 4)], hidden_channels=8)
        >>> latents, log_det = coupling((torch.randn(2, 4, 6, 8), torch.randn(2, 4, 3, 4)))
        >>> [tuple(latent.shape) for latent in latents], tuple(log_det.shape)
        ([(2, 4, 6, 8), (2, 4, 3, 4)], (2,))
    """

    def __init__(
        self,
        dims_in: Sequence[tuple[int, int, int]],
        dims_c: Sequence[tuple[int, int, int]] | None = None,
        *,
        conditioner: Conditioner | None = None,
        hidden_channels: int = 1024,
        kernel_size: int = 3,
        coarse_kernel_size: int | None = None,
        output_kernel_size: int | None = None,
        clamp: float = 3.0,
        conditioner_clamp: float | None = None,
    ) -> None:
        super().__init__(dims_in, dims_c)
        self.channels = [dims[0] for dims in self.dims_in]
        if not self.channels or min(self.channels) < 2:
            msg = f"a coupling needs at least one level and two channels at each, got dims_in={self.dims_in}"
            raise ValueError(msg)
        if self.dims_c and len(self.dims_c) != len(self.dims_in):
            msg = f"give one condition per level or none: {len(self.dims_in)} levels, {len(self.dims_c)} conditions"
            raise ValueError(msg)
        check_sizes([(height, width) for _, height, width in self.dims_in])

        first = [channels // 2 for channels in self.channels]
        second = [channels - half for channels, half in zip(self.channels, first, strict=True)]
        conditions = [dims[0] for dims in self.dims_c] or [0] * len(first)
        build = conditioner or partial(
            CrossConvolution,
            hidden_channels=hidden_channels,
            kernel_size=kernel_size,
            coarse_kernel_size=coarse_kernel_size,
            output_kernel_size=output_kernel_size,
        )
        self.from_first = build([u + c for u, c in zip(first, conditions, strict=True)], [2 * v for v in second])
        self.from_second = build([v + c for v, c in zip(second, conditions, strict=True)], [2 * u for u in first])
        self.first, self.second = first, second
        self.clamp = clamp
        self.conditioner_clamp = conditioner_clamp

    def forward(
        self, x_or_z: Iterable[Tensor], c: Iterable[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Pyramid, Tensor]:
        """Transform a pyramid; ``rev`` inverts. Returns the maps and the log-det (zeros if not ``jac``)."""
        output, log_scales = self._transform(x_or_z, c, self._inverse if rev else self._forward)
        log_det = output[0].new_zeros(output[0].shape[0])
        if jac:
            log_det = torch.stack([log_scale.flatten(1).sum(1) for log_scale in log_scales]).sum(0)
        return output, -log_det if rev else log_det

    def with_log_scales(self, x: Iterable[Tensor], c: Iterable[Tensor] | None = None) -> tuple[Pyramid, Pyramid]:
        """Transform a pyramid; returns the maps and, in maps of the same shapes, the log-scale of each number."""
        output, log_scales = self._transform(x, c, self._forward)
        halves = zip(log_scales[: len(output)], log_scales[len(output) :], strict=True)
        return output, tuple(torch.cat(level, dim=1) for level in halves)

    def _transform(
        self, x: Iterable[Tensor], c: Iterable[Tensor] | None, transform: Transform
    ) -> tuple[Pyramid, Pyramid]:
        """The transformed maps, and the log-scales of all first halves, then of all second ones."""
        pyramid = check_pyramid(tuple(x), self.channels)
        conditions = tuple(c or ())
        if len(conditions) != len(self.dims_c):
            msg = f"expected {len(self.dims_c)} conditions, got {len(conditions)}"
            raise ValueError(msg)
        # split instead of slices, whose gradients are padded with zeros in another memory layout
        first, second = zip(
            *(level.split([u, v], dim=1) for level, u, v in zip(pyramid, self.first, self.second, strict=True)),
            strict=True,
        )
        first, second, log_scales = transform(first, second, conditions)
        return tuple(torch.cat(halves, dim=1) for halves in zip(first, second, strict=True)), log_scales

    def _forward(self, first: Pyramid, second: Pyramid, conditions: Pyramid) -> tuple[Pyramid, Pyramid, Pyramid]:
        log_scale, shift = self._log_scale_and_shift(self.from_second, second, conditions)
        first = tuple(u * s.exp() + t for u, s, t in zip(first, log_scale, shift, strict=True))
        log_scale_2, shift = self._log_scale_and_shift(self.from_first, first, conditions)
        second = tuple(v * s.exp() + t for v, s, t in zip(second, log_scale_2, shift, strict=True))
        return first, second, log_scale + log_scale_2

    def _inverse(self, first: Pyramid, second: Pyramid, conditions: Pyramid) -> tuple[Pyramid, Pyramid, Pyramid]:
        log_scale_2, shift = self._log_scale_and_shift(self.from_first, first, conditions)
        second = tuple((v - t) * (-s).exp() for v, s, t in zip(second, log_scale_2, shift, strict=True))
        log_scale, shift = self._log_scale_and_shift(self.from_second, second, conditions)
        first = tuple((u - t) * (-s).exp() for u, s, t in zip(first, log_scale, shift, strict=True))
        return first, second, log_scale + log_scale_2

    def _log_scale_and_shift(
        self, conditioner: nn.Module, half: Pyramid, conditions: Pyramid
    ) -> tuple[Pyramid, Pyramid]:
        """Clamped log-scales and shifts of the other half, from one half of every level."""
        if self.conditioner_clamp is not None:
            half = tuple(level.clamp(-self.conditioner_clamp, self.conditioner_clamp) for level in half)
        if conditions:
            half = tuple(torch.cat(maps, dim=1) for maps in zip(half, conditions, strict=True))
        raw, shift = zip(*(output.chunk(2, dim=1) for output in conditioner(half)), strict=True)
        return tuple(self.clamp * ATAN_FACTOR * torch.atan(s / self.clamp) for s in raw), shift

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The shapes do not change (FrEIA's shape inference)."""
        return input_dims
