"""Files that are renamed when they are complete: a kill or a full disk leaves what was there before."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

OPENVINO_CANNOT_WRITE = "iostream error"


class WriteError(OSError):
    """A file cannot be written, for example because there is no space or no permission."""


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Report in one sentence that something cannot be written, whichever library raised the error.

    Args:
        what: what is written, in the words of the message.
        path: where it is written.

    Raises:
        WriteError: if the system does not let it be written.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None or isinstance(error, WriteError):
            raise
        msg = f"{what} cannot be written to {path} ({reason}): free some space there, or choose another folder"
        raise WriteError(msg) from error


def _reason(error: BaseException | None) -> str | None:
    """The system's reason for an error; None if the error is about something else."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        if OPENVINO_CANNOT_WRITE in str(error):
            return "OpenVINO does not say why"
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def whole_file(what: str, path: Path) -> Iterator[Path]:
    """Yield a path beside a file to write to; what was written there becomes the file at the end.

    Raises:
        WriteError: if it cannot be written; then the file is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(what, path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


@contextmanager
def partial_folder(what: str, path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside a path, from which what is complete can be moved there in one step.

    Raises:
        WriteError: if it cannot be written.
    """
    with writing(what, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".partial_", dir=path.parent, ignore_cleanup_errors=True) as folder:
            yield Path(folder)


def whole_export(root: Path, export: Callable[[Path], Path]) -> Path:
    """Export to a folder beside the place where the model will be, and move it there when it is complete.

    If a model has several files, the old model is removed just before the new one takes its place. A kill leaves the
    old model, the new one or none, but never files of both.

    Args:
        root: folder of exports.
        export: exports to a folder and returns the model's file; other files beside it belong to the model.

    Returns:
        The model's file.

    Raises:
        WriteError: if it cannot be written; then an earlier model is as it was.
    """
    with partial_folder("the export", root / "weights") as folder:
        made = export(folder)
        path = root / made.relative_to(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        others = [file for file in made.parent.iterdir() if file != made]
        if others:
            path.unlink(missing_ok=True)
        for file in (*others, made):
            file.replace(path.parent / file.name)
    return path
