"""Measure one model on one data set: accuracy, fit time, latency."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule, Batch
from anomalib.deploy import ExportType, OpenVINOInferencer
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, AUROC, Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor

from anomalib_csflow.detectors.caching import FeatureCache

METRICS = {"image_AUROC": "image AUROC", "pixel_AUROC": "pixel AUROC", "AUPRO": "AUPRO"}
"""Names in the evaluator to names in tables; all are shares of 1, of the last epoch."""


class ComparableScores(PostProcessor):
    """Scores and maps to (0, 1) by the strictly rising ``(1 + x / (1 + |x|)) / 2``.

    anomalib's default scales by validation scores and clamps what falls outside, and its AUROC puts
    larger scores through a sigmoid that rounds to 1: both tie scores that differ, and so change the
    ranking that is measured.
    """

    def __init__(self) -> None:
        super().__init__(enable_thresholding=False)

    def normalize_batch(self, batch: Batch[Any]) -> None:
        """Squash in place."""
        for field in ("pred_score", "anomaly_map"):
            value = getattr(batch, field)
            if value is not None:  # DifferNet has maps only where they are asked for
                setattr(batch, field, (1 + value / (1 + value.abs())) / 2)


def fit(model: AnomalibModule, datamodule: AnomalibDataModule, root: Path, **trainer: Any) -> float:
    """Train in anomalib's engine; returns the seconds, with the features computed once and none known before."""
    with tempfile.TemporaryDirectory() as cache:
        engine = Engine(default_root_dir=root, callbacks=[FeatureCache(cache)], **trainer)
        start = time.perf_counter()
        engine.fit(model, datamodule=datamodule)
        return time.perf_counter() - start


def evaluate(model: AnomalibModule, datamodule: AnomalibDataModule, root: Path) -> dict[str, float]:
    """Image AUROC, pixel AUROC and AUPRO on the test set, of scores as the model gives them."""
    components = model.post_processor, model.evaluator, model.visualizer
    model.post_processor = ComparableScores()
    model.visualizer = None
    model.evaluator = Evaluator(
        test_metrics=[
            AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
            AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
            AUPRO(fields=["anomaly_map", "gt_mask"], strict=False),
        ]
    )
    try:
        (metrics,) = Engine(default_root_dir=root).test(model, datamodule=datamodule, verbose=False)
    finally:
        model.post_processor, model.evaluator, model.visualizer = components
    return {title: metrics.get(name, float("nan")) for name, title in METRICS.items()}


def openvino_latency(model: AnomalibModule, images: Sequence[Path], root: Path) -> tuple[float, OpenVINOInferencer]:
    """Export to OpenVINO and predict the images one by one.

    Returns:
        The median time of an image in ms, reading and pre-processing included, and the inferencer.
    """
    model.eval()
    xml = Engine(default_root_dir=root).export(model, ExportType.OPENVINO, export_root=root)
    assert xml is not None  # noqa: S101 (None is for unknown formats alone)
    inferencer = OpenVINOInferencer(xml, device="CPU", config={"CACHE_DIR": str(root / "openvino_cache")})
    inferencer.predict(str(images[0]))  # the first compiles for the image's size
    seconds = []
    for image in images:
        start = time.perf_counter()
        inferencer.predict(str(image))
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds), inferencer
