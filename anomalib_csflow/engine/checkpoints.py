"""Checkpoints without the frozen backbone, that say whose they are before anything is built."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.pytorch import LightningModule
from typing_extensions import Self

from anomalib_csflow.features import weights

from .checkpoint_files import CHECKPOINT_KEY, CheckedCheckpoints, CheckpointError, check_form, read, sum_of
from .images import ImageOptions
from .model import FlowModel

BACKBONE = "model.features.backbone."
EVALUATOR = "evaluator."


class LeanCheckpoints(LightningModule):
    """What a detector's checkpoint holds: the flow, the thresholds, and whose they are.

    The frozen backbone is left out where its weights can be had again: a digest tells whether they are
    the same. So are the evaluator's tensors: metrics with buffers would else fail to load.

    Attributes:
        output_arguments: the detector's own arguments that change what it gives for an image. They must be the
            checkpoint's, as must the backbone, its weights and :class:`~.images.ImageOptions`' others.
        free_arguments: its own that may differ. So may all of :class:`~.optimization.TrainingOptions`.
        keep_backbone: whether checkpoints hold the backbone, since no source of weights has it.
    """

    output_arguments: ClassVar[tuple[str, ...]]
    free_arguments: ClassVar[tuple[str, ...]] = ()
    model: FlowModel
    image_options: ImageOptions
    keep_backbone: bool
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
            "tensors": sum_of(state),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is this detector's, and put back what was left out."""
        check_form(checkpoint, type(self).__name__, "the file")
        self._check_arguments(checkpoint[CHECKPOINT_KEY])
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

    def check_read_checkpoints(self) -> None:
        """Have the trainer check what it reads: Lightning looks into a checkpoint before it asks the detector."""
        strategy = self.trainer.strategy
        inner = strategy.checkpoint_io
        inner = inner.inner if isinstance(inner, CheckedCheckpoints) else inner  # of an earlier stage
        strategy.checkpoint_io = CheckedCheckpoints(inner, type(self).__name__)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load; see ``torch.nn.Module``.

        Raises:
            CheckpointError: if the tensors do not fit, in a sentence.
        """
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            first = " ".join(str(error).splitlines()[1:2]).strip() or str(error)
            msg = f"the tensors do not fit this {type(self).__name__} ({first[:200].rstrip('. ')}): build it alike"
            raise CheckpointError(msg) from error

    def _check_arguments(self, written: dict[str, Any]) -> None:
        """Raise CheckpointError if the checkpoint's detector would give other scores or maps."""
        # not the checkpoint's hyperparameters: Lightning puts the caller's arguments over them before it asks us
        theirs = written.get("arguments") or {
            name: _plain(value)
            for name, value in written.get(
                "structure", {}
            ).items()  # as older ones have it, whose None stood for a default
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
        with anomalib_safe_globals(extra=cls.checkpoint_safe_globals()):
            read(path, lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=True), cls.__name__)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)


def _plain(value: object) -> object:
    """A value as it is compared: checkpoints have lists where a constructor may be given tuples."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
