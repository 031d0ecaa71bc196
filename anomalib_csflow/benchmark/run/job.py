"""The job of one run: its stages, each in a process of its own. It imports little, since it waits most of the time."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock

from anomalib_csflow.benchmark import results
from anomalib_csflow.benchmark.rows import Row, write_json

from . import timing

ERROR = re.compile(r"(?:\w+\.)*(\w+(?:Error|Exception)\b.*)")  # the end of a Python traceback, without the module
LOG_TAIL = 20_000  # number of characters that are searched for the last line of an error


def measure(path: str) -> None:
    """Do the stages of the run with this folder, one after the other, and write its row."""
    folder = Path(path)
    with FileLock(folder / "lock"):  # a cluster may still be at it for a benchmark that was stopped
        if not is_done(folder):
            _measure(folder)


def is_done(folder: Path) -> bool:
    """Whether a run was measured without failing."""
    path = folder / "result.json"
    return path.is_file() and json.loads(path.read_text()).get("status") == "done"


def about(folder: Path) -> dict[str, Any]:
    """What the row of a run says even if it fails."""
    run = json.loads((folder / "run.json").read_text())
    return {
        "run": folder.name,
        "detector": run["detector"]["name"],
        "class_path": run["detector"]["class_path"],
        "data": run["data"]["name"],
        "seed": run["seed"],
        "status": "done",
        "notes": [],
        "machine": results.machine(),
        "versions": results.versions(),
        "commit": results.commit(),
    }


def fail(folder: Path, reason: str) -> Row:
    """Write the row of a run that has no job, or whose job ended before it could."""
    return write_row(folder, about(folder) | {"status": "failed", "reason": reason})


def write_row(folder: Path, values: dict[str, Any]) -> Row:
    """Write the row of a run, and return it."""
    now = datetime.now(timezone.utc).isoformat("T", "seconds")
    row = Row.parse(values | {"finished": now})
    write_json(folder / "result.json", row.flat())
    return row


def _measure(folder: Path) -> None:
    for name in ("log.txt", "fit.json", "export.json", "openvino.json"):  # from an earlier attempt
        (folder / name).unlink(missing_ok=True)
    values = about(folder)
    in_full = json.loads((folder / "run.json").read_text())["in_full"]
    start = time.perf_counter()
    reason = _stage("fit", folder)
    values |= {"status": "failed", "reason": reason} if reason else _read(folder, "fit")
    if not reason and in_full:
        reason = _stage("export", folder)
        exported = _read(folder, "export")
        values |= exported | {"notes": [*values["notes"], *exported.get("notes", [])]}
        xml = values.pop("xml", None)
        if xml is not None:
            reason = _openvino(xml, int(values["threads"]), folder)
            values |= _read(folder, "openvino")
        if reason:
            values["notes"] = [*values["notes"], f"not timed in OpenVINO: {reason}"]
    write_row(folder, values | {"run_s": time.perf_counter() - start})
    for name in ("model.pt", "batches.npz"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "exported", ignore_errors=True)


def _stage(stage: str, folder: Path) -> str:
    """Run the process of a stage, with its output in the log; returns why it failed, or an empty string."""
    command = [sys.executable, "-m", "anomalib_csflow.benchmark.run.stage", stage, str(folder)]
    with (folder / "log.txt").open("a") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode == -signal.SIGINT:  # from the user who started this, so the run has not failed
        raise KeyboardInterrupt
    return "" if done.returncode == 0 else _reason(done.returncode, folder / "log.txt")


def _openvino(xml: str, threads: int, folder: Path) -> str:
    """Time the exported model without torch; returns why it failed, or an empty string."""
    command = [sys.executable, timing.__file__, xml, str(folder / "batches.npz"), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
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
