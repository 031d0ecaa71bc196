"""anomalib's own models on our recipes' backbones, at our sizes: built of anomalib's own layers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from anomalib.models import Csflow, Patchcore
from anomalib.models.image.csflow import torch_model
from anomalib.pre_processing import PreProcessor
from FrEIA.framework import GraphINN, InputNode, Node, OutputNode
from torch import Tensor, nn
from torchvision.models import efficientnet_b5
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_csflow import weights
from anomalib_csflow.features import FrozenBackbone

NUM_SCALES = 3


class _Layer(nn.Module):
    """A layer of a backbone, in torch's default memory layout, under the name by which Csflow asks for it."""

    def __init__(self, backbone: str, layer: str, source: str) -> None:
        super().__init__()
        model = FrozenBackbone(weights.create_backbone(backbone, source), layer)
        self.extractor = model.to(memory_format=torch.contiguous_format)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features as a dictionary."""
        with torch.no_grad():
            return {"features.6.8": self.extractor(images)}


def flow(channels: int, size: int, kernel_sizes: Sequence[int], hidden_channels: int, clamp: float = 3.0) -> GraphINN:
    """Anomalib's permutations and couplings, in anomalib's order, for any number of channels."""
    nodes: list[Node] = [InputNode(channels, size >> s, size >> s, name=f"input{s}") for s in range(NUM_SCALES)]
    outputs = [node.out0 for node in nodes]
    for block, kernel_size in enumerate(kernel_sizes):
        for module_type, arguments in (
            (torch_model.ParallelPermute, {"seed": block}),
            (
                torch_model.ParallelGlowCouplingLayer,
                {"clamp": clamp, "subnet_args": {"channels_hidden": hidden_channels, "kernel_size": kernel_size}},
            ),
        ):
            nodes.append(Node(outputs, module_type, arguments))
            outputs = [nodes[-1].out0, nodes[-1].out1, nodes[-1].out2]
    return GraphINN([*nodes, *(OutputNode([output]) for output in outputs)])


@contextmanager
def _without_download() -> Iterator[None]:
    """Csflow asks for its backbone's weights before it can be given another."""
    with mock.patch.object(torch_model, "efficientnet_b5", return_value=efficientnet_b5(weights=None)):
        yield


def csflow(recipe: dict[str, Any]) -> Csflow:
    """Anomalib's Csflow with a recipe's backbone, weights, size, blocks and width."""
    size = recipe["image_size"]
    transform = Compose([Resize([size, size], antialias=True), Normalize(*weights.normalization(recipe["backbone"]))])
    with _without_download():
        model = Csflow(
            cross_conv_hidden_channels=recipe["hidden_channels"],
            n_coupling_blocks=len(recipe["kernel_sizes"]),
            pre_processor=PreProcessor(transform),
        )
    network: Any = model.model
    network.feature_extractor.feature_extractor = _Layer(recipe["backbone"], recipe["layer"], recipe["weights"])
    with torch.no_grad():
        features = network.feature_extractor.feature_extractor(torch.zeros(1, 3, size, size))["features.6.8"]
    network.graph.graph = flow(features.shape[1], features.shape[2], recipe["kernel_sizes"], recipe["hidden_channels"])
    network.eval()
    return model.train()


def patchcore(recipe: dict[str, Any], layers: Sequence[str], ratio: float) -> Patchcore:
    """Anomalib's PatchCore on a recipe's backbone, weights and size."""
    weights.install(recipe["backbone"])
    size = recipe["image_size"]
    transform = Compose([Resize([size, size], antialias=True), Normalize(*weights.normalization(recipe["backbone"]))])
    return Patchcore(
        recipe["backbone"], list(layers), coreset_sampling_ratio=ratio, pre_processor=PreProcessor(transform)
    )
