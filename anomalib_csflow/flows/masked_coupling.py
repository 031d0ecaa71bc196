"""The masked coupling of RealNVP.

Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", ICLR 2017,
https://arxiv.org/abs/1605.08803, sections 3.4 to 3.6.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

from .pyramid import Pyramid, check_pyramid

Mask = Literal["halves", "checkerboard"]


class MaskedCoupling(InvertibleModule):
    r"""Affine coupling that keeps what a mask :math:`b` selects, and changes the rest depending on it.

    .. math::
        y = b \odot x + (1 - b) \odot (x + t) \odot e^{s}, \quad
        s = r \odot \tanh(s'), \quad (s', t) = g(b \odot x)

    The rescaling :math:`r`, one per channel, is learned, starting from 1.

    Args:
        dims_in: ``(D,)`` of the one vector or ``(C, H, W)`` of the one map. Only the channels are fixed.
        dims_c: unused, part of FrEIA's interface.
        conditioner: makes :math:`g` from (input channels, output channels).
        mask: what is kept: the first half of the channels (``halves``), or every second pixel
            (``checkerboard``, for maps only).
        swap: keep the other half instead.

    Shape:
        a tuple of one tensor to a tuple of one of the same shape, and a log-det ``(N,)`` in nats.

    Raises:
        ValueError: if there is not exactly one vector or map, or the mask cannot split it.

    Example:
        >>> coupling = MaskedCoupling([(6,)], conditioner=nn.Linear)
        >>> (latents,), log_det = coupling((torch.ones(2, 6),))
        >>> latents[0, :3], log_det.shape
        (tensor([1., 1., 1.], grad_fn=<SliceBackward0>), torch.Size([2]))
    """

    def __init__(
        self,
        dims_in: Sequence[tuple[int, ...]],
        dims_c: Sequence[tuple[int, ...]] | None = None,
        *,
        conditioner: Callable[[int, int], nn.Module],
        mask: Mask = "halves",
        swap: bool = False,
    ) -> None:
        super().__init__(dims_in, dims_c)
        channels, *size = self.dims_in[0]
        if len(self.dims_in) != 1 or (mask == "halves" and channels < 2) or (mask == "checkerboard" and not size):
            msg = f"the mask {mask!r} needs exactly one tensor that it can split, got dims_in={self.dims_in}"
            raise ValueError(msg)
        self.channels = channels
        self.mask = mask
        self.swap = swap
        self.conditioner = conditioner(channels, 2 * channels)
        self.rescale = nn.Parameter(torch.ones(channels, *(1 for _ in size)))

    def forward(
        self, x_or_z: Iterable[Tensor], c: Iterable[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Pyramid, Tensor]:
        """Transform, or with ``rev`` invert; returns the tensor and the log-det (zeros if not ``jac``)."""
        del c
        (x,) = check_pyramid(tuple(x_or_z), [self.channels], self.rescale.ndim + 1)
        kept = self._kept(x)
        raw, shift = self.conditioner(torch.where(kept, x, 0)).chunk(2, dim=1)
        log_scale = self.rescale * torch.tanh(raw)
        changed = x * (-log_scale).exp() - shift if rev else (x + shift) * log_scale.exp()
        log_det = x.new_zeros(x.shape[0])
        if jac:
            log_det = torch.where(kept, 0, log_scale).flatten(1).sum(1)
        return (torch.where(kept, x, changed),), -log_det if rev else log_det

    def _kept(self, x: Tensor) -> Tensor:
        """The mask, in a shape that broadcasts to that of x."""
        if self.mask == "halves":
            kept = (torch.arange(self.channels, device=x.device) < self.channels // 2).view(self.rescale.shape)
        else:
            rows, columns = (torch.arange(side, device=x.device) for side in x.shape[2:])
            kept = (rows[:, None] + columns) % 2 == 0
        return ~kept if self.swap else kept

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The shapes do not change (FrEIA's shape inference)."""
        return input_dims
