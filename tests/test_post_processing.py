"""The post-processor of good images: its verdicts, its checkpoints and its graphs."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch, InferenceBatch
from anomalib.engine import Engine
from anomalib.metrics import AUROC, Evaluator
from anomalib.post_processing import PostProcessor
from conftest import FAST_FLOW, folder_arguments
from lightning.pytorch.trainer.states import TrainerFn
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from anomalib_csflow import FastFlow
from anomalib_csflow.calibration import Scale, p_values
from anomalib_csflow.engine.post_processing import ConformalPostProcessor


def good(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores and maxima of good images, on two scales."""
    generator = torch.Generator().manual_seed(seed)
    scores = 0.14 + 0.01 * torch.randn(count, generator=generator)
    return scores, 40 * scores + 0.5 * torch.randn(count, generator=generator)


def predictions(count: int, seed: int = 1, farthest: float = 3.0) -> InferenceBatch:
    """Raw predictions: a few like those of good images, the rest farther and farther from them."""
    generator = torch.Generator().manual_seed(seed)
    scores = 0.14 + torch.logspace(-2, farthest, count)
    maps = 3 + torch.randn(count, 1, 8, 6, generator=generator) + 20 * (scores - 0.14)[:, None, None, None]
    return InferenceBatch(pred_score=scores, anomaly_map=maps)


@pytest.fixture
def calibrated() -> ConformalPostProcessor:
    """Calibrated on 200 good images."""
    post_processor = ConformalPostProcessor(0.05)
    post_processor.calibrate(*good(200))
    return post_processor


def test_labels_and_masks(calibrated: ConformalPostProcessor) -> None:
    raw = predictions(50)
    judged = calibrated(raw)
    assert judged.pred_score.dtype == torch.float32
    torch.testing.assert_close(judged.pred_mask, judged.anomaly_map > 0.5)
    torch.testing.assert_close(judged.pred_label, (judged.pred_score > 0.5) | judged.pred_mask.flatten(1).any(1))
    torch.testing.assert_close(judged.pred_score > 0.5, raw.pred_score > calibrated.image_threshold)
    torch.testing.assert_close(judged.anomaly_map > 0.5, raw.anomaly_map > calibrated.pixel_threshold)
    assert 0 < judged.pred_label.sum() < 50
    assert judged.pred_mask.shape == (50, 1, 8, 6)


def test_good_images_show_a_label_or_a_contour_at_the_promised_rate(calibrated: ConformalPostProcessor) -> None:
    scores, maxima = good(200)
    judged = calibrated(InferenceBatch(pred_score=scores, anomaly_map=maxima[:, None, None, None].expand(-1, 1, 2, 2)))
    assert judged.pred_label.sum() <= 0.05 * 201
    assert judged.pred_label.any()
    assert (judged.pred_label | ~judged.pred_mask.flatten(1).any(1)).all()


@pytest.mark.parametrize("farthest", [1.0, 6.0])
def test_ranking_is_that_of_raw_scores(calibrated: ConformalPostProcessor, farthest: float) -> None:
    raw = predictions(300, farthest=farthest)
    judged = calibrated(raw)
    assert (judged.pred_score.diff() > 0).all()
    assert 0 < judged.pred_score.min() < judged.pred_score.max() < 1
    labels = torch.rand(300, generator=torch.Generator().manual_seed(0)) < raw.pred_score.log().sigmoid()
    expected = roc_auc_score(labels, raw.pred_score)
    metric = AUROC(fields=["pred_score", "gt_label"])
    metric.update(SimpleNamespace(pred_score=judged.pred_score, gt_label=labels))
    assert metric.compute().item() == pytest.approx(expected, abs=1e-6)
    pixels = labels[:, None, None, None].expand_as(raw.anomaly_map).flatten()
    expected = roc_auc_score(pixels, raw.anomaly_map.flatten())
    assert roc_auc_score(pixels, judged.anomaly_map.flatten()) == pytest.approx(expected, abs=1e-6)


