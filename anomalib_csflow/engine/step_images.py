"""The images of a fit by steps: no more than its steps see, or features of all would be computed for a few."""

import hashlib
from collections.abc import Sequence
from typing import Any

from anomalib.data import AnomalibDataset
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

NAMES = {"train_data": "train", "val_data": "validate"}
MOST_VALIDATED = 10_000
"""Images to validate on, at most: enough for thresholds that one good image in 10,000 exceeds."""


class StepImages(Callback):
    """Leaves a fit by ``max_steps`` as many images as its batches hold, if there are more; gives all back afterwards.

    At most :data:`MOST_VALIDATED` are left to validate on. They are drawn by digests of their paths: at random, but
    alike in every process and every fit, which therefore find one another's cached features; more steps draw those of
    fewer steps and others. All that a fit does once for each image, from checking its file to the last score, then
    takes a time and a memory that do not depend on how many images there are.
    """

    def __init__(self) -> None:
        self._whole: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Draw the images, before the feature cache takes over the data sets."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        if stage != "fit" or datamodule is None:
            return
        self._whole = {name: data for name in NAMES if (data := getattr(datamodule, name, None)) is not None}
        detector: Any = pl_module
        steps = detector.training_options.max_steps
        if not steps:
            return
        most = {"train_data": batches(trainer, steps) * datamodule.train_batch_size, "val_data": MOST_VALIDATED}
        for name, data in self._whole.items():
            if isinstance(data, AnomalibDataset) and len(data) > most[name]:
                what = f"Of {len(data)} images to {NAMES[name]} on, {most[name]} are drawn"
                rank_zero_info(f"{what}: a fit of {steps} steps needs no more.")
                setattr(datamodule, name, data.subsample(drawn([*map(str, data.samples.image_path)], most[name])))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give back the data sets that the datamodule had."""
        del pl_module, stage
        for name, data in self._whole.items():
            setattr(trainer.datamodule, name, data)  # type: ignore[attr-defined]
        self._whole = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give them back here too, since Lightning does not call teardown then."""
        del exception
        self.teardown(trainer, pl_module, "fit")


def batches(trainer: Trainer, steps: int) -> int:
    """Batches of so many optimizer steps, of all processes."""
    return steps * trainer.world_size * trainer.accumulate_grad_batches


def drawn(paths: Sequence[str], count: int) -> list[int]:
    """Indices of ``count`` images in ascending order: those whose paths have the lowest digests."""
    digests = [hashlib.blake2b(path.encode(), digest_size=8).digest() for path in paths]
    return sorted(sorted(range(len(paths)), key=digests.__getitem__)[:count])
