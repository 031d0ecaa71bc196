"""Anomalib's own models on our backbones, weights and sizes: each function takes the arguments of our detectors.

Every model is built by anomalib's constructor, which gets our frozen layers instead of making its own extractor;
flows, losses, optimizers, scores and maps stay anomalib's, and so do all defaults that are not named here. So a
model can have any backbone, layer and source of weights, and nothing is downloaded that is not used.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import timm
import torch
from anomalib.models import Cflow, Csflow, Fastflow, Padim, Patchcore
from anomalib.models.image.cflow import torch_model as cflow_model
from anomalib.models.image.csflow import torch_model as csflow_model
from anomalib.models.image.padim import torch_model as padim_model
from anomalib.models.image.patchcore import torch_model as patchcore_model
from anomalib.pre_processing import PreProcessor
from FrEIA.framework import GraphINN, InputNode, Node, OutputNode
from timm.models import FeatureInfo
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_csflow.features import FrozenLayers
from anomalib_csflow.features.weights import create_backbone, normalization

ImageSize = int | Sequence[int]

CSFLOW_LAYER = "features.6.8"
"""The name by which Csflow looks up its layer, whichever layer it gets."""


class _Layers(nn.Module):
    """Layers of a frozen backbone in torch's default memory layout, described as timm describes its own."""

    def __init__(self, backbone: str, weights: str, layers: Sequence[str]) -> None:
        super().__init__()
        model = FrozenLayers(create_backbone(backbone, weights), layers)
        self.extractor = model.to(memory_format=torch.contiguous_format)
        described = zip(layers, model.layer_channels, model.layer_strides, strict=True)
        info = [{"module": name, "num_chs": channels, "reduction": stride} for name, channels, stride in described]
        self.feature_info = FeatureInfo(info, tuple(range(len(info))))

    def forward(self, images: Tensor) -> Any:
        """Maps of all layers, in their order."""
        with torch.no_grad():
            return list(self.extractor.maps(images))


class _NamedLayers(_Layers):
    """The same as a dictionary, like the output of anomalib's extractor."""

    def __init__(self, backbone: str, weights: str, layers: Sequence[str], names: Sequence[str] | None = None) -> None:
        super().__init__(backbone, weights, layers)
        self.names = list(names or layers)
        self.out_dims = self.feature_info.channels()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps by name."""
        return dict(zip(self.names, super().forward(images), strict=True))


@contextmanager
def _extractor(module: Any, layers: nn.Module) -> Iterator[None]:
    """Give anomalib's constructors these layers instead of an extractor."""
    with mock.patch.object(module, "TimmFeatureExtractor", return_value=layers):
        yield


def _size(image_size: ImageSize) -> list[int]:
    return [image_size, image_size] if isinstance(image_size, int) else list(image_size)


def _pre_processor(backbone: str, image_size: ImageSize, antialias: bool) -> PreProcessor:
    resize = Resize(_size(image_size), antialias=antialias)
    return PreProcessor(Compose([resize, Normalize(*normalization(backbone))]))


def _check_size(name: str, image_size: ImageSize, multiple: int) -> None:
    """Raise now, before anomalib's model fails in its first step."""
    if any(side % multiple for side in _size(image_size)):
        msg = f"anomalib's {name} needs multiples of {multiple} pixels with these layers, got image_size={image_size}"
        raise ValueError(msg)


def csflow_graph(shapes: Sequence[Sequence[int]], kernel_sizes: Sequence[int], hidden_channels: int) -> GraphINN:
    """Anomalib's permutations and couplings, in anomalib's order, for maps of any three shapes (C, H, W)."""
    nodes: list[Node] = [InputNode(*shape, name=f"input{scale}") for scale, shape in enumerate(shapes)]
    outputs = [node.out0 for node in nodes]
    for block, kernel_size in enumerate(kernel_sizes):
        subnet = {"channels_hidden": hidden_channels, "kernel_size": kernel_size}
        for module_type, arguments in (
            (csflow_model.ParallelPermute, {"seed": block}),
            (csflow_model.ParallelGlowCouplingLayer, {"clamp": 3.0, "subnet_args": subnet}),
        ):
            nodes.append(Node(outputs, module_type, arguments))
            outputs = [nodes[-1].out0, nodes[-1].out1, nodes[-1].out2]
    return GraphINN([*nodes, *(OutputNode([output]) for output in outputs)])


