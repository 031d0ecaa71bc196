"""Fixed random channel permutations, one per level."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from FrEIA.modules import InvertibleModule
from torch import Tensor

from .pyramid import Pyramid, check_pyramid


class ScalePermutation(InvertibleModule):
    """Permute the channels of each level by its own random, fixed permutation.

    The permutations are drawn from one legacy NumPy generator (MT19937), finest level first, as in
    the published CS-Flow code: block ``k`` with ``seed=k`` has the paper's permutations.

    Args:
        dims_in: ``(C, H, W)`` of each level, finest first, or ``(D,)`` of vectors.
        dims_c: unused, part of FrEIA's interface.
        seed: of the generator.

    Shape:
        maps ``(N, C_i, H_i, W_i)`` or vectors ``(N, D_i)`` to the same shapes, and a log-det of zeros ``(N,)``.

    Example:
        >>> permutation = ScalePermutation([(3, 2, 2), (3, 1, 1)], seed=0)
        >>> permutation.permutation_0, permutation.permutation_1
        (tensor([2, 1, 0]), tensor([2, 0, 1]))
    """

    def __init__(
        self,
        dims_in: Sequence[tuple[int, ...]],
        dims_c: Sequence[tuple[int, ...]] | None = None,
        *,
        seed: int,
    ) -> None:
        super().__init__(dims_in, dims_c)
        generator = np.random.RandomState(seed)
        self.channels = [dims[0] for dims in self.dims_in]
        for scale, channels in enumerate(self.channels):
            self.register_buffer(f"permutation_{scale}", torch.from_numpy(generator.permutation(channels)))

    def forward(
        self, x_or_z: Iterable[Tensor], c: Iterable[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Pyramid, Tensor]:
        """Permute, or with ``rev`` undo it."""
        del c, jac
        pyramid = check_pyramid(tuple(x_or_z), self.channels, len(self.dims_in[0]) + 1)
        orders = [self.get_buffer(f"permutation_{scale}") for scale in range(len(pyramid))]
        if rev:
            orders = [torch.argsort(order) for order in orders]
        permuted = tuple(level.index_select(1, order) for level, order in zip(pyramid, orders, strict=True))
        return permuted, pyramid[0].new_zeros(pyramid[0].shape[0])

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The shapes do not change (FrEIA's shape inference)."""
        return input_dims
