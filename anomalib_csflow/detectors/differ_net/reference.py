"""Names of flows that were trained with DifferNet's published code.

It builds the flow with FrEIA: ``module_list.N.s1.fc1.weight`` belongs to node N, and the node before it is
the permutation. ``s1`` sees the first half of the features. The permutations are not stored.
"""

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

COUPLING = re.compile(r"module_list\.(?P<node>\d+)\.s(?P<half>[12])\.(?P<layer>fc\w+)\.(?P<kind>weight|bias)$")
LAYERS = {"fc1": 0, "fc2": 2, "fc2b": 4, "fc3": 6}  # with ReLUs between them; the published batch norms are unused


def convert_reference_flow(
    state_dict: Mapping[str, Tensor], permutations: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Rename a trained flow's tensors to those of a chain of permutation and coupling per block.

    Args:
        state_dict: with the couplings' tensors under the published names; others are ignored.
        permutations: ``module_list.N.perm`` of node N, if the weights were trained with other
            permutations than the code draws. By default, they are drawn as that code draws them.

    Returns:
        Names of :class:`~anomalib_csflow.flows.PyramidFlow` to tensors.

    Raises:
        ValueError: if it contains no coupling.
    """
    matches = [(match, tensor) for key, tensor in state_dict.items() if (match := COUPLING.search(key))]
    if not matches:
        msg = "there is no DifferNet in these weights: no name like 'module_list.2.s1.fc1.weight'"
        raise ValueError(msg)
    nodes = sorted({int(match["node"]) for match, _ in matches})
    converted: dict[str, Tensor] = {}
    for match, tensor in matches:
        coupling = 2 * nodes.index(int(match["node"])) + 1
        converted[f"{coupling}.subnet{match['half']}.{LAYERS[match['layer']]}.{match['kind']}"] = tensor
    for block, node in enumerate(nodes):
        width = sum(converted[f"{2 * block + 1}.subnet{half}.0.weight"].shape[1] for half in (1, 2))
        order = torch.from_numpy(np.random.RandomState(block).permutation(width))
        if permutations is not None:
            order = permutations[f"module_list.{node - 1}.perm"]
        converted[f"{2 * block}.permutation_0"] = order
    return converted
