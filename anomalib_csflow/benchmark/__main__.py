"""``python -m anomalib_csflow.benchmark --config configs/benchmark.yaml``: detectors x data sets x seeds, in one table.

Each cell is measured in processes of its own and written when it is finished. The command, given again, goes on where
it stopped, and tries cells that failed once more.
"""

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from anomalib_csflow.benchmark import results
from anomalib_csflow.benchmark.run import config, plan
from anomalib_csflow.benchmark.run.pipeline import CellGenerator, CellRunner

SECONDS_PER_IMAGE = 0.05  # and epoch, for a detector that has not been measured here yet: one thread of a Xeon
SECONDS_PER_CELL = 90.0  # for starting, testing, exporting and timing


def check_extra() -> None:
    """Ask now for what the tables and the page at the end need.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    missing = [name for name in ("jinja2", "tabulate") if find_spec(name) is None]
    if missing:
        msg = f"the benchmark needs {' and '.join(missing)}: pip install 'anomalib-csflow[benchmark]'"
        raise ModuleNotFoundError(msg)


def count_images(cell: plan.Cell) -> int:
    """Good images that a data set has for training; fails where the data cannot be had."""
    data: AnomalibDataModule = plan.datamodule(cell)
    try:
        data.setup()
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        msg = f"data set {cell.data.name}: {error}; prepare it first, or leave it out of the benchmark"
        raise FileNotFoundError(msg) from error
    return len(data.train_data)


def estimate(cells: list[plan.Cell], done: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each cell by its slug: those of the same detector where one is done, a rough guess where none is."""
    images = {}
    for cell in cells:
        if cell.data.name not in images:
            images[cell.data.name] = count_images(cell)
    seconds = {}
    for cell in cells:
        rates = [
            row["fit_s"] / cell.detector.images_seen(row["train_images"])
            for row in done
            if row["detector"] == cell.detector.name and row["status"] == "done"
        ]
        rate = sum(rates) / len(rates) if rates else SECONDS_PER_IMAGE
        seconds[cell.slug] = SECONDS_PER_CELL + rate * cell.detector.images_seen(images[cell.data.name])
    return seconds


def run(
    detectors: list[dict[str, Any] | str],
    data: str | list[dict[str, Any] | str],
    seeds: list[int] = [0, 1],  # noqa: B006 (jsonargparse shows it as the default)
    shared: dict[str, Any] | None = None,
    accelerator: str = "auto",
    out: Path = Path("runs/benchmark"),
    jobs: int = 1,
    dry_run: bool = False,
) -> None:
    """Measure detectors on data sets and make tables and a page of it.

    Args:
        detectors: classes by name or import path, with init_args, name, epochs or steps, batch sizes, note; or recipes.
        data: folders in MVTec AD's layout, or of such; or datamodules by class_path with init_args and name.
        seeds: one cell for each.
        shared: backbone, weights, image_size and antialias, for all detectors that can take them.
        accelerator: as Lightning names it.
        out: folder of the results; cells that are finished there are not measured again.
        jobs: cells at once, each on a device of its own, or with its share of the processors.
        dry_run: list the cells with an estimate of their time and stop.
    """
    check_extra()
    console = Console()
    entries = data if isinstance(data, list) else [data]
    sets = [data_set for entry in entries for data_set in config.read_data(entry)]
    chosen = [config.read_detector(entry, Path()) for entry in detectors]
    cells = plan.cells(chosen, sets, seeds, shared or {}, accelerator)
    rows = {cell.slug: results.read(out / "cells" / cell.slug / "result.json") for cell in cells}
    done = {slug: row for slug, row in rows.items() if row is not None and row["status"] == "done"}
    seconds = estimate(cells, list(done.values()))
    left = [cell for cell in cells if cell.slug not in done]
    if dry_run:
        console.print(listing(cells, seconds, set(done)))
        total = sum(seconds[cell.slug] for cell in left) / jobs / 60
        console.print(f"{len(left)} of {len(cells)} cells to be measured, about {total:.0f} minutes")
        return
    out.mkdir(parents=True, exist_ok=True)
    fresh: list[dict[str, Any]] = []
    try:
        CellRunner(CellGenerator(left, out, jobs), seconds, console).run()
    finally:
        finished = [results.read(out / "cells" / cell.slug / "result.json") for cell in cells]
        fresh = [row for row in finished if row is not None]
        found = results.save(fresh, out)
    console.print(*results.terminal(fresh, found), sep="\n")
    console.print(*results.remarks(fresh), sep="\n", markup=False, highlight=False, soft_wrap=True)
    from anomalib_csflow.benchmark.page import report  # noqa: PLC0415 (what it needs was asked for above)

    page = report.write(out)
    console.print(f"\nTables: {out / 'results.md'}, {out / 'results.csv'}. Page: {page}", soft_wrap=True)


def listing(cells: list[plan.Cell], seconds: dict[str, float], done: set[str]) -> Table:
    """What a dry run shows."""
    table = Table("data", "detector", "seed", "epochs", "steps", "about, s", "state")
    for cell in cells:
        state = "done" if cell.slug in done else "to do"
        lengths = [str(length or "-") for length in (cell.detector.epochs, cell.detector.steps)]
        table.add_row(cell.data.name, cell.detector.name, str(cell.seed), *lengths, f"{seconds[cell.slug]:.0f}", state)
    return table


def main() -> None:
    """Parse the command line and run."""
    warnings.simplefilter("ignore")  # the libraries' own, which would bury the progress
    try:
        auto_cli(run, as_positional=False, prog="python -m anomalib_csflow.benchmark")
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on from here")


if __name__ == "__main__":
    main()
