"""Labels and masks with a promised false-alarm rate, as part of the exported graph."""

from dataclasses import asdict
from typing import Any, Literal, get_args

import torch
from anomalib.data import Batch, InferenceBatch
from torch import Tensor

from anomalib_csflow.calibration import Kind, Promise, joint_thresholds
from anomalib_csflow.calibration.promises import CONFIDENCE, check_asked

from .calibrating import FitCalibration
from .good_images import NAN, GoodScale, image_scores
from .groups import check_pattern
from .verdicts import levels

ThresholdMode = Literal["conformal", "f1"]
THRESHOLD_MODES: tuple[str, ...] = get_args(ThresholdMode)


class ConformalPostProcessor(FitCalibration):
    r"""Calibrates scores and maps on good images: 0.5 at a threshold that good images exceed at a promised rate.

    A calibrated score is within (0, 1) and rises strictly with the raw one, see
    :class:`~anomalib_csflow.calibration.Scale`: defects stay ranked however far they are from good images. The same
    holds for the map, whose scale is calibrated on the *maximum* of each good image's map. Label and contour share
    one rate: at most the promised share of good images has either.

    - ``pred_mask`` is true where the map is above 0.5 (above ``1 - pixel_sensitivity``).
    - ``pred_label`` is true if the score is above 0.5 (``1 - image_sensitivity``), or any pixel of the mask is true: an
      image with a contour is never called good.

    Calibrated values are not probabilities: ``score_scale`` and ``map_scale`` convert them to p-values and to raw
    values.

    Calibration images are those passed to :meth:`calibrate`, or else the good validation images of a fit's last
    validation; ``validate`` does not calibrate a calibrated model again. Images that were used to choose anything, such
    as the epoch, keep no promise.

    Args:
        false_alarm_rate: share of good images that may have a label "anomalous" or any masked pixel.
        promise: ``marginal``, on average over calibrations, or ``certified``, for 95 % of them; see
            :mod:`~anomalib_csflow.calibration.promises`.
        threshold: ``conformal``, or ``f1``: anomalib's own thresholds and normalization, from labelled validation
            images.
        num_folds: number of refits at the end of a fit, if the validation had too few good images for the rate: each
            is fitted on a part of the training images and scores the rest. 0 for no refits, and a higher rate.
        groups: regular expression that finds in an image's path which part, place or session it shows, such as
            ``(session_\d+)``. Images of one group are kept together: a refit never scores an image if it was fitted on
            others of its group, and validation images of groups that were fitted on are not calibrated on.
        **kwargs: arguments of anomalib's ``PostProcessor``.

    Attributes:
        score_scale: scale of the image score, with the scores of the calibration images in ascending order.
        map_scale: scale of the map, with the maxima of the same images' maps in the same order.
        made: what the thresholds promise; None before the calibration.

    Raises:
        ValueError: if the rate is not within (0, 1), there is no promise or threshold of that name, or ``groups`` is
            not a regular expression.

    References:
        Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2005.
        Angelopoulos, Bates: A Gentle Introduction to Conformal Prediction, 2021.
    """

    def __init__(
        self,
        false_alarm_rate: float = 0.01,
        promise: Literal["marginal", "certified"] = "marginal",
        threshold: ThresholdMode = "conformal",
        num_folds: int = 3,
        groups: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_asked(false_alarm_rate, promise)
        if threshold not in THRESHOLD_MODES:
            msg = f"unknown threshold {threshold!r}: choose one of {', '.join(THRESHOLD_MODES)}"
            raise ValueError(msg)
        if num_folds < 0 or num_folds == 1:
            msg = f"num_folds must be 2 or more, or 0 for no refits, got {num_folds}"
            raise ValueError(msg)
        self.false_alarm_rate = false_alarm_rate
        if groups is not None:
            check_pattern(groups)
        self.num_folds = num_folds
        self.groups = groups
        self.promise = promise
        self.threshold = threshold
        self.made: Promise | None = None
        self.score_scale = GoodScale()
        self.map_scale = GoodScale()

    # -- calibration ------------------------------------------------------------------------------

    @property
    def gives_calibrated(self) -> bool:
        """Whether scores and maps come out calibrated, which they do not by F1, raw, or before a calibration."""
        return self.threshold == "conformal" and self.is_calibrated and self.enable_normalization

    @property
    def good_levels(self) -> Tensor:
        """``(n,)``, of each good image that was calibrated on the larger of calibrated score and map's maximum."""
        maxima = self.map_scale(self.map_scale.good) if self.map_scale.is_calibrated else None
        return levels(self.score_scale(self.score_scale.good), maxima)

    def calibrate(
        self,
        scores: Tensor,
        map_maxima: Tensor | None = None,
        kind: Kind | None = None,
        *,
        reference: tuple[Tensor, Tensor] | None = None,
    ) -> Promise:
        """Set thresholds and scales from good images; validation does not change them until the next fit.

        Args:
            scores: ``(n,)``, raw image scores of good images: held out, or out-of-fold.
            map_maxima: ``(n,)``, the maximum of each image's raw map; None for detectors without maps.
            kind: kind of promise: ``estimated`` if the scores are out-of-fold; by default, the constructor's.
            reference: raw scores and maxima ``(m,)`` of other held-out good images, such as those used to choose the
                epoch: with them, half as many images are needed; see
                :func:`~anomalib_csflow.calibration.joint_thresholds`.

        Returns:
            What the thresholds promise.

        Raises:
            ValueError: if there are no scores, a score is not finite, or there is not one maximum for each.
        """
        score = scores.detach().float().flatten().cpu()
        maxima = None if map_maxima is None else map_maxima.detach().float().flatten().cpu()
        found = joint_thresholds(
            score.numpy(),
            None if maxima is None else maxima.numpy(),
            self.false_alarm_rate,
            kind or self.promise,
            CONFIDENCE,
            reference=None if reference is None else (reference[0].cpu().numpy(), reference[1].cpu().numpy()),
        )
        order = score.argsort()
        self.score_scale.calibrate(found.score, score[order])
        self.map_scale.calibrate(found.map, None if maxima is None else maxima[order])
        # anomalib displays its own thresholds, and the range of good images
        for level, scale in (("image", self.score_scale), ("pixel", self.map_scale)):
            good = scale.good if scale.is_calibrated else torch.tensor([NAN])
            getattr(self, f"_{level}_threshold").copy_(scale.threshold)
            getattr(self, f"{level}_min").copy_(good.min())
            getattr(self, f"{level}_max").copy_(good.max())
        self.made = found.promise
        self._is_given = True
        return found.promise

    # -- predictions ------------------------------------------------------------------------------

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Calibrate the score and the map, and compare them with their thresholds.

        Args:
            predictions: raw ``pred_score (N,)`` and ``anomaly_map (N, 1, H, W)``, or one of them.

        Returns:
            Calibrated score and map, ``pred_label (N,)`` and ``pred_mask (N, 1, H, W)``. Without a calibration they are
            raw, and there is neither label nor mask. Without a map, or a calibration of maps, there is no mask.

        Raises:
            ValueError: if there is neither a score nor a map.
        """
        if self.threshold == "f1":
            return super().forward(predictions)
        return InferenceBatch(**self._judged(predictions.pred_score, predictions.anomaly_map))

    def post_process_batch(self, batch: Batch[Any]) -> None:
        """Do the same for a batch of ``test`` or ``predict``, in place."""
        if self.threshold == "f1":
            super().post_process_batch(batch)
            return
        for name, value in self._judged(batch.pred_score, batch.anomaly_map).items():
            setattr(batch, name, value)

    def _judged(self, score: Tensor | None, anomaly_map: Tensor | None) -> dict[str, Tensor | None]:
        """Score, label, map and mask from a raw score and map."""
        score = image_scores(score, anomaly_map)
        if not self.is_calibrated:
            self._warn()
            return {"pred_score": score, "pred_label": None, "anomaly_map": anomaly_map, "pred_mask": None}
        calibrated, calibrated_map, mask = self.score_scale(score), anomaly_map, None
        label = calibrated > 1 - self.image_sensitivity
        if anomaly_map is not None and self.map_scale.is_calibrated:
            calibrated_map = self.map_scale(anomaly_map)
            mask = calibrated_map > 1 - self.pixel_sensitivity
            label = label | mask.flatten(1).any(1)
        return {
            "pred_score": calibrated if self.enable_normalization else score,
            "pred_label": label if self.enable_thresholding else None,
            "anomaly_map": calibrated_map if self.enable_normalization else anomaly_map,
            "pred_mask": mask if self.enable_thresholding else None,
        }

    # -- checkpoints ------------------------------------------------------------------------------

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "false_alarm_rate", "promise", "threshold", "num_folds", "groups")

    def checkpoint_config(self) -> dict[str, Any]:
        """Plain data for the checkpoint: the arguments, and what the thresholds promise."""
        return super().checkpoint_config() | {"made": None if self.made is None else asdict(self.made)}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore what :meth:`checkpoint_config` returned; data of anomalib's post-processor means F1 thresholds."""
        super().load_checkpoint_config({"threshold": "f1"} | config)
        made = config.get("made")
        self.made = None if made is None else Promise(**made)
