"""``python -m anomalib_csflow.benchmark --config configs/benchmark.yaml``: detectors x data sets x seeds, in one table.

Each run is measured in its own processes and written when it is finished. The same command continues where it
stopped, and tries failed runs again.
"""

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from jsonargparse import ActionConfigFile, ArgumentParser
from rich.console import Console
from rich.table import Table

from anomalib_csflow.benchmark import results
from anomalib_csflow.benchmark.rows import Row
from anomalib_csflow.benchmark.run import config, execute, plan
from anomalib_csflow.jobs import LOCAL, Cluster

SECONDS_PER_IMAGE = 0.05  # and epoch, on one thread of a Xeon, for a detector that has not been measured here yet
SECONDS_PER_RUN = 90.0  # for starting, testing, exporting and timing


def check_extra() -> None:
    """Check now for the packages that the tables and the page need at the end.

    Raises:
        ModuleNotFoundError: if one is not installed.
    """
    missing = [name for name in ("jinja2", "submitit", "tabulate") if find_spec(name) is None]
    if missing:
        msg = f"the benchmark needs {' and '.join(missing)}: pip install 'anomalib-csflow[benchmark]'"
        raise ModuleNotFoundError(msg)


def count_images(runs: list[plan.Run]) -> tuple[dict[str, int], dict[str, str]]:
    """Number of good training images of each data set, and what is wrong with data sets that cannot be read.

    Raises:
        ValueError: if none can be read.
    """
    images, broken = {}, {run.data.name: run.data.error for run in runs if run.data.error}
    for run in {run.data.name: run for run in runs}.values():
        name = run.data.name
        if name not in broken:
            try:
                data = plan.datamodule(run)
                data.setup()
                images[name] = len(data.train_data)
            except Exception as error:  # whatever a datamodule raises, continue with the other data sets
                broken[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    if not images:
        msg = "; ".join(f"data set {name}: {problem}" for name, problem in broken.items())
        raise ValueError(msg)
    return images, broken


def estimate(runs: list[plan.Run], images: dict[str, int], done: list[Row]) -> dict[str, float]:
    """Estimated seconds of each run, by its slug: from finished runs of the same detector, or else a rough guess."""
    seconds = {}
    for run in runs:
        rates = [
            float(row.figures["fit_s"] or 0) / run.detector.images_seen(row.train_images or 1)
            for row in done
            if row.detector == run.detector.name
        ]
        rate = sum(rates) / len(rates) if rates else SECONDS_PER_IMAGE
        known = images.get(run.data.name)
        seconds[run.slug] = 1.0 if known is None else SECONDS_PER_RUN + rate * run.detector.images_seen(known)
    return seconds


def benchmark(
    detectors: list[dict[str, Any] | str],
    data: str | list[dict[str, Any] | str],
    seeds: list[int] = [0, 1],  # noqa: B006 (jsonargparse shows it as the default)
    shared: dict[str, Any] | None = None,
    accelerator: str = "auto",
    out: Path = Path("runs/benchmark"),
    jobs: int = 1,
    cluster: str = LOCAL,
    cluster_options: dict[str, Any] | None = None,
    *,
    dry_run: bool = False,
) -> None:
    """Measure detectors on data sets, and make tables and a page from the results.

    Args:
        detectors: classes by name or import path, with init_args, name, epochs or steps, batch sizes, note; or recipes.
        data: folders in MVTec AD's layout, or folders of such; or datamodules by class_path with init_args and name.
        seeds: one run for each.
        shared: backbone, weights, image_size and antialias, for all detectors that can take them.
        accelerator: Lightning's name for it.
        out: folder of the results; runs that are finished there are not measured again.
        jobs: number of runs at once, each on its own device, or with its share of the processors.
        cluster: ``local``, or ``slurm`` for arrays of SLURM jobs; this command waits for them.
        cluster_options: parameters of submitit, such as timeout_min, cpus_per_task, slurm_partition.
        dry_run: list the runs with an estimate of their time and stop.
    """
    check_extra()
    place = Cluster(cluster, jobs, cluster_options or {})
    console = Console()
    entries = data if isinstance(data, list) else [data]
    sets = [data_set for entry in entries for data_set in config.read_data(entry)]
    chosen = [config.read_detector(entry, Path()) for entry in detectors]
    runs = plan.runs(chosen, sets, seeds, shared or {}, accelerator)
    done = {row.run: row for row in read(runs, out) if row.done}
    images, broken = count_images(runs)
    seconds = estimate(runs, images, list(done.values()))
    left = [run for run in runs if run.slug not in done]
    for name, problem in broken.items():
        console.print(f"data set {name} cannot be used: {problem}", markup=False, highlight=False, soft_wrap=True)
    if dry_run:
        console.print(listing(runs, seconds, set(done)))
        total = sum(seconds[run.slug] for run in left) / jobs / 60
        console.print(f"{len(left)} of {len(runs)} runs to be measured, about {total:.0f} minutes")
        return
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / "lock", blocking=False):  # the system releases it, however this process ends
            rows = measure(left, runs, out, seconds, broken, console, place)
    except Timeout as error:
        msg = f"another benchmark is running in {out.absolute()}: wait for its end, or choose another --out"
        raise ValueError(msg) from error
    console.print(*results.remarks(rows), sep="\n", markup=False, highlight=False, soft_wrap=True)
    from anomalib_csflow.benchmark.page import report  # noqa: PLC0415 (its packages were checked above)

    page = report.write(out)
    console.print(f"\nTables: {out / 'results.md'}, {out / 'results.csv'}. Page: {page}", soft_wrap=True)


