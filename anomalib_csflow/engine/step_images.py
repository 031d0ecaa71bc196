"""The images of a fit by ``max_steps``: no more than its batches hold, so that no other features are computed."""

import hashlib
from collections.abc import Sequence
from typing import Any

from anomalib.data import AnomalibDataset
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from .optimization import steps_to_draw_for

NAMES = {"train_data": "train", "val_data": "validate"}
MOST_VALIDATED = 10_000
"""Largest number of images to validate on: enough for a false-alarm rate of 1 in 10,000."""


class StepImages(Callback):
    """Draws as many images for a fit by ``max_steps`` as its batches hold, and restores all of them afterwards.

    At most :data:`MOST_VALIDATED` are drawn to validate on. Images are drawn by digests of their paths: at random, but
    alike in every process and fit, so that later fits find their features in the cache. A fit with more steps draws the
    images of one with fewer steps, and others. What a fit does once for each image, from the check of its file to its
    score, then takes the same time and memory, however many images there are.
    """

    def __init__(self) -> None:
        self._whole: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Draw the images, before the feature cache takes over the data sets.

        Raises:
            ValueError: if there are no images in a batch.
        """
        datamodule: Any = getattr(trainer, "datamodule", None)
        if stage != "fit" or datamodule is None:
            return
        self._whole = {name: data for name in NAMES if (data := getattr(datamodule, name, None)) is not None}
        size = getattr(datamodule, "train_batch_size", 1)
        if size < 1:
            msg = f"train_batch_size must be 1 or more, got {size}"
            raise ValueError(msg)
        detector: Any = pl_module
        steps = steps_to_draw_for(detector.training_options.max_steps)
        if not steps or detector.is_refit:
            return
        most = {"train_data": batches(trainer, steps) * datamodule.train_batch_size, "val_data": MOST_VALIDATED}
        for name, data in self._whole.items():
            if isinstance(data, AnomalibDataset) and len(data) > most[name]:
                what = f"Of {len(data)} images to {NAMES[name]} on, {most[name]} are drawn"
                rank_zero_info(f"{what}: the batches of {steps} steps hold no more.")
                setattr(datamodule, name, data.subsample(drawn([*map(str, data.samples.image_path)], most[name])))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the data sets of the datamodule."""
        del pl_module, stage
        for name, data in self._whole.items():
            setattr(trainer.datamodule, name, data)  # type: ignore[attr-defined]
        self._whole = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the data sets here too, since Lightning does not call teardown then."""
        del exception
        self.teardown(trainer, pl_module, "fit")


def batches(trainer: Trainer, steps: int) -> int:
    """Number of batches that all processes together need for this number of optimizer steps."""
    return steps * trainer.world_size * trainer.accumulate_grad_batches


def drawn(paths: Sequence[str], count: int) -> list[int]:
    """Indices of ``count`` images in ascending order: those whose paths have the lowest digests."""
    digests = [hashlib.blake2b(path.encode(), digest_size=8).digest() for path in paths]
    return sorted(sorted(range(len(paths)), key=digests.__getitem__)[:count])
