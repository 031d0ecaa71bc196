"""How far a training had come when its checkpoint was written, and how many steps its schedule has in all."""

import math
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer


@dataclass(frozen=True)
class Progress:
    """How much of a training was done.

    Args:
        epochs: number of whole epochs.
        batches: number of batches in all epochs.
        batches_in_epoch: batches of an epoch that was not finished.
        scheduled: steps that the learning rate's schedule has taken.
    """

    epochs: int
    batches: int
    batches_in_epoch: int
    scheduled: int

    @classmethod
    def of(cls, checkpoint: dict[str, Any]) -> "Progress | None":
        """The progress in a checkpoint; None if the checkpoint has weights only."""
        loop = (checkpoint.get("loops") or {}).get("fit_loop")
        if not loop:
            return None
        epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
        is_within = epochs["ready"] > epochs["completed"]
        total, current = batches["total"], batches["current"]
        # by this Lightning recognizes a checkpoint from after a step; after several resumptions it may repeat the batch
        is_counted = total["ready"] == total["started"] == total["processed"] == total["completed"] + 1
        in_epoch = current["completed"] + is_counted
        is_over = is_within and batches["is_last_batch"] and in_epoch >= current["ready"]  # all its batches are done
        schedules = checkpoint.get("lr_schedulers") or [{"last_epoch": 0}]
        return cls(
            epochs=epochs["completed"] + is_over,
            batches=batches["total"]["ready"],
            batches_in_epoch=in_epoch if is_within and not is_over else 0,
            scheduled=schedules[0]["last_epoch"],
        )

    def all_steps(self, trainer: Trainer) -> float:
        """All steps of the schedule: those taken, and those left at the trainer's present number of steps an epoch."""
        planned = trainer.estimated_stepping_batches  # which also loads the training set
        if planned == math.inf or trainer.max_epochs in (None, -1):
            return planned
        accumulated = trainer.accumulate_grad_batches
        an_epoch = math.ceil(trainer.num_training_batches / accumulated)
        is_within = self.batches_in_epoch < trainer.num_training_batches  # otherwise Lightning repeats the epoch
        of_this = self.batches_in_epoch // accumulated if is_within else 0
        left = max((trainer.max_epochs or 0) - self.epochs, 0) * an_epoch - of_this
        steps = self.scheduled + max(left, 1)
        return steps if trainer.max_steps == -1 else min(steps, max(trainer.max_steps, self.scheduled + 1))
