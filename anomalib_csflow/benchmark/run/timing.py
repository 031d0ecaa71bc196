"""Latency and memory of one process; run as a script, those of an exported model in OpenVINO.

``python timing.py MODEL.xml BATCHES.npz THREADS`` prints one JSON object. It imports neither torch nor anomalib, so
that its memory is that of a production line that runs the exported model.
"""

import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_REPEATS, MAX_SECONDS = 100, 5.0  # whichever comes first, but at least five repeats


def latency(run: Callable[[], Any], images: int, synchronize: Callable[[], Any] = lambda: None) -> dict[str, float]:
    """Time a call, after two calls as warm-up.

    Args:
        run: predicts a batch.
        images: number of images in the batch.
        synchronize: waits until the device is done.

    Returns:
        Median and 95th percentile in ms per batch, and images per second.
    """
    seconds: list[float] = []
    for repeat in range(-2, MAX_REPEATS):
        start = time.perf_counter()
        run()
        synchronize()
        if repeat >= 0:
            seconds.append(time.perf_counter() - start)
        if len(seconds) >= 5 and sum(seconds) > MAX_SECONDS:
            break
    p95 = statistics.quantiles(seconds, n=20, method="inclusive")[-1]
    per_second = images * len(seconds) / sum(seconds)
    return {"p50_ms": 1e3 * statistics.median(seconds), "p95_ms": 1e3 * p95, "per_s": per_second}


def peak_mb() -> float:
    """Peak resident memory of this process, MB; nan on Windows."""
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux, rusage also counts the process that started this one
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    if os.name != "posix":
        return float("nan")
    import resource  # noqa: PLC0415 (of POSIX alone)

    unit = 1 if platform.system() == "Darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def cpu_seconds() -> float:
    """Processor time of this process and its ended children, s; less than on the clock if other processes run too."""
    return sum(os.times()[:4])


def end_with_parent() -> None:
    """End this process when its parent has ended, because a killed parent cannot end it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:  # on Windows it never changes
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def time_openvino(xml: str, batches: str, threads: int) -> dict[str, float]:
    """Compile an exported model and time the batches ``b1``, ``b8`` ... of a file; memory is that after the first."""
    import numpy as np  # noqa: PLC0415 (only here, so that others can import this file without OpenVINO)
    import openvino as ov  # noqa: PLC0415

    start = time.perf_counter()
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(xml, "CPU", hints)
    found = {"compile_s": time.perf_counter() - start}
    with np.load(batches) as arrays:
        for name in sorted(arrays.files):
            batch = arrays[name]
            if not compiled.input(0).partial_shape.compatible(ov.PartialShape(batch.shape)):
                continue  # exported for another batch size
            timed = latency(lambda batch=batch: compiled([batch]), len(batch))
            found |= {f"openvino_{name}_{key}": value for key, value in timed.items()}
            found.setdefault("inference_peak_mb", peak_mb())
    if "inference_peak_mb" not in found:
        msg = f"its input is {compiled.input(0).partial_shape}, which no batch of the benchmark has"
        raise ValueError(msg)
    return found


if __name__ == "__main__":
    end_with_parent()
    print(json.dumps(time_openvino(sys.argv[1], sys.argv[2], int(sys.argv[3]))))  # noqa: T201
