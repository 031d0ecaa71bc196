"""One fit of ``fit-all``: what it needs, its job, and what it leaves in its folder."""

import hashlib
import json
import os
import shutil
import time
import traceback
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from .engine.whole_files import whole_file
from .host_cli import anomalib
from .runtime.bundle import sha256
from .runtime.detector import images_in
from .user_errors import sentence

GOOD = ("train/good", "good", ".")
SIZES = ("train_batch_size", "eval_batch_size", "num_workers")


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
        return is_ended and found["digest"] == sha256(checkpoint)


def good_images(part: Path) -> tuple[Path, list[Path]]:
    """The folder of a part's good images, and their files.

    Raises:
        ValueError: if there are none, or if it is not clear which images are good.
    """
    for name in GOOD:
        folder = part / name
        files = sorted(images_in(folder)) if folder.is_dir() else []
        if files and name == "." and any(file.parent != folder for file in files):
            msg = f"it is not clear which images of {part} are good: put these into a folder {part / 'good'}"
            raise ValueError(msg)
        if files:
            return folder, files
    msg = f"there are no images in {part}, {part / 'good'} or {part / 'train/good'}"
    raise ValueError(msg)


def prepare(fit: Fit, part: Path, recipe: dict[str, Any], options: Sequence[str]) -> str:
    """Write a fit's own recipe and options; returns a digest of everything that the fit depends on.

    Raises:
        ValueError: see :func:`good_images`.
    """
    folder, files = good_images(part)
    given = recipe.get("data") or {}
    old = given.get("init_args") or {}
    is_folder = given.get("class_path", "").endswith(".Folder")
    kept = {name: value for name, value in old.items() if is_folder or name in SIZES}
    kept = {name: value for name, value in kept.items() if not name.endswith("_dir")}
    data = {"name": fit.part, "root": str(folder.absolute()), "normal_dir": ".", "seed": fit.seed}
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
        write(fit.folder / "job.json", {"settings": settings, "options": [*options], "images": len(files)})
    return settings


def work(path: str) -> None:
    """Run the fit of a folder; a job calls this."""
    folder = Path(path)
    with FileLock(folder / "lock"):  # a job of an earlier command may still run on a cluster
        job = json.loads((folder / "job.json").read_text())
        if not Fit("", 0, folder).is_done(job["settings"]):
            (folder / "result.json").unlink(missing_ok=True)
            write(folder / "result.json", {key: job[key] for key in ("settings", "images")} | _fit(folder, job))


def _fit(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run anomalib's command line, with its output in the log, and say how it ended."""
    model = yaml.safe_load((folder / "recipe.yaml").read_text())["model"]
    detector = str(model.get("class_path") if isinstance(model, dict) else model).rpartition(".")[2]
    if detector.isidentifier():  # anomalib's folder, of an earlier attempt; others may be the user's
        shutil.rmtree(folder / detector, ignore_errors=True)
    log = folder / "log.txt"
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    start = time.perf_counter()
    try:
        engine = anomalib(["fit", "-c", str(folder / "recipe.yaml"), *job["options"]]).engine
        Path(engine.best_model_path).replace(folder / "model.ckpt")
        made = getattr(engine.model.post_processor, "made", None)
    except ArgumentError as error:
        return {"status": "refused", "reason": sentence(error)}
    except SystemExit:
        return {"status": "refused", "reason": "the options end anomalib's fit before it begins"}
    except Exception as error:  # whatever fails in this fit, the others go on
        traceback.print_exc()  # into the log
        reason = sentence(error) or f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        return {"status": "failed", "reason": reason}
    return {
        "status": "done",
        "digest": sha256(folder / "model.ckpt"),
        "s": time.perf_counter() - start,
        "rate": made and made.rate,
        "promise": made and str(made),
    }


def write(path: Path, values: dict[str, Any]) -> None:
    """Write a file in one step."""
    with whole_file("a fit's record", path) as partial:
        partial.write_text(json.dumps(values, indent=1))
