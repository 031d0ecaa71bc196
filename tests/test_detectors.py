"""What every detector must do: one row per detector."""

from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from conftest import CFLOW, FAST_FLOW, MS_FLOW, SMALL, randomize

from anomalib_csflow import CFlow, CSFlow, DifferNet, FastFlow, MSFlow, RealNVP, scoring
from anomalib_csflow.engine.detector import FlowDetector

DETECTORS: dict[str, tuple[type[FlowDetector], dict[str, Any]]] = {
    "CSFlow": (CSFlow, SMALL),
    "CSFlow, score tests": (CSFlow, SMALL | {"image_score": "score_test", "num_scales": 2, "top_share": 0.1}),
    "CSFlow, fused map": (CSFlow, SMALL | {"map_mode": "mean", "num_scales": 2, "standardize": False}),
    "CSFlow, maps rounded down": (
        CSFlow,
        SMALL | {"backbone": "convnext_atto", "layer": "stages.2", "weights": "random"},
    ),
    "CSFlow, transformer": (
        CSFlow,
        SMALL | {"backbone": "vit_tiny_patch16_224", "layer": "blocks.2", "weights": "random"},
    ),
    "DifferNet": (DifferNet, SMALL | {"num_train_rotations": 2, "num_test_rotations": 3}),
    "DifferNet, fixed rotations": (
        DifferNet,
        SMALL | {"num_test_rotations": 1, "fixed_train_rotations": True, "standardize": False},
    ),
    "RealNVP": (RealNVP, SMALL),
    "RealNVP, transformer": (
        RealNVP,
        SMALL | {"backbone": "vit_tiny_patch16_224", "layer": "blocks.2", "weights": "random", "standardize": False},
    ),
    "CFlow": (CFlow, CFLOW),
    "CFlow, transformer": (
        CFlow,
        CFLOW | {"backbone": "vit_tiny_patch16_224", "layers": ["blocks.1", "blocks.2"], "weights": "random"},
    ),
    "CFlow, standardized and permuted": (CFlow, CFLOW | {"standardize": True, "permute_soft": False}),
    "CFlow, by energy": (CFlow, CFLOW | {"score_by": "energy", "top_share": 0.03}),
    "FastFlow": (FastFlow, FAST_FLOW),
    "FastFlow, of the least likely positions": (FastFlow, FAST_FLOW | {"top_share": 0.03}),
    "FastFlow, transformer": (
        FastFlow,
        FAST_FLOW
        | {"backbone": "vit_tiny_patch16_224", "layers": ["blocks.2"], "weights": "random", "standardize": False},
    ),
    "FastFlow, borders not padded": (
        FastFlow,
        FAST_FLOW | {"backbone": "inception_v4", "layers": ["features.3", "features.10"], "weights": "random"},
    ),
    "MSFlow": (MSFlow, MS_FLOW),
    "MSFlow, standardized": (MSFlow, MS_FLOW | {"standardize": True}),
}
WITHOUT_MAPS = (DifferNet, RealNVP)
"""Detectors whose forward gives the image score alone."""


@pytest.fixture(params=DETECTORS.values(), ids=DETECTORS.keys())
def each(request: pytest.FixtureRequest) -> FlowDetector:
    """Every detector, small, with random flow parameters."""
    cls, arguments = request.param
    detector = cls(**arguments, image_size=(96, 128))
    randomize(detector.model.flow, scale=0.05)
    return detector.eval()


def test_a_score_depends_on_its_own_image_alone(each: FlowDetector) -> None:
    images = torch.rand(4, 3, 110, 140)
    with torch.no_grad():
        batch, singles = each.model(images), [each.model(image[None]) for image in images]
        nll = torch.cat([each.nll(image[None]) for image in images])
        torch.testing.assert_close(batch.pred_score, torch.cat([s.pred_score for s in singles]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(each.nll(images), nll, atol=1e-2, rtol=1e-4)
    assert batch.pred_score.shape == (4,)
    assert batch.pred_score.std() > 0
    if isinstance(each, WITHOUT_MAPS):
        assert batch.anomaly_map is None
        return
    torch.testing.assert_close(batch.anomaly_map, torch.cat([s.anomaly_map for s in singles]), atol=1e-4, rtol=1e-3)
    assert batch.anomaly_map.shape == (4, 1, 110, 140)


def test_forward_gives_the_same_in_training_mode(each: FlowDetector) -> None:
    images = torch.rand(2, 3, 96, 128)
    torch.testing.assert_close(each.model.train()(images), each.model.eval()(images))


def test_loss_is_the_nll_per_dimension_less_its_constant(each: FlowDetector) -> None:
    images = torch.rand(3, 3, 96, 128)
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi))
    features = each.model.features(each.model.views(images))
    dims = scoring.num_dims(features)
    torch.testing.assert_close(each.loss(features), each.model.nll(images).mean() / dims - constant)


def test_nll_is_of_the_pre_processed_images(each: FlowDetector) -> None:
    raw = torch.rand(3, 3, 200, 170)  # nll() pre-processes, as forward() does
    images = each.pre_processor(raw)
    nats, dims = each.model.nll(images), scoring.num_dims(each.model.features(images))
    torch.testing.assert_close(each.nll(raw), nats)
    torch.testing.assert_close(each.nll(raw, bits_per_dim=True), scoring.bits_per_dim(nats, dims))


def test_the_optimizer_has_the_flow_and_nothing_frozen(each: FlowDetector, datamodule: Folder, tmp_path: Path) -> None:
    """The detector comes in eval mode, which makes training fail in anomalib's own models."""
    before = {name: value.clone() for name, value in each.model.features.state_dict().items()}
    Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path).fit(each, datamodule=datamodule)
    (optimizer,) = each.trainer.optimizers
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in each.model.flow.parameters()}
    after = each.model.features.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
