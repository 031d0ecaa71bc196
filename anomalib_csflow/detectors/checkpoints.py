"""Checkpoints without the frozen backbone, that say whose they are before anything is built."""

from pathlib import Path
from typing import Any, cast

import torch
from anomalib.models.components import AnomalibModule
from anomalib.utils.serialization import anomalib_safe_globals
from typing_extensions import Self

from anomalib_csflow import weights

from .flow_model import FlowModel

CHECKPOINT_KEY = "anomalib_csflow"
LEFT_OUT = ("model.features.backbone.", "evaluator.")


class CheckpointError(RuntimeError):
    """A checkpoint does not belong to the detector that should load it."""


class LeanCheckpoints(AnomalibModule):
    """What a detector's checkpoint holds: the flow, the thresholds, and whose they are.

    The frozen backbone is left out, since its weights can be had again: a digest tells whether they are
    the same. So are the evaluator's tensors: metrics with buffers would else fail to load.
    """

    model: FlowModel

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what can be had again: the frozen backbone, and the metrics' states."""
        super().on_save_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        for key in [key for key in state if key.startswith(LEFT_OUT)]:
            del state[key]
        # the evaluator is a callback too, and its state there is the same tensors
        for key in [key for key in checkpoint.get("callbacks", {}) if key.startswith("Evaluator")]:
            del checkpoint["callbacks"][key]
        checkpoint[CHECKPOINT_KEY] = {
            "detector": type(self).__name__,
            "backbone": weights.fingerprint(self.model.features.backbone),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is this detector's, and put back what was left out."""
        self._check_checkpoint(checkpoint)
        if checkpoint[CHECKPOINT_KEY]["backbone"] != weights.fingerprint(self.model.features.backbone):
            msg = (
                f"the checkpoint was trained on other weights of the backbone {self.hparams['backbone']!r} than those "
                f"loaded (weights={self.hparams['weights']!r}): pass the weights= that it was trained with"
            )
            raise CheckpointError(msg)
        super().on_load_checkpoint(checkpoint)
        own = {key: value for key, value in self.state_dict().items() if key.startswith(LEFT_OUT)}
        checkpoint["state_dict"].update(own)

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
        with anomalib_safe_globals(extra=cls.checkpoint_safe_globals()):
            cls._check_checkpoint(torch.load(path, map_location="cpu", weights_only=True, mmap=True), path)
        return cast("Self", super().load_from_checkpoint(checkpoint_path, *args, **kwargs))

    @classmethod
    def _check_checkpoint(cls, checkpoint: dict[str, Any], path: Path | None = None) -> None:
        """Raise CheckpointError unless this detector wrote the checkpoint."""
        writer = checkpoint.get(CHECKPOINT_KEY, {}).get("detector")
        if writer != cls.__name__:
            what = f"a checkpoint of {writer}" if writer else "not a checkpoint of this package"
            msg = f"{path or 'the file'} is {what}: {cls.__name__} cannot load it"
            raise CheckpointError(msg)