def test_graph_and_numpy_agree(calibrated: ConformalPostProcessor) -> None:
    raw = predictions(50)
    judged = calibrated(raw)
    for scale, values, found in (
        (calibrated.score_scale, raw.pred_score, judged.pred_score),
        (calibrated.map_scale, raw.anomaly_map, judged.anomaly_map),
    ):
        plain = Scale(scale.threshold.item(), scale.width.item())
        np.testing.assert_allclose(found, plain.calibrated(values.numpy()), rtol=1e-6)
        np.testing.assert_allclose(scale.raw(found), values, rtol=1e-4)
        np.testing.assert_allclose(scale.p_values(found), p_values(values.numpy(), scale.good.numpy()))


def test_p_value_of_an_alarm(calibrated: ConformalPostProcessor) -> None:
    assert calibrated.score_scale.p_values(torch.tensor([0.0, 0.9999])).tolist() == pytest.approx([1.0, 1 / 201])
    torch.testing.assert_close(calibrated.score_scale.good, good(200)[0].sort().values)


def test_detectors_without_maps() -> None:
    post_processor = ConformalPostProcessor(0.05)
    assert post_processor.calibrate(good(30)[0]).rate == 0.05
    judged = post_processor(InferenceBatch(pred_score=torch.tensor([0.1, 9.0])))
    assert judged.pred_label.tolist() == [False, True]
    assert judged.anomaly_map is judged.pred_mask is None
    maps = torch.full((1, 1, 2, 2), 7.0)  # which were not calibrated on: raw, and without masks
    judged = post_processor(InferenceBatch(pred_score=torch.tensor([0.1]), anomaly_map=maps))
    assert judged.anomaly_map is maps
    assert judged.pred_mask is None


def test_detectors_without_scores(calibrated: ConformalPostProcessor) -> None:
    raw = predictions(5)
    judged = calibrated(InferenceBatch(anomaly_map=raw.anomaly_map))
    expected = calibrated(raw._replace(pred_score=raw.anomaly_map.amax((1, 2, 3))))
    torch.testing.assert_close(judged.pred_score, expected.pred_score)
    with pytest.raises(ValueError, match="neither a score nor a map"):
        calibrated(InferenceBatch())


def test_without_a_calibration_all_is_raw_and_said_once() -> None:
    post_processor, raw = ConformalPostProcessor(), predictions(5)
    with pytest.warns(UserWarning, match="This model was never calibrated") as caught:
        judged = [post_processor(raw) for _ in range(2)][-1]
    assert len(caught) == 1
    assert judged.pred_score is raw.pred_score
    assert judged.anomaly_map is raw.anomaly_map
    assert judged.pred_label is judged.pred_mask is None


def test_anomalib_s_switches(calibrated: ConformalPostProcessor) -> None:
    raw = predictions(50)
    expected = calibrated(raw)
    calibrated.enable_normalization = False
    judged = calibrated(raw)
    torch.testing.assert_close(judged.pred_score, raw.pred_score)
    torch.testing.assert_close(judged.pred_label, expected.pred_label)
    calibrated.enable_thresholding = False
    assert calibrated(raw).pred_label is None


def test_sensitivity_moves_the_threshold_of_calibrated_scores(calibrated: ConformalPostProcessor) -> None:
    calibrated.image_sensitivity = 0.2
    judged = calibrated(predictions(50)._replace(anomaly_map=None))
    torch.testing.assert_close(judged.pred_label, judged.pred_score > 0.8)


def test_batches_are_judged_as_by_forward(calibrated: ConformalPostProcessor) -> None:
    raw = predictions(6)
    batch = ImageBatch(image=torch.zeros(6, 3, 8, 6), pred_score=raw.pred_score, anomaly_map=raw.anomaly_map[:, 0])
    calibrated.post_process_batch(batch)
    judged = calibrated(raw)
    torch.testing.assert_close(batch.pred_score, judged.pred_score)
    torch.testing.assert_close(batch.pred_label, judged.pred_label)
    torch.testing.assert_close(torch.as_tensor(batch.pred_mask), judged.pred_mask[:, 0])


# -- calibration ------------------------------------------------------------------------------------


