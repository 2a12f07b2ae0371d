"""Files and folders that appear whole or not at all, and how to tell that they are."""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ulmfit.locks import lock_folder

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h


def read_small(path: Path, most: int) -> bytes:
    """A file that is no larger than `most` bytes, whoever wrote it.

    Raises:
        OSError, ValueError: it cannot be read, or is larger.
    """
    if path.stat().st_size > most:
        raise ValueError(f"it is larger than {most >> 20} MiB")
    return path.read_bytes()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a name beside `path` to write to; that file takes the place of `path` at the end.

    After a failure it is removed, and what stood at `path` is still there. Folders above `path` are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        _to_disk(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Gives a new folder beside `path` to write into, for the caller to put in its place; what is left is removed.

    Other such folders for `path`, whose process was killed, are removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, path.name)
    while True:
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
        partial.mkdir()
        # As long as this process lives, others see by the lock that it is at work.
        descriptor, held = lock_folder(partial)
        if held is not False:
            break
        if descriptor is not None:  # somebody took it for abandoned before it was locked
            os.close(descriptor)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes left of `partial_folder` in `folder`; None: whatever its name."""
    stem = "*" if name is None else glob.escape(name)
    for partial in folder.glob(f".{stem}.{'[0-9a-f]' * 12}.partial"):
        if not partial.is_dir() or partial.is_symlink():
            continue
        descriptor, held = lock_folder(partial)
        if held:
            shutil.rmtree(partial, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def remove_partials(folder: Path) -> None:
    """Removes every unfinished file and folder below `folder`, in which no other process is at work."""
    for partial in [*folder.rglob(".*.partial"), *folder.rglob(".*.old")]:
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def put_folder(new: Path, final: Path, stays: Callable[[str], bool] = lambda name: False) -> None:
    """Puts the folder `new` in the place of `final`; a reader finds the old or the new one.

    Where the system cannot exchange two folders at once, there is an instant with neither.

    Args:
        stays: whether what has this name in `final` stays there.
    """
    for file in new.rglob("*"):
        if file.is_file():
            _to_disk(file)
    try:
        os.replace(new, final)  # works if there is nothing, or an empty folder
        return
    except OSError as error:
        if not final.is_dir() or error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES):  # Windows: the last
            raise
    for other in final.iterdir():
        if stays(other.name):
            _copy(other, new / other.name)
    if _exchange(new, final):
        return
    old = final.with_name(f".{final.name}.{uuid.uuid4().hex[:12]}.old")
    os.replace(final, old)
    try:
        os.replace(new, final)
    except BaseException:
        os.replace(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> bool:
    """Two folders change places, at once; False where the system does not offer that."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def _to_disk(path: Path) -> None:
    """Else a machine that loses power could come back with the name but without the content."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
