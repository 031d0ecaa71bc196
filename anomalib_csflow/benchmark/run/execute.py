"""Measure runs: each in its own processes, several at once if requested, showing progress and remaining time."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime, timezone
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from anomalib_csflow.benchmark import results
from anomalib_csflow.benchmark.rows import Row, write_json

from . import timing
from .plan import Run

ERROR = re.compile(r"(?:\w+\.)*(\w+(?:Error|Exception)\b.*)")  # the end of a Python traceback, without the module
LOG_TAIL = 20_000  # number of characters that are searched for the last line of an error


def measure_all(
    runs: Sequence[Run],
    out: Path,
    seconds: Mapping[str, float],
    broken: Mapping[str, str],
    console: Console,
    jobs: int = 1,
) -> None:
    """Measure runs and write their rows; a failed run has a row too, and the others continue.

    Args:
        runs: what to measure.
        out: the folder of the benchmark.
        seconds: estimated seconds of each run, by its slug.
        broken: what is wrong with data sets, by name: their runs fail without being started.
        console: where progress is shown.
        jobs: number of runs at once; threads are enough, since they wait for processes.
    """
    places: Queue[int] = Queue()
    for place in range(jobs):
        places.put(place)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"), TimeElapsedColumn())
    with (
        Progress(*columns, console=console, refresh_per_second=1) as progress,
        ThreadPoolExecutor(jobs) as pool,
    ):
        whole = progress.add_task("", total=sum(seconds[run.slug] for run in runs), left="")
        start = time.perf_counter()

        def one(run: Run) -> Row:
            place = places.get()
            task = progress.add_task(f"  {run.data.name}, {run.detector.name}, seed {run.seed}", total=None, left="")
            try:
                return measure(run, out, broken.get(run.data.name, ""), environment(place, jobs))
            finally:
                progress.remove_task(task)
                places.put(place)

        futures = {pool.submit(one, run): run for run in runs}
        try:
            for count, future in enumerate(as_completed(futures), start=1):
                row = future.result()
                progress.advance(whole, seconds[futures[future].slug])
                done, total = progress.tasks[0].completed, progress.tasks[0].total or 0
                left = f"about {(total - done) * (time.perf_counter() - start) / done / 60:.0f} min left"
                progress.update(whole, description=f"{count} of {len(futures)} runs", left=left)
                console.print(_said(row), markup=False, highlight=False, soft_wrap=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # otherwise pending runs would still be measured
            raise


def measure(run: Run, out: Path, broken: str, env: dict[str, str]) -> Row:
    """Do the stages of one run, one after the other, and write its row.

    Args:
        run: what to measure.
        out: the folder of the benchmark.
        broken: what is wrong with its data set; empty if nothing is.
        env: the environment of its processes.
    """
    folder = out / "runs" / run.slug
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("log.txt", "fit.json", "export.json", "openvino.json"):  # from an earlier attempt
        (folder / name).unlink(missing_ok=True)
    run.save(folder / "run.json")
    values: dict[str, Any] = {
        "run": run.slug,
        "detector": run.detector.name,
        "class_path": run.detector.class_path,
        "data": run.data.name,
        "seed": run.seed,
        "status": "done",
        "notes": [],
        "machine": results.machine(),
        "versions": results.versions(),
        "commit": results.commit(),
    }
    start = time.perf_counter()
    reason = broken or _stage("fit", folder, env)
    values |= {"status": "failed", "reason": reason} if reason else _read(folder, "fit")
    if not reason and run.in_full:
        reason = _stage("export", folder, env)
        exported = _read(folder, "export")
        values |= exported | {"notes": [*values["notes"], *exported.get("notes", [])]}
        xml = values.pop("xml", None)
        if xml is not None:
            reason = _openvino(xml, int(values["threads"]), folder, env)
            values |= _read(folder, "openvino")
        if reason:
            values["notes"] = [*values["notes"], f"not timed in OpenVINO: {reason}"]
    values |= {"run_s": time.perf_counter() - start, "finished": datetime.now(timezone.utc).isoformat("T", "seconds")}
    row = Row.parse(values)
    write_json(folder / "result.json", row.flat())
    for name in ("model.pt", "batches.npz"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "exported", ignore_errors=True)
    return row


def environment(place: int, jobs: int) -> dict[str, str]:
    """Environment for the processes of one of several jobs: its share of the processors, its own accelerator."""
    found = dict(os.environ)
    found.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    count = torch.cuda.device_count()
    if jobs > 1 and count:
        visible = found.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        found["CUDA_VISIBLE_DEVICES"] = visible.split(",")[place % count]
    return found


def _stage(stage: str, folder: Path, env: dict[str, str]) -> str:
    """Run the process of a stage, with its output in the log; returns why it failed, or an empty string."""
    command = [sys.executable, "-m", "anomalib_csflow.benchmark.run.stage", stage, str(folder)]
    with (folder / "log.txt").open("a") as log:
        done = subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode == -signal.SIGINT:  # from the user who started this, so the run has not failed
        raise KeyboardInterrupt
    return "" if done.returncode == 0 else _reason(done.returncode, folder / "log.txt")


def _openvino(xml: str, threads: int, folder: Path, env: dict[str, str]) -> str:
    """Time the exported model without torch; returns why it failed, or an empty string."""
    command = [sys.executable, timing.__file__, xml, str(folder / "batches.npz"), str(threads)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    with (folder / "log.txt").open("a") as log:
        log.write(done.stdout + done.stderr)
    if done.returncode:
        return _reason(done.returncode, folder / "log.txt")
    write_json(folder / "openvino.json", json.loads(done.stdout.splitlines()[-1]))
    return ""


def _read(folder: Path, stage: str) -> dict[str, Any]:
    """What a stage measured; empty if it did not get that far."""
    path = folder / f"{stage}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _reason(code: int, log: Path) -> str:
    """Why a process failed, in one sentence."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (is there enough memory?)" if name == "SIGKILL" else "")
    lines = [line.strip() for line in log.read_text(errors="replace")[-LOG_TAIL:].splitlines() if line.strip()]
    errors = [match for line in lines if (match := ERROR.match(line))]
    return errors[-1][1] if errors else (lines or [f"exit status {code}"])[-1]


def _said(row: Row) -> str:
    """The outcome of a run in one line."""
    result = f"failed: {row.reason}" if not row.done else f"image AUROC {row.figures['image_AUROC']:.3f}"
    return f"{row.data}, {row.detector}, seed {row.seed}: {result}, {row.run_s:.0f} s"
