"""Pyramids of features: one layer at several image sizes, or several layers in one pass."""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .backbones import PROBE_SIZE, FrozenBackbone, FrozenLayers


class FeaturePyramid(nn.Module):
    """What all pyramids of features have: a frozen backbone, and a minimum image size.

    Args:
        backbone: frozen.
        channels: number of channels of each level, finest first.
        strides: pixels of the image per position, for each level.
        what: describes the pyramid in errors.

    Attributes:
        channels: as given.
        strides: as given.
        min_size: least height and width of an image: one position at the coarsest level.
    """

    def __init__(self, backbone: FrozenLayers, channels: Sequence[int], strides: Sequence[int], what: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels = list(channels)
        self.strides = list(strides)
        self.min_size = max(strides)
        self.what = what

    def check_size(self, height: int, width: int) -> None:
        """Check that the backbone takes images of this size, and that the coarsest level has a position.

        Raises:
            ValueError: if not; the message says what size to use.
        """
        if height < self.min_size or width < self.min_size:
            msg = (
                f"an image of {height}x{width} pixels is too small for {self.what}: the least size is "
                f"{self.min_size}x{self.min_size}"
            )
            raise ValueError(msg)
        fixed = self.backbone.fixed_size
        if fixed is not None and (height, width) != (fixed, fixed):
            msg = (
                f"this backbone cannot take an image of {height}x{width} pixels: its positional embedding is for "
                f"{fixed}x{fixed} only, set image_size={fixed}"
            )
            raise ValueError(msg)

    def few_at_once(self, images: Tensor) -> tuple[Tensor, ...]:
        """The same maps; on a CPU, of at most as many images at once as there are threads, or two if there is one.

        The maps of more images do not fit the processor's cache: on one and two threads, EfficientNet-Lite takes half
        the time for 16 images of 256 pixels, or less.
        """
        number = max(torch.get_num_threads(), 2)
        if images.device.type != "cpu" or len(images) <= number:
            return cast("tuple[Tensor, ...]", self(images))
        return tuple(torch.cat(level) for level in zip(*map(self, images.split(number)), strict=True))


class LayerPyramid(FeaturePyramid):
    """Several layers of one backbone in one pass, as CFLOW-AD, FastFlow and MSFlow use it.

    Args:
        backbone: its layers must be in order from fine to coarse; they may have equal strides, as a transformer's do.

    Shape:
        images ``(N, 3, H, W)`` to maps ``(N, channels[i], ceil(H / strides[i]), ceil(W / strides[i]))``.

    Raises:
        ValueError: if a layer is finer than the one before it, or an image has a wrong size.
    """

    def __init__(self, backbone: FrozenLayers) -> None:
        strides = backbone.layer_strides
        if strides != sorted(strides):
            msg = f"name the layers from fine to coarse: {backbone.layers} have strides {strides}"
            raise ValueError(msg)
        what = f"layer {backbone.layers[-1]!r} at stride {strides[-1]}"
        super().__init__(backbone, backbone.layer_channels, strides, what)

    def extra_repr(self) -> str:
        """What determines the features, apart from the backbone's weights."""
        return f"layers={self.backbone.layers}, final_norm={self.backbone.final_norm}"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the layers' maps."""
        self.check_size(images.shape[2], images.shape[3])
        return self.backbone.maps(images)


class ImagePyramid(FeaturePyramid):
    """One layer of one backbone at several image sizes, as CS-Flow uses it.

    The image is halved by nearest-neighbour sampling once per level.

    Args:
        backbone: applied to the image at every size.
        num_scales: number of levels, 1 or more.

    Shape:
        images ``(N, 3, H, W)`` to maps ``(N, C, ceil(H / 2^s / stride), ceil(W / 2^s / stride))``.

    Raises:
        ValueError: if an image is too small for the pyramid.
    """

    backbone: FrozenBackbone

    def __init__(self, backbone: FrozenBackbone, num_scales: int = 3) -> None:
        if num_scales < 1:
            msg = f"num_scales must be 1 or more, got {num_scales}"
            raise ValueError(msg)
        if backbone.fixed_size is not None and num_scales > 1:
            msg = f"this backbone takes images of {backbone.fixed_size} pixels only: set num_scales=1"
            raise ValueError(msg)
        super().__init__(
            backbone,
            channels=[backbone.channels] * num_scales,
            strides=[backbone.stride << s for s in range(num_scales)],
            what=f"{num_scales} scales of layer {backbone.layer!r} at stride {backbone.stride}",
        )
        self.num_scales = num_scales
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
                    f"layer {self.backbone.layer!r} gives maps of side {sides} for images of side {probes}, which "
                    "do not halve: choose a backbone that pads its convolutions, or num_scales=1"
                )
                raise ValueError(msg)

    def extra_repr(self) -> str:
        """What determines the features, apart from the backbone's weights."""
        return f"layer={self.backbone.layer!r}, num_scales={self.num_scales}"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the pyramid of feature maps."""
        height, width = images.shape[-2:]
        self.check_size(height, width)
        sizes = [(height >> s, width >> s) for s in range(self.num_scales)]
        return tuple(
            self.backbone(images if s == 0 else F.interpolate(images, sizes[s])) for s in range(self.num_scales)
        )


class PooledPyramid(ImagePyramid):
    """The maps of an :class:`ImagePyramid`, averaged over positions and joined into one vector, as DifferNet uses them.

    Args:
        backbone: applied to the image at every size.
        num_scales: number of levels, 1 or more.

    Attributes:
        num_features: length of the vector: the channels of all levels together.

    Shape:
        images ``(N, 3, H, W)`` to a tuple of one vector ``(N, num_features)``, finest level first.

    Raises:
        ValueError: if an image is too small for the pyramid.
    """

    def __init__(self, backbone: FrozenBackbone, num_scales: int = 3) -> None:
        super().__init__(backbone, num_scales)
        self.num_features = sum(self.channels)

    def _check_halving(self) -> None:
        """Not needed: an average is one vector for any size of the map."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the vector."""
        return (torch.cat([level.mean((2, 3)) for level in super().forward(images)], dim=1),)


