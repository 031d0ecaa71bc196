"""Does a bundle keep its promise here? Each installed runtime on the reference images, and on a folder of your own."""

import math
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle, BundleError
from .detector import Detector, images_in
from .engines import Precision, Runtime, installed

WARM_UP = 3
LATENCY_RUNS = 20


@dataclass(frozen=True)
class Case:
    """A runtime with a precision; in float32 it must give torch's outputs."""

    runtime: Runtime
    precision: Precision = "f32"

    def __str__(self) -> str:
        """As the table names it."""
        return f"{self.runtime} {self.precision}"


@dataclass(frozen=True)
class Measured:
    """What a runtime gave for some images.

    Attributes:
        case: which one.
        images: number of images.
        score: largest difference of a calibrated score.
        map: largest difference of a calibrated map; nan without maps.
        flips: labels that differ.
        p50_ms: median time of an image.
        p95_ms: time that 95 % of the images take at most.
        peak_mb: most resident memory of the process, in 10^6 bytes; nan where the system does not say.
        error: why it did not run, or nothing.
    """

    case: Case
    images: int = 0
    score: float = math.nan
    map: float = math.nan
    flips: int = 0
    p50_ms: float = math.nan
    p95_ms: float = math.nan
    peak_mb: float = math.nan
    error: str = ""

    def keeps(self, tolerance: float) -> bool:
        """Whether it gives the expected outputs, as it must in float32."""
        is_near = self.score <= tolerance and not self.map > tolerance
        return self.case.precision != "f32" or (not self.error and self.flips == 0 and is_near)


Outputs = list[tuple[float, bool | None, NDArray[np.float32] | None]]


def validate(bundle: Bundle, folder: str | Path | None = None, num_threads: int | None = None) -> list[Measured]:
    """Run each installed runtime on the reference images, and on a folder's images if one is given.

    On the reference images, outputs are compared with those of torch that the bundle contains; on others, with
    those of the first runtime in float32.

    Raises:
        BundleError: if no runtime is installed.
        FileNotFoundError: if there is no folder.
    """
    cases = [Case(runtime) for runtime in installed(bundle)]
    if not cases:
        msg = "no runtime for this bundle is installed: pip install openvino, or onnxruntime"
        raise BundleError(msg)
    if cases[0].runtime == "openvino" and _has_bfloat16():
        cases.append(Case("openvino", "bf16"))
    if cases[0].runtime == "openvino" and "int8" in bundle.manifest["models"]:
        cases.append(Case("openvino", "int8"))
    images, arrays = bundle.reference()
    expected: Outputs = [
        (
            float(score),
            bool(arrays["pred_label"][index]) if "pred_label" in arrays else None,
            arrays["anomaly_map"][index] if "anomaly_map" in arrays else None,
        )
        for index, score in enumerate(arrays["pred_score"])
    ]
    others = find_images(folder) if folder is not None else []
    measured, first = [], None
    for case in cases:  # each in a process of its own, whose memory is its alone
        found, outputs = _in_process(bundle, case, [*images, *others], num_threads)
        if outputs:
            first = first or outputs
            wanted = expected + first[len(images) :]
            found = _compared(found, outputs, wanted)
        measured.append(found)
    return measured


def _in_process(bundle: Bundle, case: Case, images: Sequence[Path], threads: int | None) -> tuple[Measured, Outputs]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(_run, bundle, case, images, threads).result()
        except BrokenProcessPool:
            return Measured(case, error="its process ended without a result: was it killed, for want of memory?"), []


def _run(bundle: Bundle, case: Case, images: Sequence[Path], threads: int | None) -> tuple[Measured, Outputs]:
    """Judge the images one by one."""
    try:
        detector = Detector(bundle, case.runtime, case.precision, threads)
        outputs: Outputs = []
        for image in images:
            result = detector(image)
            outputs.append((result.score, result.label, result.anomaly_map))
        seconds = []
        for turn in range(WARM_UP + LATENCY_RUNS):
            start = time.perf_counter()
            detector(images[turn % len(images)])
            seconds.append(time.perf_counter() - start)
        ms = sorted(1e3 * value for value in seconds[WARM_UP:])
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return Measured(case, error=str(error).splitlines()[0]), []
    p95 = ms[math.ceil(0.95 * len(ms)) - 1]
    return Measured(case, len(images), p50_ms=median(ms), p95_ms=p95, peak_mb=peak_mb()), outputs


def _compared(found: Measured, outputs: Outputs, expected: Outputs) -> Measured:
    pairs = list(zip(outputs, expected, strict=True))
    maps = [
        float(np.abs(one[2] - other[2]).max()) for one, other in pairs if one[2] is not None and other[2] is not None
    ]
    return replace(
        found,
        score=max(abs(one[0] - other[0]) for one, other in pairs),
        map=max(maps, default=math.nan),
        flips=sum(one[1] != other[1] for one, other in pairs),
    )


def table(measured: Sequence[Measured], tolerance: float) -> str:
    """The results as a text table."""
    header = ("runtime", "images", "score", "map", "flips", "p50 ms", "p95 ms", "peak MB", "promise")
    rows: list[tuple[str, ...]] = [header]
    for one in measured:
        if one.error:
            rows.append((str(one.case), *["-"] * 7, one.error))
            continue
        promise = "kept" if one.keeps(tolerance) else "BROKEN"
        figures = (f"{one.p50_ms:.1f}", f"{one.p95_ms:.1f}", "-" if math.isnan(one.peak_mb) else f"{one.peak_mb:.0f}")
        of_map = "-" if math.isnan(one.map) else f"{one.map:.1e}"
        judged = promise if one.case.precision == "f32" else "none"
        rows.append((str(one.case), str(one.images), f"{one.score:.1e}", of_map, str(one.flips), *figures, judged))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def find_images(folder: str | Path) -> list[Path]:
    """The images of a folder and its subfolders, by name.

    Raises:
        FileNotFoundError: if there is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        msg = f"there is no folder {folder}"
        raise FileNotFoundError(msg)
    found = sorted(path for path in images_in(folder) if path.is_file())
    if not found:
        msg = f"there is no image in {folder}"
        raise FileNotFoundError(msg)
    return found


def _has_bfloat16() -> bool:
    import openvino  # noqa: PLC0415 (optional)

    capabilities: Any = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "BF16" in capabilities


def peak_mb() -> float:
    """Most resident memory of this process, where Linux says so: getrusage would give that of a larger parent."""
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(kilobytes) * 1024 / 1e6
