"""Checkpoints without the frozen backbone, that say whose they are before anything is built."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.pytorch import LightningModule
from typing_extensions import Self

from anomalib_csflow.features import weights

from .images import ImageOptions
from .model import FlowModel
from .roles import Roles

CHECKPOINT_KEY = "anomalib_csflow"
BACKBONE = "model.features.backbone."
EVALUATOR = "evaluator."


class CheckpointError(RuntimeError):
    """A checkpoint does not belong to the detector that should load it."""


class LeanCheckpoints(LightningModule):
    """What a detector's checkpoint holds: the flow, the thresholds, and whose they are.

    The frozen backbone is left out where its weights can be had again: a digest tells whether they are
    the same. So are the evaluator's tensors: metrics with buffers would else fail to load.

    Attributes:
        output_arguments: the detector's own arguments that change what it gives for an image. They must be the
            checkpoint's, as must the backbone, its weights and :class:`~.images.ImageOptions`' others.
        free_arguments: its own that may differ. So may all of :class:`~.optimization.TrainingOptions`.
        keep_backbone: whether checkpoints hold the backbone, since no source of weights has it.
        roles: digests of the images that it was trained or validated on, see :mod:`~.roles`.
    """

    output_arguments: ClassVar[tuple[str, ...]]
    free_arguments: ClassVar[tuple[str, ...]] = ()
    model: FlowModel
    image_options: ImageOptions
    keep_backbone: bool
    roles: Roles
    checkpoint_safe_globals: ClassVar[Callable[[], list[Any]]]  # AnomalibModule's

    @property
    def output_values(self) -> dict[str, object]:
        """Values of all arguments that change what the detector gives for an image, by name."""
        images = self.image_options
        values = {"backbone": images.backbone, "image_size": images.size, "antialias": images.antialias}
        values |= {name: self.hparams[name] for name in self.output_arguments if name in self.hparams}
        return {name: _plain(value) for name, value in values.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what can be had again: the frozen backbone, and the metrics' states."""
        super().on_save_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        left_out = (EVALUATOR,) if self.keep_backbone else (EVALUATOR, BACKBONE)
        for key in [key for key in state if key.startswith(left_out)]:
            del state[key]
        # the evaluator is a callback too, and its state there is the same tensors
        for key in [key for key in checkpoint.get("callbacks", {}) if key.startswith("Evaluator")]:
            del checkpoint["callbacks"][key]
        checkpoint[CHECKPOINT_KEY] = {
            "detector": type(self).__name__,
            "backbone": weights.fingerprint(self.model.features.backbone),
            "arguments": self.output_values,
            "images": self.roles,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is this detector's, and put back what was left out."""
        self._check_checkpoint(checkpoint)
        self._check_arguments(checkpoint[CHECKPOINT_KEY])
        self.roles = checkpoint[CHECKPOINT_KEY].get("images", {})
        state = checkpoint["state_dict"]
        self.keep_backbone = any(key.startswith(BACKBONE) for key in state)
        if not self.keep_backbone and checkpoint[CHECKPOINT_KEY]["backbone"] != weights.fingerprint(
            self.model.features.backbone
        ):
            msg = (
                f"the checkpoint was trained on other weights of the backbone {self.image_options.backbone!r} than "
                f"those loaded (weights={self.image_options.weights!r}): pass the weights= that it was trained with"
            )
            raise CheckpointError(msg)
        super().on_load_checkpoint(checkpoint)
        left_out = (EVALUATOR,) if self.keep_backbone else (EVALUATOR, BACKBONE)
        state.update({key: value for key, value in self.state_dict().items() if key.startswith(left_out)})

    def _check_arguments(self, written: dict[str, Any]) -> None:
        """Raise CheckpointError if the checkpoint's detector would give other scores or maps."""
        # not the checkpoint's hyperparameters: Lightning puts the caller's arguments over them before it asks us
        theirs = written.get("arguments") or {
            name: _plain(value)
            for name, value in written["structure"].items()  # as older ones have it, whose None stood for a default
            if value is not None
        }
        for name, ours in self.output_values.items():
            if name in theirs and theirs[name] != ours:
                msg = (
                    f"the checkpoint was trained with {name}={theirs[name]!r}, this detector has {ours!r}: "
                    "build it alike"
                )
                raise CheckpointError(msg)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Rebuild a detector from its checkpoint; see ``AnomalibModule.load_from_checkpoint``.

        Raises:
            FileNotFoundError: if there is no such file.
            CheckpointError: if it is not a checkpoint of this detector, before anything is built.
        """
        path = Path(checkpoint_path)
        if not path.is_file():
            msg = f"there is no checkpoint at {path}"
            raise FileNotFoundError(msg)
        try:
            with anomalib_safe_globals(extra=cls.checkpoint_safe_globals()):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # the reader raises many kinds
            msg = (
                f"{path} is not a readable checkpoint ({str(error).splitlines()[0]}): give the .ckpt file of a training"
            )
            raise CheckpointError(msg) from error
        cls._check_checkpoint(checkpoint, path)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    @classmethod
    def _check_checkpoint(cls, checkpoint: dict[str, Any], path: Path | None = None) -> None:
        """Raise CheckpointError unless this detector wrote the checkpoint."""
        writer = checkpoint.get(CHECKPOINT_KEY, {}).get("detector")
        if writer != cls.__name__:
            what = f"a checkpoint of {writer}" if writer else "not a checkpoint of this package"
            msg = f"{path or 'the file'} is {what}: {cls.__name__} cannot load it"
            raise CheckpointError(msg)


def _plain(value: object) -> object:
    """A value as it is compared: checkpoints have lists where a constructor may be given tuples."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
