"""``anomalib-csflow fit-all``: one fit for each part and seed, as jobs on this machine or a SLURM cluster.

A folder has one folder per part. A part's good images are those in its folder ``train/good``, as in MVTec AD's layout,
else in ``good``, else in the part's folder itself; other images are not read.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from PIL import Image
from rich.console import Console
from rich.table import Table

from . import jobs
from .recipe_files import recipe_path

GOOD = ("train/good", "good", ".")
SIZES = ("train_batch_size", "eval_batch_size", "num_workers")
COLUMNS = ("part", "seed", "images", "false alarms", "s", "checkpoint, or what was wrong")


@dataclass(frozen=True)
class Fit:
    """One fit, which has a folder of its own for all that it leaves.

    Args:
        part: name of the part.
        seed: of the random numbers.
        folder: of its results: ``recipe.yaml``, ``model.ckpt``, ``result.json``, ``log.txt`` and anomalib's own folder.
    """

    part: str
    seed: int
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        """What the fit left; empty if it has not ended."""
        path = self.folder / "result.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def is_done(self, settings: str) -> bool:
        """Whether a fit with these settings has ended well, and its checkpoint is as it was written."""
        checkpoint, found = self.folder / "model.ckpt", self.result
        is_ended = found.get("status") == "done" and found["settings"] == settings and checkpoint.is_file()
        return is_ended and found["digest"] == digest(checkpoint)


def good_images(part: Path) -> tuple[Path, list[Path]]:
    """The folder of a part's good images, and these.

    Raises:
        ValueError: if there are none, or others may be among them.
    """
    for name in GOOD:
        folder = part / name
        files = sorted(_images(folder)) if folder.is_dir() else []
        if files and name == "." and any(file.parent != folder for file in files):
            msg = f"it is not clear which images of {part} are good: put these into a folder {part / 'good'}"
            raise ValueError(msg)
        if files:
            return folder, files
    msg = f"there are no images in {part}, {part / 'good'} or {part / 'train/good'}"
    raise ValueError(msg)


def _images(folder: Path) -> Iterator[Path]:
    suffixes = Image.registered_extensions()
    for path, _, names in os.walk(folder, followlinks=True):
        yield from (Path(path) / name for name in names if Path(name).suffix.lower() in suffixes)


def digest(file: Path) -> str:
    """Of a file's content."""
    found = hashlib.blake2b(digest_size=16)
    with file.open("rb") as content:
        while block := content.read(2**20):
            found.update(block)
    return found.hexdigest()


def prepare(fit: Fit, part: Path, recipe: dict[str, Any], options: Sequence[str]) -> str:
    """Write a fit's own recipe and options; returns the digest of all that it depends on.

    Raises:
        ValueError: see :func:`good_images`.
    """
    folder, files = good_images(part)
    given = recipe.get("data") or {}
    old = given.get("init_args") or {}
    is_folder = given.get("class_path", "").endswith(".Folder")
    kept = {name: value for name, value in old.items() if is_folder or name in SIZES}
    kept = {name: value for name, value in kept.items() if not name.endswith("_dir")}
    data = {"name": fit.part, "root": str(folder.absolute()), "normal_dir": "."}
    own = recipe | {
        "seed_everything": fit.seed,
        "data": {"class_path": "anomalib.data.Folder", "init_args": kept | data},
        "trainer": {"enable_progress_bar": False} | recipe.get("trainer", {}),
        "default_root_dir": str(fit.folder.absolute()),
    }
    times = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    settings = hashlib.blake2b(json.dumps([own, [*options], times]).encode(), digest_size=16).hexdigest()
    if not fit.is_done(settings):
        fit.folder.mkdir(parents=True, exist_ok=True)
        (fit.folder / "recipe.yaml").write_text(yaml.safe_dump(own, sort_keys=False))
        _write(fit.folder / "job.json", {"settings": settings, "options": [*options], "images": len(files)})
    return settings


def work(path: str) -> None:
    """Be the job of the fit with this folder."""
    folder = Path(path)
    with FileLock(folder / "lock"):  # a cluster may still be at it for a command that was stopped
        job = json.loads((folder / "job.json").read_text())
        if not Fit("", 0, folder).is_done(job["settings"]):
            (folder / "result.json").unlink(missing_ok=True)
            _write(folder / "result.json", {key: job[key] for key in ("settings", "images")} | _fit(folder, job))


