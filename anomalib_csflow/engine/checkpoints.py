"""Checkpoints without the frozen backbone, which name their detector, so that a wrong one is refused early."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from zlib import crc32

import torch
from anomalib.models.components import AnomalibModule
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.pytorch import LightningModule
from typing_extensions import Self

from anomalib_csflow.features import weights

from .checkpoint_files import CHECKPOINT_KEY, CheckedCheckpoints, CheckpointError, check_form, read, sum_of
from .images import ImageOptions
from .model import FlowModel
from .roles import Roles

BACKBONE = "model.features.backbone."
EVALUATOR = "evaluator."
COMPONENTS = ("pre_processor", "post_processor", "evaluator", "visualizer")
"""Arguments of anomalib's that are modules."""


def read_checkpoint(path: str | Path, detector: str | None = None) -> dict[str, Any]:
    """What a checkpoint file holds; nothing in it is executed, and tensors are read when they are used.

    Args:
        path: of the file.
        detector: name of the detector that should load it; any of this package's if None.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is damaged, or not a checkpoint of this detector.
    """
    with anomalib_safe_globals(extra=AnomalibModule.checkpoint_safe_globals()):
        return read(Path(path), lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=True), detector)


def model_of(path: str | Path) -> dict[str, Any]:
    """Class path and arguments of the detector that wrote a checkpoint, as a configuration has them.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is not a checkpoint of this package, or has arguments that could run other code.
    """
    checkpoint = read_checkpoint(path)
    written = checkpoint[CHECKPOINT_KEY]
    arguments = {name: _plain(value) for name, value in checkpoint["hyper_parameters"].items()}
    class_path = f"anomalib_csflow.{written['detector']}"
    for name, value in [("detector", class_path), *arguments.items()]:
        if not (_is_own(value) if name in ("detector", *COMPONENTS) else _is_value(value)):
            msg = (
                f"{path} has a {name} that is not of this package, and could run any code: if you trust the file, "
                "give the detector's arguments yourself, by --config or --model"
            )
            raise CheckpointError(msg)
    return {"class_path": class_path, "init_args": arguments}


def _is_value(value: object) -> bool:
    """Whether an argument is a value or a list of values, of which no command line makes an object."""
    if isinstance(value, list | tuple):
        return all(_is_value(one) for one in value)
    return value is None or isinstance(value, bool | int | float | str)


def _is_own(component: object) -> bool:
    """Whether an argument is no component, or one of this package with values as arguments."""
    if isinstance(component, str):
        component = {"class_path": component}
    if not isinstance(component, Mapping):
        return component is None or isinstance(component, bool)
    package, _, name = str(component.get("class_path")).rpartition(".")
    values = component.get("init_args") or {}
    is_plain = isinstance(values, Mapping) and all(_is_value(value) for value in values.values())
    return (
        package == "anomalib_csflow"
        and name.isidentifier()
        and is_plain
        and {*component} <= {"class_path", "init_args"}
    )


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
    take_size: Callable[[tuple[int, int]], None]
    checkpoint_safe_globals: ClassVar[Callable[[], list[Any]]]  # AnomalibModule's

    @property
    def output_values(self) -> dict[str, object]:
        """Values of all arguments that change scores or maps, by name."""
        images = self.image_options
        values = {"backbone": images.backbone, "image_size": images.size, "antialias": images.antialias}
        values["region"] = images.region and f"mask {crc32(images.region.encode()):08x}"
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
            "tensors": sum_of(state),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint belongs to this detector, and put back what was left out."""
        check_form(checkpoint, type(self).__name__, "the file")
        size = checkpoint[CHECKPOINT_KEY].get("arguments", {}).get("image_size")
        if self.image_options.is_open and size:
            self.take_size((size[0], size[1]))
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
        # not the checkpoint's hyperparameters: Lightning has already replaced them with the caller's arguments
        given = inspect.signature(type(self)).parameters.values()
        defaults = {one.name: _plain(one.default) for one in given if one.default is not one.empty}
        theirs = defaults | written["arguments"]  # older ones lack new arguments
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
        read_checkpoint(path, cls.__name__)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)


def _plain(value: object) -> object:
    """A value in comparable form: checkpoints have lists where a constructor may be given tuples."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
