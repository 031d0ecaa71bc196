"""Large images in horizontal strips, because a backbone's first maps take most of the memory of an inference.

A layer only sees some rows above and below a position. So a strip with a margin of that many rows gives the whole map's
rows of that strip, up to rounding, and the large maps between a block's input and its output never exist as a whole.
"""

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from timm.layers.drop import DropPath
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.fx.passes.split_module import split_module
from torch.nn import functional as F  # noqa: N812

STRIP_VALUES = 2**22
"""Number of values in the largest map of a strip of one image, without its margin: 16 MiB."""

LEAST_STRIPS = 3
"""Fewer strips than this would hardly save memory."""

LARGEST_MARGIN = 64
"""Rows of the image above and below a strip that are worth computing twice."""

POINTWISE = (
    *(nn.BatchNorm2d, nn.Identity, nn.Dropout, DropPath, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU),
    *(nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
)
"""Modules that see one position, in eval mode."""

POINTWISE_FUNCTIONS = {operator.add, torch.add, torch.relu, F.relu, F.relu6, F.silu, F.gelu}
"""Functions that see one position, if all maps have one size."""


class Strips(NamedTuple):
    """How a part of a backbone is divided.

    Attributes:
        stride: of the part.
        margin: rows of its input that a strip needs above and below it, a multiple of the stride.
        values: number of values in its largest map, for each position of its input.
    """

    stride: int
    margin: int
    values: float


class InStrips(nn.Module):
    """A part of a backbone that is computed strip by strip, if its maps are large.

    Args:
        part: a map ``(N, C, H, W)`` to ``(N, D, H / stride, W / stride)``.
        strips: how to divide it.
    """

    def __init__(self, part: nn.Module, strips: Strips) -> None:
        super().__init__()
        self.part = part
        self.strips = strips

    def forward(self, maps: Tensor) -> Tensor:
        """Compute the part; at once if strips could not be aligned with its strides."""
        height, width = maps.shape[2:]
        stride, margin, values = self.strips
        number = math.ceil(height * width * values / STRIP_VALUES)
        if number < LEAST_STRIPS or height % stride or width % stride:
            return cast("Tensor", self.part(maps))
        rows = max(math.ceil(height / number / stride) * stride, 4 * margin)  # of wide images, margins would be most
        done = []
        for top in range(0, height, rows):
            begin, end = max(top - margin, 0), min(top + rows + margin, height)
            first = (top - begin) // stride
            done.append(self.part(maps[:, :, begin:end])[:, :, first : first + rows // stride])
        return torch.cat(done, dim=2)


def in_strips(model: fx.GraphModule, image: Tensor) -> fx.GraphModule:
    """The same backbone, whose parts with large maps are computed in strips if the image is large.

    Such a part begins and ends with a small map, and only has convolutions, pooling, and functions of single positions
    between them. So the parts that see the whole image, as by attention or squeeze-and-excitation, are not divided.

    Args:
        model: of images, in eval mode.
        image: ``(1, 3, S, S)``, to measure the maps on; S is a multiple of all strides.

    Returns:
        A model that shares all modules with the given one; or that one, if no part of it can be divided.
    """
    if any(node.op == "get_attr" for node in model.graph.nodes):
        return model  # dividing would copy these tensors, which would then miss what happens to the model's
    ShapeProp(model).propagate(image)
    nodes = [node for node in model.graph.nodes if node.op != "output"]
    begin = nodes[0]
    ends = [node for node in _waists(nodes) if node is nodes[-1] or _is_small(node, image)]
    part_of: dict[fx.Node, int] = {}
    found: dict[int, Strips] = {}
    part = 0
    for end in ends:
        inside = nodes[nodes.index(begin) + 1 : nodes.index(end) + 1]
        strips = _strips(model, begin, inside, image)
        part += strips is not None or part in found  # what is not divided stays together
        if strips is not None:
            found[part] = strips
        part_of.update(dict.fromkeys(inside, part))
        begin = end
    if not found:
        return model
    divided = split_module(model, model, part_of.__getitem__)
    for part, strips in found.items():
        name = f"submod_{part}"
        divided.set_submodule(name, InStrips(divided.get_submodule(name), strips))
    return divided.eval()


def _waists(nodes: Sequence[fx.Node]) -> Iterator[fx.Node]:
    """Nodes that every path from an earlier node to a later one goes through, in order; the last node is one."""
    place = {node: index for index, node in enumerate(nodes)}
    needed_until = 0
    for index, node in enumerate(nodes):
        if 0 < index >= needed_until:
            yield node
        needed_until = max([needed_until, *(place.get(user, 0) for user in node.users)])  # the output has no place


def _strips(model: fx.GraphModule, begin: fx.Node, inside: Sequence[fx.Node], image: Tensor) -> Strips | None:
    """How to divide the part between two waists; None if it need not be divided, or cannot."""
    end = inside[-1]
    needed = list(model.graph.nodes)[-1].all_input_nodes
    if all(_is_small(node, image) for node in inside) or any(node in needed for node in inside[:-1]):
        return None
    if any(begin in node.all_input_nodes and _is_in_place(model, node) for node in inside):
        return None  # it would change the rows that two strips share
    above = _shape(begin)[2]
    reaches = {begin: 0.0}
    for node in inside:
        reach = _reach(model, node) if _is_map(node, image) else None
        if reach is None:
            return None
        reaches[node] = max(reaches[x] + reach * above / _shape(x)[2] for x in node.all_input_nodes)
    stride = above // _shape(end)[2]
    margin = math.ceil(reaches[end] / stride) * stride
    if margin * image.shape[2] > LARGEST_MARGIN * above:
        return None
    return Strips(stride, margin, max(_shape(node).numel() for node in inside) / above**2)


def _reach(model: fx.GraphModule, node: fx.Node) -> int | None:
    """Rows that a node sees above and below a position of its input, at most; None if this is not known."""
    if node.op == "call_function":
        one_size = all(_shape(x)[2:] == _shape(node)[2:] for x in node.all_input_nodes)
        return 0 if one_size and node.target in POINTWISE_FUNCTIONS else None
    module: Any = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, nn.BatchNorm2d) and module.running_mean is None:
        return None  # it takes the statistics of what it sees
    if isinstance(module, POINTWISE):
        return 0
    is_local = isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d))
    if not is_local or getattr(module, "padding_mode", "zeros") != "zeros":
        return None
    kernel, dilation, padding = (_rows(getattr(module, name, 1)) for name in ("kernel_size", "dilation", "padding"))
    seen = dilation * (kernel - 1)
    return max(padding, seen - padding)


def _is_in_place(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may write to its input."""
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    return bool(getattr(module, "inplace", False) or node.kwargs.get("inplace", False))


def _rows(value: Any) -> int:
    """That of the rows, of a convolution's sizes; padding by a rule ("same") counts as none, the worst case."""
    first = value[0] if isinstance(value, (tuple, list)) else value
    return first if isinstance(first, int) else 0


def _shape(node: fx.Node) -> torch.Size:
    return cast("torch.Size", node.meta["tensor_meta"].shape)


def _is_map(node: fx.Node, image: Tensor) -> bool:
    """Whether a node gives one square map whose side divides the image's."""
    shape = getattr(node.meta.get("tensor_meta"), "shape", ())
    return len(shape) == 4 and shape[2] == shape[3] and image.shape[2] % shape[2] == 0


def _is_small(node: fx.Node, image: Tensor) -> bool:
    """Whether a node gives a map of at most half as many values as the image has."""
    return _is_map(node, image) and 2 * _shape(node).numel() <= image.numel()
