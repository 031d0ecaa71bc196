"""Results on disk: one JSON file per run, and tables made from these."""

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from rich.table import Table

from . import overview
from .rows import FORMAT, Row, write_json
from .standings import BESIDE, OVER_ALL, Standing, duels, plain, standings, table

PACKAGES = ("anomalib-csflow", "anomalib", "torch", "torchvision", "timm", "openvino")
TABLES = {  # the figures that a terminal and a README have room for; the page shows all
    "Accuracy": ("image_AUROC", "image_AP", "image_F1", "pixel_AUROC", "AUPRO", "pixel_F1", "AUPIMO"),
    "Calibrated verdict": ("recall_5", "false_alarms_5", "recall_1", "false_alarms_1"),
    "Cost": (
        "fit_s",
        "fit_cpu_s",
        "openvino_b1_p50_ms",
        "torch_b1_p50_ms",
        "file_mb",
        "fit_peak_mb",
        "inference_peak_mb",
    ),
}
TITLES = {"openvino_b1_p50_ms": "OpenVINO, ms", "torch_b1_p50_ms": "torch, ms", "file_mb": "file, MB"}


def versions() -> dict[str, str]:
    """Versions of the packages that figures depend on, of those that are installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(ModuleNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str:
    """The commit of the measured checkout, or an empty string."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine() -> str:
    """The processor, the number of its CPUs, and the system."""
    names = [line for line in _cpuinfo() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} CPUs, {platform.system()}"


def _cpuinfo() -> list[str]:
    """Lines of ``/proc/cpuinfo`` on Linux; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def read(path: Path) -> Row | None:
    """The result of a run, or None if there is none.

    Raises:
        ValueError: if it was written in another format or with other versions.
    """
    if not path.is_file():
        return None
    values = json.loads(path.read_text())
    remedy = "choose another --out, or move that folder away"
    if values.get("format") != FORMAT:
        msg = f"{path} is of format {values.get('format')!r}, but this version writes {FORMAT}: {remedy}"
        raise ValueError(msg)
    row, here = Row.parse(values), versions()
    other = [f"{name} {found}" for name, found in row.versions.items() if here.get(name) != found]
    if other:
        now = ", ".join(f"{entry.split()[0]} {here.get(entry.split()[0], 'is not installed')}" for entry in other)
        msg = f"{path} was measured with {', '.join(other)}, but here is {now}: do not mix their figures, {remedy}"
        raise ValueError(msg)
    return row


def save(rows: Sequence[Row], out: Path) -> list[Standing]:
    """Write ``results.json``, ``results.csv``, ``summary.csv`` and ``results.md``; returns the detectors' standings."""
    found = standings(rows, overview.summary(rows), out)
    about = {"format": FORMAT, "machine": {"processor": machine()}, "summary": plain(found)}
    write_json(out / "results.json", about | {"rows": [row.flat() for row in rows]})
    pd.json_normalize([row.flat() for row in rows], sep=".").to_csv(out / "results.csv", index=False)
    pd.json_normalize(plain(found), sep=".").to_csv(out / "summary.csv", index=False)
    (out / "results.md").write_text(markdown(rows, found))
    return found


def summary(rows: Sequence[Row], keys: Sequence[str]) -> pd.DataFrame:
    """Mean ± standard deviation over seeds, as text; one row per data set and detector, without failed runs."""
    figures = overview.summary(rows)
    table = []
    for data in overview.names(rows, "data"):
        for detector in (name for name in overview.names(rows, "detector") if (name, data) in figures):
            spreads = figures[detector, data]
            if "fit_s" not in spreads:  # all runs failed
                continue
            entry = {"data": data, "detector": detector, "seeds": str(len(spreads["fit_s"].values))}
            for key in keys:
                column = overview.BY_KEY[key]
                entry[TITLES.get(key, column.title)] = _cell(spreads[key], column) if key in spreads else overview.NONE
            table.append(entry)
    return pd.DataFrame(table)


def _cell(spread: overview.Spread, column: overview.Column) -> str:
    """Mean ± standard deviation."""
    mean, std = overview.written_spread(spread, column)
    return f"{mean} ± {std}" if std else mean


def remarks(rows: Sequence[Row]) -> list[str]:
    """Remarks for readers of the table: notes, failures, thresholds, machine, versions."""
    found: dict[str, None] = {}
    for row in rows:
        for note in row.notes:
            found[f"{row.detector}: {note}."] = None
    for row in rows:
        if not row.done:
            found[f"{row.detector} on {row.data}, seed {row.seed}, failed: {row.reason}"] = None
    for key in ("threshold", "machine", "commit"):
        for value in dict.fromkeys(getattr(row, key) for row in rows if getattr(row, key)):
            found[f"{key.capitalize()}: {value}."] = None
    for text in dict.fromkeys(", ".join(f"{k} {v}" for k, v in row.versions.items()) for row in rows):
        found[f"Versions: {text}."] = None
    return list(found)


def markdown(rows: Sequence[Row], found: Sequence[Standing]) -> str:
    """The tables over all data sets and for each, and the remarks, for a README."""
    frames = [table(found), duels(found), *(summary(rows, keys) for keys in TABLES.values())]
    tables = [_shown(frame).to_markdown(index=False, disable_numparse=True) for frame in frames if len(frame)]
    return "\n\n".join([*(tables or ["No run is done."]), "\n".join(f"- {line}" for line in remarks(rows))]) + "\n"


def _shown(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns that have any value."""
    return frame[[column for column in frame.columns if not (frame[column] == overview.NONE).all()]]


def terminal(rows: Sequence[Row], found: Sequence[Standing]) -> list[Table]:
    """Tables that fit into a terminal: accuracy on each data set, cost, and all sets together."""
    frames = {
        f"{title}: last epoch, mean ± standard deviation over seeds": summary(rows, keys)
        for title, keys in TABLES.items()
    }
    frames |= {OVER_ALL: table(found), BESIDE: duels(found)}
    tables = []
    for title, frame in frames.items():
        if len(frame):
            shown = _shown(frame)
            tables.append(Table(*shown.columns, title=title))
            for entry in shown.to_numpy():
                tables[-1].add_row(*entry)
    return tables
