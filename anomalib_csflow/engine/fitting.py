"""What a fit does around its steps: statistics before the first, measurements and a checkpoint after the last."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataset
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Subset

from anomalib_csflow.flows import ChannelWhitening
from anomalib_csflow.flows.pyramid import Pyramid

from .compiled import CompiledFeatures
from .folds import LEAST_IMAGES, out_of_fold
from .good_images import Seen
from .model import FlowModel
from .optimization import TrainingOptions, steps_for
from .post_processing import ConformalPostProcessor
from .providers import CachedSet, FeatureProvider, RepeatedSet
from .resuming import Progress
from .step_images import batches
from .suspects import least_likely, scored

LEAST_SHRINKAGE = 0.1
"""Least shrinkage of a whitening, in standard deviations of the channels; more if the training noise is larger."""


class FlowFitting(LightningModule):
    """The course of a detector's fit: features computed once, steps, measurements, a checkpoint."""

    model: FlowModel
    training_options: TrainingOptions
    features: Callable[[Any], Pyramid]
    pre_processor: PreProcessor | None
    post_processor: PostProcessor | None
    compiled: CompiledFeatures | None = None
    _unseen: list[Seen]
    done: Progress | None = None
    is_refit = False
    """Whether it is fitted to score one fold; then the images have been drawn before."""
    _noise = 0.0
    _measured_step = -1
    _saved_step = -1

    @property
    def provider(self) -> FeatureProvider:
        """Gives the features of a batch's images."""
        raise NotImplementedError

    # -- steps ------------------------------------------------------------------------------------

    def repeat_training_set(self) -> None:
        """Make an epoch of ``max_steps`` batches, if the option is set."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        max_steps = self.training_options.max_steps
        if max_steps and datamodule is not None:
            step_size = batches(self.trainer, 1) * datamodule.train_batch_size
            steps = steps_for(max_steps, len(datamodule.train_data), step_size)
            repeated = RepeatedSet(datamodule.train_data, steps, step_size)
            datamodule.train_data = repeated  # anomalib's datamodules read it whenever they make a loader

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume a fit by steps: those that are left are one more epoch."""
        super().on_load_checkpoint(checkpoint)
        options, trainer = self.training_options, self._trainer
        done = Progress.of(checkpoint)
        if options.max_epochs or not done or not done.epochs or trainer is None or trainer.state.fn != "fit":
            return
        data = getattr(getattr(trainer, "datamodule", None), "train_data", None)
        if not isinstance(data, RepeatedSet):
            return
        left = data.steps - done.batches // trainer.accumulate_grad_batches  # of each process
        if left > 0:
            data.steps = left
            trainer.fit_loop.max_epochs = done.epochs + 1

    def teardown(self, stage: str) -> None:
        """Forget what belongs to a stage."""
        del stage
        self.compiled = self.done = None

    def noisy(self, features: Pyramid) -> Pyramid:
        """Training features with the noise that the options set."""
        if not self._noise:
            return features
        layer = self.model.standardization
        assert layer is not None  # noqa: S101 (checked by the detector's constructor)
        scales = (self._noise * std.view(-1, *[1] * (x.ndim - 2)) for x, std in zip(features, layer.stds, strict=True))
        return tuple(x + torch.randn_like(x) * scale for x, scale in zip(features, scales, strict=True))

    # -- before the first step --------------------------------------------------------------------

    @torch.no_grad()
    def on_train_start(self) -> None:
        """Measure the statistics of the training features, unless they were loaded from a checkpoint."""
        super().on_train_start()
        data = getattr(self.trainer.train_dataloader, "dataset", ())
        images = data.dataset if isinstance(data, RepeatedSet) else data
        self._noise = self.training_options.noise_for(len(images))
        layer = self.model.standardization
        if layer is not None and not layer.is_fitted:
            rank_zero_info("Measuring the mean and standard deviation of the training features before the first step.")
            if isinstance(layer, ChannelWhitening):
                layer.fit(self.training_features(), max(self._noise, LEAST_SHRINKAGE), gather=self.gather)
            else:
                layer.fit(self.training_features(), gather=self.gather)
        elif isinstance(data, RepeatedSet) and self.provider.keeps:
            for _ in self.training_features():  # store the features now, so that no step has to decode images
                pass

    @property
    def gather(self) -> Callable[[Tensor], Iterable[Tensor]] | None:
        """Collects a tensor from all processes; None if there is only one process."""
        return self.all_gather if self.trainer.world_size > 1 else None

    def training_features(self, at_most: int | None = None) -> Iterator[Pyramid]:
        """Features of the training images, each once; of this process's share if there are several processes.

        Args:
            at_most: take only so many images or fewer, evenly spread.
        """
        loader: Any = self.trainer.train_dataloader
        given = getattr(loader, "dataset", None)
        data: Any = given.dataset if isinstance(given, RepeatedSet) else given
        if data is not given or (at_most and isinstance(data, (AnomalibDataset, CachedSet)) and len(data) > at_most):
            step = math.ceil(len(data) / at_most) if at_most else 1
            images = Subset(data, range(0, len(data), step))
            share: Any = DistributedSampler(images, shuffle=False) if self.gather else None
            options = {"batch_size": loader.batch_size, "num_workers": loader.num_workers}
            loader = DataLoader(images, sampler=share, collate_fn=loader.collate_fn, **options)
        for index, raw in enumerate(loader or ()):
            batch = self.trainer.strategy.batch_to_device(raw)
            if self.pre_processor:
                self.pre_processor.on_train_batch_start(self.trainer, self, batch, index)
            yield self.features(batch)

    # -- after the last step ----------------------------------------------------------------------

    def measure(self) -> None:
        """Measure what scores need of the trained flow; called before each validation and each checkpoint of a fit."""

    def on_validation_start(self) -> None:
        """Measure what scores need, before thresholds are set."""
        self._measure_once()

    def on_train_epoch_end(self) -> None:
        """Measure what scores need, before a checkpoint is written."""
        self._measure_once()

    def on_train_end(self) -> None:
        """Calibrate and write the checkpoint again; also if the last step has no checkpoint, so that every fit has one.

        If a monitored metric chose the checkpoint of another step, that one stays, with its validation's thresholds.
        """
        self._measure_once()
        self._unseen = []
        is_new = self.calibrate_out_of_fold() or self._saved_step != self.global_step
        self.show_suspects()
        checkpoint = self.trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.dirpath and checkpoint.monitor is None and is_new:
            path = checkpoint.best_model_path or Path(checkpoint.dirpath) / f"{checkpoint.filename or 'model'}.ckpt"
            self.trainer.save_checkpoint(path)
            checkpoint.best_model_path = str(path)

    def calibrate_out_of_fold(self) -> bool:
        """Set thresholds with refits, if there are too few good validation images for the requested rate.

        Returns:
            Whether thresholds were set.
        """
        processor = self.post_processor
        if not isinstance(processor, ConformalPostProcessor) or processor.is_satisfied:
            return False
        images, reason = self.training_images, None
        if images is None or not self.provider.keeps:
            reason = "the features of the training images are not cached, so each refit would take as long as the fit"
        elif self.trainer.world_size > 1:
            reason = "there are no refits with several processes"
        elif len(images) < LEAST_IMAGES:
            reason = f"{len(images)} training images are too few to refit on, which takes {LEAST_IMAGES} or more"
        if images is None or reason is not None:
            source = (
                f"come from {processor.num_good} good validation images only, which is too few for "
                f"false_alarm_rate={processor.false_alarm_rate}"
                if processor.num_good
                else "cannot be set, because there is no good validation image"
            )
            rank_zero_warn(f"Thresholds {source}: {reason}.")
            return False
        unseen = out_of_fold(self, images, processor.num_folds, processor.groups)  # type: ignore[arg-type]
        self._unseen = unseen.seen
        processor.calibrate_out_of_fold(*unseen.take())
        return True

    @property
    def training_images(self) -> AnomalibDataset | None:
        """The training set as the datamodule made it; None if it is not one of anomalib's."""
        images: Any = getattr(self.trainer.train_dataloader, "dataset", None)
        while isinstance(images, (RepeatedSet, CachedSet)):
            images = images.dataset
        return images if isinstance(images, AnomalibDataset) else None

    def show_suspects(self) -> None:
        """Log the least likely training images, among which a defect may be; by the refits' scores if there are any.

        Nothing is logged with several processes, or if features are not stored and would all be computed once more.
        """
        processor, images = self.post_processor, self.training_images
        if not isinstance(processor, ConformalPostProcessor) or not processor.gives_calibrated:
            return
        if images is not None and self.provider.keeps and self.trainer.world_size == 1:
            seen = self._unseen or scored(self, images)  # type: ignore[arg-type]
            rank_zero_info(least_likely(seen, processor, is_out_of_fold=bool(self._unseen)))

    def _measure_once(self) -> None:
        if self.trainer.state.fn == "fit" and self._measured_step != self.global_step:
            self._measured_step = self.global_step
            self.measure()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the step of the last checkpoint."""
        super().on_save_checkpoint(checkpoint)
        self._saved_step = self.global_step
