"""Whom the store of features trusts: the user whose process this is, and root.

Features decide what is called defective, so a folder in which another user can write is not read. Only POSIX says who
owns a file; elsewhere nothing is checked.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PRIVATE = 0o700
"""Mode of the folders that the store makes."""

STORE_NAME = re.compile(r"[0-9a-f]{32}")
SHARD_NAME = re.compile(r"[0-9a-f]{2}")
FILE_NAME = re.compile(r"[0-9a-f]{64}\.safetensors|\.[0-9a-f]{64}\.[0-9]+\.partial")
"""Names that the store gives; a file with another is nobody's that it knows, and is never deleted."""


class UntrustedError(OSError):
    """Others can write where features would be read from."""


class OwnFile(NamedTuple):
    """A file that the store has written."""

    changed_ns: int
    size: int
    path: Path


def check_directory(directory: Path, folder: Path) -> None:
    """Check that no other user can put features into a store, or swap it; what does not exist yet is fine.

    Args:
        directory: of all stores. It may be a link, since who made it chose where it leads, and it may be open to all
            if it is as ``/tmp``, where nobody can rename what is another's.
        folder: of one store, in the directory.

    Raises:
        UntrustedError: names the folder, what is wrong with it and what to do.
    """
    if os.name != "posix":
        return
    user = os.getuid()
    with suppress(FileNotFoundError):
        status = directory.stat()
        _check(directory, status, status.st_uid in (user, 0), is_open=_is_open(status) and not _is_sticky(status))
        status = folder.lstat()
        _check(folder, status, status.st_uid == user, is_open=_is_open(status))


def is_own(path: Path) -> bool:
    """Whether a path leads to a regular file of this user, and through no link that another could have laid."""
    try:
        status, shard = path.lstat(), path.parent.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and stat.S_ISDIR(shard.st_mode) and _is_mine(status) and _is_mine(shard)


def own_files(directory: Path) -> Iterator[OwnFile]:
    """All files in a directory that a store has written: by their names, their places, and whose they are."""
    for store in _folders(directory, STORE_NAME):
        for shard in _folders(store, SHARD_NAME):
            for entry in _entries(shard):
                with suppress(OSError):  # other processes delete too
                    status = entry.stat(follow_symlinks=False)
                    if FILE_NAME.fullmatch(entry.name) and stat.S_ISREG(status.st_mode) and _is_mine(status):
                        yield OwnFile(status.st_mtime_ns, status.st_size, Path(entry.path))


def _folders(directory: Path, name: re.Pattern[str]) -> Iterator[Path]:
    for entry in _entries(directory):
        if name.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            yield Path(entry.path)


def _entries(directory: Path) -> Iterator[os.DirEntry[str]]:
    with suppress(OSError), os.scandir(directory) as entries:
        yield from entries


def _check(path: Path, status: os.stat_result, is_owned: bool, is_open: bool) -> None:
    if not stat.S_ISDIR(status.st_mode):
        problem, remedy = "is not a folder", "remove it"
    elif not is_owned:
        problem, remedy = f"belongs to another user ({status.st_uid})", "name a folder of your own"
    elif is_open:
        problem, remedy = "can be written by others", f"chmod go-w {path}"
    else:
        return
    msg = (
        f"features are not kept in {path}, which {problem}: {remedy} (FeatureCache's directory, ANOMALIB_CSFLOW_CACHE)"
    )
    raise UntrustedError(msg)


def _is_open(status: os.stat_result) -> bool:
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _is_sticky(status: os.stat_result) -> bool:
    return bool(status.st_mode & stat.S_ISVTX)


def _is_mine(status: os.stat_result) -> bool:
    return os.name != "posix" or status.st_uid == os.getuid()
