"""Locks on files, which the kernel lets go of when their process ends, however it ends."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ulmfit.errors import InUseError

if sys.platform != "win32":  # there nothing is locked
    import fcntl


@contextmanager
def locked(
    path: Path, meanwhile: str = "which trains there; wait for it or end it, or choose another seed= or runs="
) -> Iterator[None]:
    """Holds the file `path` (made here, removed afterwards) for this process alone: its folder is in use.

    Args:
        meanwhile: what the error says about the other process.

    Raises:
        InUseError: another process holds it.
    """
    if sys.platform == "win32":
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        held = try_lock(descriptor)
        if held is False:
            owner = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(descriptor)
            raise InUseError(f"{path.parent} is in use by {owner}, {meanwhile}")
        if held is None or _stands_at(descriptor, path):
            break
        os.close(descriptor)  # its owner has just removed it
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Whether an open file or folder could be locked; None: this file system or platform has no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def lock_folder(folder: Path) -> tuple[int | None, bool | None]:
    """A descriptor to close (None: there is none) and the outcome of `try_lock` on a folder.

    The outcome is False also if the folder is not there (any more).
    """
    if sys.platform == "win32":
        return None, None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None, False
    except OSError:  # somebody else's
        return None, None
    held = try_lock(descriptor)
    return descriptor, held and _stands_at(descriptor, folder)


def _stands_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
