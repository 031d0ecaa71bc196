"""Features that are computed once: pyramids on disk, shared by several fits and processes.

One file per image, memory-mapped, in the safetensors format: nothing is unpickled. A file appears only when it is
complete (it is written under another name, then renamed), has a checksum, and is named after everything that it
depends on. So neither a process that is killed nor two processes at once leave wrong features behind.
"""

import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT = 1
"""Part of every name: increase it when the meaning of the stored values changes."""

BETWEEN_LOOKS = 2**26
"""Bytes that one process writes before it checks again how much all processes have written."""

OWN_FILES = f"{'[0-9a-f]' * 32}/[0-9a-f][0-9a-f]/*"
"""Pattern of the store's own files; nothing else in the directory is ever deleted."""


def default_directory() -> Path:
    """``$ANOMALIB_CSFLOW_CACHE``, or ``anomalib_csflow`` in the user's cache folder."""
    named = os.environ.get("ANOMALIB_CSFLOW_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "anomalib_csflow"


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
        return self.path(key).exists()

    def get(self, key: str) -> tuple[Tensor, ...] | None:
        """Read a pyramid, ``(C, H, W)`` per level; None if it is missing or damaged."""
        path = self.path(key)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                pyramid = tuple(file.get_tensor(name) for name in sorted(file.keys()))
        except (OSError, SafetensorError):
            return None
        if key not in self._used:  # once per process
            if metadata.get("crc32") != _checksum(pyramid):
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
            {f"{scale:03d}": level for scale, level in enumerate(stored)}, metadata={"crc32": _checksum(stored)}
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
            path.parent.mkdir(parents=True, exist_ok=True)
            (self.folder / "context.json").write_text(self.description)  # for people to read
        partial = path.with_name(f".{path.stem}.{os.getpid()}.partial")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def _make_room(self, needed: int) -> bool:
        """Measure the directory, delete the least recently used files, and return whether ``needed`` bytes fit."""
        files = []
        for path in self.directory.glob(OWN_FILES):
            with suppress(OSError):  # other processes delete too
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        wanted = self.max_bytes - max(needed, min(BETWEEN_LOOKS, self.max_bytes // 10))
        for _, size, path in sorted(files):
            if total <= wanted:
                break
            if path.stem not in self._used:
                path.unlink(missing_ok=True)
                total -= size
        self._room = min(self.max_bytes - total, max(needed, BETWEEN_LOOKS))
        return needed <= self._room

    def _stop(self, reason: str) -> None:
        self._is_writing = False
        warnings.warn(
            f"the feature cache in {self.directory} stops storing: {reason}. Features that are not in it are "
            "computed in every epoch. Free some space, or set FeatureCache's directory or max_gb",
            stacklevel=2,
        )


def _checksum(pyramid: tuple[Tensor, ...]) -> str:
    value = 0
    for level in pyramid:
        value = zlib.crc32(level.flatten().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
