"""A fit by steps: as many on few images as on many, each image computed once, and never without a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.data.datasets import FolderDataset
from anomalib.data.datasets.base import image
from anomalib.engine import Engine
from conftest import FAST_FLOW
from lightning.pytorch import Callback, Trainer

from anomalib_csflow import CSFlow, FastFlow, FeatureCache, scoring
from anomalib_csflow.engine import folds, images, optimization, roles, step_images
from anomalib_csflow.engine.optimization import TrainingOptions
from anomalib_csflow.engine.post_processing import ConformalPostProcessor
from anomalib_csflow.engine.providers import RepeatedSet

OVER_LAYERS: dict[str, Any] = {
    "backbone": "tf_efficientnet_lite0",
    "layers": ["blocks.2", "blocks.4", "blocks.5"],
    "weights": "package",
    "image_size": 64,
    "num_scales": 1,
    "num_blocks": 1,
    "kernel_sizes": [3],
    "hidden_channels": 8,
    "standardize": True,
    "whiten": True,
    "map_mode": "soft_minimum",
    "image_score": "score_test",
    "top_share": 0.03,
    "lr": 1e-2,
    "schedule": "one_cycle",
    "noise": "auto",
}


class Steps(Callback):
    """Counts what the trainer did."""

    def __init__(self) -> None:
        self.steps = self.validations = 0

    def on_train_batch_end(self, *_: Any) -> None:
        """One more step."""
        self.steps += 1

    def on_validation_end(self, *_: Any) -> None:
        """One more validation."""
        self.validations += 1


def folder(root: Path, **options: Any) -> Folder:
    arguments = {"name": "few", "root": root, "normal_dir": "train/good", "num_workers": 0, "train_batch_size": 4}
    return Folder(
        **arguments | {"val_split_mode": "from_train", "val_split_ratio": 0.25, "test_split_mode": "none"} | options
    )


def fit(detector: Any, data: Folder, root: Path, **trainer: Any) -> tuple[Engine, Steps]:
    steps = Steps()
    engine = Engine(accelerator="cpu", default_root_dir=root, callbacks=[steps], **trainer)
    engine.fit(detector, datamodule=data)
    return engine, steps


@pytest.mark.parametrize("with_validation", [True, False])
def test_as_many_steps_as_are_asked_and_a_checkpoint(image_folder: Path, tmp_path: Path, with_validation: bool) -> None:
    detector = CSFlow(**OVER_LAYERS, max_steps=7, post_processor=False)
    data = folder(image_folder, **({} if with_validation else {"val_split_mode": "none"}))
    engine, steps = fit(detector, data, tmp_path, **({} if with_validation else {"limit_val_batches": 0}))
    assert (steps.steps, engine.trainer.global_step, steps.validations) == (7, 7, int(with_validation))
    assert not isinstance(data.train_data, RepeatedSet)  # given back
    loaded = CSFlow.load_from_checkpoint(engine.best_model_path, weights="package")
    batch = torch.rand(2, 3, 64, 64)
    found, expected = loaded.eval()(batch), detector.eval()(batch)
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map)
    torch.testing.assert_close(found.pred_score, expected.pred_score)
    assert loaded.model.level_scale.is_fitted
    assert loaded.model.test_scale.is_fitted


@pytest.mark.parametrize(("least", "views", "expected"), [(2, 1, 2), (3, 3, 7), (5, 1, 5)])  # nine images, by four
def test_auto_takes_more_steps_for_many_images(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int, views: int, expected: int
) -> None:
    monkeypatch.setattr(optimization, "LEAST_STEPS", least)
    monkeypatch.setattr(optimization, "LEAST_VIEWS", views)
    detector = CSFlow(**OVER_LAYERS, max_steps="auto", post_processor=False)
    _, steps = fit(detector, folder(image_folder), tmp_path)
    assert steps.steps == expected


def test_auto_is_240_or_one_step_for_each_of_up_to_1920_images() -> None:
    assert optimization.steps_to_draw_for("auto") * 8 == 1920
    assert [optimization.steps_for("auto", count, 8) for count in (20, 240, 761, 1920)] == [240, 240, 761, 1920]


@pytest.mark.parametrize("max_steps", [3, 100])
def test_the_trainer_may_stop_earlier_and_there_is_a_checkpoint(
    image_folder: Path, tmp_path: Path, max_steps: int
) -> None:
    detector = CSFlow(**OVER_LAYERS, max_steps=5, post_processor=False)
    engine, steps = fit(detector, folder(image_folder), tmp_path, max_steps=max_steps)
    assert steps.steps == min(max_steps, 5)
    assert Path(engine.best_model_path).is_file()
    assert detector.model.level_scale.is_fitted


def test_each_image_is_computed_once(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = CSFlow(**OVER_LAYERS, max_steps=9, post_processor=False)
    computed = []
    forward = type(detector.model.features).forward
    monkeypatch.setattr(
        type(detector.model.features), "forward", lambda self, x: computed.append(len(x)) or forward(self, x)
    )
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path, callbacks=[FeatureCache(tmp_path / "cache")])
    engine.fit(detector, datamodule=folder(image_folder))
    assert sum(computed) == 12


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"max_epochs": 1}])
@pytest.mark.parametrize(("at_most", "expected"), [(4, 3), (5, 5), (100, 9)])  # of nine
def test_the_scale_of_levels_comes_from_images_evenly_spread(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    length: dict[str, int],
    at_most: int,
    expected: int,
) -> None:
    detector = CSFlow(**OVER_LAYERS, **length, post_processor=False)
    monkeypatch.setattr("anomalib_csflow.detectors.cs_flow.detector.SCALE_IMAGES", at_most)
    measured = []
    mean_squares = scoring.mean_squares
    monkeypatch.setattr(scoring, "mean_squares", lambda z: measured.append(len(z[0])) or mean_squares(z))
    fit(detector, folder(image_folder), tmp_path, limit_val_batches=0)
    assert sum(measured) == expected
    assert detector.model.level_scale.is_fitted


def test_features_that_are_not_standardized_are_computed_once_too(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = FastFlow(**FAST_FLOW, standardize=False, image_size=64, max_steps=9, post_processor=False)
    decoded = []
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path, callbacks=[FeatureCache(tmp_path / "cache")])
    read = image.read_image
    monkeypatch.setattr(image, "read_image", lambda path, **options: decoded.append(path) or read(path, **options))
    engine.fit(detector, datamodule=folder(image_folder))
    assert len(decoded) <= 12


@pytest.mark.parametrize("is_kept", [True, False])
def test_steps_take_no_more_images_than_they_see(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_kept: bool
) -> None:
    monkeypatch.setattr(step_images, "MOST_VALIDATED", 2)
    decoded: list[str] = []
    for module, name in ((image, "read_image"), (images, "_check_image"), (roles, "_digest")):
        touch = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path, *a, t=touch, **o: decoded.append(str(path)) or t(path, *a, **o))
    seen = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        detector = CSFlow(**OVER_LAYERS, max_steps=2, post_processor=False)
        data = folder(image_folder, train_batch_size=2, seed=0)
        cache = FeatureCache(tmp_path / "cache", max_gb=1.0 if is_kept else 0)
        engine = Engine(accelerator="cpu", default_root_dir=tmp_path, callbacks=[cache])
        engine.fit(detector, datamodule=data)
        seen.append({Path(path).name for path in decoded})
        assert len(detector.roles[roles.TRAINED]) == 4
        assert len(detector.roles[roles.VALIDATED]) == 2
        assert (len(data.train_data), len(data.val_data)) == (9, 3)  # given back
    assert len(seen[0]) == 6
    assert seen[0] == seen[1]  # drawn alike, whatever the seed
    paths = [str(n) for n in range(1000)]
    few, more = step_images.drawn(paths, 400), step_images.drawn(paths, 500)
    assert set(few) < set(more)
    assert few == sorted(few)
    assert sum(few) / len(few) == pytest.approx(500, abs=50)  # from the whole folder


def test_all_images_are_given_back_after_an_error(image_folder: Path, tmp_path: Path) -> None:
    detector = CSFlow(**OVER_LAYERS, max_steps=2, post_processor=False)
    detector.training_step = lambda *_: 1 / 0
    data = folder(image_folder, train_batch_size=2)
    for cache in (FeatureCache(tmp_path / "cache"), FeatureCache(max_gb=0)):
        engine = Engine(accelerator="cpu", default_root_dir=tmp_path, callbacks=[cache])
        with pytest.raises(ZeroDivisionError):
            engine.fit(detector, datamodule=data)
        assert type(data.train_data) is type(data.val_data) is FolderDataset
        assert len(data.train_data) == 9


def test_noise_is_in_standard_deviations(image_folder: Path, tmp_path: Path) -> None:
    detector = CSFlow(**OVER_LAYERS | {"noise": 0.5}, max_steps=1, post_processor=False)
    fit(detector, folder(image_folder), tmp_path)
    zeros = tuple(torch.zeros(64, c, 8, 8) for c in detector.model.features.channels)
    for noisy, std in zip(detector.noisy(zeros), detector.model.standardization.stds, strict=True):
        torch.testing.assert_close(noisy.std((0, 2, 3)), 0.5 * std, rtol=0.1, atol=0)
    assert CSFlow(**OVER_LAYERS).training_options.noise_for(5) == 1
    assert CSFlow(**OVER_LAYERS).training_options.noise_for(2000) == pytest.approx(0.1)
    assert TrainingOptions(1.0, "constant", noise="auto").noise_for(160) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_steps": 0}, "max_steps must be 1 or more, or 'auto', got 0"),
        ({"noise": -1.0}, "noise must be 'auto' or a standard deviation of 0 or more, got -1.0"),
        ({"noise": float("nan")}, "noise must be 'auto' or a standard deviation"),
        ({"standardize": False, "whiten": False}, "only a detector with standardize=True measures"),
        ({"standardize": False}, "whiten=True needs standardize=True"),
        ({"standardize": False, "whiten": False, "conditioner_clamp": 2.0}, "conditioner_clamp needs standardize=True"),
        ({"image_score": "maximum"}, "unknown image_score 'maximum': choose one of energy, map, levels"),
        ({"layers": ["blocks.2", "blocks.5"]}, "strides .* do not make a pyramid"),
        ({"layers": ["blocks.5", "blocks.2"]}, "name the layers from fine to coarse"),
        ({"num_scales": 0}, "num_scales must be 1 or more, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CSFlow(**OVER_LAYERS | arguments)


@pytest.mark.parametrize("size", [(64, 64), (75, 110), (64, 97)])
def test_layers_and_image_sizes_in_one_pyramid(size: tuple[int, int]) -> None:
    detector = CSFlow(**OVER_LAYERS | {"num_scales": 2, "noise": 0.0}).eval()
    batch = torch.rand(2, 3, *size)
    pyramid = detector.model.features(batch)
    assert [level.shape[1] for level in pyramid] == detector.model.features.channels
    latents, log_det = detector.model.transform(pyramid)
    back, log_det_back = detector.model.flow(latents, rev=True)
    torch.testing.assert_close(log_det, -log_det_back)
    for found, level in zip(back, pyramid, strict=True):
        torch.testing.assert_close(found, level, atol=1e-3, rtol=1e-3)
    assert detector.model(batch).anomaly_map.shape == (2, 1, *size)


def test_few_good_images_get_thresholds_out_of_fold(
    image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    processor = ConformalPostProcessor(false_alarm_rate=0.1)
    detector = CSFlow(**OVER_LAYERS, max_steps=4, post_processor=processor)
    engine, _ = fit(detector, folder(image_folder), tmp_path)
    assert processor.made.kind == "estimated"
    assert "computed in every epoch" not in caplog.text  # the refits read the cache
    assert processor.made.num_images == processor.num_good == 12  # 9 out of fold, 3 of the validation
    loaded = CSFlow.load_from_checkpoint(engine.best_model_path, weights="package")
    assert str(loaded.post_processor.made) == str(processor.made)
    batch = torch.rand(3, 3, 64, 64)
    torch.testing.assert_close(loaded.eval()(batch).pred_score, detector.eval()(batch).pred_score)


def test_enough_validation_images_need_no_refit(image_folder: Path, tmp_path: Path) -> None:
    processor = ConformalPostProcessor(false_alarm_rate=0.5)
    fit(CSFlow(**OVER_LAYERS, max_steps=2, post_processor=processor), folder(image_folder), tmp_path)
    assert (processor.made.kind, processor.num_good) == ("marginal", 3)


@pytest.mark.refits
def test_too_few_images_to_refit_are_said(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train/good").mkdir(parents=True)
    for file in sorted((image_folder / "train/good").iterdir())[:6]:
        (tmp_path / "train/good" / file.name).symlink_to(file)
    detector = CSFlow(**OVER_LAYERS, max_steps=2)
    with pytest.warns(UserWarning, match="5 training images are too few to refit on, which takes 6 or more"):
        fit(detector, folder(tmp_path, val_split_ratio=0.2), tmp_path)
    assert detector.post_processor.num_good == 1


@pytest.fixture
def refits(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The trainers of refits, in their order."""
    made: list[Trainer] = []

    def trainer(**options: Any) -> Trainer:
        made.append(Trainer(**options))
        return made[-1]

    monkeypatch.setattr(folds, "Trainer", trainer)
    return made


