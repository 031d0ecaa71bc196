"""Contents of the head and the tables of the benchmark's page: plain values for the template."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from anomalib_csflow.benchmark import overview, standings
from anomalib_csflow.benchmark.overview import Figures
from anomalib_csflow.benchmark.rows import Row

HEADLINES = {
    "image_AUROC": "highest image AUROC",
    "AUPRO": "highest AUPRO",
    "openvino_b1_p50_ms": "fastest with OpenVINO, ms per image",
    "fit_s": "fastest fit, s",
}


def written(value: Any) -> str:
    """A setting as text: sizes as 256 x 256, mappings as name value, lists with commas.

    >>> written([256, 320]), written({"torch": "2.15", "timm": "1.0"}), written(["a", "b"])
    ('256 \N{MULTIPLICATION SIGN} 320', 'torch 2.15, timm 1.0', 'a, b')
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {written(item)}" for key, item in value.items())
    if isinstance(value, list):
        numbers = len(value) == 2 and all(isinstance(item, int) for item in value)
        return (" \N{MULTIPLICATION SIGN} " if numbers else ", ").join(written(item) for item in value)
    return str(value)


def distinct(rows: Iterable[Row], key: str) -> list[str]:
    """Distinct values of a key in the rows, as text, without empty ones."""
    found = (getattr(row, key) for row in rows)
    return list(dict.fromkeys(written(value) for value in found if value not in (None, "", [], {})))


def facts(rows: Sequence[Row], machine: Mapping[str, Any]) -> dict[str, list[str]]:
    """The head: lines for each title; empty titles are left out."""
    done = [row for row in rows if row.done]
    data = []
    for name in overview.names(rows, "data"):
        row = next((row for row in done if row.data == name), None)
        counts = [row and row.train_images, row and row.test_good, row and row.test_defective]
        text = "{} good images to train on, {} good and {} defective ones to test".format(*counts)
        data.append(f"{name}: {text if None not in counts else 'nothing was measured on it'}")
    finished = sorted(distinct(rows, "finished"))
    places = list(dict.fromkeys(f"{r.machine}; threads: {r.threads}; device: {r.device}" for r in done))
    found = {
        "Data": data,
        "Seeds": [", ".join(sorted(overview.names(rows, "seed"), key=int))],
        "Machine": places or [f"{key.replace('_', ' ')}: {written(machine[key])}" for key in machine],
        "Versions": distinct(rows, "versions"),
        "Commit": distinct(rows, "commit"),
        "Finished": [finished[0] if len(set(finished)) == 1 else f"{finished[0]} to {finished[-1]}"]
        if finished
        else [],
        "Thresholds of F1": distinct(rows, "threshold"),
        "Not the same for all": notes(rows),
    }
    return {title: lines for title, lines in found.items() if lines}


def notes(rows: Sequence[Row]) -> list[str]:
    """What is not the same for all: each note once, with the detectors and data sets that it applies to."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for note in row.notes:
            of = found.setdefault(note, {}).setdefault(row.detector, [])
            if row.data not in of:
                of.append(row.data)
    ran = {
        name: overview.names((r for r in rows if r.detector == name), "data")
        for name in overview.names(rows, "detector")
    }
    lines = []
    for note, detectors in found.items():
        groups: dict[str, list[str]] = {}
        for detector, of in detectors.items():
            groups.setdefault("" if of == ran[detector] else f" on {', '.join(of)}", []).append(detector)
        lines += [f"{', '.join(who)}{where}: {note}" for where, who in groups.items()]
    return lines


def settings(rows: Sequence[Row]) -> list[dict[str, str]]:
    """How each detector was run."""
    keys = ("class_path", "backbone", "weights", "image_size", "epochs", "steps")
    return [
        {"detector": name}
        | {
            key: " / ".join(distinct((row for row in rows if row.detector == name), key)) or overview.NONE
            for key in keys
        }
        for name in overview.names(rows, "detector")
    ]


def glance(figures: Figures, data_sets: Sequence[str]) -> list[dict[str, Any]]:
    """The best detectors on each data set in the main figures."""
    found = []
    for data in data_sets:
        lines = []
        for key, title in HEADLINES.items():
            column = overview.BY_KEY[key]
            winners = overview.best(figures, data, column)
            if winners:
                first = next(detector for (detector, of) in figures if of == data and detector in winners)
                mean, _ = overview.written_spread(figures[first, data][key], column)
                lines.append({"title": title, "value": mean, "who": ", ".join(sorted(winners))})
        if lines:
            found.append({"data": data, "lines": lines})
    return found


def frames(found: Sequence[standings.Standing]) -> list[dict[str, Any]]:
    """The tables over all data sets; without the comparison if there is no PatchCore."""
    both = {standings.OVER_ALL: standings.table(found), standings.BESIDE: standings.duels(found)}
    return [
        {"title": title, "columns": list(frame.columns), "rows": frame.to_numpy().tolist()}
        for title, frame in both.items()
        if len(frame)
    ]


def table(rows: Sequence[Row], figures: Figures) -> dict[str, Any]:
    """Columns, groups and rows of the summary: first finished runs, by data and accuracy, then failed ones."""
    columns = overview.measured(figures, overview.COLUMNS)
    groups: dict[str, int] = {}
    for column in columns:
        groups[column.group] = groups.get(column.group, 0) + 1
    winners = {(data, c.key): overview.best(figures, data, c) for data in overview.names(rows, "data") for c in columns}
    data_order = overview.names(rows, "data")
    lines = []
    for (detector, data), spreads in figures.items():
        seeds = [row for row in rows if (row.detector, row.data) == (detector, data)]
        done = sum(row.done for row in seeds)
        texts = [overview.written_spread(spreads[c.key], c) if c.key in spreads else None for c in columns]
        values = {key: spread.mean for key, spread in spreads.items()}
        entry = {
            "detector": detector,
            "data": data,
            "seeds": str(done) if done == len(seeds) else f"{done} of {len(seeds)}",
            "reason": "",
            "values": json.dumps(values | {"detector": detector, "data": data, "seeds": done}),
            "cells": [
                {"column": c, "text": text, "best": detector in winners[data, c.key]}
                for c, text in zip(columns, texts, strict=True)
            ],
        }
        lines.append((data_order.index(data), -values.get("image_AUROC", 0.0), entry))
    failed = [
        {
            "detector": detector,
            "data": data,
            "seeds": ", ".join(seeds),
            "reason": reason,
            "values": json.dumps({"detector": detector, "data": data, "seeds": 0}),
        }
        for (detector, data), reasons in overview.failures(rows).items()
        for reason, seeds in reasons.items()
    ]
    ordered = [entry for *_, entry in sorted(lines, key=lambda line: line[:2])]
    return {"columns": columns, "groups": groups, "rows": ordered + failed}
