"""Frozen backbones: from images to a pyramid of feature maps."""

import difflib
import math
from itertools import pairwise
from typing import Any

import torch
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchvision.models.feature_extraction import create_feature_extractor

PROBE_SIZE = 256
"""Side of the blank image that tells a layer's channels and stride; any multiple of 64 would do."""


class FrozenBackbone(nn.Module):
    """A backbone up to one layer: no gradients, always in eval mode, nothing kept beyond the layer.

    Args:
        model: a convolutional network of any kind (named modules), or a timm vision transformer.
        layer: name of the module whose output is used, such as ``blocks.5``, ``layer3.1`` or
            ``features.6.8``. Of a transformer: ``blocks.N``, whose tokens are folded to a map.

    Attributes:
        channels: of the map.
        stride: pixels of the image per cell of the map.
        min_size: least height and width of an image that gives a cell.

    Shape:
        images ``(N, 3, H, W)`` to a map ``(N, channels, ceil(H / stride), ceil(W / stride))``.

    Raises:
        ValueError: if the model has no such layer, or its output is not a map.
    """

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__()
        check_layer(model, layer)
        self.layer = layer
        # timm's mark of a model that works on tokens behind which class and register tokens may stand
        self.is_transformer = hasattr(model, "num_prefix_tokens")
        if self.is_transformer:
            block = layer.removeprefix("blocks.")
            if not block.isdigit():
                msg = f"layer {layer!r} of a transformer gives no map: name a block, such as 'blocks.{8}'"
                raise ValueError(msg)
            transformer: Any = model
            transformer.prune_intermediate_layers([int(block)])
            self.stride = int(transformer.patch_embed.patch_size[0])
            self.model = transformer
        else:
            self.model = _truncate(model, layer)
            for module in self.model.modules():
                if isinstance(module, nn.Conv2d):  # half the time on a CPU, measured on EfficientNet-Lite
                    module.to(memory_format=torch.channels_last)
        self.requires_grad_(requires_grad=False)
        self.train()
        try:
            with torch.no_grad():
                features = self(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE))
        except (AssertionError, RuntimeError, TypeError) as error:
            msg = f"layer {layer!r} cannot be used: the backbone does not run on images of any size ({error})"
            raise ValueError(msg) from error
        if features.ndim != 4 or features.shape[2] != features.shape[3]:
            msg = f"layer {layer!r} gives {tuple(features.shape)}, not a map (N, C, H, W): choose another layer"
            raise ValueError(msg)
        self.channels = features.shape[1]
        if not self.is_transformer:
            self.stride = 2 ** round(math.log2(PROBE_SIZE / features.shape[2]))
        self.min_size = self._least_size()

    @torch.no_grad()
    def _least_size(self) -> int:
        """The stride, where borders are padded; more where a kernel must fit into what is left, as in AlexNet."""
        fails, works = self.stride - 1, PROBE_SIZE
        side = self.stride  # tried first: it is the answer almost always
        while fails + 1 < works:
            try:
                self(torch.zeros(1, 3, side, side))
                works = side
            except (AssertionError, RuntimeError):
                fails = side
            side = (fails + works) // 2
        return works

    def train(self, mode: bool = True) -> "FrozenBackbone":
        """Stay in eval mode, whatever is asked: batch-norm statistics must not drift."""
        del mode
        return super().train(mode=False)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the layer's map."""
        if self.is_transformer:
            features: Tensor = self.model.forward_intermediates(images, indices=1, norm=False, intermediates_only=True)[
                0
            ]
            return features
        output: Tensor = self.model(images)["map"]
        return output


def _truncate(model: nn.Module, layer: str) -> nn.Module:
    """Trace the model up to the layer; what comes after is dropped."""
    tracer = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    try:
        dual = create_feature_extractor(model.eval(), {layer: "map"}, tracer_kwargs=tracer, suppress_diff_warning=True)
    except Exception as error:  # tracing fails in as many ways as there are models
        msg = f"layer {layer!r} cannot be used: tracing the backbone up to it fails ({error})"
        raise ValueError(msg) from error
    # the graph for training is not needed, and a module with plain graphs in it is too deep for pickle
    return torch.fx.GraphModule(dual, dual.eval_graph)


