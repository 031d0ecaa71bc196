"""Reading checkpoint files that may be anybody's: nothing in them is run, and what is wrong is said in a sentence."""

import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZipFile

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from packaging.version import InvalidVersion, Version
from torch import Tensor

from .whole_files import whole_file

CHECKPOINT_KEY = "anomalib_csflow"
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LOOPS = ("fit_loop", "validate_loop", "test_loop", "predict_loop")

NEEDED = {"pytorch-lightning_version": str, "state_dict": dict, "hyper_parameters": dict}
"""Entries of every checkpoint, and their types."""

OPTIONAL = {
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "anomalib_components_enabled": dict,
    "anomalib_pre_processor_config": dict,
    "anomalib_post_processor_config": dict,
}
"""Entries that may be missing, or None."""


class CheckpointError(RuntimeError):
    """A checkpoint does not belong to the detector that should load it."""


def check_form(checkpoint: object, detector: str, where: str) -> None:
    """Check that a checkpoint is the detector's, and has all that loading it takes, of the right types.

    Args:
        checkpoint: what the file holds.
        detector: name of the detector that should load it.
        where: the file, as the message should call it.

    Raises:
        CheckpointError: if not.
    """
    writer = _writer(checkpoint)
    if writer != detector:
        what = f"a checkpoint of {writer}" if isinstance(writer, str) and writer else "not a checkpoint of this package"
        msg = f"{where} is {what}: {detector} cannot load it"
        raise CheckpointError(msg)
    assert isinstance(checkpoint, Mapping)  # noqa: S101 (it has an entry of ours)
    problem = next(_problems(checkpoint, checkpoint[CHECKPOINT_KEY]), None)
    if problem is not None:
        msg = f"{where} is a damaged checkpoint, {problem}: give another, as {detector} writes them while it is trained"
        raise CheckpointError(msg)


def _writer(checkpoint: object) -> Any:
    """Name of the detector that wrote a checkpoint; None of what is no checkpoint of ours."""
    own = checkpoint.get(CHECKPOINT_KEY) if isinstance(checkpoint, Mapping) else None
    return own.get("detector") if isinstance(own, Mapping) else None


def _problems(checkpoint: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a checkpoint of ours; what comes later relies on what was right before."""
    for name, kind in NEEDED.items():
        if not isinstance(checkpoint.get(name), kind):
            yield f"whose {name} is missing or no {kind.__name__}"
    for name, kind in OPTIONAL.items():
        if checkpoint.get(name) is not None and not isinstance(checkpoint[name], kind):
            yield f"whose {name} is no {kind.__name__}"
    try:
        Version(checkpoint["pytorch-lightning_version"])
    except InvalidVersion:
        yield "whose pytorch-lightning_version is none"
    arguments = own.get("arguments")
    if not isinstance(own.get("backbone"), str) or not isinstance(arguments, Mapping) or not arguments:
        yield "which does not say what it was trained with"
    for name, tensor in checkpoint["state_dict"].items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            yield f"whose {name!r} is no tensor"
        if name.startswith("model.flow.") and tensor.dtype in FLOATS and tensor.isnan().any():
            yield f"whose {name!r} has NaN"
    loops, schedules = checkpoint.get("loops"), checkpoint.get("lr_schedulers") or ()
    if loops is not None and not all(isinstance(loops.get(name), Mapping) for name in LOOPS):
        yield "whose loops are incomplete"
    if not all(isinstance(one, dict) for one in schedules):
        yield "whose lr_schedulers are none"


def read(path: Path, load: Callable[[], Any], detector: str | None) -> dict[str, Any]:
    """Read a checkpoint of a detector.

    Args:
        path: of the file.
        load: reads it, and runs nothing that is in it.
        detector: name of the detector that should load it; whichever wrote it if None.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it cannot be read, or see :func:`check_form`.
    """
    if not path.is_file():
        msg = f"there is no checkpoint at {path}"
        raise FileNotFoundError(msg)
    try:
        check_sums(path)
        checkpoint = load()
    except Exception as error:  # the reader raises many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
        if isinstance(error, UnpicklingError):  # torch's text tells how to run what is in the file
            reason = "it holds more than tensors and plain values"
        if not isinstance(error, OSError) and not zipfile.is_zipfile(path):
            reason = "torch.save did not write it, or its end is missing"
        msg = f"{path} is not a readable checkpoint ({reason}): give the .ckpt file of a training"
        raise CheckpointError(msg) from error
    check_form(checkpoint, detector or _writer(checkpoint) or "anomalib_csflow", str(path))
    written = checkpoint[CHECKPOINT_KEY].get("tensors")  # earlier ones have no sum
    if written is not None and written != sum_of(checkpoint["state_dict"]):
        msg = f"{path} is a damaged checkpoint, whose tensors are not those that were written: give another"
        raise CheckpointError(msg)
    return dict(checkpoint)


def sum_of(tensors: Mapping[str, Tensor]) -> str:
    """Checksum of named tensors: of names, types, shapes and values."""
    total = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def check_sums(path: Path) -> None:
    """Check the sums that torch writes into its files and does not look at: a flipped bit is another flow.

    Raises:
        OSError: if an entry is damaged.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":  # torch says what is wrong with a file that is none of its own
            return
    with ZipFile(path) as entries:
        damaged = entries.testzip()
    if damaged is not None:
        msg = f"its entry {damaged} is damaged"
        raise OSError(msg)


class CheckedCheckpoints(CheckpointIO):
    """The trainer's reader and writer of checkpoints, which checks what it has read before anything looks at it.

    Args:
        inner: reads and writes.
        detector: name of the detector whose checkpoints they are.
    """

    def __init__(self, inner: CheckpointIO, detector: str) -> None:
        self.inner = inner
        self.detector = detector

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read and check; never run what is in the file, whatever ``weights_only`` says."""
        del weights_only
        load = self.inner.load_checkpoint
        return read(Path(path), lambda: load(path, map_location=map_location, weights_only=True), self.detector)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write; a local file under another name first, so that a kill or a full disk leaves the one before.

        Lightning's own writer copies it from the folder of temporary files, which may be on another disk.

        Raises:
            WriteError: if it cannot be written.
        """
        is_lightnings = type(self.inner).save_checkpoint is TorchCheckpointIO.save_checkpoint
        if not is_lightnings or storage_options is not None or "://" in str(path):
            self.inner.save_checkpoint(checkpoint, path, storage_options)
            return
        with whole_file("the checkpoint", Path(path)) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove."""
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """End what the inner one does."""
        self.inner.teardown()