def _fit(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run anomalib's command line, with its output in the log, and say how it ended."""
    from . import cli  # noqa: PLC0415 (which imports this module)

    for old in (path for path in folder.iterdir() if path.is_dir()):  # anomalib's, of an earlier attempt
        shutil.rmtree(old)
    log = folder / "log.txt"
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    start = time.perf_counter()
    try:
        engine = cli.anomalib(["fit", "-c", str(folder / "recipe.yaml"), *job["options"]]).engine
        Path(engine.best_model_path).replace(folder / "model.ckpt")
        made = getattr(engine.model.post_processor, "made", None)
    except SystemExit:  # of the parser, after it has said why
        said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return {"status": "refused", "reason": said[-1] if said else "anomalib refuses the arguments"}
    except Exception as error:  # whatever it is, it is this part's
        reason = (str(error).strip().splitlines() or [""])[0]
        return {"status": "failed", "reason": f"{type(error).__name__}: {reason}"}
    return {
        "status": "done",
        "digest": digest(folder / "model.ckpt"),
        "s": time.perf_counter() - start,
        "rate": made and made.rate,
        "promise": made and str(made),
    }


def _write(path: Path, values: dict[str, Any]) -> None:
    """Write a file in one step."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1))
    partial.replace(path)


def fit_all(
    recipe: str, root: Path, out: Path, seeds: Sequence[int] | None, cluster: jobs.Cluster, options: Sequence[str] = ()
) -> list[Fit]:
    """Fit a recipe to each part with each seed, unless it was done before with the same images.

    Args:
        recipe: a file, or the name of one of this package's.
        root: with a folder per part.
        out: for the results, in a folder per part and seed.
        seeds: those of the fits; by default that of the recipe.
        cluster: where the fits run.
        options: more options of ``anomalib fit``.

    Returns:
        All fits, which know their results.

    Raises:
        FileNotFoundError: if there is no such recipe or folder.
        ValueError: if there is no part, the recipe is of no detector, anomalib refuses an option, or another command
            is at work in ``out``.
    """
    values = yaml.safe_load((Path(recipe) if Path(recipe).is_file() else recipe_path(recipe)).read_text())
    if "model" not in values:
        msg = f"the recipe {recipe} is of no detector"
        raise ValueError(msg)
    if not root.is_dir():
        msg = f"there is no folder {root}"
        raise FileNotFoundError(msg)
    parts = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not parts or (root / "train" / "good").is_dir():
        msg = f"{root} needs a folder for each part, with its good images in it, or in its folder good or train/good"
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
    """Whether a fit is to be done; if not because it cannot be, its result says so."""
    try:
        is_left = not fit.is_done(prepare(fit, part, recipe, options))
    except ValueError as error:
        fit.folder.mkdir(parents=True, exist_ok=True)
        _write(fit.folder / "result.json", {"status": "failed", "reason": str(error)})
        return False
    if is_left:
        (fit.folder / "result.json").unlink(missing_ok=True)
    return is_left


def _run(calls: dict[str, list[str]], fits: dict[str, Fit], out: Path, cluster: jobs.Cluster) -> None:
    """Run the fits that are left, and say how each ended."""
    console, count = Console(stderr=True, highlight=False), 0
    console.print(f"{len(calls)} of {len(fits)} fits to do", markup=False)
    for name, reason in jobs.run(calls, f"{__name__}:work", out / "jobs", cluster):
        if reason is None:
            continue
        count += 1
        fit = fits[name]
        if not fit.result:
            _write(fit.folder / "result.json", {"status": "failed", "reason": reason or "its job left no result"})
        if fit.result["status"] == "refused":  # and would be by all others
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
    named = {name: yaml.safe_load(value) for name, _, value in (text.partition("=") for text in given.cluster_options)}
    try:
        cluster = jobs.Cluster(given.cluster, given.jobs, named)
        fits = fit_all(given.config, given.root, given.out, given.seeds, cluster, options)
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped: the same command continues from here")
    table = Table(*COLUMNS)
    for fit in fits:
        table.add_row(*row(fit))
    Console(width=None if sys.stdout.isatty() else 200).print(table, markup=False)
    sys.exit(int(any(fit.result["status"] != "done" for fit in fits)))
