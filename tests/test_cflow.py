"""CFLOW-AD: the published numbers, steps on fibers, and scores that are absolute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from conftest import CFLOW, randomize
from lightning.pytorch import Trainer

from anomalib_csflow import CFlow, scoring
from anomalib_csflow.flows import FiberFlow
from anomalib_csflow.flows.positional_encoding import positional_encoding


@pytest.fixture
def golden(test_data: Path) -> dict:
    """Tensors made by running the authors' code."""
    return torch.load(test_data / "golden" / "cflow.pt", weights_only=True)


def test_published_code(golden: dict) -> None:
    config, features = golden["config"], golden["feature_map"]
    channels, height, width = features.shape[1:]
    flow = FiberFlow(
        [(channels, height, width)],
        num_blocks=config["blocks"],
        condition_channels=config["condition"],
        clamp=config["clamp"],
    )
    flow.decoders[0].load_state_dict(golden["state_dict"])
    code = positional_encoding(config["condition"], height, width, features)
    torch.testing.assert_close(code, golden["position_code"], atol=1e-5, rtol=1e-5)
    fibers, conditions = flow.fibers(features)
    torch.testing.assert_close(fibers, golden["fibers"])
    torch.testing.assert_close(conditions, golden["conditions"], atol=1e-5, rtol=1e-5)
    latents, log_det = flow.decode(0, fibers, conditions)
    torch.testing.assert_close(latents, golden["latents"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_det, golden["log_det"], atol=1e-5, rtol=1e-5)
    log_prob = scoring.log_density(latents, log_det)
    torch.testing.assert_close(log_prob, golden["log_prob"], atol=1e-5, rtol=1e-5)
    loss = -torch.nn.functional.logsigmoid(log_prob / channels).mean()
    torch.testing.assert_close(loss, golden["loss"].squeeze(), atol=1e-5, rtol=1e-5)
    # whole maps give the same, position by position
    (maps,), (log_dets,) = flow.positions([features])
    torch.testing.assert_close(maps.permute(0, 2, 3, 1).flatten(0, 2), latents)
    torch.testing.assert_close(log_dets.flatten(), log_det)


def test_decoders_of_the_authors_load() -> None:
    trained = CFlow(**CFLOW, image_size=64)
    states = [randomize(decoder, seed).state_dict() for seed, decoder in enumerate(trained.model.fiber_flow.decoders)]
    detector = CFlow(**CFLOW, image_size=64)
    detector.load_reference_state_dict(states)
    features = trained.model.features(torch.rand(1, 3, 64, 64))
    torch.testing.assert_close(detector.model.transform(features), trained.model.transform(features))
    with pytest.raises(ValueError, match="weights of 1 decoders do not fit this detector's 2: use the layers"):
        detector.load_reference_state_dict(states[:1])


def test_parameters_and_defaults_are_the_papers() -> None:
    detector = CFlow(weights="random", num_blocks=1)  # one block of eight, to be built in little time
    hparams = detector.hparams
    assert hparams.image_size == 256
    assert detector.model.features.channels == [512, 1024, 2048]
    assert detector.model.features.strides == [8, 16, 32]
    trainable = sum(p.numel() for p in detector.model.flow.parameters() if p.requires_grad)
    assert 8 * trainable == pytest.approx(81.65e6, rel=1e-3)
    defaults = (hparams.lr, hparams.schedule, hparams.fibers_per_step, hparams.clamp, hparams.permute_soft)
    assert defaults == (2e-4, "warmup_cosine", 256, 1.9, True)
    assert (detector.model.score_by, detector.model.top_share) == ("density", 0)


class Watched(CFlow):
    """Keeps the norms of the gradients and the sizes of the steps."""

    norms: list[float]
    sizes: list[int]

    def on_fit_start(self) -> None:
        """Begin the records."""
        self.norms, self.sizes = [], []
        decode = self.model.fiber_flow.decode

        def recorded(level: int, fibers: torch.Tensor, conditions: torch.Tensor, **options: bool) -> Any:
            if torch.is_grad_enabled():
                self.sizes.append(len(fibers))
            return decode(level, fibers, conditions, **options)

        self.model.fiber_flow.decode = recorded

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Record what a step used."""
        gradients = [p.grad for p in self.model.flow.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))


Fit = Callable[..., Watched]


@pytest.fixture
def fit(datamodule: Folder, tmp_path: Path) -> Fit:
    """Train one epoch of three batches of four images."""

    def run(trainer: dict[str, Any], **arguments: Any) -> Watched:
        detector = Watched(**CFLOW | arguments, image_size=64)
        engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **trainer)
        engine.fit(detector, datamodule=datamodule)
        return detector

    return run


@pytest.mark.parametrize(
    ("fibers_per_step", "fine", "coarse"),
    [
        # four images have 256 positions in the finer layer and 64 in the coarser
        (100, [100, 100], [64]),
        (64, [64] * 4, [64]),
        (1000, [256], [64]),
    ],
)
def test_one_step_for_each_batch_of_fibers(fit: Fit, fibers_per_step: int, fine: list[int], coarse: list[int]) -> None:
    detector = fit({}, fibers_per_step=fibers_per_step)
    assert detector.sizes == 3 * (fine + coarse)
    assert detector.trainer.global_step == 3  # the trainer counts batches of images
    states = detector.trainer.optimizers[0].state
    for decoder, steps in zip(detector.model.fiber_flow.decoders, (fine, coarse), strict=True):
        assert {int(states[parameter]["step"]) for parameter in decoder.parameters()} == {3 * len(steps)}


def test_gradients_are_clipped_at_each_step(fit: Fit) -> None:
    free = fit({}, fibers_per_step=64)
    assert max(free.norms) > 0.02
    for trainer, arguments in (({"gradient_clip_val": 0.01}, {}), ({}, {"gradient_clip_norm": 0.01})):
        clipped = fit(trainer, fibers_per_step=64, **arguments)
        assert len(clipped.norms) == len(free.norms)
        assert max(clipped.norms) == pytest.approx(0.01, rel=1e-2)


def test_accumulation_is_refused(fit: Fit) -> None:
    with pytest.raises(ValueError, match="raise fibers_per_step instead of accumulate_grad_batches"):
        fit({"accumulate_grad_batches": 2})


def test_several_devices_are_refused(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.raises(ValueError, match="CFlow trains on one device, since"):
        fit({})


def test_scores_are_relative_to_the_training(fit: Fit, datamodule: Folder, tmp_path: Path) -> None:
    detector = fit({}, fibers_per_step=1000)
    assert detector.model.is_measured
    assert torch.isfinite(detector.model.reference).all()
    loaded = Watched.load_from_checkpoint(detector.trainer.checkpoint_callback.best_model_path)
    torch.testing.assert_close(loaded.model.reference, detector.model.reference)
    images = torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        prediction = detector.eval().model(images)
        assert (prediction.anomaly_map >= 0).all()
        torch.testing.assert_close(prediction.pred_score, prediction.anomaly_map.amax((1, 2, 3)))
        # the published order: the sum over layers of densities relative to a maximum
        densities = detector.model.plausibilities(detector.model.features(images))
        pairs = zip(densities, detector.model.reference, strict=True)
        relative = [(level - highest).clamp(max=0).double().exp() for level, highest in pairs]
        assert (detector.model.unit == 1).all()
        summed = scoring.upsampled(relative, (64, 64), align_corners=True).sum(0)
    torch.testing.assert_close(prediction.anomaly_map.double(), -(summed / 2).log(), atol=1e-4, rtol=1e-4)
    # validation without training leaves the reference alone
    before = loaded.model.reference.clone()
    Engine(accelerator="cpu", default_root_dir=tmp_path).validate(loaded, datamodule=datamodule)
    assert torch.equal(loaded.model.reference, before)


def test_energies_are_in_standard_deviations_of_the_trainings(fit: Fit) -> None:
    detector = fit({}, score_by="energy", top_share=0.1, standardize=True, lr=0, fibers_per_step=64).eval()
    model = detector.model
    assert model.is_measured
    loaded = Watched.load_from_checkpoint(detector.trainer.checkpoint_callback.best_model_path)
    torch.testing.assert_close(loaded.model.unit, model.unit)
    with torch.no_grad():
        levels: list[list[torch.Tensor]] = [[], []]
        for batch in detector.trainer.datamodule.train_dataloader():
            latents, log_det = model.latents(detector.pre_processor(batch.image))
            assert log_det.abs().min() > 1  # there is something to leave out
            for level, latent in zip(levels, latents, strict=True):
                level.append(-0.5 * latent.square().mean(1, keepdim=True))
        energies = [torch.cat(level) for level in levels]
        torch.testing.assert_close(model.reference, torch.stack([level.mean() for level in energies]))
        torch.testing.assert_close(model.unit, torch.stack([level.std(correction=0) for level in energies]))
        # the last batch, position by position
        prediction = model(detector.pre_processor(batch.image))
        relative = [
            ((level[-len(batch.image) :] - level.mean()) / level.std(correction=0)).clamp(max=0) for level in energies
        ]
        expected = -scoring.upsampled(relative, (64, 64), align_corners=True).exp().mean(0).log()
    torch.testing.assert_close(prediction.anomaly_map, expected, atol=1e-4, rtol=1e-4)
    most = expected.flatten(1).sort(1, descending=True).values[:, : int(0.1 * 64 * 64)]
    torch.testing.assert_close(prediction.pred_score, -(-most).exp().mean(1).log(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("far", [100.0, 2000.0])
def test_energies_that_differ_beyond_float32s_exponents_are_ordered(far: float) -> None:
    detector = CFlow(**CFLOW, image_size=64, score_by="energy")
    maps = [torch.full((2, 1, 8, 8), -far), torch.full((2, 1, 4, 4), -far)]
    for level in maps:
        level[1] -= 5
    torch.testing.assert_close(detector.model.compare(maps, (64, 64)).pred_score, torch.tensor([far, far + 5]))


def test_far_cells_are_still_ordered() -> None:
    """A float32 sum of densities would be 0 for both."""
    detector = CFlow(**CFLOW, image_size=64)
    maps = [torch.full((2, 1, 8, 8), -20.0), torch.full((2, 1, 4, 4), -20.0)]
    maps[0][1] -= 5
    maps[1][1] -= 5
    scores = detector.model.compare(maps, (64, 64)).pred_score
    torch.testing.assert_close(scores, torch.tensor([20.0, 25.0]))
    assert torch.isfinite(detector.model.compare([m - 1e4 for m in maps], (64, 64)).anomaly_map).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ["blocks.4", "blocks.2"]}, "name the layers from fine to coarse"),
        ({"layers": ["blocks.2", "blocks.9"]}, r"no layer 'blocks\.9'"),
        ({"image_size": 15}, "15x15 pixels is too small for layer 'blocks.4' at stride 16: the least size is 16x16"),
        ({"condition_channels": 10}, "a positive multiple of 4"),
        ({"fibers_per_step": 0}, "fibers_per_step must be 1 or more"),
        ({"num_blocks": 0}, "num_blocks must be 1 or more"),
        ({"schedule": "cosine"}, "unknown schedule"),
        ({"score_by": "latents"}, "unknown score_by 'latents': choose one of density, energy"),
        ({"top_share": 2}, "top_share is a share of the map's positions"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CFlow(**CFLOW | {"image_size": 64} | changes)
