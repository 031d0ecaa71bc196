"""How flows are trained: optimizers and learning-rate schedules by name, and a stop if a loss is not finite."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast, get_args

import torch
from anomalib.data import Batch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from .arguments import check_arguments
from .checkpoint_files import CheckpointError
from .model import FlowModel
from .muon import Muon
from .resuming import Progress

Schedule = Literal["constant", "one_cycle", "warmup_cosine", "warmup_steps"]
"""How the learning rate changes during training:

- ``constant``;
- ``one_cycle``: up to ``lr``, then down to nearly 0; Adam's first beta moves between 0.95 and 0.85;
- ``warmup_cosine``: see :func:`warmup_cosine`;
- ``warmup_steps``: see :func:`warmup_steps`.

All except the first are defined over the whole training, and are stretched when it is resumed for more epochs.
"""
SCHEDULES: tuple[str, ...] = get_args(Schedule)
OptimizerName = Literal["adam", "muon"]
"""``adam``, which the papers use, or :class:`~anomalib_csflow.engine.muon.Muon`, which needs about half the steps."""
OPTIMIZERS: dict[str, type[torch.optim.Adam]] = {"adam": torch.optim.Adam, "muon": Muon}
Noise = float | Literal["auto"]
"""Gaussian noise on the training features, in standard deviations of each channel.

It keeps a flow from learning a few images by heart. The learned density, whose likelihoods are exact, is that of the
noisy features. ``auto`` is ``(20 / n)^a`` for n training images, but at most 1, where a is 1/2 for ``CSFlow`` and 2/3
for the other detectors.
"""
Steps = int | Literal["auto"]
"""Number of batches to train for, however many images there are, or ``auto``.

``auto`` is 240, or more if the images are so many that each would be seen less than 8 times. No more images are drawn
than 240 batches hold, so with batches of 8, there is one step for each image from 240 to 1,920.
"""
LEAST_STEPS, LEAST_VIEWS = 240, 8
OPTIMIZER_KEY = "anomalib_csflow_optimizer"
"""Of a checkpoint: name of the optimizer whose state it holds; earlier ones have none, and Adam's."""
WARMUP_START = 0.1
"""Share of the learning rate at which the warm-up of CFLOW-AD and MSFlow begins."""


@dataclass(frozen=True)
class TrainingOptions:
    """Those of a detector's arguments that say how its flow is trained; they may differ from a checkpoint's.

    Raises:
        ValueError: if there is no schedule or optimizer of that name, or a number is out of range.
    """

    lr: float
    schedule: Schedule
    max_epochs: int | None = None
    gradient_clip_norm: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    bfloat16: bool = False
    max_steps: Steps | None = None
    noise: Noise = 0.0
    crop_size: int | None = None
    optimizer: OptimizerName = "adam"
    noise_exponent: float = 2 / 3

    def __post_init__(self) -> None:
        check_arguments(vars(self))
        if self.schedule not in SCHEDULES:
            msg = f"unknown schedule {self.schedule!r}: choose one of {', '.join(SCHEDULES)}"
            raise ValueError(msg)
        if self.optimizer not in tuple(OPTIMIZERS):  # a list, for instance, cannot be looked up
            msg = f"unknown optimizer {self.optimizer!r}: choose one of {', '.join(OPTIMIZERS)}"
            raise ValueError(msg)
        if self.noise != "auto" and not (isinstance(self.noise, (int, float)) and 0 <= self.noise < math.inf):
            msg = f"noise must be 'auto' or a standard deviation of 0 or more, got {self.noise!r}"
            raise ValueError(msg)

    def noise_for(self, num_images: int) -> float:
        """Standard deviation of the noise for this number of training images, see :data:`Noise`."""
        if self.noise != "auto":
            return float(self.noise)
        return min(1.0, (20 / max(num_images, 1)) ** self.noise_exponent)


def steps_for(max_steps: Steps | None, num_images: int, step_size: int) -> int:
    """Number of steps of a fit by ``max_steps``; 0 without it.

    Args:
        max_steps: the detector's argument.
        num_images: to train on.
        step_size: number of samples in a step, of all processes together.
    """
    if max_steps != "auto":
        return max_steps or 0
    return max(LEAST_STEPS, math.ceil(LEAST_VIEWS * num_images / step_size))


def steps_to_draw_for(max_steps: Steps | None) -> int:
    """Number of steps whose batches should hold all images that are drawn to train on; 0 for all images."""
    return LEAST_STEPS if max_steps == "auto" else max_steps or 0