def processor() -> ConformalPostProcessor:
    return ConformalPostProcessor(num_folds=2)


def test_refits_take_all_steps_of_a_resumed_fit(image_folder: Path, tmp_path: Path, refits: list[Trainer]) -> None:
    engine, _ = fit(CSFlow(**OVER_LAYERS, max_steps=4, post_processor=processor()), folder(image_folder), tmp_path)
    assert [trainer.global_step for trainer in refits] == [4, 4]
    refits.clear()
    detector, steps = CSFlow(**OVER_LAYERS, max_steps=6, post_processor=processor()), Steps()
    again = Engine(accelerator="cpu", default_root_dir=tmp_path / "again", callbacks=[steps])
    again.fit(detector, datamodule=folder(image_folder), ckpt_path=engine.best_model_path)
    assert (steps.steps, [trainer.global_step for trainer in refits]) == (2, [6, 6])


def test_refits_take_as_many_steps_as_auto_gave(
    image_folder: Path, tmp_path: Path, refits: list[Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimization, "LEAST_STEPS", 3)
    monkeypatch.setattr(optimization, "LEAST_VIEWS", 3)
    detector = CSFlow(**OVER_LAYERS, post_processor=processor(), max_steps="auto")
    fit(detector, folder(image_folder), tmp_path)
    assert [trainer.global_step for trainer in refits] == [7, 7]


class Stop(Callback):
    """Stops a fit after its second epoch, as early stopping does."""

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop."""
        trainer.should_stop = trainer.current_epoch == 1


def test_refits_stop_where_the_fit_stopped(image_folder: Path, tmp_path: Path, refits: list[Trainer]) -> None:
    detector = CSFlow(**OVER_LAYERS, post_processor=processor())
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path, callbacks=[Stop()], max_epochs=5)
    engine.fit(detector, datamodule=folder(image_folder))
    assert engine.trainer.global_step == 6
    assert [trainer.global_step for trainer in refits] == [2, 4]  # two epochs, of 4 and 5 images in batches of four


@pytest.mark.parametrize("epochs", [9, -1])
def test_refits_take_as_many_steps_as_the_trainer_allowed(
    epochs: int, image_folder: Path, tmp_path: Path, refits: list[Trainer]
) -> None:
    detector = CSFlow(**OVER_LAYERS, post_processor=processor())
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path, max_epochs=epochs, max_steps=7)
    engine.fit(detector, datamodule=folder(image_folder))
    assert [trainer.global_step for trainer in refits] == [7, 7]
    assert detector.post_processor.num_good == 12  # each of the nine once, and three held out
    scores = [score for _, score, _ in detector._unseen]
    assert len(scores) == len(set(scores)) == 9


def test_refits_of_a_fit_that_was_stopped_use_all_images_of_their_folds(
    image_folder: Path, tmp_path: Path, refits: list[Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    detector = CSFlow(**OVER_LAYERS, max_steps=5, post_processor=processor())
    data = folder(image_folder, train_batch_size=2)
    fit(detector, data, tmp_path, max_steps=1)
    assert [trainer.global_step for trainer in refits] == [1, 1]
    assert "images to train on" not in caplog.text


@pytest.mark.parametrize(("rate", "is_said"), [(0.01, True), (0.5, False)])
def test_a_prediction_says_that_thresholds_promise_less_than_was_asked(
    rate: float, is_said: bool, image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    detector = CSFlow(**OVER_LAYERS, max_steps=2, post_processor=ConformalPostProcessor(rate, num_folds=0))
    engine, _ = fit(detector, folder(image_folder), tmp_path)
    caplog.clear()
    engine.predict(detector, data_path=image_folder / "test/good", return_predictions=False)
    assert (
        "A false-alarm rate of 1 % needs 199 good images to calibrate on, and there are 3" in caplog.text
    ) == is_said
