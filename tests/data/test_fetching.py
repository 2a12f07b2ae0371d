"""Files over the network, from a server in this process that behaves badly when told to."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from ulmfit.data import fetching
from ulmfit.data.fetching import PAUSES, Remote, fetch
from ulmfit.errors import DataError, UlmfitError

CONTENT = random.Random(0).randbytes(300_000)


class Server(ThreadingHTTPServer):
    """Answers with `content`; `first` holds what goes wrong with the next requests, one each."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.first: list[tuple[str, int]] = []
        self.parts = True  # whether it can send parts
        self.asked: list[str | None] = []  # the Range of each request

    @property
    def remote(self) -> Remote:
        return Remote(
            f"http://127.0.0.1:{self.server_port}/a/file.bin", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT)
        )


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.headers.get("Range"))
        wrong, number = self.server.first.pop(0) if self.server.first else ("", 0)
        if wrong == "status":
            self.send_error(number)
            return
        if wrong == "hang up":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        start = 0
        if self.server.parts and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(self.server.content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        else:
            self.send_response(200)
        body = self.server.content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:number] if wrong == "cut" else body)
        if wrong == "cut":
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetching, "PAUSES", (0.0,) * len(PAUSES))
    monkeypatch.setattr(fetching, "_CHUNK", 10_000)
    with Server() as running:
        thread = Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_under_a_hidden_name(server: Server, tmp_path: Path) -> None:
    path = fetch(server.remote, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / ".file.bin.part"
    assert path.read_bytes() == CONTENT
    assert fetch(server.remote, path.parent) == path  # checked, not asked for again
    assert server.asked == [None]


def test_what_arrived_is_kept_when_the_connection_breaks(server: Server, tmp_path: Path) -> None:
    server.first = [("cut", 100_000), ("cut", 70_000)]
    assert fetch(server.remote, tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=170000-"]


def test_what_an_earlier_command_left_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".file.bin.part").write_bytes(CONTENT[:123_456])
    assert fetch(server.remote, tmp_path).read_bytes() == CONTENT
    assert server.asked == ["bytes=123456-"]


def test_a_server_without_parts_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.parts = False
    server.first = [("cut", 100_000)]
    assert fetch(server.remote, tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-"]


def test_a_server_that_is_busy_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.first = [("status", 503), ("status", 429), ("hang up", 0)]
    assert fetch(server.remote, tmp_path).read_bytes() == CONTENT


def test_a_connection_that_keeps_breaking_is_given_up(server: Server, tmp_path: Path) -> None:
    server.first = [("cut", 50_000), *[("cut", 0)] * 100]
    with pytest.raises(UlmfitError, match=r"broke off after 0\.1 of 0\.3 MB .*repeat the command to go on") as raised:
        fetch(server.remote, tmp_path)
    assert raised.value.exit_code == 1
    assert len(server.asked) == 1 + len(PAUSES)
    assert (tmp_path / ".file.bin.part").read_bytes() == CONTENT[:50_000]
    server.first.clear()
    assert fetch(server.remote, tmp_path).read_bytes() == CONTENT


def test_a_file_that_is_not_there(server: Server, tmp_path: Path) -> None:
    server.first = [("status", 404)]
    with pytest.raises(UlmfitError, match=rf"answered 404 Not Found; .*put it at {tmp_path / 'file.bin'} and repeat"):
        fetch(server.remote, tmp_path)
    assert len(server.asked) == 1


@pytest.mark.parametrize("other", [CONTENT[:-1] + b"x", CONTENT + b"x"], ids=["other content", "longer"])
def test_another_file_is_refused_and_removed(server: Server, tmp_path: Path, other: bytes) -> None:
    server.content = other
    with pytest.raises(DataError, match=r"does not send the file expected \((SHA-256|\S+ bytes in place)"):
        fetch(server.remote, tmp_path)
    assert names(tmp_path) == []


def test_another_length_is_noticed_before(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:1000]
    for left, reason in ((0, "1,000 bytes in place of 300,000"), (1000, "nothing follows 1,000 of 300,000 bytes")):
        (tmp_path / ".file.bin.part").write_bytes(CONTENT[:left])
        with pytest.raises(DataError, match=reason):
            fetch(server.remote, tmp_path)
        assert names(tmp_path) == []
    assert len(server.asked) == 2


def test_a_damaged_part_is_not_built_upon_twice(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".file.bin.part").write_bytes(b"x" * 1000)
    with pytest.raises(DataError, match="SHA-256"):
        fetch(server.remote, tmp_path)
    assert fetch(server.remote, tmp_path).read_bytes() == CONTENT


def test_a_file_brought_from_elsewhere_is_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(CONTENT)
    assert fetch(server.remote, tmp_path) == tmp_path / "file.bin"
    (tmp_path / "file.bin").write_bytes(b"a web page")
    with pytest.raises(DataError, match=r"file\.bin is not the file expected \(10 bytes in place of 300,000\)"):
        fetch(server.remote, tmp_path)
    assert server.asked == []
    assert names(tmp_path) == ["file.bin"]


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once and in one sentence: nobody listens, no such host."""
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}/file.bin"
        for address in (closed, "http://no-such-host.invalid/file.bin"):
            with pytest.raises(UlmfitError, match=r"cannot be reached \(.+\); connect this machine") as raised:
                fetch(Remote(address, "0" * 64, 10), tmp_path)
            assert raised.value.exit_code == 1
    assert names(tmp_path) == []


def test_a_full_disk_is_noticed_before(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UlmfitError, match=r"has 0 MB of room and the file takes 0 MB more; make room there"):
        fetch(server.remote, tmp_path)
    assert server.asked == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_fills_up_meanwhile(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".file.bin.part").symlink_to("/dev/full")
    with pytest.raises(UlmfitError, match="there is no room left"):
        fetch(server.remote, tmp_path)
