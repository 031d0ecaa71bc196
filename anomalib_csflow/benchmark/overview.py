"""From the rows of a benchmark to the figures of its page: mean and spread over seeds, the best, the Pareto front."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from .rows import Row


@dataclass(frozen=True)
class Column:
    """A measured quantity.

    Args:
        key: its name in a row.
        title: its name for readers, with the unit.
        group: its topic.
        higher: True if higher is better.
        digits: number of decimals; None for three significant digits.
        scale: factor for a row's value.
    """

    key: str
    title: str
    group: str
    higher: bool = False
    digits: int | None = None
    scale: float = 1.0


METRICS = tuple(
    Column(key, key.replace("_", " "), "Accuracy", higher=True, digits=3)
    for key in ("image_AUROC", "AUPRO", "pixel_AUROC", "AUPIMO", "image_AP", "image_F1", "pixel_F1")
)
VERDICTS = tuple(
    column
    for percent in (5, 1)
    for column in (
        Column(f"recall_{percent}", f"defects found at {percent} %", "Calibrated verdict", higher=True, digits=3),
        Column(f"false_alarms_{percent}", f"false alarms at {percent} %", "Calibrated verdict", digits=3),
    )
)
COSTS = (
    Column("fit_s", "fit, s", "Cost"),
    Column("fit_cpu_s", "fit, CPU s", "Cost"),
    Column("fit_peak_mb", "fit peak, MB", "Cost"),
    Column("fit_device_mb", "fit on device, MB", "Cost"),
    Column("inference_peak_mb", "inference peak, MB", "Cost"),
    Column("inference_device_mb", "inference on device, MB", "Cost"),
    Column("parameters", "trained parameters, M", "Cost", scale=1e-6),
    Column("file_mb", "OpenVINO file, MB", "Cost"),
    Column("export_s", "export, s", "Cost"),
    Column("compile_s", "compile, s", "Cost"),
)
SPEEDS = tuple(
    Column(f"{engine.lower()}_b{batch}_{key}", f"batch {batch}: {title}", engine, higher=key == "per_s")
    for engine in ("OpenVINO", "torch")
    for batch in (1, 8)
    for key, title in (("p50_ms", "median, ms"), ("p95_ms", "95 %, ms"), ("per_s", "images/s"))
)
COLUMNS = METRICS + VERDICTS + COSTS + SPEEDS
BY_KEY = {column.key: column for column in COLUMNS}
NONE = "\N{EN DASH}"  # shown for values that were not measured


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None for one seed) and single values of one quantity."""

    mean: float
    std: float | None
    values: tuple[float, ...]


Figures = Mapping[tuple[str, str], Mapping[str, Spread]]
"""Figures for each (detector, data), by key."""


def written(value: float, digits: int | None) -> str:
    """A number as text, with the given decimals, or with three significant digits.

    >>> written(0.97812, 3), written(1234.5, None), written(0.01234, None), written(0.0, None)
    ('0.978', '1,234', '0.0123', '0.00')
    """
    if digits is None:
        digits = min(max(2 - math.floor(math.log10(abs(value))), 0), 6) if value else 2
    return f"{value:,.{digits}f}"


def written_spread(spread: Spread, column: Column) -> tuple[str, str]:
    """Mean and standard deviation with the same decimals; the latter is empty for one seed.

    >>> written_spread(Spread(12.34, 0.567, ()), COSTS[0])
    ('12.3', '0.6')
    """
    mean = written(spread.mean, column.digits)
    decimals = len(mean.partition(".")[2])
    return mean, "" if spread.std is None else f"{spread.std:,.{decimals}f}"


def names(rows: Iterable[Row], key: str) -> list[str]:
    """Distinct values, in the order of the rows."""
    return list(dict.fromkeys(str(getattr(row, key)) for row in rows))


def summary(rows: Sequence[Row]) -> Figures:
    """Spread over seeds for each (detector, data), from finished runs, without quantities that were not measured."""
    done = [row for row in rows if row.done]
    if not done:
        return {}
    frame = pd.DataFrame([row.flat() for row in done])
    keys = [column.key for column in COLUMNS if column.key in frame]
    frame[keys] = frame[keys].apply(pd.to_numeric) * [column.scale for column in COLUMNS if column.key in keys]
    figures: dict[tuple[str, str], dict[str, Spread]] = {}
    for (detector, data), group in frame.groupby(["detector", "data"], sort=False):
        found = {key: group[key].dropna() for key in keys}
        figures[detector, data] = {
            key: Spread(
                float(values.mean()), float(values.std()) if len(values) > 1 else None, tuple(map(float, values))
            )
            for key, values in found.items()
            if len(values)
        }
    return figures


def failures(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, list[str]]]:
    """For each (detector, data): reasons, and the seeds that failed with them."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        if not row.done:
            reasons = found.setdefault((row.detector, row.data), {})
            reasons.setdefault(row.reason or "no reason was written", []).append(str(row.seed))
    return found


def measured(figures: Figures, columns: Iterable[Column]) -> list[Column]:
    """The columns that at least one detector has."""
    return [column for column in columns if any(column.key in own for own in figures.values())]


def metrics(figures: Figures) -> list[Column]:
    """The metrics that readers can choose."""
    return measured(figures, METRICS)


def best(figures: Figures, data: str, column: Column) -> set[str]:
    """Detectors with the best mean on one data set, after rounding; empty if there is nothing to compare."""
    means = {
        detector: own[column.key].mean for (detector, of), own in figures.items() if of == data and column.key in own
    }
    if len(means) < 2:
        return set()
    top = written((max if column.higher else min)(means.values()), column.digits)
    return {detector for detector, mean in means.items() if written(mean, column.digits) == top}


def pareto(costs: Sequence[float], gains: Sequence[float]) -> list[bool]:
    """Which points no other point beats, by costing no more, gaining no less, and differing in one of the two.

    >>> pareto([1, 2, 3, 3], [0.5, 0.9, 0.8, 0.95])
    [True, True, False, True]
    """
    points = list(zip(costs, gains, strict=True))
    return [not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points) for cost, gain in points]
