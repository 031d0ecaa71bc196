"""8-bit models, and what in them stays in float."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

CALIBRATION_IMAGES = 300
"""Number of images used to measure the ranges of activations: NNCF's default maximum."""
PRODUCTS = ("Convolution", "GroupConvolution", "MatMul")
FLOW = "model.flow."
"""Prefix of the names of the flow's parameters, in torch and in exported graphs."""
Item = TypeVar("Item")


def quantized(model: Any, items: Sequence[Item], read: Callable[[Item], Any], num_first: int = 1) -> Any:
    """The model in 8 bits, weights and activations.

    Args:
        model: OpenVINO's, in float.
        items: one for each good image on which the ranges of activations are measured.
        read: gives an item's image, as the model takes it.
        num_first: see :func:`float_operations`.
    """
    import nncf  # noqa: PLC0415 (seconds, and optional)

    return nncf.quantize(
        model,
        nncf.Dataset(items, read),
        subset_size=len(items),
        ignored_scope=nncf.IgnoredScope(names=float_operations(model, num_first), validate=False),
    )


def float_operations(model: Any, num_first: int = 1) -> list[str]:
    """Names of an OpenVINO model's operations that an 8-bit model should leave in float.

    All operations stay in float, except the products of the backbone and the flow, and what feeds the backbone's:
    activations and residual sums between them. Latents and scores stay in float because ranges that are measured on
    good images would clip those of defects. Two kinds of products, which take little of the time, stay in float too:
    depthwise convolutions, in which each channel has its own range, and the first products, to whose weights NNCF gives
    only 7 bits.

    Args:
        model: OpenVINO's.
        num_first: number of the backbone's first products to leave in float.
    """
    eight_bit: set[str] = set()
    flow: set[str] = set()  # its products, and all that leads to them
    backbone: list[tuple[str, str, int]] = []  # names, types and weights of its products, the last one first
    operations = [(o, o.get_friendly_name(), o.get_type_name()) for o in model.get_ordered_ops()]
    for operation, name, kind in reversed(operations):
        inputs = [operation.input_value(index).get_node() for index in range(operation.get_input_size())]
        consumers = {t.get_node().get_friendly_name() for o in operation.outputs() for t in o.get_target_inputs()}
        is_flow = any(node.get_friendly_name().startswith(FLOW) for node in inputs)
        if (is_flow and kind in PRODUCTS) or consumers & flow:
            flow.add(name)
        if kind in PRODUCTS and not is_flow and name in flow:
            backbone.append((name, kind, _weight(inputs[1])))
            eight_bit.add(name)
        elif consumers & eight_bit:
            eight_bit.add(name)
    # what feeds the flow's products stays in float: it becomes the latents
    eight_bit |= {name for _, name, kind in operations if kind in PRODUCTS and name in flow}
    # where an image is divided into strips, a product is there once for each of them
    first = list(dict.fromkeys(weight for _, _, weight in reversed(backbone)))[:num_first]
    eight_bit -= {name for name, kind, weight in backbone if kind == "GroupConvolution" or weight in first}
    fixed = {"Constant", "Parameter", "Result"}
    return [name for _, name, kind in operations if kind not in fixed and name not in eight_bit]


def _weight(node: Any) -> int:
    """A digest of the constant that a product's weights are made from, such as by reshaping."""
    while node.get_input_size():
        node = node.input_value(0).get_node()
    return hash(node.data.tobytes()) if node.get_type_name() == "Constant" else hash(node.get_friendly_name())
