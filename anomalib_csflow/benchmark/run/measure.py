"""Measure one model on one data set: training, raw predictions, latency."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy import ExportType, OpenVINOInferencer
from anomalib.engine import Engine
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback
from torch import Tensor

from anomalib_csflow.engine.feature_cache import FeatureCache

from .accuracy import Predictions


class _Collector(Callback):
    """Keeps the predictions of a test."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *rest: Any) -> None:  # noqa: ARG002
        fields = ("image_path", "pred_score", "gt_label", "anomaly_map", "gt_mask")
        kept = {field: getattr(batch, field) for field in fields}
        self.batches.append({k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in kept.items()})

    def joined(self) -> Predictions:
        """All batches as one."""

        def cat(field: str) -> Tensor | None:
            values = [batch[field] for batch in self.batches]
            return None if any(value is None for value in values) else torch.cat(values)

        scores, labels, maps, masks = (cat(field) for field in ("pred_score", "gt_label", "anomaly_map", "gt_mask"))
        assert scores is not None and labels is not None  # noqa: S101, PT018 (every model scores, every test set has labels)
        paths = [Path(path) for batch in self.batches for path in batch["image_path"]]
        maps = maps.flatten(1, -3) if maps is not None and maps.ndim > 3 else maps
        return Predictions(
            paths,
            scores.flatten().float(),
            labels.flatten().bool(),
            None if maps is None else maps.float(),
            None if masks is None else masks.bool(),
        )


def fit(
    model: AnomalibModule, datamodule: AnomalibDataModule, root: Path, *, thresholds: bool = False, **trainer: Any
) -> float:
    """Train in anomalib's engine, starting with an empty feature cache; returns the seconds."""
    with tempfile.TemporaryDirectory() as cache:
        engine = Engine(default_root_dir=root, callbacks=[FeatureCache(cache)], **trainer)
        processor = model.post_processor
        model.post_processor = processor if thresholds else None  # so that thresholds take no time
        start = time.perf_counter()
        engine.fit(model, datamodule=datamodule)
        model.post_processor = processor
        return time.perf_counter() - start


def predict(model: AnomalibModule, datamodule: AnomalibDataModule, root: Path, **trainer: Any) -> Predictions:
    """The model's predictions on the test set, without anomalib's normalization."""
    components = model.post_processor, model.evaluator, model.visualizer
    model.post_processor, model.evaluator, model.visualizer = None, Evaluator(), None
    collector = _Collector()
    try:
        Engine(default_root_dir=root, callbacks=[collector], **trainer).test(
            model, datamodule=datamodule, verbose=False
        )
    finally:
        model.post_processor, model.evaluator, model.visualizer = components
    return collector.joined()


def openvino_latency(model: AnomalibModule, images: Sequence[Path], root: Path) -> tuple[float, OpenVINOInferencer]:
    """Export to OpenVINO and predict the images one by one, in float32.

    Returns:
        The median time per image in ms, with reading and pre-processing, and the inferencer.
    """
    model.eval()
    xml = Engine(default_root_dir=root).export(model, ExportType.OPENVINO, export_root=root)
    assert xml is not None  # noqa: S101 (None is only for unknown formats)
    # float32, because OpenVINO's own choice may be bfloat16, which changes verdicts
    config = {"CACHE_DIR": str(root / "openvino_cache"), "INFERENCE_PRECISION_HINT": "f32"}
    inferencer = OpenVINOInferencer(xml, device="CPU", config=config)
    inferencer.predict(str(images[0]))  # the first prediction compiles for the image's size
    seconds = []
    for image in images:
        start = time.perf_counter()
        inferencer.predict(str(image))
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds), inferencer