def warmup_cosine(progress: float) -> float:
    """CFLOW-AD's schedule: half a cosine down to 1/1000, with a linear warm-up during 2 of 25 meta-epochs.

    Args:
        progress: share of the training that is done, in [0, 1].

    Returns:
        Factor of the learning rate.

    Example:
        >>> [round(warmup_cosine(progress), 4) for progress in (0.0, 0.08, 0.5, 1.0)]
        [0.1, 0.9843, 0.5005, 0.001]
    """
    end = 1e-3
    return _warmup(progress, 2 / 25) * (end + (1 - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)


def warmup_steps(progress: float) -> float:
    """MSFlow's schedule: times 0.33 at epoch 70 and again at 90 of 100, with a linear warm-up during the first 12.

    Args:
        progress: share of the training that is done, in [0, 1].

    Returns:
        Factor of the learning rate.

    Example:
        >>> [round(warmup_steps(progress), 4) for progress in (0.0, 0.06, 0.5, 0.7, 0.9)]
        [0.1, 0.55, 1.0, 0.33, 0.1089]
    """
    return _warmup(progress, 12 / 100) * 0.33 ** sum(progress >= milestone for milestone in (0.7, 0.9))


def _warmup(progress: float, length: float) -> float:
    return WARMUP_START + (1 - WARMUP_START) * min(progress / length, 1.0)


def optimizer_with_schedule(
    parameters: Iterable[nn.Parameter],
    options: TrainingOptions,
    num_steps: Callable[[], float],
    *,
    fused: bool = True,
) -> OptimizerLRScheduler:
    """An optimizer with a schedule.

    Args:
        parameters: to optimize.
        options: of the optimizer and of the schedule.
        num_steps: returns the number of training steps, which all schedules except ``constant`` need.
        fused: use the fused form of Adam, which takes a quarter of the time on a CPU. Lightning's mixed precision
            cannot clip gradients with it.

    Returns:
        What Lightning's ``configure_optimizers`` returns.

    Raises:
        ValueError: if the schedule needs the number of steps, and it is infinite.
    """
    optimizer = OPTIMIZERS[options.optimizer](
        parameters,
        lr=options.lr,
        betas=(options.betas[0], options.betas[1]),  # a list in YAML
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=fused,
    )
    name = options.schedule
    if name == "constant":
        return {"optimizer": optimizer}
    steps = num_steps()
    if steps == float("inf"):
        msg = f"schedule={name!r} needs the number of steps: set the trainer's max_epochs or max_steps"
        raise ValueError(msg)
    schedule: LRScheduler
    if name == "one_cycle":
        schedule = OneCycleLR(optimizer, max_lr=options.lr, total_steps=int(steps))
    else:
        factor = {"warmup_cosine": warmup_cosine, "warmup_steps": warmup_steps}[name]
        schedule = LambdaLR(optimizer, lambda step: factor(step / steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def forget_length(checkpoint: dict[str, Any]) -> None:
    """Keep the current step of a saved one-cycle schedule, but not its total length."""
    kept = ("last_epoch", "_step_count", "_last_lr")
    for state in checkpoint.get("lr_schedulers") or ():
        if "total_steps" in state:
            for key in set(state) - set(kept):
                del state[key]


class NonFiniteLossError(RuntimeError):
    """Training diverged: the loss or its gradient is NaN or infinite."""


class FlowOptimization(LightningModule):
    """The optimizer of a detector's flow."""

    model: FlowModel
    training_options: TrainingOptions
    done: Progress | None = None

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The detector's optimizer on the flow's parameters, with its schedule."""
        is_mixed = self._trainer is not None and isinstance(self.trainer.precision_plugin, MixedPrecision)
        return optimizer_with_schedule(
            self.model.flow.parameters(),
            self.training_options,
            lambda: self.done.all_steps(self.trainer) if self.done else self.trainer.estimated_stepping_batches,
            fused=not is_mixed,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say whose state the optimizer's is."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[OPTIMIZER_KEY] = self.training_options.optimizer

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume a schedule at its step, stretched to the number of steps planned now.

        Raises:
            CheckpointError: if a fit is resumed with another optimizer than the checkpoint's, whose state it needs.
        """
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and self._trainer.state.fn == "fit":
            saved = checkpoint.get(OPTIMIZER_KEY, "adam")
            if checkpoint.get("optimizer_states") and saved != self.training_options.optimizer:
                msg = (
                    f"the checkpoint's fit has optimizer={saved!r}, and cannot go on with "
                    f"{self.training_options.optimizer!r}: set optimizer to {saved!r}, or begin a new fit"
                )
                raise CheckpointError(msg)
            self.done = Progress.of(checkpoint)
        forget_length(checkpoint)

    def on_train_start(self) -> None:
        """Go on with the rate of the schedule as it is laid out now, and not of the one that the checkpoint knew."""
        super().on_train_start()
        for config in self.trainer.lr_scheduler_configs if self.done else ():
            config.scheduler.last_epoch -= 1
            config.scheduler.step()  # type: ignore[call-arg] # none of ours waits for a metric

    def checked(self, loss: Tensor, batch: Batch[Any]) -> Tensor:
        """Log a batch's loss, and stop if it is not finite."""
        if not torch.isfinite(loss):
            self._stop("the loss", loss)
        self.log(
            "train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(cast("Tensor", batch.image))
        )
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient's norm as the paper does, unless the trainer was given another value."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # a scaler skips such steps itself
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.flow.parameters() if p.grad is not None])
            if not torch.isfinite(norm):
                self._stop("the gradient", norm)
        if gradient_clip_val is None:
            gradient_clip_val = self.training_options.gradient_clip_norm
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _stop(self, what: str, value: Tensor) -> NoReturn:
        """Raise before the optimizer's step, so that no checkpoint can contain values that are not finite."""
        saved = getattr(self.trainer.checkpoint_callback, "best_model_path", "") or "none was written yet"
        msg = (
            f"{what} became {value.item()} at epoch {self.current_epoch}, step {self.global_step}: training stops. "
            f"The last good checkpoint: {saved}. Lower lr, lower gradient_clip_norm, or look for images that are "
            "unlike the others"
        )
        raise NonFiniteLossError(msg)