class CrossScalePyramid(LayerPyramid):
    """Levels that halve: several layers of one backbone in one pass, and the coarsest also at smaller image sizes.

    The published CS-Flow has one layer at three image sizes (:class:`ImagePyramid`); layers whose strides double only
    need one pass of the backbone, and no smaller image.

    Args:
        backbone: with layers from fine to coarse, each with twice the stride of the one before.
        num_scales: number of image sizes for the coarsest layer, each half the one before; 1 for only the image itself.

    Shape:
        images ``(N, 3, H, W)`` to maps ``(N, channels[i], ceil(H / strides[i]), ceil(W / strides[i]))``, finest first.

    Raises:
        ValueError: if the levels do not halve; on an image that is too small for them.
    """

    def __init__(self, backbone: FrozenLayers, num_scales: int = 1) -> None:
        super().__init__(backbone)
        if num_scales < 1:
            msg = f"num_scales must be 1 or more, got {num_scales}"
            raise ValueError(msg)
        if backbone.fixed_size is not None and num_scales > 1:
            msg = f"this backbone takes images of {backbone.fixed_size} pixels only: set num_scales=1"
            raise ValueError(msg)
        if any(coarser != 2 * finer for finer, coarser in pairwise(self.strides)):
            msg = (
                f"the layers {backbone.layers} have strides {self.strides}, which do not make a pyramid: name layers "
                "that each have twice the stride of the one before"
            )
            raise ValueError(msg)
        coarsest = self.strides[-1]
        self.num_scales = num_scales
        self.channels += [self.channels[-1]] * (num_scales - 1)
        self.strides += [coarsest << scale for scale in range(1, num_scales)]
        self.min_size = self.strides[-1]
        self.what = f"layers {backbone.layers} at {num_scales} image sizes, down to stride {self.min_size}"

    def extra_repr(self) -> str:
        """What determines the features, apart from the backbone's weights."""
        return f"{super().extra_repr()}, num_scales={self.num_scales}"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the pyramid of feature maps."""
        height, width = images.shape[-2:]
        levels = super().forward(images)
        smaller = (F.interpolate(images, (height >> scale, width >> scale)) for scale in range(1, self.num_scales))
        return levels + tuple(self.backbone.maps(image)[-1] for image in smaller)
