"""Frozen backbones: from images to the maps of some of their layers."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from typing_extensions import Self

from .strips import in_strips

PROBE_SIZE = 256
"""Side of the blank image that is used to find a layer's channels and stride; any multiple of 64 works."""


class FrozenLayers(nn.Module):
    """A backbone up to the last of some layers, without the rest, without gradients, and always in eval mode.

    Args:
        model: a convolutional network of any kind (named modules), or a timm vision transformer.
        layers: names of the modules whose outputs are used, in the order in which the model runs them.
            For a transformer: ``blocks.N``, whose tokens are folded into maps.
        final_norm: apply a transformer's final norm to each layer's tokens, as before its own head.

    Attributes:
        layers: as given.
        layer_channels: number of channels of each layer's map.
        layer_strides: pixels of the image per position of each layer's map.
        fixed_size: side of the images, if the model takes only one size; else None.

    Raises:
        ValueError: if the model has no such layer, or its output is not a map.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], final_norm: bool = False) -> None:
        super().__init__()
        if not layers or len(set(layers)) < len(layers):
            msg = f"name one or more layers, each only once, got {list(layers)}"
            raise ValueError(msg)
        for layer in layers:
            check_layer(model, layer)
        self.layers = list(layers)
        # timm's transformers have these: their tokens may begin with class and register tokens (CaiT's from 1.0.31 on)
        self.is_transformer = hasattr(model, "num_prefix_tokens") or hasattr(model, "cls_token")
        self.final_norm = final_norm
        if self.is_transformer:
            self.blocks = _block_numbers(self.layers)
            transformer: Any = model
            transformer.prune_intermediate_layers(self.blocks)
            self.model = transformer
        else:
            self.model = _truncate(model, self.layers)
            for module in self.model.modules():
                if isinstance(module, nn.Conv2d):  # takes half the time on a CPU, measured on EfficientNet-Lite
                    module.to(memory_format=torch.channels_last)
        self.requires_grad_(requires_grad=False)
        self.train()
        self._computed = [self.model]  # in a list, because a divided model has the same modules
        self.fixed_size: int | None = None
        maps = self._probe()
        if not self.is_transformer and self.fixed_size is None:
            self._computed = [in_strips(self.model, torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE))]
        self.layer_channels = [level.shape[1] for level in maps]
        if self.is_transformer:
            self.layer_strides = [int(self.model.patch_embed.patch_size[0])] * len(maps)
        else:
            self.layer_strides = [2 ** round(math.log2(PROBE_SIZE / level.shape[2])) for level in maps]

    @torch.no_grad()
    def _probe(self) -> tuple[Tensor, ...]:
        """Maps of a blank image; of the model's own size, if it only takes one."""
        named = ", ".join(repr(layer) for layer in self.layers)
        try:
            maps = self.maps(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE))
        except (AssertionError, RuntimeError, TypeError) as error:
            own_size = getattr(getattr(self.model, "patch_embed", None), "img_size", None)
            if not self.is_transformer or own_size is None:
                msg = f"layer {named} cannot be used: the backbone does not run on images of any size ({error})"
                raise ValueError(msg) from error
            self.fixed_size = int(own_size[0])
            maps = self.maps(torch.zeros(1, 3, self.fixed_size, self.fixed_size))
        for layer, level in zip(self.layers, maps, strict=True):
            if level.ndim != 4 or level.shape[2] != level.shape[3]:
                msg = f"layer {layer!r} gives {tuple(level.shape)}, not a map (N, C, H, W): choose another layer"
                raise ValueError(msg)
        return maps

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever ``mode`` is: batch-norm statistics must not drift."""
        del mode
        return super().train(mode=False)

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the layers' maps ``(N, C, ceil(H / stride), ceil(W / stride))`` in one pass."""
        if self.is_transformer:
            return tuple(
                self.model.forward_intermediates(
                    images, indices=self.blocks, norm=self.final_norm, intermediates_only=True
                )
            )
        found = self._computed[0](images)  # in the order in which the layers run
        return tuple(found[f"map {index}"] for index in range(len(self.layers)))


class FrozenBackbone(FrozenLayers):
    """A backbone up to one layer, without the rest, without gradients, and always in eval mode.

    Args:
        model: a convolutional network of any kind (named modules), or a timm vision transformer.
        layer: name of the module whose output is used, such as ``blocks.5``, ``layer3.1`` or
            ``features.6.8``. For a transformer: ``blocks.N``, whose tokens are folded into a map.

    Attributes:
        layer: as given.
        channels: number of channels of the map.
        stride: pixels of the image per position of the map.
        min_size: least height and width of an image that gives a map of one position.

    Shape:
        images ``(N, 3, H, W)`` to a map ``(N, channels, ceil(H / stride), ceil(W / stride))``.

    Raises:
        ValueError: if the model has no such layer, or its output is not a map.
    """

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__(model, [layer])
        self.layer = layer
        self.channels = self.layer_channels[0]
        self.stride = self.layer_strides[0]
        self.min_size = self.fixed_size or self._least_size()

    @torch.no_grad()
    def _least_size(self) -> int:
        """The stride, if borders are padded; more if a kernel has to fit into an unpadded map, as in AlexNet."""
        fails, works = self.stride - 1, PROBE_SIZE
        side = self.stride  # tried first: almost always the answer
        while fails + 1 < works:
            try:
                self(torch.zeros(1, 3, side, side))
                works = side
            except (AssertionError, RuntimeError):
                fails = side
            side = (fails + works) // 2
        return works

    def forward(self, images: Tensor) -> Tensor:
        """Compute the layer's map."""
        return self.maps(images)[0]


def _block_numbers(layers: Sequence[str]) -> list[int]:
    """Numbers of a transformer's blocks, from names such as ``blocks.8``."""
    numbers = [layer.removeprefix("blocks.") for layer in layers]
    for layer, number in zip(layers, numbers, strict=True):
        if not number.isdigit():
            msg = f"layer {layer!r} of a transformer gives no map: name a block, such as 'blocks.{8}'"
            raise ValueError(msg)
    blocks = [int(number) for number in numbers]
    if blocks != sorted(blocks):
        msg = f"name a transformer's blocks in order, got {list(layers)}"
        raise ValueError(msg)
    return blocks


def _truncate(model: nn.Module, layers: Sequence[str]) -> nn.Module:
    """Trace the model up to the last layer, and drop the rest."""
    names = {layer: f"map {index}" for index, layer in enumerate(layers)}
    tracer = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    try:
        dual = create_feature_extractor(model.eval(), names, tracer_kwargs=tracer, suppress_diff_warning=True)
    except Exception as error:  # tracing fails in as many ways as there are models
        named = ", ".join(repr(layer) for layer in layers)
        msg = f"layer {named} cannot be used: tracing the backbone up to it fails ({error})"
        raise ValueError(msg) from error
    # only the graph for evaluation: a module that holds graphs as attributes is nested too deeply for pickle
    return torch.fx.GraphModule(dual, dual.eval_graph)


def check_layer(model: nn.Module, layer: str) -> None:
    """Check that the model has a module of that name.

    Raises:
        ValueError: if it has none; the message lists similar names.
    """
    names = [name for name, _ in model.named_modules() if name]
    if layer not in names:
        near = difflib.get_close_matches(layer, names, n=5) or [name for name in names if "." not in name]
        msg = f"the backbone has no layer {layer!r}; near names are {', '.join(near)}"
        raise ValueError(msg)
