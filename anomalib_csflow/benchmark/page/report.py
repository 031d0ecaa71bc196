"""The benchmark's page: one HTML file that opens from disk, without a network.

``python -m anomalib_csflow.benchmark.page.report OUT`` writes OUT/report.html again, from a benchmark's results in OUT.
"""

import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from anomalib_csflow.benchmark import overview, standings
from anomalib_csflow.benchmark.rows import FORMAT, Row

from . import comparisons, drawing, pictures, sections


def read(out: Path) -> tuple[list[Row], dict[str, Any]]:
    """The benchmark's rows, and what is known about its machine.

    Raises:
        FileNotFoundError: if there are none in that folder.
        ValueError: if they are of another format.
    """
    path = out / "results.json"
    if not path.is_file():
        msg = f"no results.json in {out.absolute()}: run `python -m anomalib_csflow.benchmark --out {out}` first"
        raise FileNotFoundError(msg)
    results = json.loads(path.read_text(encoding="utf-8"))
    found = results.get("format") if isinstance(results, dict) else None
    if found != FORMAT:
        msg = (
            f"{path} has format {found!r}, but this version reads format {FORMAT}: "
            "run the benchmark again, or install the version that wrote it"
        )
        raise ValueError(msg)
    return [Row.parse(row) for row in results["rows"]], results.get("machine") or {}


def run_folders(out: Path, rows: list[Row]) -> dict[tuple[str, str, int], Path]:
    """Folders of the runs, by detector, data and seed."""
    return {(row.detector, row.data, row.seed): out / "runs" / row.run for row in rows}


def curves(rows: list[Row], folders: dict[tuple[str, str, int], Path]) -> dict[tuple[str, str, str], list[Any]]:
    """Curves of every seed, by kind (roc, pro), data and detector."""
    found: dict[tuple[str, str, str], list[Any]] = {}
    for row in rows:
        path = folders.get((row.detector, row.data, row.seed), Path()) / "curves.npz"
        if row.done and path.is_file():
            with np.load(path) as arrays:
                for kind in ("roc", "pro"):
                    if kind in arrays and arrays[kind].shape[1] > 1:
                        found.setdefault((kind, row.data, row.detector), []).append(arrays[kind])
    return found


def write(out: Path) -> Path:
    """Write OUT/report.html from OUT's results, curves, maps and samples.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: if there are no results.
        ValueError: if they are of another format.
    """
    rows, machine = read(out)
    folders = run_folders(out, rows)
    detectors = overview.names(rows, "detector")
    data_sets = overview.names(rows, "data")
    styles = {name: drawing.Style(number) for number, name in enumerate(detectors)}
    figures = overview.summary(rows)
    page = files("anomalib_csflow.benchmark.page")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string((page / "template.html").read_text(encoding="utf-8"))
    text = template.render(
        css=(page / "page.css").read_text(encoding="utf-8"),
        script=(page / "page.js").read_text(encoding="utf-8"),
        detectors=detectors,
        data_sets=data_sets,
        swatches={name: drawing.swatch(style) for name, style in styles.items()},
        facts=sections.facts(rows, machine),
        settings=sections.settings(rows),
        glance=sections.glance(figures, data_sets),
        standings=sections.frames(standings.standings(rows, figures, out)),
        table=sections.table(rows, figures),
        metrics=overview.metrics(figures),
        trades=comparisons.trades(figures, styles, data_sets),
        bars=comparisons.bars(figures, data_sets),
        curves=comparisons.curve_charts(curves(rows, folders), figures, styles, data_sets),
        galleries=[pictures.gallery(out, data, rows, folders) for data in data_sets],
        many_seeds=any(spread.std is not None for own in figures.values() for spread in own.values()),
    )
    target = out / "report.html"
    part = target.with_suffix(".part")  # a reader never sees half a page
    part.write_text(text, encoding="utf-8")
    part.replace(target)
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the folder of a benchmark: python -m anomalib_csflow.benchmark.page.report OUT")
    write(Path(sys.argv[1]))
