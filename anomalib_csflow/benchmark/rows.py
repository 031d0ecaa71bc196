"""A row of the benchmark: what a run was and what it measured, and its JSON."""

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

FORMAT = 2


@dataclass(frozen=True)
class Row:
    """One run. What is None was not found out before the run failed.

    Args:
        run: the folder of the run.
        detector: its name.
        class_path: what was built.
        data: name of the data set.
        seed: of the random numbers.
        status: ``done`` or ``failed``.
        reason: why it failed.
        origin: the package that the model comes from.
        backbone: of the model.
        weights: where they come from.
        image_size: height and width.
        notes: what is not as for the others.
        epochs: begun in the fit.
        steps: of the optimizer.
        train_images: how many the fit had.
        test_good: good images of the test.
        test_defective: defective ones.
        threshold: how F1 got its own.
        threads: of the process.
        device: where it was fitted.
        machine: which one.
        versions: of the packages that figures depend on.
        commit: of this package.
        run_s: seconds of all stages.
        finished: when.
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
        """Whether it was measured."""
        return self.status == "done"

    @classmethod
    def parse(cls, values: dict[str, Any]) -> "Row":
        """From flat values, as JSON has them: what is no field is a figure."""
        known = {entry.name for entry in fields(cls)} - {"figures"}
        own = {key: value for key, value in values.items() if key in known}
        own |= {key: type(empty)() for key, empty in (("notes", []), ("versions", {})) if own.get(key) is None}
        return cls(**own, figures={key: values[key] for key in values.keys() - known - {"format"}})

    def flat(self) -> dict[str, Any]:
        """What :meth:`parse` reads."""
        values = asdict(self)
        figures = values.pop("figures")
        return {"format": FORMAT} | values | figures


def write_json(path: Path, value: Any) -> None:
    """Write so that a reader, or a benchmark that is killed, never sees half a file."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(_plain(value), indent=1))
    temporary.replace(path)


def _plain(value: Any) -> Any:
    """Numbers as JSON has them: what is no number becomes null."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
