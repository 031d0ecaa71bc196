"""Commands that are killed at random and started again, until they end by themselves."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np


def end_killed_at_random(
    command: list[str],
    jobs: Path,
    generator: np.random.Generator,
    longest: float,
    is_done: Callable[[], bool] = lambda: True,
) -> int:
    """Start a command again and again, and kill it or one of its jobs after a random time; returns the number of kills.

    Args:
        command: that continues where it was stopped.
        jobs: the folder of submitit's files.
        generator: of the times, and of what is killed.
        longest: seconds until the first kill, at most; each time a third more, so that there is an end.
        is_done: whether a command that ended well has done everything.
    """
    kills = 0
    while True:
        known = {*jobs.glob("*/*_submitted.pkl")}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as started:
            try:
                output, _ = started.communicate(timeout=generator.uniform(0, longest))
            except subprocess.TimeoutExpired:
                own = sorted({*jobs.glob("*/*_submitted.pkl")} - known)
                victim = started.pid
                if own and generator.uniform() < 0.5:  # a job's process is named in its file
                    victim = int(own[-1].name.partition("_")[0])
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                    kills += 1
                longest *= 1.3
                if victim != started.pid:
                    started.communicate()
                time.sleep(0.1)
            else:
                if started.returncode == 0 and is_done():
                    return kills
                assert kills, output
