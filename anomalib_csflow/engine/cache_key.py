"""What the features of an image depend on beside its file, as text; what cannot be put so is not cached."""

import enum
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from anomalib.pre_processing import PreProcessor
from torch import nn
from torchvision.transforms import v2

from .region import Region, RegionPreProcessor

FIXED_TRANSFORMS = (
    v2.CenterCrop,
    v2.Grayscale,
    v2.Identity,
    v2.Normalize,
    v2.Pad,
    v2.RGB,
    v2.Resize,
    v2.ToDtype,
    v2.ToImage,
    v2.ToPureTensor,
    Region,
)
"""Transforms that do the same to an image every time, whose attributes are all that they do it by."""

READING = ("__getitem__", "collate_fn")
LOADING = (
    *("train_dataloader", "val_dataloader"),
    *("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"),
)
HOSTS = ("anomalib.", "anomalib_csflow.", "lightning.", "pytorch_lightning.")


class UnkeyedError(Exception):
    """What an image's features depend on is not known in full, so they cannot be told from others."""


def transform_key(transform: object) -> str:
    """All that a transform does, as text: two that differ in anything have other texts.

    Raises:
        UnkeyedError: if it may change images at random, or has an argument of an unknown type.

    Example:
        >>> transform_key(v2.Compose([v2.CenterCrop(8), v2.Normalize([0.5], [0.25])]))
        'Compose[CenterCrop(size=(8, 8)), Normalize(inplace=False, mean=[0.5], std=[0.25])]'
        >>> transform_key(v2.RandomCrop(8))
        Traceback (most recent call last):
        ...
        anomalib_csflow.engine.cache_key.UnkeyedError: RandomCrop may change images from time to time
    """
    if transform is None:
        return "None"
    name = type(transform).__name__
    if type(transform) not in (*FIXED_TRANSFORMS, v2.Compose):  # a subclass may do anything
        msg = f"{name} may change images from time to time"
        raise UnkeyedError(msg)
    attributes, plain = dict(vars(transform)), vars(nn.Module())
    if type(transform) is v2.Compose:
        inner = ", ".join(transform_key(one) for one in attributes.pop("transforms"))
    attributes.pop("training")
    for key in [key for key in attributes if key in plain and not attributes[key]]:
        del attributes[key]  # hooks and the like, of which there are none
    own = ", ".join(f"{key}={_value_key(attributes[key], name)}" for key in sorted(attributes))
    return f"Compose[{inner}]{own}" if type(transform) is v2.Compose else f"{name}({own})"


def pre_processor_key(pre_processor: PreProcessor | None) -> str:
    """All that anomalib's pre-processor does.

    Raises:
        UnkeyedError: if it is of a class of its own, or see :func:`transform_key`.
    """
    if pre_processor is not None and type(pre_processor) not in (PreProcessor, RegionPreProcessor):
        msg = f"the pre-processor is a {type(pre_processor).__name__}, which may do more to images than its transform"
        raise UnkeyedError(msg)
    return transform_key(pre_processor and pre_processor.transform)


def data_key(dataset: object) -> str:
    """How a data set makes images of files.

    Raises:
        UnkeyedError: if it does so by code that is not anomalib's, or see :func:`transform_key`.
    """
    return f"{_code_key(dataset, READING)} {transform_key(getattr(dataset, 'augmentations', None))}"


def check_datamodule(datamodule: object) -> None:
    """Raise UnkeyedError if a datamodule makes or moves batches by code that is not anomalib's or Lightning's."""
    _code_key(datamodule, LOADING)
    collate: Any = getattr(datamodule, "external_collate_fn", None)
    if collate is not None:  # such as anomalib's tiled ensemble, which makes another tile of an image for each model
        name = getattr(collate, "__name__", type(collate).__name__)
        msg = f"the datamodule's batches are made by {name}, which may change images from time to time"
        raise UnkeyedError(msg)


def _code_key(owner: object, names: Sequence[str]) -> str:
    """Names of the functions that stand behind an object's attributes; they are of known versions of the hosts."""
    found = []
    for name in names:
        attribute: Any = getattr(type(owner), name, None)
        function = getattr(attribute, "fget", None) or attribute
        module = getattr(function, "__module__", None) or ""
        if not module.startswith(HOSTS) or name in vars(owner):
            msg = f"{type(owner).__name__} has a {name} of its own, which may change images from time to time"
            raise UnkeyedError(msg)
        found.append(f"{module}.{function.__qualname__}")
    return " ".join(found)


def _value_key(value: object, owner: str) -> str:
    """An argument's value to the last digit: the repr of a tensor, or of an array, leaves some out."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, enum.Enum)):
        return repr(value)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Mapping):
        items = sorted((_value_key(key, owner), _value_key(one, owner)) for key, one in value.items())
        return "{" + ", ".join(f"{key}: {one}" for key, one in items) + "}"
    if type(value) in (list, tuple):
        inner = ", ".join(_value_key(one, owner) for one in value)  # type: ignore[attr-defined]
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        array = np.ascontiguousarray(value.numpy(force=True) if isinstance(value, torch.Tensor) else value)
        if array.dtype.hasobject:
            msg = f"an argument of {owner} is an array of objects, which cannot be told from others"
            raise UnkeyedError(msg)
        return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"
    msg = f"an argument of {owner} is a {type(value).__name__}, which cannot be told from others of its kind"
    raise UnkeyedError(msg)