def test_promises() -> None:
    made = ConformalPostProcessor(0.01).calibrate(*good(60), "estimated")
    assert (made.kind, made.rate, made.num_needed) == ("estimated", 1 / 61, 99)
    made = ConformalPostProcessor(0.01, "certified").calibrate(*good(300), reference=good(10, seed=3))
    assert (made.kind, made.rate, made.confidence) == ("certified", 0.01, 0.95)
    made = ConformalPostProcessor(0.01).calibrate(*good(100))
    assert (made.rate, made.num_needed) == (2 / 101, 199)


def validate(
    post_processor: PostProcessor, scores: Tensor, maxima: Tensor, defective: list[int], fn: TrainerFn
) -> None:
    """Let a post-processor see an epoch of validation, in two batches."""
    trainer: Any = SimpleNamespace(sanity_checking=False, world_size=1, state=SimpleNamespace(fn=fn))
    labels = torch.tensor([index in defective for index in range(len(scores))])
    for part in torch.arange(len(scores)).chunk(2):
        maps = maxima[part, None, None] * torch.tensor([[1.0, 0.5]])
        batch = ImageBatch(
            image=torch.zeros(len(part), 3, 1, 2), pred_score=scores[part], anomaly_map=maps, gt_label=labels[part]
        )
        post_processor.on_validation_batch_end(trainer, None, batch)
    post_processor.on_validation_epoch_end(trainer, None)


def test_validation_calibrates_on_good_images_alone() -> None:
    scores, maxima = good(100)
    post_processor, expected = ConformalPostProcessor(0.1), ConformalPostProcessor(0.1)
    validate(post_processor, scores, maxima, [3, 70], TrainerFn.FITTING)
    kept = torch.tensor([index for index in range(100) if index not in {3, 70}])
    expected.calibrate(scores[kept], maxima[kept])
    torch.testing.assert_close(post_processor.state_dict(), expected.state_dict(), equal_nan=True)


def test_which_validation_calibrates() -> None:
    post_processor = ConformalPostProcessor(0.1)
    validate(post_processor, *good(50), [], TrainerFn.VALIDATING)  # a model that was never calibrated
    validate(post_processor, *good(40), [], TrainerFn.VALIDATING)
    assert post_processor.made.num_images == 50
    validate(post_processor, *good(40), [], TrainerFn.FITTING)  # weights that have changed
    assert post_processor.made.num_images == 40
    post_processor.calibrate(*good(60))
    validate(post_processor, *good(40), [], TrainerFn.FITTING)  # the detector has better images
    assert post_processor.made.num_images == 60
    post_processor.on_fit_start(None, None)
    validate(post_processor, *good(40), [], TrainerFn.FITTING)
    assert post_processor.made.num_images == 40


