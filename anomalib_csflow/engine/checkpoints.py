"""Checkpoints without the frozen backbone, which name their detector, so that a wrong one is refused early."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from anomalib.models.components import AnomalibModule
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


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a checkpoint file holds; nothing in it is executed, and tensors are read when they are used.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"there is no checkpoint at {path}"
        raise FileNotFoundError(msg)
    try:
        with anomalib_safe_globals(extra=AnomalibModule.checkpoint_safe_globals()):
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the reader raises many kinds
        msg = f"{path} is not a readable checkpoint ({str(error).splitlines()[0]}): give the .ckpt file of a training"
        raise CheckpointError(msg) from error
    return checkpoint


def model_of(path: str | Path) -> dict[str, Any]:
    """Class path and arguments of the detector that wrote a checkpoint, as a configuration has them.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is not a checkpoint of this package.
    """
    checkpoint = read_checkpoint(path)
    written = checkpoint.get(CHECKPOINT_KEY)
    if not isinstance(written, dict) or "detector" not in written:
        msg = f"{path} is not a checkpoint of this package: name its --model"
        raise CheckpointError(msg)
    arguments = {name: _plain(value) for name, value in checkpoint["hyper_parameters"].items()}
    return {"class_path": f"anomalib_csflow.{written['detector']}", "init_args": arguments}


class LeanCheckpoints(LightningModule):
    """Checkpoints of a detector: the flow, the thresholds, the detector's name and its arguments.

    The frozen backbone is left out if its weights can be loaded again; a digest tells whether they are the
    same. The evaluator's tensors are left out too, because metrics with buffers would fail to load.

    Attributes:
        output_arguments: the detector's own arguments that change its scores or maps. They must be the same in the
            checkpoint, and so must the backbone, its weights and the rest of :class:`~.images.ImageOptions`.
        free_arguments: the detector's own arguments that may differ, as may :class:`~.optimization.TrainingOptions`.
        keep_backbone: whether checkpoints contain the backbone, because its weights cannot be loaded from elsewhere.
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
        """Values of all arguments that change scores or maps, by name."""
        images = self.image_options
        values = {"backbone": images.backbone, "image_size": images.size, "antialias": images.antialias}
        values |= {name: self.hparams[name] for name in self.output_arguments if name in self.hparams}
        return {name: _plain(value) for name, value in values.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what can be restored from elsewhere: the frozen backbone, and the metrics' states."""
        super().on_save_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        left_out = (EVALUATOR,) if self.keep_backbone else (EVALUATOR, BACKBONE)
        for key in [key for key in state if key.startswith(left_out)]:
            del state[key]
        # the evaluator is also a callback, whose state contains the same tensors
        for key in [key for key in checkpoint.get("callbacks", {}) if key.startswith("Evaluator")]:
            del checkpoint["callbacks"][key]
        checkpoint[CHECKPOINT_KEY] = {
            "detector": type(self).__name__,
            "backbone": weights.fingerprint(self.model.features.backbone),
            "arguments": self.output_values,
            "images": self.roles,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint belongs to this detector, and put back what was left out."""
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
        # not the checkpoint's hyperparameters: Lightning has already replaced them with the caller's arguments
        theirs = written.get("arguments") or {
            name: _plain(value)
            for name, value in written["structure"].items()  # in older checkpoints, where None stood for a default
            if value is not None
        }
        for name, ours in self.output_values.items():
            if name in theirs and theirs[name] != ours:
                msg = (
                    f"the checkpoint was trained with {name}={theirs[name]!r}, this detector has {ours!r}: "
                    "create it with the same value"
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
        cls._check_checkpoint(read_checkpoint(path), path)
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
    """A value in comparable form: checkpoints have lists where a constructor may be given tuples."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
