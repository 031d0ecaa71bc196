"""Measure runs as jobs, showing progress and remaining time."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from anomalib_csflow import jobs
from anomalib_csflow.benchmark import results
from anomalib_csflow.benchmark.rows import Row

from . import job
from .plan import Run

PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}


def measure_all(
    runs: Sequence[Run],
    out: Path,
    seconds: Mapping[str, float],
    broken: Mapping[str, str],
    console: Console,
    cluster: jobs.Cluster | None = None,
) -> None:
    """Measure runs and write their rows; a failed run has a row too, and the others continue.

    Args:
        runs: what to measure.
        out: the folder of the benchmark.
        seconds: estimated seconds of each run, by its slug.
        broken: what is wrong with data sets, by name: their runs fail without being started.
        console: where progress is shown.
        cluster: where the runs' jobs run; by default here, one after the other.
    """
    by_slug = {run.slug: run for run in runs}
    calls: dict[str, list[str]] = {}
    for run in runs:
        folder = out / "runs" / run.slug
        folder.mkdir(parents=True, exist_ok=True)
        run.save(folder / "run.json")
        (folder / "result.json").unlink(missing_ok=True)  # of an attempt that failed
        if run.data.name in broken:
            console.print(_said(job.fail(folder, broken[run.data.name])), **PLAIN)
        else:
            calls[run.slug] = [str(folder.absolute())]
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        whole = progress.add_task("", total=sum(seconds[slug] for slug in calls), left="")
        start, count, tasks = time.perf_counter(), 0, {}
        for slug, reason in jobs.run(calls, f"{job.__name__}:measure", out / "jobs", cluster or jobs.Cluster()):
            run = by_slug[slug]
            if reason is None:
                name = f"  {run.data.name}, {run.detector.name}, seed {run.seed}"
                tasks[slug] = progress.add_task(name, total=None, left="")
                continue
            progress.remove_task(tasks[slug])
            progress.advance(whole, seconds[slug])
            count += 1
            done, total = progress.tasks[0].completed, progress.tasks[0].total or 0
            left = f"about {(total - done) * (time.perf_counter() - start) / done / 60:.0f} min left"
            progress.update(whole, description=f"{count} of {len(calls)} runs", left=left)
            folder = out / "runs" / slug
            row = results.read(folder / "result.json") or job.fail(folder, reason or "its job left no result")
            console.print(_said(row), **PLAIN)


def _said(row: Row) -> str:
    """The outcome of a run in one line."""
    result = f"failed: {row.reason}" if not row.done else f"image AUROC {row.figures['image_AUROC']:.3f}"
    return f"{row.data}, {row.detector}, seed {row.seed}: {result}, {row.run_s or 0:.0f} s"
