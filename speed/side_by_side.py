"""What all comparisons share: medians, one thread setting for both sides, a table with machine and commit."""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console

from anomalib_csflow.benchmark.results import commit, machine, versions

RESULTS = Path(__file__).parent / "results"


def seconds(function: Callable[[], Any], repeats: int = 7, warm_up: int = 2) -> float:
    """Median time of a call, after a warm-up."""
    for _ in range(warm_up):
        function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def alternating(functions: dict[str, Callable[[], Any]], repeats: int = 7, warm_up: int = 2) -> dict[str, float]:
    """Median time of each, measured in turns, so that other load on the machine slows all of them equally."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warm_up + repeats):
        for name, function in functions.items():
            elapsed = seconds(function, repeats=1, warm_up=0)
            if turn >= warm_up:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def row(what: str, ours: float, theirs: float, target: float | None, unit: str = "ms") -> dict[str, Any]:
    """One line of a table: both sides, their ratio, and the target if there is one."""
    ratio = ours / theirs
    return {
        "what": what,
        "ours": f"{ours:.4g} {unit}",
        "theirs": f"{theirs:.4g} {unit}",
        "ratio": f"{ratio:.3f}",
        "target": "" if target is None else f"{target:.3f}",
        "met": "" if target is None else "yes" if ratio <= target else "NO",
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of every comparison."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both sides")
    result.add_argument("--repeats", type=int, default=7)
    result.add_argument("--quick", action="store_true", help="tiny sizes, one repeat, no files: checks that it runs")
    return result


def begin(arguments: argparse.Namespace) -> None:
    """Set the number of threads, and keep warnings of libraries out of the tables."""
    if arguments.quick:
        arguments.repeats = 1
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)


def write(name: str, rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print a table with its machine, versions and commit, and write it to the results."""
    table = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    packages = ", ".join(f"{package} {version}" for package, version in versions().items())
    text = f"{table}\n\n{machine()}, threads: {arguments.threads}; {packages}; commit {commit()}"
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(f"{text}\n")
    Console().print(text, soft_wrap=True, markup=False)
