"""Watch a folder: judge images as they arrive, write what was found, alarm when the line drifts.

``results.jsonl`` is the record: one line per image, written to the disk before the next image is judged. What is in
it is never judged again, so a watch that was killed goes on where it was.
"""

import csv
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from anomalib_csflow.calibration import DriftMonitor

from .detector import Detector, ImageError, Result

RECORD = "results.jsonl"
COLUMNS = ("time", "image", "label", "score", "p_value", "boxes", "error")
RED = (220, 30, 30)


@dataclass
class Watch:
    """A folder that is watched.

    Args:
        detector: that judges.
        folder: where images arrive.
        out: where the record, its CSV and the pictures of rejected images go.
        report: is given each line for the operator.
        settle: seconds for which a file must not have changed before it is read: it may still be being written.
        alarm_rate: bound on the probability that an unchanged line ever alarms.
    """

    detector: Detector
    folder: Path
    out: Path
    report: Callable[[str], None] = print
    settle: float = 0.5
    alarm_rate: float = 0.01
    _done: set[str] = field(default_factory=set)
    _seen: dict[Path, tuple[tuple[int, int] | None, float]] = field(default_factory=dict)
    _monitor: DriftMonitor | None = None
    _is_alarmed: bool = False
    _stopped: bool = False
    _own: Path | None = None  # where pictures are drawn, if that is in the folder

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            msg = f"there is no folder {self.folder}"
            raise FileNotFoundError(msg)
        rejected, folder = self.out / "rejected", self.folder.resolve()
        rejected.mkdir(parents=True, exist_ok=True)
        if rejected.resolve().is_relative_to(folder):
            self._own = self.folder / rejected.resolve().relative_to(folder)
        scale = self.detector.score_scale
        if scale is not None:
            self._monitor = DriftMonitor(scale.scale.calibrated(scale.good), self.alarm_rate)
        self._resume()

    def run(self, *, once: bool = False) -> int:
        """Judge what is there, then what arrives, until SIGINT or SIGTERM; returns the number of images judged.

        Args:
            once: stop when everything that is there has been judged.
        """
        count = 0
        with self._stopping():
            while not self._stopped:
                arrived = self._arrived(0 if once else self.settle)
                for path in arrived:
                    self._judge(path)
                    count += 1
                    if self._stopped:
                        break
                if once:
                    break
                if not arrived:
                    time.sleep(min(self.settle, 0.2))
        return count

    def _arrived(self, settle: float) -> list[Path]:
        """Images that have not changed for so many seconds and are not in the record, the oldest first."""
        suffixes, found = Image.registered_extensions(), []
        for path in self.folder.rglob("*"):
            if path.suffix.lower() not in suffixes or path.name.startswith("."):
                continue
            if self._own is not None and path.is_relative_to(self._own):
                continue
            try:
                status = path.stat()
            except OSError:  # it went away
                continue
            if not status.st_size or self._key(path) in self._done:
                continue
            state = (status.st_size, status.st_mtime_ns)  # a copy may have its source's time from the start
            seen, since = self._seen.get(path, (None, 0.0))
            if seen != state:
                seen, since = state, time.monotonic()
                self._seen[path] = (state, since)
            if time.monotonic() - since >= settle:
                found.append((status.st_mtime_ns, path))
        return [path for _, path in sorted(found)]

    def _judge(self, path: Path) -> None:
        """Judge an image, draw it if it is rejected, and record it."""
        line: dict[str, Any] = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds")}
        line["image"] = self._key(path)
        try:
            result = self.detector(path)
        except ImageError as error:
            line["error"] = str(error)
            self._record(line)
            self.report(f"{line['image']}: {error}")
            return
        boxes = [list(box) for box in result.boxes]
        line |= {"label": result.label, "score": result.score, "p_value": result.p_value, "boxes": boxes}
        if result.label:
            name = line["image"].replace("/", "__")
            draw(path, result).save(self.out / "rejected" / f"{name}.png")
        self._record(line)
        verdict = {True: "REJECT", False: "good", None: "score"}[result.label]
        self.report(f"{line['image']}: {verdict} {result.score:.3f}")
        self._watch_drift(result.score, say=True)

    def _record(self, line: dict[str, Any]) -> None:
        with (self.out / RECORD).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._done.add(line["image"])
        self._seen.pop(self.folder / line["image"], None)
        self._write_csv([line], "a")

    def _write_csv(self, lines: list[dict[str, Any]], mode: str) -> None:
        path = self.out / "results.csv"
        is_new = mode == "w" or not path.exists()
        with path.open(mode, newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if is_new:
                writer.writeheader()
            writer.writerows(lines)

    def _resume(self) -> None:
        """Read the record of an earlier watch; a line that was cut off by a kill is judged again."""
        path = self.out / RECORD
        if not path.exists():
            return
        whole, _, cut = path.read_bytes().rpartition(b"\n")
        lines = [json.loads(line) for line in whole.splitlines()]
        if cut:
            path.write_bytes(whole + b"\n" if whole else b"")
        for line in lines:
            self._done.add(line["image"])
            if "score" in line:
                self._watch_drift(line["score"], say=False)
        self._write_csv(lines, "w")
        self.report(f"going on after {len(lines)} images of an earlier watch")

    def _watch_drift(self, score: float, *, say: bool) -> None:
        if self._monitor is None or self._is_alarmed:
            return
        state = self._monitor.update(float(np.float32(score)))
        if state.alarm:
            self._is_alarmed = True
            if say:
                self.report(
                    f"DRIFT: scores have changed since about image {state.since} of {state.num_images} "
                    f"(an unchanged line ever says so with a probability of at most {self.alarm_rate:g}): check the "
                    "camera, the light and the parts, then calibrate again"
                )

    def _key(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Finish the image at hand when asked to stop."""
        before = {
            number: signal.signal(number, lambda *_: setattr(self, "_stopped", True))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def draw(path: Path, result: Result) -> Image.Image:
    """An image with the mask's outline tinted and a box around each defect."""
    image = Image.open(path).convert("RGB")
    if result.mask is not None:
        mask = Image.fromarray(result.mask.astype(np.uint8) * 90).resize(image.size)
        image.paste(Image.new("RGB", image.size, RED), mask=mask)
    drawing = ImageDraw.Draw(image)
    width = max(1, min(image.size) // 200)
    for left, top, right, bottom in result.boxes:
        drawing.rectangle((left - width, top - width, right + width - 1, bottom + width - 1), outline=RED, width=width)
    return image
