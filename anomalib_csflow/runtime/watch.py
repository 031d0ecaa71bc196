"""Watch a folder: judge images as they arrive, write what was found, alarm when the line drifts."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from anomalib_csflow.calibration import DriftMonitor

from .bundle import DIGEST, sha256
from .detector import Detector, ImageError, Result, images_in, read
from .record import Record, State

EMPTY = 10
"""A file that stays empty is reported after this many times the time for which others must not have changed."""
LONGEST_NAME = 150
"""Of a picture, in characters; of a longer name, the end is kept."""
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
        self._record = Record(self.out, self._say)

    def run(self, *, once: bool = False) -> int:
        """Judge what is there, then what arrives, until SIGINT or SIGTERM; returns the number of images judged.

        Args:
            once: stop when everything that is there has been judged.

        Raises:
            OSError: if another watch writes into the same folder, or the record cannot be written.
            ValueError: if the record of an earlier watch is damaged.
        """
        count = 0
        with self._record.held() as lines, self._stopping():
            self._resume(lines)
            while not self._stopped:
                start, judged = time.monotonic(), 0
                for path, state in self._arrived(0 if once else self.settle):
                    judged += self._judge(path, state)
                    if self._stopped:
                        break
                count += judged
                if once and not judged:
                    break
                if not judged:  # a look at a large folder takes long, and rests as long
                    time.sleep(max(min(self.settle, 0.2), time.monotonic() - start))
        return count

    def _arrived(self, settle: float) -> list[tuple[Path, State]]:
        """Images that have not changed for so many seconds and are not in the record, the oldest first."""
        found = []
        for path in self._files():
            state = _state(path)
            if state is None or self._record.has(self._key(path), state):
                continue
            seen, since = self._seen.get(path, (None, 0.0))
            if seen != state:
                seen, since = state, time.monotonic()
                self._seen[path] = (state, since)
            if time.monotonic() - since >= (settle if state[0] else EMPTY * settle):
                found.append((path, state))
        return sorted(found, key=lambda one: (one[1][1], one[0]))

    def _files(self) -> Iterator[Path]:
        """All images in the folder, except hidden ones and the pictures that are drawn here."""
        return (path for path in images_in(self.folder, self._own) if not path.name.startswith("."))

    def _judge(self, path: Path, state: State) -> bool:
        """Judge an image, draw it if it is rejected, and record it; returns whether it was another one, and whole."""
        name = self._key(path)
        line: dict[str, Any] = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "image": name}
        line |= {"bytes": state[0], "mtime_ns": state[1]} | self._judge_key
        result = None
        try:
            pixels = read(path)
            line["sha256"] = sha256(path)
            if _state(path) != state:  # it changed in the meantime: the next look takes it up
                return False
            if self._record.meets_again(name, state, line["sha256"]):
                return False
            result = self.detector(pixels[0])
        except (ImageError, OSError) as error:
            if _state(path) not in {state, None}:
                return False
            line["error"] = str(error)
        if result is not None:
            boxes = [list(box) for box in result.boxes]
            line |= {"label": result.label, "score": result.score, "p_value": result.p_value, "boxes": boxes}
            if result.label:
                self._draw(pixels[0], line, result)
        self._record.append(line)
        self._seen.pop(path, None)
        if result is None:
            self._say(f"{name}: {line['error']}")
            return True
        verdict = {True: "REJECT", False: "good", None: "score"}[result.label]
        self._say(f"{name}: {verdict} {result.score:.3f}")
        self._watch_drift(result.score)
        return True

    @property
    def _judge_key(self) -> dict[str, str]:
        """What judges: scores of other bundles and precisions are not compared."""
        return {"bundle": str(self.detector.bundle.manifest[DIGEST]), "precision": self.detector.precision}

    def _draw(self, pixels: NDArray[np.uint8], line: dict[str, Any], result: Result) -> None:
        """Draw a rejected image; the record does not wait for a picture that cannot be drawn."""
        stem = line["image"].replace("/", "__")
        if len(stem) > LONGEST_NAME or self._record.has_another(line["image"]):
            stem = f"{stem[-LONGEST_NAME:]}_{line['sha256'][:8]}"
        target = self.out / "rejected" / f"{stem}.png"
        try:
            draw(pixels, result).save(target)
        except OSError as error:
            self._say(f"{line['image']}: it is rejected, but there is no picture of it ({error})")

    def _resume(self, lines: list[dict[str, Any]]) -> None:
        """Go on after the lines of an earlier watch: what has drifted is still so."""
        self._monitor, self._is_alarmed = self._new_monitor(), False
        if lines:
            self._say(f"going on after {len(lines)} images of an earlier watch")
        for line in lines:
            if "score" in line and self._judge_key.items() <= line.items():
                self._watch_drift(line["score"])

    def _new_monitor(self) -> DriftMonitor | None:
        """A monitor that ranks scores among those of the good images, if the same model scored them."""
        scale = self.detector.score_scale
        promise = self.detector.bundle.manifest["calibration"]["promise"]
        if scale is None or promise is None or promise["kind"] == "estimated" or self.detector.precision != "f32":
            return None
        return DriftMonitor(scale.scale.calibrated(scale.good), self.alarm_rate)

    def _watch_drift(self, score: float) -> None:
        """Add a score; say once if scores have changed."""
        score = float(np.float32(score))
        if self._is_alarmed or self.detector.score_scale is None:
            return
        if self._monitor is None:  # another model scored the good images: rank among the line's own
            self._monitor = DriftMonitor([score], self.alarm_rate)
            return
        state = self._monitor.update(score)
        if state.alarm:
            self._is_alarmed = True
            self._say(
                f"DRIFT: scores have changed since about image {state.since} of {state.num_images} "
                f"(an unchanged line ever says so with a probability of at most {self.alarm_rate:g}): check the "
                "camera, the light and the parts, then calibrate again"
            )

    def _say(self, text: str) -> None:
        """Report, whatever characters a file's name has."""
        self.report(text.encode("utf-8", "backslashreplace").decode())

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


def _state(path: Path) -> State | None:
    """A file's state; None if it went away."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns  # a copy may have its source's time from the start


def draw(pixels: NDArray[np.uint8], result: Result) -> Image.Image:
    """An image ``(H, W, 3)`` with the mask's outline tinted and a box around each defect."""
    image = Image.fromarray(pixels)
    if result.mask is not None:
        mask = Image.fromarray(result.mask.astype(np.uint8) * 90).resize(image.size)
        image.paste(Image.new("RGB", image.size, RED), mask=mask)
    drawing = ImageDraw.Draw(image)
    width = max(1, min(image.size) // 200)
    for left, top, right, bottom in result.boxes:
        drawing.rectangle((left - width, top - width, right + width - 1, bottom + width - 1), outline=RED, width=width)
    return image
