"""Files from the network: gone on with where they broke off, checked against a SHA-256, whole or not there."""

from __future__ import annotations

import http.client
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from ulmfit.durations import clock
from ulmfit.errors import DataError, UlmfitError, disk_full
from ulmfit.status_line import StatusLine
from ulmfit.whole_file import sha256_of

TIMEOUT = 30.0  # seconds without a byte after which a connection is taken for dead
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before a connection is tried again
_CHUNK = 1 << 18
_BUSY = (429, 500, 502, 503, 504)  # answers of a server that may work in a moment
_BROKEN = (http.client.HTTPException, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Remote:
    """A file on the network.

    Attributes:
        size: in bytes.
    """

    address: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rpartition("/")[2]


class _BrokenOff(Exception):
    """A connection that another attempt may make good."""


def fetch(remote: Remote, folder: Path) -> Path:
    """A complete, checked copy of `remote` in `folder`: the file of its name where somebody put it, else `.NAME.part`.

    What an earlier call left is gone on with, if the server can send parts of a file. An interrupted transfer is tried
    again, as long as each attempt brings something or for `PAUSES`.

    Raises:
        UlmfitError: the network, the server or the disk does not allow it; what has arrived stays for the next call.
        DataError: the content is not the expected one.
    """
    brought = folder / remote.name
    if brought.is_file():
        if differs := _differs(brought, remote):
            raise DataError(f"{brought} is not the file expected ({differs}); remove it")
        return brought
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{remote.name}.part"
    line, failures = StatusLine(log_seconds=30.0), 0
    try:
        while (have := _length(part)) < remote.size:
            _check_room(folder, remote.size - have)
            try:
                _receive(remote, part, have, line)
            except _BrokenOff as reason:
                failures = 0 if _length(part) > have else failures + 1
                if failures >= len(PAUSES):
                    raise UlmfitError(
                        f"{remote.address} broke off after {_length(part) / 1e6:.1f} of {remote.size / 1e6:.1f} MB "
                        f"({reason}); repeat the command to go on from there"
                    ) from None
                time.sleep(PAUSES[failures])
    finally:
        line.clear()
    if differs := _differs(part, remote):
        raise _refused(remote, part, differs)
    return part


def _receive(remote: Remote, part: Path, have: int, line: StatusLine) -> None:
    """Appends to `part`, of which `have` bytes are there, what the server still has to send."""
    brought = part.with_name(remote.name)
    request = urllib.request.Request(remote.address, headers={"User-Agent": "ulmfit"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code in _BUSY:
            raise _BrokenOff(f"the server answered {error.code} {error.reason}") from None
        if error.code == 416:
            raise _refused(remote, part, f"nothing follows {have:,} of {remote.size:,} bytes") from None
        raise UlmfitError(
            f"{remote.address} is not to be had: the server answered {error.code} {error.reason}; "
            f"find the file ({remote.size / 1e6:.1f} MB) elsewhere, put it at {brought} and repeat the command"
        ) from None
    except http.client.HTTPException as error:  # among them that the server hangs up without an answer
        raise _BrokenOff(str(error) or type(error).__name__) from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise UlmfitError(
            f"{remote.address} cannot be reached ({getattr(reason, 'strerror', None) or reason}); connect this machine "
            f"to the network, or put the file ({remote.size / 1e6:.1f} MB) at {brought}, and repeat the command"
        ) from None
    with answer, part.open("ab") as file:
        if have and not (answer.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
            have = 0  # the server sends the whole file
            file.truncate(0)
        announced = answer.headers.get("Content-Length")
        if announced is not None and have + int(announced) != remote.size:
            raise _refused(remote, part, f"{have + int(announced):,} bytes in place of {remote.size:,}")
        started, before = time.monotonic(), have
        while chunk := _read(answer):
            try:
                file.write(chunk)
            except OSError as error:
                raise _no_room(part.parent, error) from None
            have += len(chunk)
            if have > remote.size:
                return  # for the caller to refuse
            if line.due():
                seconds = time.monotonic() - started
                rate = (have - before) / seconds
                left = clock((remote.size - have) / rate)
                line.show(
                    f"{remote.name}: {have / 1e6:.1f} of {remote.size / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s, {left} left"
                )
    if have < remote.size:
        raise _BrokenOff("the connection ended")


def _read(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read(_CHUNK)
    except _BROKEN as error:
        raise _BrokenOff(str(error) or type(error).__name__) from None


def _refused(remote: Remote, part: Path, differs: str) -> DataError:
    """Removes what has arrived, and says why."""
    part.unlink(missing_ok=True)
    return DataError(
        f"{remote.address} does not send the file expected ({differs}), so it has been changed or was damaged on its "
        f"way; repeat the command, or put the right file at {part.with_name(remote.name)}"
    )


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UlmfitError(
            f"{folder} has {free / 1e6:.0f} MB of room and the file takes {needed / 1e6:.0f} MB more; make room there, "
            "or set ULMFIT_DATA to another folder"
        )


def _no_room(folder: Path, error: OSError) -> UlmfitError:
    if disk_full(error):
        return UlmfitError(f"there is no room left in {folder}; make some and repeat the command to go on")
    return UlmfitError(f"{folder} cannot be written to ({error.strerror or error}); choose another with ULMFIT_DATA")


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _differs(path: Path, remote: Remote) -> str:
    """In what a file is not `remote`; empty if it is."""
    size = path.stat().st_size
    if size != remote.size:
        return f"{size:,} bytes in place of {remote.size:,}"
    found = sha256_of(path)
    return "" if found == remote.sha256 else f"SHA-256 {found[:16]}... in place of {remote.sha256[:16]}..."
