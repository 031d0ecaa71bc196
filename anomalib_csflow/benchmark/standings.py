"""Detectors over all data sets: mean and worst accuracy, and image AUROC beside the better PatchCore on each set."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from . import overview
from .overview import Figures
from .rows import Row

KEYS = ("image_AUROC", "pixel_AUROC", "AUPRO")
RESAMPLES = 5000
OVER_ALL = "All data sets: mean over sets of the mean over seeds, and the worst set"
BESIDE = "Image AUROC minus that of the better PatchCore on each set, with 95 % intervals over test images"
Pairs = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """Image AUROC minus that of the better PatchCore on a data set, with its 95 % interval over test images."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class Standing:
    """A detector over all data sets.

    Args:
        detector: its name.
        sets: number of sets that it was measured on.
        of: number of all sets.
        means: by key, the mean over the sets of the mean over seeds.
        worsts: by key, the lowest mean over seeds, and its set.
        differences: by set, if there are scores of a PatchCore and of this detector.
    """

    detector: str
    sets: int
    of: int
    means: dict[str, float]
    worsts: dict[str, tuple[float, str]]
    differences: dict[str, Difference]

    @property
    def counted(self) -> str:
        """Number of sets that it was measured on, and of all sets if some are missing."""
        return str(self.sets) if self.sets == self.of else f"{self.sets} of {self.of}"

    @property
    def duel(self) -> str:
        """Sets won and lost, and in parentheses those whose 95 % interval leaves out 0."""
        found = self.differences.values()
        won, lost = [d for d in found if d.value > 0], [d for d in found if d.value < 0]
        sure = sum(d.low > 0 for d in won), sum(d.high < 0 for d in lost)
        return f"{len(won)} : {len(lost)} ({sure[0]} : {sure[1]})" if self.differences else overview.NONE


def pairs(path: Path) -> tuple[Pairs, list[str]] | None:
    """Which pairs of a defective and a good image a run ranks correctly (ties: one half); their mean is the AUROC.

    Returns:
        (defective, good), and the paths of the images; None if the run has no scores.
    """
    if not path.is_file():
        return None
    with np.load(path) as kept:
        scores, labels, paths = kept["scores"], kept["labels"], kept["paths"].tolist()
    above = scores[labels][:, None] - scores[~labels]
    return (np.sign(above) + 1) / 2, paths


def mean_pairs(rows: Sequence[Row], out: Path) -> dict[tuple[str, str], Pairs]:
    """Mean over seeds for each (detector, data), from runs that were tested on the same images of that data set."""
    found: dict[tuple[str, str], list[Pairs]] = {}
    images: dict[str, list[str]] = {}
    for row in rows:
        ranked = pairs(out / "runs" / row.run / "scores.npz") if row.done else None
        if ranked and ranked[1] == images.setdefault(row.data, ranked[1]):
            found.setdefault((row.detector, row.data), []).append(ranked[0])
    return {key: np.mean(of_seeds, axis=0) for key, of_seeds in found.items()}


def difference(ours: Pairs, theirs: Pairs) -> Difference:
    """Paired bootstrap: the same defective and good images are drawn for both."""
    generator = np.random.default_rng(0)
    gain = ours - theirs
    defective, good = (generator.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n for n in gain.shape)
    low, high = np.quantile(((defective @ gain) * good).sum(1), (0.025, 0.975))
    return Difference(float(gain.mean()), float(low), float(high))


def standings(rows: Sequence[Row], figures: Figures, out: Path) -> list[Standing]:
    """All measured detectors, the best mean image AUROC first.

    Args:
        rows: of the runs.
        figures: their summary.
        out: the folder of the benchmark, with the runs' scores.
    """
    ranked = mean_pairs(rows, out)
    references = {row.detector for row in rows if row.class_path.rpartition(".")[2].lower() == "patchcore"}
    sets = overview.names(rows, "data")
    better: dict[str, str] = {}
    for data in sets:
        known = [name for name in sorted(references) if (name, data) in ranked]
        if known:
            better[data] = max(known, key=lambda name: ranked[name, data].mean())
    found = []
    for detector in overview.names(rows, "detector"):
        own = {data: figures[detector, data] for data in sets if (detector, data) in figures}
        measured = {key: {data: spreads[key].mean for data, spreads in own.items() if key in spreads} for key in KEYS}
        measured = {key: values for key, values in measured.items() if values}
        means = {key: sum(values.values()) / len(values) for key, values in measured.items()}
        worsts = {key: min((value, data) for data, value in values.items()) for key, values in measured.items()}
        differences = {
            data: difference(ranked[detector, data], ranked[reference, data])
            for data, reference in better.items()
            if (detector, data) in ranked and detector not in references
        }
        if own:
            found.append(Standing(detector, len(own), len(sets), means, worsts, differences))
    return sorted(found, key=lambda standing: -standing.means.get("image_AUROC", 0.0))


def table(found: Sequence[Standing]) -> pd.DataFrame:
    """Mean and worst of each detector, as text."""
    lines = []
    for standing in found:
        line = {"detector": standing.detector, "sets": standing.counted}
        for key in KEYS:
            title = overview.BY_KEY[key].title
            mean, (worst, where) = standing.means.get(key), standing.worsts.get(key, (None, ""))
            line[f"{title}, mean"] = overview.NONE if mean is None else f"{mean:.3f}"
            line[f"{title}, worst"] = overview.NONE if worst is None else f"{worst:.3f} {where}"
        lines.append(line | {"won : lost to PatchCore": standing.duel})
    return pd.DataFrame(lines)


def duels(found: Sequence[Standing]) -> pd.DataFrame:
    """The difference from the better PatchCore on each set, as text; empty if there is no PatchCore."""
    sets = list(dict.fromkeys(data for standing in found for data in standing.differences))
    return pd.DataFrame(
        {"detector": standing.detector} | {data: str(standing.differences.get(data, overview.NONE)) for data in sets}
        for standing in found
        if standing.differences
    )


def plain(found: Sequence[Standing]) -> list[dict[str, Any]]:
    """Plain values, for JSON and CSV."""
    return [asdict(standing) for standing in found]
