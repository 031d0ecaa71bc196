"""Ranges of the detectors' arguments, by name: checked before any work, alike for all detectors."""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from os import PathLike
from typing import Any

COUNTS = {
    "num_blocks": 1,
    "num_scales": 1,
    "num_steps": 1,
    "num_hidden": 0,
    "hidden_channels": 1,
    "condition_channels": 1,
    "num_train_rotations": 1,
    "num_test_rotations": 1,
    "fibers_per_step": 1,
    "max_epochs": 1,
    "crop_size": 1,
}
"""Whole numbers, and the least of each."""

FLAGS = (
    *("antialias", "standardize", "whiten", "bfloat16", "recompute", "permute_soft", "fixed_train_rotations"),
    "localize",
)
OPTIONAL = (
    *("kernel_sizes", "coarse_kernel_size", "output_kernel_size", "conditioner_clamp"),
    *("gradient_clip_norm", "max_epochs", "max_steps", "crop_size", "region"),
)
"""May be None too."""

LARGEST_KERNEL = 15
"""A convolution's weights grow with the square of its size: at the paper's width a kernel of 101 takes 20 GB."""


def _is_whole(value: object, least: int = 1, most: float = math.inf) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most


def _is_number(value: object, least: float = 0, below: float = math.inf) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and least <= float(value) < below


def _each(value: object, test: Callable[[Any], bool], lengths: Container[int] = range(1, 1000)) -> bool:
    return (
        isinstance(value, Sequence) and not isinstance(value, str) and len(value) in lengths and all(map(test, value))
    )


RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **{name: (f"{least} or more", partial(_is_whole, least=least)) for name, least in COUNTS.items()},
    **dict.fromkeys(
        ("clamp", "conditioner_clamp", "hidden_ratio", "gradient_clip_norm"),
        ("a number above 0", lambda x: _is_number(x) and x > 0),
    ),
    **dict.fromkeys(("lr", "eps", "weight_decay"), ("a number of 0 or more", _is_number)),
    **dict.fromkeys(FLAGS, ("True or False", lambda x: isinstance(x, bool))),
    "max_steps": ("1 or more, or 'auto'", lambda x: _is_whole(x) or x == "auto"),
    "keep_aspect": ("True, False or 'auto'", lambda x: isinstance(x, bool) or x == "auto"),
    **dict.fromkeys(("backbone", "layer"), ("a name", lambda x: isinstance(x, str))),
    "layers": ("a list of names", lambda x: _each(x, lambda one: isinstance(one, str), range(1000))),
    "top_share": ("a number", lambda x: _is_number(x, -math.inf)),  # scoring says which
    "region": ("a path", lambda x: isinstance(x, (str, PathLike))),
    "weights": ("hub, package, random or a path", lambda x: isinstance(x, (str, PathLike))),
    "kernel_sizes": (
        f"one or more whole numbers from 1 to {LARGEST_KERNEL}",
        lambda x: _each(x, partial(_is_whole, most=LARGEST_KERNEL)),
    ),
    **dict.fromkeys(
        ("coarse_kernel_size", "output_kernel_size"),
        (f"a whole number from 1 to {LARGEST_KERNEL}", partial(_is_whole, most=LARGEST_KERNEL)),
    ),
    "betas": ("two numbers of 0 or more and below 1", lambda x: _each(x, partial(_is_number, below=1), (2,))),
    "image_size": ("positive, a whole number or two", lambda x: _is_whole(x) or _each(x, _is_whole, (2,))),
}
"""What each argument must be, and how to see whether a value is."""

ONE_OF_EACH = ("1 or more for each layer", partial(_each, test=_is_whole))


def check_arguments(arguments: Mapping[str, Any], of_each_layer: Container[str] = ()) -> None:
    """Check those arguments of a detector that mean the same in all of them; a constructor gives its ``locals()``.

    Args:
        arguments: by name; names that are not known here are left to the detector.
        of_each_layer: names of counts that are given for each layer.

    Raises:
        ValueError: names the first that is of a wrong type or out of its range, and says what it may be.

    Example:
        >>> check_arguments({"num_blocks": 4, "clamp": 1.9, "top_share": 0.1})
        >>> check_arguments({"num_blocks": 4, "clamp": 0})
        Traceback (most recent call last):
        ...
        ValueError: clamp must be a number above 0, got 0
    """
    for name, value in arguments.items():
        wanted, is_right = ONE_OF_EACH if name in of_each_layer else RULES.get(name, ("", None))
        if is_right is None or (value is None and name in OPTIONAL) or is_right(value):
            continue
        msg = f"{name} must be {wanted}, got {value!r}"
        raise ValueError(msg)