def test_thresholds_by_f1_are_anomalib_s() -> None:
    scores, maxima = good(40)
    theirs, ours = PostProcessor(), ConformalPostProcessor(threshold="f1")
    for post_processor in (theirs, ours):
        validate(post_processor, scores, maxima, [3, 7], TrainerFn.FITTING)
    raw = predictions(20)
    for name, value in theirs(raw)._asdict().items():
        torch.testing.assert_close(getattr(ours(raw), name), value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"false_alarm_rate": 1.0}, "the false-alarm rate is a share"),
        ({"promise": "sure"}, "unknown promise 'sure'"),
        ({"threshold": "f2"}, "unknown threshold 'f2': choose one of conformal, f1"),
    ],
)
def test_no_post_processor(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConformalPostProcessor(**arguments)


# -- checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 30, 250])
def test_state_of_any_number_of_images_loads(calibrated: ConformalPostProcessor, count: int) -> None:
    saved = ConformalPostProcessor(0.1)
    if count:
        saved.calibrate(*good(count))
    calibrated.load_state_dict(saved.state_dict())
    calibrated.load_checkpoint_config(saved.checkpoint_config())
    torch.testing.assert_close(calibrated.state_dict(), saved.state_dict(), equal_nan=True)
    assert calibrated.is_calibrated == bool(count)
    assert (calibrated.made, calibrated.false_alarm_rate) == (saved.made, 0.1)


def test_configuration_is_plain_data(calibrated: ConformalPostProcessor, tmp_path: Path) -> None:
    torch.save(calibrated.checkpoint_config(), tmp_path / "config.pt")
    config = torch.load(tmp_path / "config.pt", weights_only=True)
    restored = ConformalPostProcessor()
    restored.load_checkpoint_config(config)
    assert restored.made == calibrated.made


def test_checkpoints_of_anomalib_s_post_processor_load(calibrated: ConformalPostProcessor) -> None:
    theirs, raw = PostProcessor(), predictions(20)
    validate(theirs, *good(40), [3, 7], TrainerFn.FITTING)
    calibrated.load_checkpoint_config(theirs.checkpoint_config())
    calibrated.load_state_dict(theirs.state_dict())
    assert calibrated.threshold == "f1"
    assert not calibrated.is_calibrated
    for name, value in theirs(raw)._asdict().items():
        torch.testing.assert_close(getattr(calibrated(raw), name), value)


# -- the graph --------------------------------------------------------------------------------------


class Exported(nn.Module):
    """A post-processor as the end of a graph."""

    def __init__(self, post_processor: PostProcessor) -> None:
        super().__init__()
        self.post_processor = post_processor

    def forward(self, maps: Tensor) -> InferenceBatch:
        """The image score is the mean of the map."""
        return self.post_processor(InferenceBatch(pred_score=maps.mean((1, 2, 3)) / 30, anomaly_map=maps))


def test_graphs_give_the_same(calibrated: ConformalPostProcessor, tmp_path: Path) -> None:
    import openvino

    model, path = Exported(calibrated).eval(), tmp_path / "model.onnx"
    batch = torch.export.Dim("batch")
    maps = predictions(7).anomaly_map
    exported = torch.export.export(model, (maps,), dynamic_shapes=({0: batch},))
    names = ["pred_score", "pred_label", "anomaly_map", "pred_mask"]
    torch.onnx.export(exported, f=str(path), output_names=names, dynamo=True, opset_version=18)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for raw in (maps, maps[:1]):
        expected, outputs = model(raw), compiled(raw.numpy())
        for name in names:
            torch.testing.assert_close(getattr(exported.module()(raw), name), getattr(expected, name))
            found = torch.from_numpy(outputs[name]).to(getattr(expected, name).dtype)
            torch.testing.assert_close(found, getattr(expected, name), atol=1e-6, rtol=1e-6)


def test_fit_checkpoint_test_and_predict(image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = AUROC(fields=["pred_score", "gt_label"], prefix="image_")
    datamodule = Folder(**folder_arguments(image_folder))
    detector = FastFlow(
        **FAST_FLOW,
        image_size=64,
        post_processor=ConformalPostProcessor(0.25, num_folds=0),
        evaluator=Evaluator(test_metrics=[raw]),
    )
    engine = Engine(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path)
    with caplog.at_level(logging.INFO):
        engine.fit(detector, datamodule=datamodule)
    sentence = "needs 7 good images to calibrate on, and there are 4: at most 40 % of good images"
    assert caplog.text.count(sentence) == 1

    loaded = FastFlow.load_from_checkpoint(engine.best_model_path, post_processor=ConformalPostProcessor()).eval()
    assert loaded.post_processor.made == detector.post_processor.made
    pixels = torch.rand(2, 3, 150, 180)
    with torch.no_grad():
        expected, found = detector.eval()(pixels), loaded(pixels)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(found, name), value)

    (metrics,) = engine.test(detector, datamodule=datamodule)
    judged = list(engine.predict(detector, datamodule=datamodule, return_predictions=True))
    scores, labels = (torch.cat([getattr(batch, name) for batch in judged]) for name in ("pred_score", "gt_label"))
    originals = detector.post_processor.score_scale.raw(scores)
    assert metrics["image_AUROC"] == pytest.approx(roc_auc_score(labels, originals), abs=1e-6)
    assert ((scores > 0) & (scores < 1)).all()
