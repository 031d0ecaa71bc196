"""The cells as jobs of anomalib's pipelines: each in processes of its own, several at once if asked, none twice."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor as Pool
from concurrent.futures import as_completed
from datetime import datetime, timezone
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from anomalib.pipelines.components import Job, JobGenerator, Runner
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from anomalib_csflow.benchmark import results

from . import timing
from .plan import Cell

ERROR = re.compile(r"(?:\w+\.)*(\w+(?:Error|Exception)\b.*)")  # as Python's tracebacks end, without the module
LOG_TAIL = 20_000  # characters in which the last line of an error is looked for


class CellJob(Job):
    """Measure one cell.

    Args:
        cell: what to measure.
        out: the folder of the benchmark.
        num_jobs: how many run at once; they share the processors.
    """

    name = "cell"

    def __init__(self, cell: Cell, out: Path, num_jobs: int = 1) -> None:
        self.cell, self.num_jobs = cell, num_jobs
        self.folder = out / "cells" / cell.slug

    def run(self, task_id: int | None = None) -> dict[str, Any]:
        """Run the stages one after the other and write the row, that of a failure too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("log.txt", "fit.json", "export.json", "openvino.json"):  # of an earlier try
            (self.folder / name).unlink(missing_ok=True)
        self.cell.save(self.folder / "cell.json")
        row: dict[str, Any] = {
            "format": results.FORMAT,
            "cell": self.cell.slug,
            "detector": self.cell.detector.name,
            "class_path": self.cell.detector.class_path,
            "origin": None,
            "data": self.cell.data.name,
            "seed": self.cell.seed,
            "status": "done",
            "reason": "",
            "notes": [],
            "machine": results.machine(),
            "versions": results.versions(),
            "commit": results.commit(),
        }
        environment = self._environment(task_id or 0)
        module = [sys.executable, "-m", "anomalib_csflow.benchmark.run.cell"]
        start = time.perf_counter()
        reason = self._stage([*module, "fit", str(self.folder)], environment)
        if reason:
            row |= {"status": "failed", "reason": reason}
        else:
            row |= self._read("fit")
        if not reason and self.cell.in_full:
            reason = self._stage([*module, "export", str(self.folder)], environment)
            exported = self._read("export")
            row |= exported | {"notes": [*row["notes"], *exported.get("notes", [])]}
            xml = row.pop("xml", None)
            if xml is not None:
                reason = self._openvino(xml, int(row["threads"]), environment)
                row |= self._read("openvino")
            if reason:
                row["notes"] = [*row["notes"], f"not timed in OpenVINO: {reason}"]
        row |= {"cell_s": time.perf_counter() - start, "finished": datetime.now(timezone.utc).isoformat("T", "seconds")}
        results.write_json(self.folder / "result.json", row)
        for name in ("model.pt", "batches.npz"):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "exported", ignore_errors=True)
        return row

    def _environment(self, task_id: int) -> dict[str, str]:
        """Of a process of this job: its share of the processors, its own accelerator."""
        environment = dict(os.environ)
        threads = max(1, (os.cpu_count() or 1) // self.num_jobs)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        count = torch.cuda.device_count()
        if self.num_jobs > 1 and count:
            visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[task_id % count]
        return environment

    def _stage(self, command: Sequence[str], environment: dict[str, str]) -> str:
        """Run a process with its output in the log; returns why it failed, or nothing."""
        with (self.folder / "log.txt").open("a") as log:
            done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode == -signal.SIGINT:  # by the one who has started this: no failure of the cell's
            raise KeyboardInterrupt
        return "" if done.returncode == 0 else _reason(done.returncode, self.folder / "log.txt")

    def _openvino(self, xml: str, threads: int, environment: dict[str, str]) -> str:
        """Time the exported model without torch."""
        command = [sys.executable, timing.__file__, xml, str(self.folder / "batches.npz"), str(threads)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        with (self.folder / "log.txt").open("a") as log:
            log.write(done.stdout + done.stderr)
        if done.returncode:
            return _reason(done.returncode, self.folder / "log.txt")
        results.write_json(self.folder / "openvino.json", json.loads(done.stdout.splitlines()[-1]))
        return ""

    def _read(self, stage: str) -> dict[str, Any]:
        """What a stage measured; nothing where it did not get so far."""
        path = self.folder / f"{stage}.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    @staticmethod
    def collect(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All rows."""
        return results

    @staticmethod
    def save(results: list[dict[str, Any]]) -> None:
        """Nothing: each job has written its own row."""


def _reason(code: int, log: Path) -> str:
    """Why a process ended, in a sentence."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (is there enough memory?)" if name == "SIGKILL" else "")
    lines = [line.strip() for line in log.read_text(errors="replace")[-LOG_TAIL:].splitlines() if line.strip()]
    errors = [match for line in lines if (match := ERROR.match(line))]
    return errors[-1][1] if errors else (lines or [f"exit status {code}"])[-1]


class CellGenerator(JobGenerator):
    """The jobs of the cells that are still to be measured.

    Args:
        cells: the cells.
        out: the folder of the benchmark.
        num_jobs: how many run at once.
    """

    def __init__(self, cells: Sequence[Cell], out: Path, num_jobs: int = 1) -> None:
        self.cells, self.out, self.num_jobs = cells, out, num_jobs

    @property
    def job_class(self) -> type[Job]:
        """What it makes."""
        return CellJob

    def generate_jobs(self, args: Any = None, prev_stage_result: Any = None) -> Generator[Job, None, None]:  # noqa: ARG002
        """One job per cell."""
        for cell in self.cells:
            yield CellJob(cell, self.out, self.num_jobs)


class CellRunner(Runner):
    """Run the jobs, several at once if asked, with the progress and the time that is left.

    Threads are enough, since a job waits for processes of its own; anomalib's ParallelRunner keeps a processor busy
    while it waits, and its SerialRunner does not say how much is left.

    Args:
        generator: makes the jobs.
        seconds: estimate of each cell's seconds, by its slug.
        console: where progress is shown.
    """

    def __init__(self, generator: CellGenerator, seconds: Mapping[str, float], console: Console) -> None:
        super().__init__(generator)
        self.cells, self.num_jobs, self.seconds, self.console = generator.cells, generator.num_jobs, seconds, console

    def run(self, args: Any = None, prev_stage_results: Any = None) -> list[dict[str, Any]]:
        """Run all jobs; returns their rows."""
        places: Queue[int] = Queue()
        for place in range(self.num_jobs):
            places.put(place)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[left]}"),
            TimeElapsedColumn(),
        )
        rows = []
        with Progress(*columns, console=self.console, refresh_per_second=1) as progress, Pool(self.num_jobs) as pool:
            whole = progress.add_task("", total=sum(self.seconds[cell.slug] for cell in self.cells), left="")
            start = time.perf_counter()

            def run(job: Any) -> dict[str, Any]:
                place = places.get()
                task = progress.add_task(
                    f"  {job.cell.data.name}, {job.cell.detector.name}, seed {job.cell.seed}", total=None, left=""
                )
                try:
                    return job.run(place)
                finally:
                    progress.remove_task(task)
                    places.put(place)

            jobs: Iterable[Any] = self.generator(args, prev_stage_results)
            futures = {pool.submit(run, job): job.cell for job in jobs}
            try:
                for future in as_completed(futures):
                    rows.append(future.result())
                    progress.advance(whole, self.seconds[futures[future].slug])
                    done, total = progress.tasks[0].completed, progress.tasks[0].total or 0
                    left = f"about {(total - done) * (time.perf_counter() - start) / done / 60:.0f} min left"
                    progress.update(whole, description=f"{len(rows)} of {len(futures)} cells", left=left)
                    self.console.print(_said(rows[-1]), markup=False, highlight=False, soft_wrap=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # or those that wait would still be measured
                raise
        return rows


def _said(row: dict[str, Any]) -> str:
    """A cell's end in a line."""
    result = f"failed: {row['reason']}" if row["status"] == "failed" else f"image AUROC {row['image_AUROC']:.3f}"
    return f"{row['data']}, {row['detector']}, seed {row['seed']}: {result}, {row['cell_s']:.0f} s"
