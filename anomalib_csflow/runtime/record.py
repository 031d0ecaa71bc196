"""The record of a watch: one line per image, on the disk before the next image is judged.

``results.jsonl`` is the record, ``results.csv`` the same as a table. What has a line is not judged again, so a watch
that was killed goes on where it was; another image under the name of one that has a line is judged too.
"""

import csv
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RECORD = "results.jsonl"
TABLE = "results.csv"
LOCK = "watch.lock"
COLUMNS = ("time", "image", "label", "score", "p_value", "boxes", "error")
State = tuple[int, int]
"""Size of a file, and when it was changed, in nanoseconds."""


class Record:
    """The record in a folder.

    Args:
        out: the folder, which exists.
        report: is told what went wrong with the table.
    """

    def __init__(self, out: Path, report: Callable[[str], None]) -> None:
        self.out = out
        self.report = report
        self._known: dict[str, tuple[State | None, str | None]] = {}
        self._has_table = True

    @contextmanager
    def held(self) -> Iterator[list[dict[str, Any]]]:
        """Hold the record alone, and give the lines of earlier watches; one that a kill cut off is removed.

        Raises:
            OSError: if another watch holds it, or it cannot be written.
            ValueError: if a line is damaged.
        """
        with self._locked():
            path = self.out / RECORD
            whole, _, cut = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
            lines = [_parsed(line, number, path) for number, line in enumerate(whole.splitlines(), 1)]
            if cut:
                path.write_bytes(whole + b"\n" if whole else b"")
            for line in lines:
                self._know(line)
            if lines:
                self._write_table(lines, "w")
            yield lines

    def has(self, name: str, state: State) -> bool:
        """Whether a file has a line, by its name, size and time; lines of earlier versions have the name alone."""
        return self._known.get(name, ((), ""))[0] in {state, None}

    def has_another(self, name: str) -> bool:
        """Whether any image of this name has a line."""
        return name in self._known

    def meets_again(self, name: str, state: State, digest: str) -> bool:
        """Whether a file whose time has changed is the image that has a line; if so, its new time is known."""
        is_same = self._known.get(name, (None, None))[1] == digest
        if is_same:
            self._known[name] = state, digest
        return is_same

    def append(self, line: dict[str, Any]) -> None:
        """Write a line to the disk, and to the table if that is possible.

        Raises:
            OSError: if it cannot be written.
        """
        try:
            with (self.out / RECORD).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            msg = (
                f"the record in {self.out} cannot be written ({error.strerror}): make room or give access, and start "
                f"the same watch again, which goes on with {line['image']}"
            )
            raise OSError(msg) from error
        self._know(line)
        self._write_table([line], "a")

    def _know(self, line: dict[str, Any]) -> None:
        state = (line["bytes"], line["mtime_ns"]) if "bytes" in line else None
        self._known[line["image"]] = state, line.get("sha256")

    def _write_table(self, lines: Sequence[dict[str, Any]], mode: str) -> None:
        """Write lines to the table; an open spreadsheet may forbid it, and the next start writes all of them."""
        path = self.out / TABLE
        try:
            is_new = mode == "w" or not path.exists()
            with path.open(mode, newline="", encoding="utf-8", errors="backslashreplace") as file:
                writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
                if is_new:
                    writer.writeheader()
                writer.writerows(lines)
        except OSError as error:
            if self._has_table:
                self.report(f"{path} cannot be written ({error.strerror}): {RECORD} has all lines")
            self._has_table = False

    @contextmanager
    def _locked(self) -> Iterator[None]:
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
                if error.errno not in {errno.EWOULDBLOCK, errno.EACCES}:
                    msg = f"{self.out} cannot be locked ({error.strerror}): choose an --out on a disk of this computer"
                raise OSError(msg) from error
            yield


def _parsed(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(line)
        if isinstance(found, dict) and isinstance(found.get("image"), str):
            return found
    except ValueError:
        pass
    msg = f"line {number} of {path} is damaged: delete it, and its image is judged again; or choose another --out"
    raise ValueError(msg)
