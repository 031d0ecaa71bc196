"""How good scores and maps are: anomalib's metrics, and the curves behind them."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPIMO, AUPRO, AUROC
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_average_precision,
    binary_f1_score,
    binary_precision_recall_curve,
    binary_roc,
)

from anomalib_csflow.calibration import images_needed, threshold

IMAGE_METRICS = ("image_AUROC", "image_AP", "image_F1")
PIXEL_METRICS = ("pixel_AUROC", "AUPRO", "pixel_F1", "AUPIMO")
VERDICT_FOLDS = 5
"""Parts of the test images: each is judged by a threshold from the good images of the others."""
THRESHOLD = (
    "of each half of the test images the F1 threshold was chosen on the other half, and of each fifth the thresholds "
    "for 1 % and 5 % false alarms were calibrated on the good images of the other four"
)
CURVE_POINTS = 200
PIXELS_FOR_F1 = 20_000_000
AUPIMO_THRESHOLDS = 30_000  # the default of 300,000 takes a minute and 6 GB for 600 images


def comparable(values: Tensor) -> Tensor:
    """Scale the scores or maps of a whole test set linearly to [0, 1], which keeps their ranking.

    anomalib's default scales by validation scores and clamps values outside their range, and its AUROC puts
    larger scores through a sigmoid that rounds to 1: both make different scores equal.

    Raises:
        ValueError: if a value is not finite.
    """
    if not values.isfinite().all():
        msg = "the scores are not finite (NaN or infinity): lower the learning rate or clip the gradients"
        raise ValueError(msg)
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)


@dataclass(frozen=True)
class Predictions:
    """A model's own scores and maps on a test set, before any scaling.

    Args:
        paths: the images.
        scores: (N,), higher is more anomalous.
        labels: (N,), true for defective.
        maps: (N, H, W), or None if the model has none.
        masks: (N, H, W), true for defective, or None if the data set has none.
    """

    paths: list[Path]
    scores: Tensor
    labels: Tensor
    maps: Tensor | None
    masks: Tensor | None

    def __getitem__(self, index: Tensor) -> "Predictions":
        """The predictions of some of the images."""
        maps, masks = (None if value is None else value[index] for value in (self.maps, self.masks))
        paths = [self.paths[i] for i in index.tolist()]
        return Predictions(paths, self.scores[index], self.labels[index], maps, masks)

    def folds(self, count: int) -> list["Predictions"]:
        """Parts with every ``count``-th good and every ``count``-th defective image, in the order of their paths."""
        order = torch.tensor(sorted(range(len(self.paths)), key=lambda i: (bool(self.labels[i]), str(self.paths[i]))))
        return [self[order[start::count]] for start in range(count)]

    @property
    def has_pixels(self) -> bool:
        """Whether there are maps and masks to compare."""
        return self.maps is not None and self.masks is not None and bool(self.masks.any())

    def comparable(self) -> "Predictions":
        """The same with scores and maps in [0, 1], because the metrics would squash other values."""
        maps = None if self.maps is None else comparable(self.maps)
        return replace(self, scores=comparable(self.scores), maps=maps)

    def batch(self) -> ImageBatch:
        """All images as one anomalib batch for its metrics; the images themselves are left out."""
        image = torch.zeros(len(self.paths), 3, 1, 1)
        return ImageBatch(
            image=image, gt_label=self.labels, gt_mask=self.masks, pred_score=self.scores, anomaly_map=self.maps
        )


def evaluate(predictions: Predictions) -> dict[str, float]:
    """All metrics, between 0 and 1; NaN for pixel metrics without maps or masks, and for F1 of a single defect."""
    found = verdicts(predictions)
    predictions = predictions.comparable()
    batch = predictions.batch()
    values = found | dict.fromkeys((*IMAGE_METRICS, *PIXEL_METRICS), float("nan"))
    values["image_AUROC"] = _value(AUROC(fields=["pred_score", "gt_label"]), batch)
    values["image_AP"] = float(binary_average_precision(predictions.scores, predictions.labels.int()))
    halves = predictions.folds(2)
    values["image_F1"] = _f1([(half.scores, half.labels) for half in halves])
    if predictions.has_pixels:
        pixels = [_pixels(half) for half in halves]
        values["pixel_AUROC"] = _value(AUROC(fields=["anomaly_map", "gt_mask"]), batch)
        values["AUPRO"] = _value(AUPRO(fields=["anomaly_map", "gt_mask"]), batch)
        values["pixel_F1"] = _f1(pixels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning that AUPIMO is coarse on a small test set
            values["AUPIMO"] = _aupimo(batch)
    return values


def verdicts(predictions: Predictions) -> dict[str, float]:
    """False alarms and defects found at thresholds that promise 1 % and 5 % false alarms, calibrated on good images.

    Returns:
        ``false_alarms_1``, ``recall_1``, ``false_alarms_5`` and ``recall_5``: shares of good and of defective images.
        NaN if there are too few good images for the promise, or no defective ones.
    """
    folds = predictions.folds(VERDICT_FOLDS)
    truth = torch.cat([fold.labels for fold in folds])
    calibration = [
        torch.cat([other.scores[~other.labels] for other in folds if other is not fold]).numpy() for fold in folds
    ]
    values: dict[str, float] = {}
    for percent in (1, 5):
        rates = float("nan"), float("nan")
        if min(map(len, calibration)) >= images_needed(percent / 100):
            limits = [threshold(good, percent / 100).threshold for good in calibration]
            called = torch.cat([fold.scores > limit for fold, limit in zip(folds, limits, strict=True)]).float()
            rates = float(called[~truth].mean()), float(called[truth].mean())
        values |= dict(zip((f"false_alarms_{percent}", f"recall_{percent}"), rates, strict=True))
    return values


def _value(metric: Any, batch: ImageBatch) -> float:
    """One metric of one batch."""
    metric.update(batch)
    return float(metric.compute())


def _aupimo(batch: ImageBatch) -> float:
    """AUPIMO, or NaN if there are too few pixels of good images for its false positive rates."""
    try:
        return _value(AUPIMO(fields=["anomaly_map", "gt_mask"], num_thresholds=AUPIMO_THRESHOLDS), batch)
    except (RuntimeError, ValueError):
        return float("nan")


def _pixels(half: Predictions) -> tuple[Tensor, Tensor]:
    """Maps and masks as vectors, with every n-th pixel if sorting all would take too long."""
    assert half.maps is not None and half.masks is not None  # noqa: S101, PT018 (has_pixels is true)
    step = max(1, half.maps.numel() // PIXELS_FOR_F1)
    return half.maps.flatten()[::step], half.masks.flatten()[::step]


def _f1(halves: list[tuple[Tensor, Tensor]]) -> float:
    """F1 of all, where each half is judged by the best threshold of the other half; NaN if one has no defect."""
    if not all(bool(truth.any()) for _, truth in halves):
        return float("nan")  # no threshold can be chosen on it
    labels = []
    for (scores, _), (other_scores, other_truth) in zip(halves, halves[::-1], strict=True):
        precision, recall, thresholds = binary_precision_recall_curve(other_scores, other_truth.int())
        f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        labels.append(scores >= thresholds[f1[:-1].argmax()])
    return float(binary_f1_score(torch.cat(labels).int(), torch.cat([truth for _, truth in halves]).int()))


def curves(predictions: Predictions) -> dict[str, Tensor]:
    """ROC of the images and PRO of the pixels, each (2, K): false positive rate, and true positive rate or overlap."""
    predictions = predictions.comparable()
    fpr, tpr, _ = binary_roc(predictions.scores, predictions.labels.int())
    found = {"roc": torch.stack([fpr, tpr])}
    if predictions.has_pixels:
        metric = AUPRO(fields=["anomaly_map", "gt_mask"])
        metric.update(predictions.batch())
        found["pro"] = torch.stack(metric._compute())  # the public methods only plot the curve
    return {name: _thinned(curve) for name, curve in found.items()}


def scores(predictions: Predictions) -> dict[str, NDArray[Any]]:
    """The model's own image scores, the labels and the paths, in the order of the paths."""
    order = sorted(range(len(predictions.paths)), key=lambda i: predictions.paths[i])
    return {
        "scores": predictions.scores[order].numpy(),
        "labels": predictions.labels[order].numpy(),
        "paths": np.array([str(predictions.paths[i]) for i in order]),
    }


def _thinned(curve: Tensor) -> Tensor:
    """At most ``CURVE_POINTS`` points of a curve, ends included."""
    if curve.shape[1] <= CURVE_POINTS:
        return curve
    return curve[:, torch.linspace(0, curve.shape[1] - 1, CURVE_POINTS).round().long()]
