"""Glow's coupling of vectors, as in DifferNet.

Rudolph, Wandt, Rosenhahn, "Same Same But DifferNet: Semi-Supervised Defect Detection with Normalizing
Flows", WACV 2021, https://arxiv.org/abs/2008.12577, section 3.2.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from FrEIA.modules import GLOWCouplingBlock
from torch import Tensor

from .cross_scale import ATAN_FACTOR
from .perceptron import Perceptron
from .pyramid import Pyramid, check_pyramid


def _soft_clamp(values: Tensor, clamp: float) -> Tensor:
    """Map to within +-1; FrEIA's own function does not divide by ``clamp``, so it is steeper at 0 than published."""
    return ATAN_FACTOR * torch.atan(values / clamp)


class GlowCoupling(GLOWCouplingBlock):
    r"""FrEIA's Glow coupling with the published clamp, a log-det that is always ``(N,)``, and perceptrons.

    With the halves :math:`(u, v)` and the perceptrons :math:`g, h`:

    .. math::
        u' &= u \odot e^{\sigma(s)} + t, \quad (s, t) = g(v) \\
        v' &= v \odot e^{\sigma(s')} + t', \quad (s', t') = h(u'), \qquad
        \sigma(s) = 0.636\, c \arctan(s / c)

    Args:
        dims_in: ``(D,)`` of the one vector, D 2 or more.
        dims_c: unused, part of FrEIA's interface.
        hidden_features: width of the perceptrons.
        num_hidden: number of hidden layers of the perceptrons.
        clamp: bound :math:`c` of the log-scales (alpha).

    Shape:
        a tuple of one vector ``(N, D)`` to the same, and a log-det ``(N,)`` in nats.

    Raises:
        ValueError: if there is not one vector of two features or more.

    Example:
        >>> coupling = GlowCoupling([(6,)], hidden_features=8)
        >>> (latents,), log_det = coupling((torch.randn(2, 6),))
        >>> latents.shape, log_det.shape
        (torch.Size([2, 6]), torch.Size([2]))
    """

    def __init__(
        self,
        dims_in: Sequence[tuple[int, ...]],
        dims_c: Sequence[tuple[int, ...]] | None = None,
        *,
        hidden_features: int = 2048,
        num_hidden: int = 3,
        clamp: float = 3.0,
    ) -> None:
        if len(dims_in) != 1 or len(dims_in[0]) != 1 or dims_in[0][0] < 2:
            msg = f"a Glow coupling needs one vector of two features or more, got dims_in={dims_in}"
            raise ValueError(msg)
        super().__init__(
            dims_in,
            dims_c or [],
            subnet_constructor=partial(Perceptron, hidden_features=hidden_features, num_hidden=num_hidden),
            clamp=clamp,
            clamp_activation=partial(_soft_clamp, clamp=clamp),
        )

    def forward(
        self, x_or_z: Iterable[Tensor], c: Iterable[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Pyramid, Tensor]:
        """Transform, or with ``rev`` invert; returns the vector and the log-det (zeros if not ``jac``)."""
        vector = check_pyramid(tuple(x_or_z), [self.channels], ndim=2)
        output, log_det = super().forward(vector, tuple(c or ()), rev=rev, jac=jac)
        return tuple(output), log_det if jac else log_det.new_zeros(log_det.shape)
