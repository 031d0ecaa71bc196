"""Features that are computed once: pyramids on disk, shared by several fits and processes.

One file per image, memory-mapped, in the safetensors format: nothing is unpickled. A file appears only when it is
complete (it is written under another name, then renamed), has a checksum, and is named after everything that it
depends on. So neither a process that is killed nor two processes at once leave wrong features behind. The checksum
detects accidents, not forgeries: against these, the store reads and deletes only this user's files (:mod:`~.trust`).
"""

import hashlib
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .trust import PRIVATE, check_directory, is_own, own_files

FORMAT = 2
"""Part of every name: increase it when the meaning of the stored values changes."""

BETWEEN_LOOKS = 2**26
"""Bytes that one process writes before it checks again how much all processes have written."""


def default_directory() -> Path:
    """``$ANOMALIB_CSFLOW_CACHE``, or ``anomalib_csflow`` in the user's cache folder.

    In a container whose user has no home, a folder of that user's among the temporary files.
    """
    named = os.environ.get("ANOMALIB_CSFLOW_CACHE")
    if named:
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "anomalib_csflow"
    except RuntimeError:  # no HOME, and the user is not in passwd
        user = os.getuid() if os.name == "posix" else "user"
        return Path(tempfile.gettempdir()) / f"anomalib_csflow-{user}"


def image_key(path: str | Path, view: str = "") -> str | None:
    """Key of an image file in its present state, seen through a named transform; None if there is no such file.

    It includes the inode's change time, which, unlike the modification time, cannot be set back.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 (many calls)
    except OSError:
        return None
    parts = (os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, view)
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


class FeatureStore:
    """Pyramids that were computed in the same way, by key.

    Args:
        directory: the directory of all stores; this one is a folder in it.
        context: everything that the features depend on, apart from the image: each context has its own store.
        dtype: in which floating-point features are stored.
        max_bytes: limit for the whole directory; the least recently used files are deleted first.

    Raises:
        UntrustedError: if other users can write in the directory.

    Example:
        >>> import tempfile
        >>> store = FeatureStore(Path(tempfile.mkdtemp()), {"backbone": "resnet18"})
        >>> store.put("image", (torch.ones(2, 4, 4), torch.zeros(2, 2, 2)))
        >>> [tuple(level.shape) for level in store.get("image")]
        [(2, 4, 4), (2, 2, 2)]
        >>> store.get("another image") is None
        True
    """

    def __init__(
        self,
        directory: Path,
        context: Mapping[str, str],
        dtype: torch.dtype = torch.float32,
        max_bytes: int = 20 * 10**9,
    ) -> None:
        described = json.dumps({**context, "dtype": str(dtype), "format": FORMAT}, sort_keys=True, indent=1)
        self.directory = directory
        self.folder = directory / hashlib.sha256(described.encode()).hexdigest()[:32]
        self.description = described
        check_directory(directory, self.folder)
        self.dtype = dtype
        self.max_bytes = max_bytes
        self._used: set[str] = set()  # keys that this process wrote or read
        self._room = 0
        self._is_writing = True

    def path(self, key: str) -> Path:
        """File of a key."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        """Whether there is a file for this key; only :meth:`get` checks that it is intact."""
        return is_own(self.path(key))

    def get(self, key: str) -> tuple[Tensor, ...] | None:
        """Read a pyramid, ``(C, H, W)`` per level; None if it is missing or damaged."""
        path = self.path(key)
        if not is_own(path):
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                pyramid = tuple(file.get_tensor(name) for name in sorted(file.keys()))
        except (OSError, SafetensorError):
            return None
        if key not in self._used:  # once per process
            if metadata.get("crc32") != self._checksum(key, pyramid):
                return None
            with suppress(OSError):
                os.utime(path)
            self._used.add(key)
        return pyramid

    def put(self, key: str, pyramid: tuple[Tensor, ...]) -> None:
        """Store a pyramid; if that fails, warn once and continue without storing."""
        if not self._is_writing:
            return
        stored = tuple(
            level.detach().to("cpu", self.dtype if level.is_floating_point() else None).contiguous()
            for level in pyramid
        )
        data = save(
            {f"{scale:03d}": level for scale, level in enumerate(stored)},
            metadata={"crc32": self._checksum(key, stored)},
        )
        try:
            if len(data) > self._room and not self._make_room(len(data)):
                self._stop(f"the features of this process reach its limit of {self.max_bytes / 1e9:g} GB")
                return
            self._write(self.path(key), data)
        except OSError as error:
            self._stop(str(error))
            return
        self._room -= len(data)
        self._used.add(key)

    def _write(self, path: Path, data: bytes) -> None:
        if not path.parent.exists():
            self.directory.mkdir(PRIVATE, parents=True, exist_ok=True)
            self.folder.mkdir(PRIVATE, exist_ok=True)
            check_directory(self.directory, self.folder)  # as somebody else may have made them
            path.parent.mkdir(PRIVATE, exist_ok=True)
            described = self.folder / "context.json"  # for people
            if not described.exists():
                _place(described, self.description.encode())
        if path.parent.is_symlink():
            msg = f"{path.parent} is a link, which the cache did not make"
            raise OSError(msg)
        _place(path, data)

    def _make_room(self, needed: int) -> bool:
        """Measure the directory, delete the least recently used files, and return whether ``needed`` bytes fit."""
        files = sorted(own_files(self.directory))
        total = sum(file.size for file in files)
        wanted = self.max_bytes - max(needed, min(BETWEEN_LOOKS, self.max_bytes // 10))
        for _, size, path in files:
            if total <= wanted:
                break
            if path.stem not in self._used:
                path.unlink(missing_ok=True)
                total -= size
        self._room = min(self.max_bytes - total, max(needed, BETWEEN_LOOKS))
        return needed <= self._room

    def _checksum(self, key: str, pyramid: tuple[Tensor, ...]) -> str:
        """Of all that a file says: whose features they are, and each level's type, shape and values."""
        value = zlib.crc32(f"{self.folder.name} {key}".encode())
        for level in pyramid:
            value = zlib.crc32(f"{level.dtype} {tuple(level.shape)}".encode(), value)
            value = zlib.crc32(level.flatten().view(torch.uint8).numpy().data, value)
        return f"{value:08x}"

    def _stop(self, reason: str) -> None:
        self._is_writing = False
        warnings.warn(
            f"the feature cache in {self.directory} stops storing: {reason}. Features that are not in it are "
            "computed in every epoch. Free some space, or set FeatureCache's directory or max_gb",
            stacklevel=2,
        )


def _place(path: Path, data: bytes) -> None:
    """Write a file under another name, and give it its own when it is complete."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)  # of a process that was killed, or a link
    try:
        with partial.open("xb") as file:
            file.write(data)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
