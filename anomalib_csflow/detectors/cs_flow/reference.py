"""Names of CS-Flow weights that were trained with the authors' code or with anomalib's ``Csflow``.

Both build the flow with FrEIA's ``GraphINN``: ``module_list.N.s1.conv_scale0_0.weight`` in the
authors' code, ``...module_list.N.cross_convolution1.conv_scale0_0.weight`` in anomalib. ``s1`` sees
the first half of the channels, ``s2`` the second. Neither code stores its permutations.
"""

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

NUM_SCALES = 3
COUPLING = re.compile(r"module_list\.(?P<node>\d+)\.(?P<subnet>s|cross_convolution)(?P<half>[12])\.(?P<rest>.+)$")
CONDITIONERS = {"1": "from_first", "2": "from_second"}
CONVOLUTIONS = {
    **{f"conv_scale{scale}_0": f"enter.{scale}" for scale in range(NUM_SCALES)},
    **{f"conv_scale{scale}_1": f"leave.{scale}" for scale in range(NUM_SCALES)},
    "up_conv10": "up.0",
    "up_conv21": "up.1",
    "down_conv01": "down.0",
    "down_conv12": "down.1",
}


def convert_reference_flow(
    state_dict: Mapping[str, Tensor], permutations: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Rename a trained flow's tensors to those of a chain of permutation and coupling per block.

    Args:
        state_dict: with the couplings' tensors under either code's names; others are ignored.
        permutations: ``module_list.N.permS`` of node N and scale S, if the weights were trained with
            other permutations than the code draws. By default, they are drawn as that code draws them.

    Returns:
        Names of :class:`~anomalib_csflow.flows.PyramidFlow` to tensors.

    Raises:
        ValueError: if it contains no coupling of either code.
    """
    matches = [(match, tensor) for key, tensor in state_dict.items() if (match := COUPLING.search(key))]
    if not matches:
        msg = "there is no CS-Flow in these weights: no name like 'module_list.4.s1.conv_scale0_0.weight'"
        raise ValueError(msg)
    nodes = sorted({int(match["node"]) for match, _ in matches})
    converted: dict[str, Tensor] = {}
    gammas: dict[str, dict[int, Tensor]] = {}
    for match, tensor in matches:
        block = nodes.index(int(match["node"]))
        conditioner = f"{2 * block + 1}.{CONDITIONERS[match['half']]}"
        name, _, kind = match["rest"].rpartition(".")
        if match["rest"].startswith("gamma"):
            gammas.setdefault(f"{conditioner}.gamma", {})[int(match["rest"][-1])] = tensor
        else:
            converted[f"{conditioner}.{CONVOLUTIONS[name]}.{kind}"] = tensor
    for name, by_scale in gammas.items():
        converted[name] = torch.cat([by_scale[scale].reshape(1) for scale in range(NUM_SCALES)])

    of_anomalib = any(match["subnet"] == "cross_convolution" for match, _ in matches)
    for block in range(len(nodes)):
        first = converted[f"{2 * block + 1}.from_first.enter.0.weight"].shape[1]
        second = converted[f"{2 * block + 1}.from_second.enter.0.weight"].shape[1]
        orders = _draw(block, first + second, of_anomalib)
        if permutations is not None:  # the permutation's node comes just before that of its coupling
            orders = [permutations[f"module_list.{nodes[block] - 1}.perm{scale}"] for scale in range(NUM_SCALES)]
        converted |= {f"{2 * block}.permutation_{scale}": order for scale, order in enumerate(orders)}
    return converted


def _draw(block: int, channels: int, of_anomalib: bool) -> list[Tensor]:
    """The permutations that each code draws for a block: anomalib's are the same at every scale."""
    if of_anomalib:
        return [torch.from_numpy(np.random.default_rng(block).permutation(channels))] * NUM_SCALES
    generator = np.random.RandomState(block)
    return [torch.from_numpy(generator.permutation(channels)) for _ in range(NUM_SCALES)]
