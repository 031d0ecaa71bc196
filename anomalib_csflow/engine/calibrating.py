"""When a fit sets thresholds: after its last validation, or with refits."""

from typing import Any

import torch
from anomalib.data import Batch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from anomalib_csflow.calibration import Kind, Promise

from .good_images import GoodImages, GoodScale
from .groups import check_groups, groups_of
from .images import good_files, image_files

NO_CALIBRATION = (
    "This model was never calibrated: its scores and maps are raw, and it has no labels or masks. Fit it with "
    "validation images, or call post_processor.calibrate(...) with the scores of good images"
)


class FitCalibration(PostProcessor):
    """Collects the scores of good validation images during a fit, and calibrates on them.

    The attributes are those of :class:`~.post_processing.ConformalPostProcessor`, which implements ``calibrate``.
    """

    threshold: str
    num_folds: int
    groups: str | None
    made: Promise | None
    score_scale: GoodScale
    map_scale: GoodScale

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._validated = GoodImages()
        self._fitted_groups: set[str] = set()
        self._is_given = False  # set by a call of calibrate(), which validation does not override
        self._has_warned = False

    def calibrate(self, scores: Tensor, map_maxima: Tensor | None = None, kind: Kind | None = None) -> Promise:
        """Set thresholds and scales from raw scores ``(n,)`` of good images and their maps' maxima ``(n,)``."""
        raise NotImplementedError

    @property
    def is_calibrated(self) -> bool:
        """Whether there are thresholds from good images."""
        return self.score_scale.is_calibrated

    @property
    def num_good(self) -> int:
        """Number of good images that the thresholds come from."""
        return self.score_scale.good.numel()

    @property
    def is_satisfied(self) -> bool:
        """Whether no refits are needed: the rate is kept already, or refits are switched off."""
        return self.threshold == "f1" or not self.num_folds or (self.made is not None and self.made.is_as_asked)

    def calibrate_out_of_fold(self, scores: Tensor, map_maxima: Tensor | None) -> Promise:
        """Calibrate on out-of-fold scores, and on the scores of good validation images if there are any.

        Args:
            scores: ``(n,)``, raw.
            map_maxima: ``(n,)``, raw; None for detectors without maps.

        Returns:
            What the thresholds promise: an estimate, without a guarantee.
        """
        scores = torch.cat([self.score_scale.good.cpu(), scores])
        if map_maxima is not None:
            map_maxima = torch.cat([self.map_scale.good.cpu(), map_maxima])
        return self.calibrate(scores, map_maxima, "estimated")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the thresholds, because the weights are about to change, and group the images.

        Raises:
            GroupError: if the good images cannot be grouped as asked.
        """
        del pl_module
        if self.groups is not None:
            data = getattr(trainer, "datamodule", None)
            self._fitted_groups = {*groups_of(image_files(getattr(data, "train_data", None)), self.groups)}
            check_groups(self._fitted_groups, self.groups)
            # a validation image of no group would be found after the training only
            groups_of(good_files(getattr(data, "val_data", None)), self.groups)
        self._is_given = False
        self.made = None
        for scale in (self.score_scale, self.map_scale):
            scale.calibrate(None, None)

    def on_validation_batch_end(  # type: ignore[override] # anomalib's own signature is not Lightning's
        self, trainer: Trainer, pl_module: LightningModule, outputs: Batch[Any], *args: Any, **kwargs: Any
    ) -> None:
        """Collect the score and the map's maximum of each good image."""
        if self.threshold == "f1":
            super().on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)
        elif self._collects(trainer):
            self._validated.add(outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate on the collected scores, if there was any good image."""
        if self.threshold == "f1":
            super().on_validation_epoch_end(trainer, pl_module)
        elif self._collects(trainer):
            scores, maxima = self._validated.take(trainer.world_size, self._counts)
            if len(scores):
                self.calibrate(scores, maxima)
                self._is_given = False

    def _counts(self, file: str) -> bool:
        """Whether a validation image is calibrated on: not if another one of its group was fitted on."""
        return self.groups is None or self._fitted_groups.isdisjoint(groups_of([file], self.groups))

    def _collects(self, trainer: Trainer) -> bool:
        is_fitting = trainer.state.fn == TrainerFn.FITTING
        return not trainer.sanity_checking and not self._is_given and (is_fitting or not self.is_calibrated)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the thresholds promise, or that there are none."""
        del trainer, pl_module
        if self.threshold == "conformal" and self.made is not None:
            rank_zero_info(str(self.made))
        elif self.threshold == "conformal":
            self._warn()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the thresholds promise, if it is less than was asked: the refits may have been interrupted."""
        del trainer, pl_module
        if self.threshold == "conformal" and self.made is not None and not self.made.is_as_asked:
            rank_zero_info(str(self.made))

    on_test_start = on_predict_start

    def _warn(self) -> None:
        if not self._has_warned and not torch.compiler.is_compiling():
            self._has_warned = True
            rank_zero_warn(NO_CALIBRATION)