def check_layer(model: nn.Module, layer: str) -> None:
    """Check that the model has a module of that name.

    Raises:
        ValueError: if it has none; the message lists near names.
    """
    names = [name for name, _ in model.named_modules() if name]
    if layer not in names:
        near = difflib.get_close_matches(layer, names, n=5) or [name for name in names if "." not in name]
        msg = f"the backbone has no layer {layer!r}; near names are {', '.join(near)}"
        raise ValueError(msg)


class ImagePyramid(nn.Module):
    """One layer of one backbone at several sizes of the image, as CS-Flow uses it.

    The image is halved by nearest-neighbour sampling once per scale.

    Args:
        backbone: applied at every scale.
        num_scales: 1 or more.

    Attributes:
        channels: of each scale, finest first.
        min_size: least height and width of an image: one cell at the coarsest scale.

    Shape:
        images ``(N, 3, H, W)`` to maps ``(N, C, ceil(H / 2^s / stride), ceil(W / 2^s / stride))``.

    Raises:
        ValueError: on an image that is too small for the pyramid.
    """

    def __init__(self, backbone: FrozenBackbone, num_scales: int = 3) -> None:
        super().__init__()
        if num_scales < 1:
            msg = f"num_scales must be 1 or more, got {num_scales}"
            raise ValueError(msg)
        self.backbone = backbone
        self.num_scales = num_scales
        self.channels = [backbone.channels] * num_scales
        self.min_size = backbone.min_size * 2 ** (num_scales - 1)
        self._check_halving()

    @torch.no_grad()
    def _check_halving(self) -> None:
        """Raise ValueError unless half the image gives half the map, as it does where borders are padded."""
        halved = [PROBE_SIZE >> scale for scale in range(self.num_scales)]
        probes = [side for side in halved if side >= self.backbone.stride]
        sides = [self.backbone(torch.zeros(1, 3, side, side)).shape[2] for side in probes]
        for finer, coarser in pairwise(sides):
            if coarser not in {finer // 2, (finer + 1) // 2}:
                msg = (
                    f"layer {self.backbone.layer!r} gives maps of {sides} cells for images of {probes} pixels, which "
                    "do not halve: choose a backbone that pads its convolutions, or num_scales=1"
                )
                raise ValueError(msg)

    def check_size(self, height: int, width: int) -> None:
        """Check that an image of this size has at least one cell at the coarsest scale.

        Raises:
            ValueError: if it has not; the message says the least size.
        """
        if height < self.min_size or width < self.min_size:
            msg = (
                f"an image of {height}x{width} pixels is too small for {self.num_scales} scales of layer "
                f"{self.backbone.layer!r} at stride {self.backbone.stride}: the least size is "
                f"{self.min_size}x{self.min_size}"
            )
            raise ValueError(msg)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the pyramid of feature maps."""
        height, width = images.shape[-2:]
        self.check_size(height, width)
        sizes = [(height >> s, width >> s) for s in range(self.num_scales)]
        return tuple(
            self.backbone(images if s == 0 else F.interpolate(images, sizes[s])) for s in range(self.num_scales)
        )


class PooledPyramid(ImagePyramid):
    """The maps of an :class:`ImagePyramid`, averaged over their cells and joined to one vector, as DifferNet uses them.

    Args:
        backbone: applied at every scale.
        num_scales: 1 or more.

    Attributes:
        num_features: of the vector: the channels of all scales.

    Shape:
        images ``(N, 3, H, W)`` to a tuple of one vector ``(N, num_features)``, finest scale first.

    Raises:
        ValueError: on an image that is too small for the pyramid.
    """

    def __init__(self, backbone: FrozenBackbone, num_scales: int = 3) -> None:
        super().__init__(backbone, num_scales)
        self.num_features = sum(self.channels)

    def _check_halving(self) -> None:
        """Averages are of one cell, whatever the maps' sizes."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the vector."""
        return (torch.cat([level.mean((2, 3)) for level in super().forward(images)], dim=1),)
