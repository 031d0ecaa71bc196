"""``anomalib-csflow fit-all``: one fit for each part and seed, as jobs on this machine or a SLURM cluster.

The root has one folder per part. A part's good images are those in its folder ``train/good``, as in MVTec AD's layout,
else in ``good``, else in the part's folder itself; other images are not read.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from . import jobs
from .fit_job import Fit, prepare, work, write
from .recipe_files import recipe_path

COLUMNS = ("part", "seed", "images", "false alarms", "s", "checkpoint, or what was wrong")


def fit_all(
    recipe: str, root: Path, out: Path, seeds: Sequence[int] | None, cluster: jobs.Cluster, options: Sequence[str] = ()
) -> list[Fit]:
    """Fit a recipe to each part with each seed, unless the same fit has ended before.

    Args:
        recipe: a file, or the name of one of this package's recipes.
        root: a folder with a folder per part.
        out: folder of the results, which get a folder per part and seed.
        seeds: one fit of each part for each; by default the recipe's seed.
        cluster: where the fits run.
        options: more options of ``anomalib fit``.

    Returns:
        All fits, which know their results.

    Raises:
        FileNotFoundError: if there is no such recipe or folder.
        ValueError: if there is no part, ``out`` lies in ``root``, the recipe is of no detector, anomalib refuses an
            option, or another command is running in ``out``.
    """
    try:
        values = yaml.safe_load((Path(recipe) if Path(recipe).is_file() else recipe_path(recipe)).read_text())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        msg = f"the recipe {recipe} is not YAML: {' '.join(str(error).split())}"
        raise ValueError(msg) from error
    if not isinstance(values, dict) or "model" not in values:
        msg = f"the recipe {recipe} is of no detector: choose one with a model"
        raise ValueError(msg)
    if not root.is_dir():
        msg = f"there is no folder {root}"
        raise FileNotFoundError(msg)
    parts = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not parts or (root / "train" / "good").is_dir():
        msg = f"{root} needs a folder for each part, with its good images directly in it, in good or in train/good"
        raise ValueError(msg)
    if out.resolve().is_relative_to(root.resolve()):
        msg = f"the results would be among the images in {root}: choose an --out outside of it"
        raise ValueError(msg)
    seed = values.get("seed_everything")
    numbers = seeds or [seed if isinstance(seed, int) else 0]
    fits = {
        f"{part.name}/{number}": Fit(part.name, number, out / part.name / str(number))
        for number in numbers
        for part in parts
    }
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / "lock", blocking=False):
            calls = {
                name: [str(fit.folder.absolute())]
                for name, fit in fits.items()
                if _is_left(fit, root / fit.part, values, options)
            }
            _run(calls, fits, out, cluster)
    except Timeout as error:
        msg = f"another fit-all is running in {out.absolute()}: wait for its end, or choose another --out"
        raise ValueError(msg) from error
    return [*fits.values()]


def _is_left(fit: Fit, part: Path, recipe: dict[str, Any], options: Sequence[str]) -> bool:
    """Whether a fit is left to do; if it cannot be done, write the reason as its result."""
    try:
        is_left = not fit.is_done(prepare(fit, part, recipe, options))
    except ValueError as error:
        fit.folder.mkdir(parents=True, exist_ok=True)
        write(fit.folder / "result.json", {"status": "failed", "reason": str(error)})
        return False
    if is_left:
        (fit.folder / "result.json").unlink(missing_ok=True)
    return is_left


def _run(calls: dict[str, list[str]], fits: dict[str, Fit], out: Path, cluster: jobs.Cluster) -> None:
    """Run the fits that are left, and say how each ended."""
    console, count = Console(stderr=True, highlight=False), 0
    console.print(f"{len(calls)} of {len(fits)} fits to do", markup=False)
    for name, reason in jobs.run(calls, f"{work.__module__}:work", out / "jobs", cluster):
        if reason is None:
            continue
        count += 1
        fit = fits[name]
        if not fit.result:
            write(fit.folder / "result.json", {"status": "failed", "reason": reason or "its job left no result"})
        if fit.result["status"] == "refused":  # anomalib would refuse the same option in all other fits
            raise ValueError(fit.result["reason"])
        console.print(f"{count} of {len(calls)}: {' '.join(row(fit))}", markup=False, soft_wrap=True)


def row(fit: Fit) -> tuple[str, ...]:
    """A fit in the table."""
    found = fit.result
    number, images = str(fit.seed), str(found.get("images", ""))
    if found["status"] != "done":
        return fit.part, number, images, "", "", found["reason"]
    rate = "no threshold" if found["rate"] is None else f"{math.ceil(1000 * found['rate'] - 1e-6) / 10:g} %"
    return fit.part, number, images, rate, f"{found['s']:.0f}", str(fit.folder / "model.ckpt")


def main(arguments: Sequence[str]) -> None:
    """Parse the command line, fit, and print the table; the exit status is 1 if a fit failed."""
    parser = argparse.ArgumentParser(
        "anomalib-csflow fit-all",
        description="One fit for each part and seed. Other options are passed to anomalib's fit.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", required=True, help="a recipe: a file, or a name that recipe lists")
    parser.add_argument("--root", type=Path, required=True, help="a folder with a folder of good images for each part")
    parser.add_argument("--out", type=Path, default=Path("results/fit_all"), help="for the results")
    parser.add_argument("--seeds", type=int, nargs="+", help="one fit of each part for each; by default the recipe's")
    parser.add_argument("--jobs", type=int, default=1, help="number of fits at once")
    parser.add_argument("--cluster", choices=jobs.CLUSTERS, default=jobs.LOCAL, help="slurm: as arrays of SLURM jobs")
    parser.add_argument(
        "--cluster_options",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="submitit's parameters, such as timeout_min=60 cpus_per_task=4 slurm_partition=gpu",
    )
    given, options = parser.parse_known_args(arguments)
    for text in given.cluster_options:
        if "=" not in text:
            parser.error(f"a cluster option is NAME=VALUE, got {text}")
    named = {name: yaml.safe_load(value) for name, _, value in (text.partition("=") for text in given.cluster_options)}
    try:
        cluster = jobs.Cluster(given.cluster, given.jobs, named)
        fits = fit_all(given.config, given.root, given.out, given.seeds, cluster, options)
    except KeyboardInterrupt:
        sys.exit("stopped: the same command continues from here")
    table = Table(*COLUMNS)
    for fit in fits:
        table.add_row(*row(fit))
    Console(width=None if sys.stdout.isatty() else 200).print(table, markup=False)
    sys.exit(int(any(fit.result["status"] != "done" for fit in fits)))
