"""What is CS-Flow's own: the paper's size and defaults, any image size, recomputed activations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from conftest import SMALL, randomize

from anomalib_csflow import CSFlow, scoring
from anomalib_csflow.engine.precision import computes_bfloat16
from anomalib_csflow.features.weights import WeightsError
from anomalib_csflow.flows import CrossScaleCoupling


def test_number_of_parameters_is_the_papers() -> None:
    """The published flow has 275.2 M parameters."""
    with torch.device("meta"):
        dims = [(304, 24, 24), (304, 12, 12), (304, 6, 6)]
        blocks = [CrossScaleCoupling(dims, kernel_size=k) for k in (3, 3, 3, 5)]
    parameters = sum(p.numel() for block in blocks for p in block.parameters())
    assert parameters == pytest.approx(275.2e6, rel=1e-3)


def test_paper_defaults_of_the_constructor() -> None:
    detector = CSFlow(weights="random", hidden_channels=8)  # the width alone is small, to be built in little memory
    hparams = detector.hparams
    assert (hparams.backbone, hparams.layer, hparams.image_size) == ("tf_efficientnet_b5.aa_in1k", "blocks.5", 768)
    assert detector.input_size == (768, 768)
    assert detector.model.features.channels == [304] * 3
    assert detector.model.features.backbone.stride == 32  # 24x24, 12x12 and 6x6 maps
    couplings = detector.model.flow[1::2]
    assert [coupling.from_first.enter[0].kernel_size[0] for coupling in couplings] == [3, 3, 3, 5]
    assert detector.model.standardization is None
    (group,) = detector.configure_optimizers()["optimizer"].param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (2e-4, (0.9, 0.999), 1e-4, 1e-5)
    assert hparams.gradient_clip_norm == 1.0


@pytest.mark.parametrize("size", [(96, 128), (160, 96), (250, 333)])
def test_inference_at_another_size_than_in_training(detector: CSFlow, size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert detector.model(torch.rand(2, 3, *size)).anomaly_map.shape == (2, 1, *size)
    detector.pre_processor = detector.configure_pre_processor(size)
    with torch.no_grad():
        assert detector(torch.rand(1, 3, 400, 300)).anomaly_map.shape == (1, 1, *size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backbone": "tf_efficientnet_lite9"},
            "no backbone 'tf_efficientnet_lite9'; near names are .*tf_efficientnet_lite",
        ),
        ({"layer": "block.4"}, r"no layer 'block\.4'; near names are .*blocks\.4"),
        ({"image_size": 63}, "63x63 pixels is too small for 3 scales .* the least size is 64x64"),
        ({"map_mode": "max"}, "unknown map_mode 'max': choose one of"),
        ({"image_size": 0}, "image_size must be positive, a whole number or two, got 0"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine': choose one of constant, one_cycle"),
        (
            {"backbone": "inception_v4", "layer": "features.10", "weights": "random"},
            "which do not halve: choose a backbone",
        ),
        ({"num_blocks": 0}, "num_blocks must be 1 or more"),
        ({"num_blocks": 2, "kernel_sizes": [3]}, "give one of kernel_sizes for each of num_blocks"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CSFlow(**SMALL | {"image_size": 96} | changes)


def test_bad_weights() -> None:
    with pytest.raises(WeightsError, match=r"no file of weights at nowhere\.pth"):
        CSFlow(**SMALL | {"weights": "nowhere.pth"}, image_size=96)


def test_too_small_an_image_at_inference(detector: CSFlow) -> None:
    with pytest.raises(ValueError, match="the least size is 64x64"):
        detector.model(torch.rand(1, 3, 96, 60))


def test_recomputed_activations_give_the_same_gradient() -> None:
    detector = CSFlow(**SMALL, image_size=(96, 128))
    randomize(detector.model.flow, scale=0.05)
    features = detector.model.features(torch.rand(2, 3, 96, 128))
    parameters = list(detector.model.flow.parameters())
    kept = torch.autograd.grad(detector.loss(features), parameters)
    detector.model.flow.recompute = True
    again = torch.autograd.grad(detector.loss(features), parameters)
    torch.testing.assert_close(again, kept)


def test_recompute_keeps_little_between_the_passes() -> None:
    def kept_bytes(**arguments: Any) -> int:
        detector = CSFlow(**SMALL | {"num_blocks": 8} | arguments, image_size=128)
        sizes = []
        features = detector.model.features(torch.rand(4, 3, 128, 128))

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            detector.loss(features)
        return sum(sizes)

    assert kept_bytes(recompute=True) < 0.4 * kept_bytes()


@pytest.mark.skipif(not computes_bfloat16(torch.device("cpu")), reason="the processor does not compute in bfloat16")
def test_bfloat16_trains_as_well(datamodule: Folder, tmp_path: Path) -> None:
    losses = {}
    for wanted in (False, True):
        torch.manual_seed(0)
        detector = CSFlow(**SMALL, image_size=(96, 128), bfloat16=wanted)
        engine = Engine(default_root_dir=tmp_path, max_epochs=4, accelerator="cpu", enable_progress_bar=False)
        engine.fit(detector, datamodule=datamodule)
        losses[wanted] = float(engine.trainer.callback_metrics["train_loss_epoch"])
        assert {parameter.dtype for parameter in detector.model.parameters()} == {torch.float32}
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.01)


def test_training_on_good_images_finds_defects(datamodule: Folder, tmp_path: Path) -> None:
    detector = CSFlow(**SMALL, image_size=128)
    engine = Engine(max_epochs=8, accelerator="cpu", default_root_dir=tmp_path)
    engine.fit(detector, datamodule=datamodule)
    (metrics,) = engine.test(detector, datamodule=datamodule)
    assert metrics["image_AUROC"] == 1.0
    assert metrics["pixel_AUROC"] > 0.9


def test_an_image_score_of_the_levels_mean(detector: CSFlow) -> None:
    arguments = {**SMALL, "image_size": 64, "num_scales": 3, "top_share": 0.1, "map_mode": "soft_minimum"}
    models = {score: CSFlow(**arguments, image_score=score).model.eval() for score in ("map", "levels")}
    latents = tuple(torch.randn(4, 8, side, side) for side in (8, 4, 2))
    by_map, by_levels = (models[score].score(latents, (64, 64)) for score in ("map", "levels"))
    torch.testing.assert_close(by_levels.anomaly_map, by_map.anomaly_map)
    torch.testing.assert_close(by_map.pred_score, scoring.top_mean(by_map.anomaly_map, 0.1))
    mean = scoring.upsampled(scoring.mean_squares(latents), (8, 8)).mean(0)
    torch.testing.assert_close(by_levels.pred_score, scoring.top_mean(mean, 0.1))
    assert not torch.allclose(by_levels.pred_score, by_map.pred_score)


def test_an_image_score_of_score_tests() -> None:
    arguments = {**SMALL, "image_size": 64, "num_scales": 2, "top_share": 0.1, "map_mode": "soft_minimum"}
    model = CSFlow(**arguments, image_score="score_test").model.eval()
    plain = CSFlow(**arguments, image_score="map").model.eval()
    randomize(model.flow, scale=0.05)
    plain.flow.load_state_dict(model.flow.state_dict())
    features = model.features(torch.rand(2, 3, 64, 64))
    latents, log_scales = model.with_log_scales(features)
    torch.testing.assert_close(latents, model.transform(features)[0])
    log_det = sum(scales.flatten(1).sum(1) for scales in log_scales)  # until it is measured, whitening is the identity
    torch.testing.assert_close(log_det, model.transform(features)[1])

    judged = model.judge(features, (64, 64))
    torch.testing.assert_close(judged.anomaly_map, plain.judge(features, (64, 64)).anomaly_map)
    mean = scoring.upsampled(scoring.score_tests(latents, log_scales), (4, 4)).mean(0)
    torch.testing.assert_close(judged.pred_score, scoring.top_mean(mean, 0.1))
    with pytest.raises(ValueError, match="score tests need the flow's log-scales, and not only latents"):
        model.score(latents, (64, 64))
