"""Many independent jobs through submitit: processes on this machine, or arrays of SLURM jobs."""

import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LOCAL, SLURM = CLUSTERS = ("local", "slurm")
NO_LIMIT = 60 * 24 * 365  # minutes; submitit's own default ends a local job after five
SECONDS_BETWEEN_LOOKS = {LOCAL: 0.2, SLURM: 5.0}


@dataclass(frozen=True)
class Cluster:
    """Where jobs run.

    Args:
        name: ``local`` for processes on this machine, or ``slurm``.
        jobs: how many run at once.
        options: parameters of ``submitit.AutoExecutor``: ``timeout_min``, ``cpus_per_task``, ``gpus_per_node``,
            ``mem_gb``, ``slurm_partition`` ...

    Raises:
        ModuleNotFoundError: if submitit is not installed.
        ValueError: if there is no such cluster here, or an option is unknown.
    """

    name: str = LOCAL
    jobs: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if find_spec("submitit") is None:
            msg = "submitit, which starts the jobs, is not installed: pip install 'anomalib-csflow[cluster]'"
            raise ModuleNotFoundError(msg)
        if self.name not in CLUSTERS or self.jobs < 1:
            msg = f"jobs run on one of {', '.join(CLUSTERS)}, and 1 or more at once, got {self.name!r} and {self.jobs}"
            raise ValueError(msg)
        if self.name == LOCAL and os.name != "posix":
            msg = "submitit starts jobs on Linux and macOS only: on Windows, use its subsystem for Linux"
            raise ValueError(msg)
        if self.name == SLURM and shutil.which("srun") is None:
            msg = (
                "there is no SLURM here, as srun is not found: start this on a login node, or leave out --cluster slurm"
            )
            raise ValueError(msg)
        with tempfile.TemporaryDirectory() as folder:
            self.executor(Path(folder))

    def executor(self, folder: Path) -> Any:
        """Submitit's executor, with a new folder: it names files by process ids, which the system uses again."""
        import submitit  # noqa: PLC0415 (optional)

        executor = submitit.AutoExecutor(tempfile.mkdtemp(dir=folder), cluster=self.name)
        try:
            executor.update_parameters(
                **{"timeout_min": NO_LIMIT} if self.name == LOCAL else {"slurm_array_parallelism": self.jobs},
                **self.options,
            )
        except (AssertionError, NameError, TypeError, ValueError) as error:
            msg = f"submitit refuses the cluster's options {dict(self.options)}: {str(error).partition(chr(10))[0]}"
            raise ValueError(msg) from error
        return executor


def run(
    calls: Mapping[str, Sequence[Any]], target: str, folder: Path, cluster: Cluster
) -> Iterator[tuple[str, str | None]]:
    """Call a function for each of several jobs, each in a process of its own.

    A job that fails, or whose machine is lost, does not stop the others. If the caller is interrupted, its jobs are
    cancelled; if it is killed, its jobs on this machine end too.

    Args:
        calls: plain arguments of each job, by its name.
        target: the function, as ``package.module:name``; it leaves its result in a file.
        folder: for submitit's files.
        cluster: where the jobs run.

    Yields:
        The name of a job and None when it begins. When it has ended, its name and why it failed; an empty string if
        it did not fail.
    """
    folder.mkdir(parents=True, exist_ok=True)
    is_local = cluster.name == LOCAL
    limit = cluster.jobs if is_local else max(len(calls), 1)  # SLURM has a queue of its own
    waiting, places = deque(calls), deque(range(limit))
    running: dict[str, tuple[Any, int]] = {}
    try:
        while waiting or running:
            begun = [waiting.popleft() for _ in range(min(len(waiting), len(places)))]
            if begun:
                executor = cluster.executor(folder)
                with executor.batch():  # one array on SLURM
                    for name in begun:
                        place = places.popleft()
                        own = environment(place, cluster.jobs) if is_local else {}
                        caller = os.getpid() if is_local else None
                        running[name] = executor.submit(_work, caller, own, target, calls[name]), place
            yield from ((name, None) for name in begun)
            ended = [name for name, (job, _) in running.items() if job.done()]
            for name in ended:
                job, place = running.pop(name)
                places.append(place)
                yield name, _reason(job, is_local=is_local)
            if not ended:
                time.sleep(SECONDS_BETWEEN_LOOKS[cluster.name])
    finally:
        for job, _ in running.values():
            job.cancel(check=False)


def environment(place: int, jobs: int) -> dict[str, str | None]:
    """Environment of one of several jobs on this machine: its share of the processors, and its own accelerator."""
    # in a container or a job, often fewer than the machine has
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, processors // jobs))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # without it, submitit hides all devices
    if jobs > 1:
        import torch  # noqa: PLC0415 (takes seconds, and one job alone does not need it)

        devices = [name for name in (visible or "").split(",") if name] or range(torch.cuda.device_count())
        visible = str(devices[place % len(devices)]) if devices else visible
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads), "CUDA_VISIBLE_DEVICES": visible}


def _work(caller: int | None, own: Mapping[str, str | None], target: str, arguments: Sequence[Any]) -> None:
    """Run in a job: set the environment before anything is imported that reads it, then call the function."""
    for name, value in own.items():
        os.environ.pop(name, None)
        os.environ.update({} if value is None else {name: value})
    if caller is not None:
        threading.Thread(target=_end_with, args=(caller, os.getppid()), daemon=True).start()
    module, _, function = target.partition(":")
    getattr(import_module(module), function)(*arguments)


def _end_with(caller: int, parent: int) -> None:
    """End this process when its caller or its parent has ended: submitit's jobs would outlive them."""
    while os.getppid() == parent:
        try:
            os.kill(caller, 0)  # raises an error if there is no such process
        except OSError:
            break
        time.sleep(1)
    os._exit(1)


def _reason(job: Any, *, is_local: bool) -> str:
    """Why a job failed, in one sentence; empty if it did not."""
    if is_local and not job.paths.result_pickle.is_file():  # on SLURM, the file may take a while to appear
        return f"its process was killed (is there enough memory?); its log is {job.paths.stderr}"
    error = job.exception()
    if error is None:
        return ""
    lines = [line.strip() for line in job.stderr().splitlines() if line.strip()] if job.paths.stderr.is_file() else []
    return f"its job ended early ({(lines or [str(error).splitlines()[0]])[-1]}); its log is {job.paths.stderr}"
