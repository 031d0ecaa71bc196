"""What a benchmark measures: detectors x data sets x seeds."""

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import anomalib.data
import anomalib.models
from anomalib.data import AnomalibDataModule

import anomalib_csflow
from anomalib_csflow.benchmark.rows import write_json
from anomalib_csflow.engine.optimization import Steps, steps_for, steps_to_draw_for

MAX_NAME = 80  # bytes; the name of a run's folder has two names, a seed and a digest, and at most 255 bytes
SHARED = ("backbone", "weights", "image_size", "antialias")
"""Settings that the detectors of a benchmark share; each detector gets those that its constructor takes."""


@dataclass(frozen=True)
class Detector:
    """One detector of a benchmark.

    Args:
        class_path: import path of a class, or of a function that returns an anomalib model; or a name of this package
            or of ``anomalib.models``.
        init_args: its arguments.
        name: its name in tables; by default the last part of the class path.
        epochs: epochs of training; either this or steps is needed, unless the model sets its own length.
        steps: optimizer steps of training; if epochs are given too, training ends at whichever comes first.
        train_batch_size: images per step.
        eval_batch_size: images per step of the test.
        num_workers: number of processes that read images.
        note: a sentence for the table about what differs from the other detectors.
    """

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    epochs: int | None = None
    steps: int | None = None
    train_batch_size: int = 16
    eval_batch_size: int = 16
    num_workers: int = 0
    note: str = ""

    @property
    def length(self) -> dict[str, int]:
        """How long the trainer trains; empty if the model decides."""
        if self.steps is not None:
            return {"max_steps": self.steps, "max_epochs": self.epochs or -1}
        return {} if self.epochs is None else {"max_epochs": self.epochs}

    def images_seen(self, images: int) -> int:
        """Number of images that a fit processes, with repetitions, for a training set of the given size."""
        own: Steps | None = self.init_args.get("max_steps")
        if own:  # one epoch of whole batches, however many images there are
            drawn = min(images, steps_to_draw_for(own) * self.train_batch_size)
            return steps_for(own, drawn, self.train_batch_size) * self.train_batch_size
        passed = [images * self.epochs] if self.epochs else []
        passed += [min(images, self.train_batch_size) * self.steps] if self.steps else []
        return min(passed, default=images)


@dataclass(frozen=True)
class DataSet:
    """One data set of a benchmark: a datamodule by its import path, or by its name in ``anomalib.data``.

    Args:
        class_path: the datamodule.
        init_args: its arguments.
        name: its name in tables and folders.
        error: what is wrong with it, if that is known before it is read.
    """

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    error: str = ""


@dataclass(frozen=True)
class Run:
    """A detector on a data set with a seed: what one row of the table measures.

    Args:
        detector: the detector that is measured.
        data: the data set.
        seed: of the random numbers.
        shared: settings for all detectors that can take them.
        accelerator: Lightning's name for it.
        in_full: also keep heat maps, export and time the model; only with one seed, since these do not depend on it.
    """

    detector: Detector
    data: DataSet
    seed: int
    shared: dict[str, Any]
    accelerator: str = "auto"
    in_full: bool = False

    @property
    def slug(self) -> str:
        """Name of the folder of the run's results: readable names, and a digest of all settings for resuming."""
        names = f"{self.detector.name}-{self.data.name}-{self.seed}"
        plain = "".join(character if character.isalnum() or character in "-_" else "_" for character in names)
        settings = json.dumps(asdict(self), sort_keys=True, default=str)
        return f"{plain}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"

    @classmethod
    def load(cls, path: Path) -> "Run":
        """The run that was written by :meth:`save`."""
        values = json.loads(path.read_text())
        return cls(**values | {"detector": Detector(**values["detector"]), "data": DataSet(**values["data"])})

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_json(path, asdict(self))


def import_named(name: str, home: Any, what: str) -> Callable[..., Any]:
    """A class or function by its import path, or by its name in this package or in a module of anomalib.

    Raises:
        ValueError: if there is none; the message lists similar names.
    """
    for module in (anomalib_csflow, home):
        if name in getattr(module, "__all__", ()):
            return getattr(module, name)
    module_name, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module_name), attribute) if module_name else None
    except (ImportError, AttributeError):
        found = None
    if callable(found):
        return found
    known = [*anomalib_csflow.__all__, *home.__all__]
    near = get_close_matches(attribute, known, n=3)
    hint = (
        f"; is it {' or '.join(near)}?" if near else f": a name of anomalib_csflow or {home.__name__}, or package.Class"
    )
    msg = f"unknown {what} {name!r}{hint}"
    raise ValueError(msg)


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a class or function has an argument of that name."""
    return name in inspect.signature(function).parameters


def datamodule(run: Run) -> AnomalibDataModule:
    """Anomalib's datamodule of a run, with the detector's batch sizes."""
    build = import_named(run.data.class_path, anomalib.data, "datamodule")
    sizes = {key: getattr(run.detector, key) for key in ("train_batch_size", "eval_batch_size", "num_workers")}
    return build(**sizes | run.data.init_args)


def runs(
    detectors: Sequence[Detector],
    data: Sequence[DataSet],
    seeds: Sequence[int],
    shared: dict[str, Any],
    accelerator: str,
) -> list[Run]:
    """All runs, seed by seed; those of the first seed are measured in full.

    Raises:
        ValueError: if two detectors or data sets have the same name, a name cannot be that of a folder, or a shared
            setting is unknown.
    """
    for what, names in (("detectors", [d.name for d in detectors]), ("data sets", [d.name for d in data])):
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            msg = f"benchmark: two {what} are called {min(twice)!r}: give each a name"
            raise ValueError(msg)
        wrong = [
            name
            for name in names
            if len(name.encode()) > MAX_NAME or name in {"", ".", ".."} or set(name) & set("/\\\0")
        ]
        if wrong:
            msg = (
                f"benchmark: {wrong[0]!r} in {what} cannot be a folder name: use up to {MAX_NAME} letters and no slash "
                "(fewer where a letter takes several bytes)"
            )
            raise ValueError(msg)
    unknown = [key for key in shared if key not in SHARED]
    if unknown:
        msg = f"benchmark: shared has no {unknown[0]!r}; it has {', '.join(SHARED)}"
        raise ValueError(msg)
    return [
        Run(detector, data_set, seed, shared, accelerator, in_full=seed == seeds[0])
        for seed in seeds  # the first seed of all first, so that an interrupted benchmark has measured everything once
        for data_set in data
        for detector in detectors
    ]
