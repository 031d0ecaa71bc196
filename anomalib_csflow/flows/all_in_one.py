"""Chains of FrEIA's all-in-one blocks, the flow of CFLOW-AD, FastFlow and MSFlow."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from FrEIA.framework import SequenceINN
from FrEIA.modules import AllInOneBlock
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Subnet = Callable[[int, int], nn.Module]
"""Makes a network from its input and output channels."""


def _global_scale(raw: Tensor) -> Tensor:
    return 0.1 * F.softplus(raw, beta=0.5)


def all_in_one_chain(
    channels: int,
    subnets: Sequence[Subnet],
    *,
    maps: bool,
    condition_channels: int = 0,
    clamp: float = 2.0,
    permute_soft: bool = False,
    seed: int = 0,
) -> SequenceINN:
    """Chain blocks of affine coupling, global affine map and fixed permutation.

    Unlike in FrEIA, the permutations are drawn from a seed, block by block, and are buffers instead of frozen
    parameters, under FrEIA's names.

    Args:
        channels: number of channels of the inputs.
        subnets: for each block, what makes its network.
        maps: whether inputs are maps ``(N, C, H, W)``, of any size, or vectors ``(N, C)``.
        condition_channels: number of channels of the condition, or 0 for none.
        clamp: bound of the log-scales.
        permute_soft: rotate by a random matrix of SO(C) instead of permuting.
        seed: for the first block; each further block uses the next number.

    Returns:
        A chain from ``x`` (and ``c=[condition]``) to outputs and the log-det ``(N,)``.

    Raises:
        ValueError: if there are fewer than two channels or no blocks.
    """
    if channels < 2 or not subnets:
        msg = f"a flow needs at least two channels and one block, got {channels} channels and {len(subnets)} blocks"
        raise ValueError(msg)
    size = (1, 1) if maps else ()  # any size: only the channels are fixed
    chain = SequenceINN(channels, *size)
    state = np.random.get_state()
    for index, subnet in enumerate(subnets):
        np.random.seed(seed + index)  # FrEIA draws from the global generator
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Soft permutation")  # of its slowness: a second at 2048 channels
            chain.append(
                AllInOneBlock,
                cond=0 if condition_channels else None,
                cond_shape=(condition_channels, *size) if condition_channels else None,
                subnet_constructor=subnet,
                affine_clamping=clamp,
                permute_soft=permute_soft,
            )
    np.random.set_state(state)
    for block in chain:
        block.global_scale_activation = _global_scale  # computes the same as FrEIA's lambda, which cannot be pickled
        for name in ("w_perm", "w_perm_inv"):
            matrix = getattr(block, name).data
            delattr(block, name)
            block.register_buffer(name, matrix)
    return chain
