"""FastFlow: the numbers of the closest published code, the paper's backbones, and any size."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.models import Fastflow
from conftest import FAST_FLOW, randomize

from anomalib_csflow import FastFlow, scoring
from anomalib_csflow.detectors.fast_flow import convolutions
from anomalib_csflow.flows import ParallelFlow


@pytest.fixture
def golden(test_data: Path) -> dict:
    """Tensors made by running gathierry's code."""
    return torch.load(test_data / "golden" / "fastflow.pt", weights_only=True)


def test_published_code(golden: dict) -> None:
    config = golden["config"]
    subnets = [convolutions(kernel_size, config["hidden_ratio"]) for kernel_size in (3, 1, 3, 1)]
    flow = ParallelFlow(config["shapes"], subnets=[subnets] * 2, clamp=config["clamp"])
    flow.load_state_dict({f"levels.{name}": tensor for name, tensor in golden["state_dict"].items()})
    latents, log_det = flow(golden["inputs"])
    torch.testing.assert_close(list(latents), list(golden["latents"]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_det, sum(golden["log_det"]), atol=1e-5, rtol=1e-5)
    loss = (scoring.energy(latents) - log_det).mean()
    torch.testing.assert_close(loss, golden["loss"], atol=1e-5, rtol=1e-5)
    prediction = FastFlow(**FAST_FLOW).model.score(latents, config["image_size"])
    # ours is minus the logarithm of what theirs is minus of
    torch.testing.assert_close(-(-prediction.anomaly_map).exp(), golden["anomaly_map"], atol=1e-5, rtol=1e-5)
    published_score = golden["anomaly_map"].amax((1, 2, 3))
    torch.testing.assert_close(-(-prediction.pred_score).exp(), published_score, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("channels", "kernel_sizes", "num_steps", "ratio", "millions"),
    [
        ([256, 512, 1024], (3, 1), 8, 1.0, 41.34),
        ([64, 128, 256], (3,), 8, 1.0, 4.66),
        ([768], (3, 1), 20, 0.16, 7.07),
    ],
)
def test_number_of_parameters_is_that_of_the_closest_code(
    channels: list[int], kernel_sizes: tuple[int, ...], num_steps: int, ratio: float, millions: float
) -> None:
    subnets = [convolutions(kernel_sizes[step % len(kernel_sizes)], ratio) for step in range(num_steps)]
    flow = ParallelFlow([(c, 1, 1) for c in channels], subnets=[subnets] * len(channels))
    assert sum(p.numel() for p in flow.parameters()) == pytest.approx(millions * 1e6, rel=1e-3)


def test_paper_defaults_of_the_constructor() -> None:
    detector = FastFlow(weights="random", hidden_ratio=0.01)  # the width alone is small, to be built in little memory
    hparams = detector.hparams
    assert (hparams.backbone, hparams.image_size) == ("wide_resnet50_2.tv_in1k", 256)
    assert detector.model.features.channels == [256, 512, 1024]
    assert detector.model.features.strides == [4, 8, 16]
    blocks = detector.model.flow[-1].levels[0]
    assert detector.model.top_share == 0  # the score is the map's maximum
    assert [block.subnet[0].kernel_size[0] for block in blocks] == [3, 1] * 4
    (group,) = detector.configure_optimizers()["optimizer"].param_groups
    assert (group["lr"], group["weight_decay"], group["eps"]) == (1e-3, 1e-5, 1e-8)


def test_weights_of_anomalibs_fastflow_on_a_transformer() -> None:
    """Their flow by name; the features are timm's own."""
    ours = FastFlow(**FAST_FLOW | {"backbone": "vit_tiny_patch16_224", "layers": ["blocks.1"], "weights": "random"})
    trained = randomize(ParallelFlow([(192, 1, 1)], subnets=[[convolutions(k, 1.0) for k in (3, 1)]]))
    state = {
        name.replace("levels.", "model.fast_flow_blocks."): tensor for name, tensor in trained.state_dict().items()
    }
    ours.load_reference_state_dict(state | {"model.feature_extractor.norm.weight": torch.zeros(3)})
    maps = (torch.randn(2, 192, 4, 4),)
    torch.testing.assert_close(ours.model.flow[-1](maps), trained(maps))
    with pytest.raises(ValueError, match="use the layers, num_steps, kernel_sizes and hidden_ratio"):
        ours.load_reference_state_dict({name: tensor for name, tensor in state.items() if "subnet" in name})
    with pytest.raises(ValueError, match="tied to one image size: only flows on transformers"):
        ours.load_reference_state_dict(state | {"model.norms.0.weight": torch.zeros(3)})


def test_anomalibs_fastflow_has_those_names() -> None:
    names = Fastflow(backbone="resnet18", pre_trained=False, flow_steps=1).model.state_dict()
    assert any(name.startswith("fast_flow_blocks.0.module_list.0.subnet.0.weight") for name in names)
    assert "norms.0.weight" in names


def test_no_layer_is_bound_to_a_size() -> None:
    detector = FastFlow(**FAST_FLOW, image_size=64)
    for size in ((64, 64), (90, 131), (256, 320)):
        assert detector.eval().model(torch.rand(1, 3, *size)).anomaly_map.shape == (1, 1, *size)


def test_map_fuses_levels_and_does_not_saturate() -> None:
    latents = (torch.zeros(2, 4, 4, 4), torch.full((2, 4, 2, 2), 100.0))
    prediction = FastFlow(**FAST_FLOW).model.score(latents, (8, 8))
    torch.testing.assert_close(prediction.anomaly_map, torch.full((2, 1, 8, 8), math.log(2)))
    far = torch.stack([torch.full((4, 4, 4), 8.0), torch.full((4, 4, 4), 9.0)])
    torch.testing.assert_close(FastFlow(**FAST_FLOW).model.score((far,), (8, 8)).pred_score, torch.tensor([32.0, 40.5]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps must be 1 or more"),
        ({"kernel_sizes": []}, "kernel_sizes must be one or more whole numbers"),
        ({"hidden_ratio": 0}, "hidden_ratio must be a number above 0, got 0"),
        ({"layers": []}, "name one or more layers"),
        ({"image_size": 8}, "8x8 pixels is too small for layer 'blocks.4' at stride 16"),
        ({"backbone": "cait_xxs24_224", "layers": ["blocks.2"], "weights": "random"}, "set image_size=224"),
        ({"backbone": "vit_tiny_patch16_224", "layers": ["norm"], "weights": "random"}, "name a block"),
        ({"schedule": "cosine"}, "unknown schedule"),
        ({"top_share": -0.1}, "from 0 .only the highest. to 1 .all., got -0.1"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FastFlow(**FAST_FLOW | {"image_size": 64} | changes)
