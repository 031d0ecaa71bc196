"""MSFlow: the paper's width, the fusion of levels, and likelihoods that are absolute."""

from typing import Any

import pytest
import torch
from conftest import MS_FLOW, randomize

from anomalib_csflow import MSFlow, scoring
from anomalib_csflow.flows import CrossScaleCoupling, FusionConditioner, ParallelFlow, normalized_convolutions


def test_number_of_parameters_is_the_papers() -> None:
    """The published flow has about 99.6 M parameters."""
    dims = [(256, 64, 64), (512, 32, 32), (1024, 16, 16)]
    with torch.device("meta"):
        subnets = [[normalized_convolutions] * count for count in (2, 5, 8)]
        per_block = [normalized_convolutions(c // 2 + 64, c) for c, _, _ in dims]
        fusion = CrossScaleCoupling(dims, conditioner=FusionConditioner, clamp=1.9)
    blocks = sum(
        len(s) * sum(p.numel() for p in block.parameters()) for s, block in zip(subnets, per_block, strict=True)
    )
    parameters = blocks + sum(p.numel() for p in fusion.parameters())
    assert parameters == pytest.approx(99.6e6, rel=2e-3)


def test_paper_defaults_of_the_constructor() -> None:
    detector = MSFlow(weights="random", num_blocks=[1, 1, 1])  # few blocks, to be built in little memory
    hparams = detector.hparams
    assert MSFlow.__init__.__defaults__[5:7] == ((2, 5, 8), 64)
    assert (hparams.backbone, hparams.image_size, hparams.lr) == ("wide_resnet50_2.tv_in1k", 512, 1e-4)
    assert (hparams.schedule, hparams.gradient_clip_norm, hparams.clamp) == ("warmup_steps", 2.0, 1.9)
    assert detector.model.features.channels == [256, 512, 1024]
    assert detector.model.features.strides == [8, 16, 32]
    maps = detector.model.features(torch.rand(1, 3, 96, 128))
    assert [tuple(level.shape[2:]) for level in maps] == [(12, 16), (6, 8), (3, 4)]
    assert isinstance(detector.model.flow[0], ParallelFlow)
    assert detector.model.flow[0].condition_channels == 64
    assert isinstance(detector.model.flow[2].from_first, FusionConditioner)


def test_features_are_averages_of_the_layers_positions() -> None:
    detector = MSFlow(**MS_FLOW, image_size=64)
    images = torch.rand(2, 3, 70, 90)
    pooled, layers = detector.model.features(images), detector.model.features.backbone.maps(images)
    for level, layer in zip(pooled, layers, strict=True):
        torch.testing.assert_close(level[:, :, 1, 1], layer[:, :, 1:4, 1:4].mean((2, 3)))


def test_fusion_joins_levels_that_are_not_neighbours() -> None:
    conditioner = randomize(FusionConditioner([2, 3, 4], [4, 6, 8]))
    pyramid = tuple(torch.randn(1, c, size, size, requires_grad=True) for c, size in ((2, 8), (3, 4), (4, 2)))
    for output, level in zip(conditioner(pyramid), pyramid, strict=True):
        assert output.shape == (1, 2 * level.shape[1], *level.shape[2:])
        for gradient in torch.autograd.grad(output.sum(), pyramid, retain_graph=True):
            assert gradient.abs().sum() > 0


def test_score_and_map() -> None:
    """Of 100 positions 3 are bad; constants elsewhere."""
    fine = torch.zeros(2, 4, 10, 10)
    fine[0, :, 0, :3] = 2.0
    coarse = torch.ones(2, 4, 10, 10)
    prediction = MSFlow(**MS_FLOW).model.score((fine, coarse), (10, 10))
    good, bad = torch.tensor([0.0, 0.5]), torch.tensor([2.0, 0.5])  # half the mean squares of both levels
    torch.testing.assert_close(prediction.pred_score, torch.stack([bad.sum(), good.sum()]))
    torch.testing.assert_close(prediction.anomaly_map[0, 0, 0, 0], -(-bad).exp().mean().log())
    torch.testing.assert_close(prediction.anomaly_map[1], torch.full((1, 10, 10), -float((-good).exp().mean().log())))


def test_score_orders_as_the_published_formula() -> None:
    latents = (torch.randn(8, 4, 20, 20), torch.randn(8, 4, 10, 10))
    energies = scoring.upsampled(
        [0.5 * level.square().mean(1, keepdim=True) for level in latents], (40, 40), align_corners=True
    )
    published = (1 - (-energies.sum(0)).exp()).flatten(1).topk(48, dim=1).values.mean(1)
    prediction = MSFlow(**MS_FLOW).model.score(latents, (40, 40))
    torch.testing.assert_close(1 - (-prediction.pred_score).exp(), published)
    torch.testing.assert_close((-prediction.anomaly_map).exp(), (-energies).exp().mean(0))
    far = MSFlow(**MS_FLOW).model.score(tuple(100 * level for level in latents), (40, 40))  # where 1 - exp is 1
    assert torch.isfinite(far.anomaly_map).all()
    assert far.pred_score.unique().numel() == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ["blocks.1", "blocks.4"]}, r"have strides \[4, 16\], but MSFlow fuses maps that halve"),
        ({"backbone": "vit_tiny_patch16_224", "layers": ["blocks.1", "blocks.2"], "weights": "random"}, "that halve"),
        ({"num_blocks": [1]}, "num_blocks needs one number per layer"),
        ({"num_blocks": [1, 0]}, r"num_blocks must be 1 or more for each layer, got \[1, 0\]"),
        ({"condition_channels": 6}, "a positive multiple of 4"),
        ({"image_size": 31}, "31x31 pixels is too small for layer 'blocks.4', halved to stride 32"),
        ({"schedule": "cosine"}, "unknown schedule"),
        ({"top_share": 1.1}, "top_share is a share of the map's positions"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MSFlow(**MS_FLOW | {"image_size": 64} | changes)