def csflow(
    backbone: str,
    weights: str,
    image_size: ImageSize,
    antialias: bool = True,
    *,
    layer: str,
    kernel_sizes: Sequence[int],
    hidden_channels: int,
) -> Csflow:
    """Anomalib's Csflow with one block per kernel size, and couplings for any number of channels, not only 304.

    Raises:
        ValueError: if the layer's map cannot be halved twice at this image size.
    """
    layers = _NamedLayers(backbone, weights, [layer], [CSFLOW_LAYER])
    _check_size("Csflow", image_size, 4 * layers.feature_info.reduction()[0])
    # Csflow makes its own backbone for the extractor, with weights from a hub
    with _extractor(csflow_model, layers), mock.patch.object(csflow_model, "efficientnet_b5"):
        model = Csflow(
            cross_conv_hidden_channels=hidden_channels,
            n_coupling_blocks=len(kernel_sizes),
            pre_processor=_pre_processor(backbone, image_size, antialias),
        )
    network: Any = model.model
    shapes = [level.shape[1:] for level in network.feature_extractor(torch.zeros(1, 3, *_size(image_size)))]
    network.graph.graph = csflow_graph(shapes, kernel_sizes, hidden_channels)
    return model


def fast_flow(
    backbone: str,
    weights: str,
    image_size: ImageSize,
    antialias: bool = True,
    *,
    layers: Sequence[str],
    **options: Any,
) -> Fastflow:
    """Anomalib's Fastflow, which itself only supports four backbones; options are its own.

    Raises:
        ValueError: if a layer's stride does not divide the image size, to which its norms are tied.
    """
    extractor = _Layers(backbone, weights, layers)
    _check_size("Fastflow", image_size, max(extractor.feature_info.reduction()))
    with mock.patch.object(timm, "create_model", return_value=extractor):  # whatever its default backbone
        return Fastflow(pre_processor=_pre_processor(backbone, image_size, antialias), **options)


def cflow(
    backbone: str,
    weights: str,
    image_size: ImageSize,
    antialias: bool = True,
    *,
    layers: Sequence[str],
    **options: Any,
) -> Cflow:
    """Anomalib's Cflow; options are its own. Its fiber batches must fit into the coarsest map of the smallest batch."""
    with _extractor(cflow_model, _NamedLayers(backbone, weights, layers)):
        return Cflow(backbone, layers, pre_processor=_pre_processor(backbone, image_size, antialias), **options)


def padim(
    backbone: str,
    weights: str,
    image_size: ImageSize,
    antialias: bool = True,
    *,
    layers: Sequence[str],
    **options: Any,
) -> Padim:
    """Anomalib's PaDiM; options are its own."""
    with _extractor(padim_model, _NamedLayers(backbone, weights, layers)):
        return Padim(backbone, list(layers), pre_processor=_pre_processor(backbone, image_size, antialias), **options)


def farthest_first(vectors: Tensor, count: int) -> Tensor:
    """Indices of a greedy k-centre selection: after a random first one, always the vector farthest from those chosen.

    Anomalib's rule, on the vectors themselves: its sampler first projects their 100 to 200 numbers to 300 and more
    random sums, and writes all differences from the last centre to memory. Here, one product with the centre is enough.

    Args:
        vectors: (N, D).
        count: number of vectors to choose, at most N.

    Returns:
        (count,), all different.
    """
    squares = vectors.square().sum(1)
    nearest = torch.full_like(squares, torch.inf)  # squared distance to the nearest chosen one
    chosen = torch.empty(count, dtype=torch.long, device=vectors.device)
    index = torch.randint(len(vectors), (), device=vectors.device)
    for place in range(count):
        chosen[place] = index
        distances = torch.addmv(squares, vectors, vectors[index], alpha=-2).add_(squares[index])
        torch.minimum(nearest, distances, out=nearest)
        nearest[index] = -torch.inf  # not chosen again, even if all others are equal to it
        index = nearest.argmax()
    return chosen


class BoundedPatchcore(Patchcore):
    """Anomalib's PatchCore with a limit on its memory, because selecting it from hundreds of images takes hours.

    Args:
        max_vectors: largest number of vectors in the memory, if the coreset's ratio gives more.
        options: anomalib's own.
    """

    def __init__(self, max_vectors: int, **options: Any) -> None:
        super().__init__(**options)
        self.max_vectors = max_vectors

    def fit(self) -> None:
        """Choose the memory from all collected features."""
        vectors = torch.vstack(self.model.embedding_store)
        self.model.embedding_store.clear()
        count = min(max(1, int(len(vectors) * self.coreset_sampling_ratio)), self.max_vectors)
        self.model.memory_bank = vectors[farthest_first(vectors, count)]


def patchcore(
    backbone: str,
    weights: str,
    image_size: ImageSize,
    antialias: bool = True,
    *,
    layers: Sequence[str],
    max_vectors: int | None = None,
    **options: Any,
) -> Patchcore:
    """Anomalib's PatchCore; options are its own, max_vectors limits its memory (see :class:`BoundedPatchcore`)."""
    options |= {"layers": layers, "pre_processor": _pre_processor(backbone, image_size, antialias)}
    with _extractor(patchcore_model, _NamedLayers(backbone, weights, layers)):
        if max_vectors is None:
            return Patchcore(backbone, **options)
        return BoundedPatchcore(max_vectors, backbone=backbone, **options)
