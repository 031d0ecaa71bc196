"""Watch a folder: judge images as they arrive, write what was found, alarm when the line drifts.

``results.jsonl`` is the record: one line per image, written to the disk before the next image is judged. What is in
it is not judged again, so a watch that was killed goes on where it was; another file under the name of one is.
"""

import csv
import json
import os
import signal
import sys
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

from .bundle import DIGEST
from .detector import SUFFIXES, Detector, ImageError, Result

RECORD = "results.jsonl"
LOCK = "watch.lock"
EMPTY = 10
"""A file that stays empty is reported after this many times the time for which others must not have changed."""
State = tuple[int, int]
"""Size of a file, and when it was changed, in nanoseconds."""
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
    _done: dict[str, State | None] = field(default_factory=dict)
    _seen: dict[Path, tuple[State | None, float]] = field(default_factory=dict)
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

    def run(self, *, once: bool = False) -> int:
        """Judge what is there, then what arrives, until SIGINT or SIGTERM; returns the number of images judged.

        Args:
            once: stop when everything that is there has been judged.

        Raises:
            OSError: if another watch writes into the same folder, or the record cannot be written.
            ValueError: if the record of an earlier watch is damaged.
        """
        count = 0
        with self._alone(), self._stopping():
            self._resume()
            while not self._stopped:
                start = time.monotonic()
                arrived = self._arrived(0 if once else self.settle)
                for path, state in arrived:
                    self._judge(path, state)
                    count += 1
                    if self._stopped:
                        break
                if once:
                    break
                if not arrived:  # a look at a large folder takes long, and rests as long
                    time.sleep(max(min(self.settle, 0.2), time.monotonic() - start))
        return count

    def _arrived(self, settle: float) -> list[tuple[Path, State]]:
        """Images that have not changed for so many seconds and are not in the record, the oldest first."""
        found = []
        for path in self._files():
            try:
                status = path.stat()
            except OSError:  # it went away
                continue
            state = (status.st_size, status.st_mtime_ns)  # a copy may have its source's time from the start
            if self._done.get(self._key(path), ()) in {state, None}:
                continue
            seen, since = self._seen.get(path, (None, 0.0))
            if seen != state:
                seen, since = state, time.monotonic()
                self._seen[path] = (state, since)
            if time.monotonic() - since >= (settle if status.st_size else EMPTY * settle):
                found.append((path, state))
        return sorted(found, key=lambda one: (one[1][1], one[0]))

    def _files(self) -> Iterator[Path]:
        """All images in the folder, except the pictures that are drawn here."""
        for folder, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if Path(folder, name) != self._own]
            yield from (
                Path(folder, name)
                for name in names
                if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
            )

    def _judge(self, path: Path, state: State) -> None:
        """Judge an image, draw it if it is rejected, and record it."""
        line: dict[str, Any] = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds")}
        line |= {"image": self._key(path), "bytes": state[0], "mtime_ns": state[1], "bundle": self._bundle}
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
            self._draw(path, line["image"], result)
        self._record(line)
        verdict = {True: "REJECT", False: "good", None: "score"}[result.label]
        self.report(f"{line['image']}: {verdict} {result.score:.3f}")
        self._watch_drift(result.score)

    @property
    def _bundle(self) -> str:
        """Which bundle judges: scores of different ones are not compared."""
        return str(self.detector.bundle.manifest[DIGEST])

    def _draw(self, path: Path, name: str, result: Result) -> None:
        """Draw a rejected image; the record does not wait for pictures that cannot be drawn."""
        stem = self.out / "rejected" / name.replace("/", "__")
        count = 1
        target = Path(f"{stem}.png")
        while target.exists():  # another image came under this name
            count += 1
            target = Path(f"{stem}_{count}.png")
        try:
            draw(path, result).save(target)
        except OSError as error:
            target.unlink(missing_ok=True)
            self.report(f"{name}: it is rejected, but there is no picture of it ({error})")

    def _record(self, line: dict[str, Any]) -> None:
        try:
            with (self.out / RECORD).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._write_csv([line], "a")
        except OSError as error:
            msg = (
                f"the record in {self.out} cannot be written ({error.strerror}): make room or give access, and start "
                f"the same watch again, which goes on with {line['image']}"
            )
            raise OSError(msg) from error
        self._done[line["image"]] = (line["bytes"], line["mtime_ns"])
        self._seen.pop(self.folder / line["image"], None)

    def _write_csv(self, lines: list[dict[str, Any]], mode: str) -> None:
        path = self.out / "results.csv"
        is_new = mode == "w" or not path.exists()
        with path.open(mode, newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            if is_new:
                writer.writeheader()
            writer.writerows(lines)

    def _resume(self) -> None:
        """Read the record of an earlier watch; a line that was cut off by a kill is judged again."""
        path = self.out / RECORD
        self._monitor, self._is_alarmed = self._new_monitor(), False
        if not path.exists():
            return
        whole, _, cut = path.read_bytes().rpartition(b"\n")
        lines = [_parsed(line, number, path) for number, line in enumerate(whole.splitlines(), 1)]
        if cut:
            path.write_bytes(whole + b"\n" if whole else b"")
        for line in lines:  # of earlier versions, lines have no state
            self._done[line["image"]] = (line["bytes"], line["mtime_ns"]) if "bytes" in line else None
        self._write_csv(lines, "w")
        self.report(f"going on after {len(lines)} images of an earlier watch")
        for line in lines:
            if "score" in line and line.get("bundle") == self._bundle:
                self._watch_drift(line["score"])

    def _new_monitor(self) -> DriftMonitor | None:
        """A monitor that ranks scores among those of the good images, if the same model scored them."""
        scale = self.detector.score_scale
        promise = self.detector.bundle.manifest["calibration"]["promise"]
        if scale is None or promise is None or promise["kind"] == "estimated":
            return None
        return DriftMonitor(scale.scale.calibrated(scale.good), self.alarm_rate)

    def _watch_drift(self, score: float) -> None:
        """Add a score; say once if scores have changed."""
        score = float(np.float32(score))
        if self._is_alarmed or self.detector.score_scale is None:
            return
        if self._monitor is None:  # models of other folds scored the good images: rank among the line's own
            self._monitor = DriftMonitor([score], self.alarm_rate)
            return
        state = self._monitor.update(score)
        if state.alarm:
            self._is_alarmed = True
            self.report(
                f"DRIFT: scores have changed since about image {state.since} of {state.num_images} "
                f"(an unchanged line ever says so with a probability of at most {self.alarm_rate:g}): check the "
                "camera, the light and the parts, then calibrate again"
            )

    def _key(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold a lock that the system releases when this process ends, however it ends."""
        with (self.out / LOCK).open("a") as file:
            try:
                if sys.platform == "win32":
                    import msvcrt  # noqa: PLC0415 (of this system)

                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    import fcntl  # noqa: PLC0415

                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                msg = f"another watch writes into {self.out}: stop it, or choose another --out"
                raise OSError(msg) from error
            yield

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


def _parsed(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(line)
        if isinstance(found, dict) and isinstance(found.get("image"), str):
            return found
    except ValueError:
        pass
    msg = f"line {number} of {path} is damaged: delete it, and its image is judged again; or choose another --out"
    raise ValueError(msg)


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
