"""A chain of invertible layers over pyramids."""

from collections.abc import Iterable, Sequence

from FrEIA.modules import InvertibleModule
from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from .pyramid import Pyramid


class PyramidFlow(nn.ModuleList):
    """Apply layers one after the other, or with ``rev`` their inverses in reverse order.

    FrEIA's ``SequenceINN`` passes one tensor along the chain, this class a tuple of maps.

    Args:
        layers: invertible layers whose inputs and outputs are pyramids of the same shapes.
        recompute: keep only each layer's input for the backward pass and recompute the rest there: memory hardly
            grows with the number of layers, and a step takes about a third longer.

    Shape:
        a tuple of maps to a tuple of maps of the same shapes, and a log-det ``(N,)`` in nats.

    Example:
        >>> import torch
        >>> from anomalib_csflow.flows import CrossScaleCoupling, ScalePermutation
        >>> dims = [(4, 4, 4), (4, 2, 2)]
        >>> flow = PyramidFlow([ScalePermutation(dims, seed=0), CrossScaleCoupling(dims, hidden_channels=8)])
        >>> latents, log_det = flow((torch.randn(2, 4, 4, 4), torch.randn(2, 4, 2, 2)))
        >>> features, log_det_back = flow(latents, rev=True)
    """

    def __init__(self, layers: Sequence[InvertibleModule], *, recompute: bool = False) -> None:
        super().__init__(layers)
        self.recompute = recompute

    def forward(self, x_or_z: Iterable[Tensor], rev: bool = False, jac: bool = True) -> tuple[Pyramid, Tensor]:
        """Transform a pyramid; returns the maps and the summed log-det (zeros if not ``jac``)."""
        pyramid = tuple(x_or_z)
        total = pyramid[0].new_zeros(pyramid[0].shape[0])
        for layer in reversed(self) if rev else self:
            if self.recompute and is_grad_enabled() and any(p.requires_grad for p in layer.parameters()):
                # layers do not draw random numbers, so no generator state has to be restored
                pyramid, log_det = checkpoint(
                    layer, pyramid, rev=rev, jac=jac, use_reentrant=False, preserve_rng_state=False
                )
            else:
                pyramid, log_det = layer(pyramid, rev=rev, jac=jac)
            total = total + log_det
        return pyramid, total
