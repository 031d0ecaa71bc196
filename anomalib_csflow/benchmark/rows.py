"""A row of the benchmark: the settings and figures of a run, and its JSON form."""

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

FORMAT = 2


@dataclass(frozen=True)
class Row:
    """One run. A value is None if the run failed before it was known.

    Args:
        run: name of the run's folder.
        detector: its name.
        class_path: of the class or function that made it.
        data: name of the data set.
        seed: of the random numbers.
        status: ``done`` or ``failed``.
        reason: why it failed.
        origin: the package that the model comes from.
        backbone: of the model.
        weights: where they come from.
        image_size: height and width.
        notes: what differs from the other detectors.
        epochs: number of epochs begun in the fit.
        steps: number of optimizer steps.
        train_images: number of training images.
        test_good: number of good test images.
        test_defective: number of defective test images.
        threshold: how the threshold for F1 was chosen.
        threads: number of threads of the process.
        device: where it was fitted.
        machine: where it was measured.
        versions: of the packages that figures depend on.
        commit: of this package.
        run_s: seconds of all stages.
        finished: date and time of the end.
        figures: all that :data:`overview.COLUMNS` names, and more, by key.
    """

    run: str
    detector: str
    class_path: str
    data: str
    seed: int
    status: str
    reason: str = ""
    origin: str | None = None
    backbone: str | None = None
    weights: str | None = None
    image_size: list[int] | None = None
    notes: list[str] = field(default_factory=list)
    epochs: int | None = None
    steps: int | None = None
    train_images: int | None = None
    test_good: int | None = None
    test_defective: int | None = None
    threshold: str | None = None
    threads: int | None = None
    device: str | None = None
    machine: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    run_s: float | None = None
    finished: str | None = None
    figures: dict[str, float | None] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether the run was measured without failing."""
        return self.status == "done"

    @classmethod
    def parse(cls, values: dict[str, Any]) -> "Row":
        """From flat values, as in JSON: every key that is not a field is a figure."""
        known = {entry.name for entry in fields(cls)} - {"figures"}
        own = {key: value for key, value in values.items() if key in known}
        own |= {key: type(empty)() for key, empty in (("notes", []), ("versions", {})) if own.get(key) is None}
        return cls(**own, figures={key: values[key] for key in values.keys() - known - {"format"}})

    def flat(self) -> dict[str, Any]:
        """Flat values, as :meth:`parse` reads them."""
        values = asdict(self)
        figures = values.pop("figures")
        return {"format": FORMAT} | values | figures


def write_json(path: Path, value: Any) -> None:
    """Write a file in one step, so that nobody reads half a file, even if the benchmark is killed."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(_plain(value), indent=1))
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _plain(value: Any) -> Any:
    """Values that JSON supports: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