def read(runs: list[plan.Run], out: Path) -> list[Row]:
    """The rows of all runs that ended, failed ones included."""
    found = [results.read(out / "runs" / run.slug / "result.json") for run in runs]
    return [row for row in found if row is not None]


def measure(
    left: list[plan.Run],
    runs: list[plan.Run],
    out: Path,
    seconds: dict[str, float],
    broken: dict[str, str],
    console: Console,
    cluster: Cluster,
) -> list[Row]:
    """Measure the remaining runs and write the tables of all, also if it is interrupted; returns the rows."""
    try:
        execute.measure_all(left, out, seconds, broken, console, cluster)
    finally:
        rows = read(runs, out)
        found = results.save(rows, out)
    console.print(*results.terminal(rows, found), sep="\n")
    return rows


def listing(runs: list[plan.Run], seconds: dict[str, float], done: set[str]) -> Table:
    """The table that a dry run shows."""
    table = Table("data", "detector", "seed", "epochs", "steps", "about, s", "state")
    for run in runs:
        state = "done" if run.slug in done else "to do"
        steps = run.detector.steps or run.detector.init_args.get("max_steps")
        lengths = [str(length or "-") for length in (run.detector.epochs, steps)]
        table.add_row(run.data.name, run.detector.name, str(run.seed), *lengths, f"{seconds[run.slug]:.0f}", state)
    return table


def main() -> None:
    """Parse the command line and run."""
    warnings.simplefilter("ignore")  # warnings of libraries, which would hide the progress
    parser = ArgumentParser(
        prog="python -m anomalib_csflow.benchmark", description=(benchmark.__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file with any of these options")
    parser.add_function_arguments(benchmark, skip={"dry_run"})
    parser.add_argument("--dry_run", action="store_true", help="list the runs with an estimate of their time and stop")
    arguments = parser.instantiate_classes(parser.parse_args()).as_dict()
    arguments.pop("config")
    try:
        benchmark(**arguments)
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        sys.exit(str(error))
    except OSError as error:
        place = f"{error.filename or arguments['out']} ({error.strerror or error})"
        sys.exit(f"the benchmark cannot write {place}: free some space, then the same command continues from here")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command continues from here")


if __name__ == "__main__":
    main()
