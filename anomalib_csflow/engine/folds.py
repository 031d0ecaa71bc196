"""Out-of-fold scores: scores of good images that a detector was not fitted on, when few can be held out."""

import time
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import AnomalibDataset
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from sklearn.model_selection import GroupKFold
from torch.utils.data import DataLoader

from .checkpoints import COMPONENTS
from .good_images import CollectedScores, GoodImages
from .groups import groups_of

if TYPE_CHECKING:
    from .detector import FlowDetector

LEAST_IMAGES = 6
"""Least number of good images for refits: with fewer, a fold would leave fewer than four to fit on."""


class _Fold(LightningDataModule):
    """The good images of all folds except one for fitting, and those of that one for scoring."""

    def __init__(self, fitted: AnomalibDataset, scored: AnomalibDataset, batch_size: int, num_workers: int) -> None:
        super().__init__()
        self.train_data, self.val_data = fitted, scored
        self.train_batch_size, self.num_workers = batch_size, num_workers

    def _loader(self, data: Any, *, shuffle: bool) -> DataLoader[Any]:
        return DataLoader(
            data, self.train_batch_size, shuffle, num_workers=self.num_workers, collate_fn=data.collate_fn
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches to fit on."""
        return self._loader(self.train_data, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches to score."""
        return self._loader(self.val_data, shuffle=False)


def out_of_fold(
    detector: "FlowDetector", images: AnomalibDataset, num_folds: int, groups: str | None = None
) -> GoodImages:
    """For each fold, refit a detector on the images of all other folds, and score those of the fold.

    The refits use the same features, steps and settings as the detector's own fit, which has ended.

    Args:
        detector: fitted, with its trainer.
        images: the good images that it was fitted on.
        num_folds: number of folds, of about equal size; no more than there are groups.
        groups: see :class:`~.post_processing.ConformalPostProcessor`.

    Returns:
        The images with their raw scores and the maxima of their maps, in arbitrary order.
    """
    folds = _folds(images, num_folds, groups)
    collector = CollectedScores()
    loader: Any = detector.trainer.train_dataloader
    rank_zero_info(
        f"Taking thresholds from {len(folds)} refits, since too few good images were held out for the false-alarm "
        f"rate: each scores the part of the {len(images)} training images that it was not fitted on. The detector is "
        "kept."
    )
    with torch.random.fork_rng():
        for fold, scored in enumerate(folds):
            torch.manual_seed(fold)
            fitted = [index for other in folds if other is not scored for index in other]
            data = _Fold(_subset(images, fitted), _subset(images, scored), loader.batch_size, loader.num_workers)
            start = time.perf_counter()
            _refit(detector, data, collector)
            rank_zero_info(f"Refit {fold + 1} of {len(folds)} is done, after {time.perf_counter() - start:.0f} s.")
    return collector.images


def _folds(images: AnomalibDataset, num_folds: int, groups: str | None) -> list[list[int]]:
    """Indices of each fold's images: drawn at random, or so that each group is in one fold."""
    if groups is None:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
        return [order[fold::num_folds] for fold in range(num_folds)]
    names = groups_of(images.samples["image_path"], groups)
    folds = GroupKFold(min(num_folds, len({*names})))
    return [scored.tolist() for _, scored in folds.split(names, groups=names)]


def _subset(images: AnomalibDataset, indices: Sequence[int]) -> AnomalibDataset:
    return images.subsample(list(indices), inplace=False)


def _refit(detector: "FlowDetector", data: _Fold, collector: CollectedScores) -> None:
    """Fit a detector with the same arguments and backbone, for as long as the given one was fitted in all."""
    own = detector.trainer
    length, epochs = _length(detector)
    refitted = type(detector)(**(dict(detector.hparams) | dict.fromkeys(COMPONENTS, False) | length))
    refitted.pre_processor = detector.pre_processor  # which a region, or the images' aspect ratio, may have made
    refitted.model.features.load_state_dict(detector.model.features.state_dict())
    refitted.compiled = detector.compiled
    refitted.is_refit = True
    cache = copy(detector.feature_cache)
    if cache is not None:
        cache.opened = None
    trainer = Trainer(
        max_epochs=epochs,
        max_steps=own.max_steps,
        check_val_every_n_epoch=max(epochs or 1, 1),
        accelerator="auto" if own.strategy.root_device.type != "cpu" else "cpu",
        devices=1,
        precision=own.precision,
        accumulate_grad_batches=own.accumulate_grad_batches,
        gradient_clip_val=own.gradient_clip_val,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[collector, *([cache] if cache is not None else [])],
    )
    before = len(collector.images.seen)
    trainer.fit(refitted, datamodule=data)
    if len(collector.images.seen) == before:  # a limit of the trainer ended it before its validation
        trainer.validate(refitted, datamodule=data, verbose=False)
    collector.images.keep_last()


def _length(detector: "FlowDetector") -> tuple[dict[str, Any], int | None]:
    """How long a detector was fitted in all: arguments for a fit of as many steps, and the trainer's epochs.

    It may have been stopped before its planned end, or have been resumed once or more.
    """
    own, options = detector.trainer, detector.training_options
    if options.max_steps and not options.max_epochs:
        batches = own.fit_loop.epoch_loop.batch_progress.total.ready
        return {"max_steps": max(batches // own.accumulate_grad_batches, 1)}, 1
    if 0 <= own.max_steps <= own.global_step:  # an epoch of a fold has fewer steps
        return {}, own.max_epochs
    return {}, max(own.fit_loop.epoch_progress.current.completed, 1)
