"""The line that tells how far an evaluation is."""

from __future__ import annotations

import pytest

from ulmfit import status_line
from ulmfit.tasks import reading
from ulmfit.tasks.reading import ReadingProgress


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (reading, status_line):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_time_left_goes_by_length(time: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = ReadingProgress(["x" * 99, "x" * 899, "", *["x" * 999] * 3])  # 4,001 characters, the longest first
    time.now += 19
    progress(1)
    assert capsys.readouterr().err == ""  # perhaps it is done soon
    time.now += 41
    progress(3)
    assert capsys.readouterr().err == "reading: 3 of 6 texts, 00:20 left\n"
    time.now += 59
    progress(4)
    assert capsys.readouterr().err == ""
    time.now += 1
    progress(5)
    assert capsys.readouterr().err == "reading: 5 of 6 texts, 00:00 left\n"
    time.now += 100
    progress(6)
    assert capsys.readouterr().err == ""


def test_nothing_is_told_if_not_asked_for(time: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = ReadingProgress(["a", "b"], shown=False)
    time.now += 1000
    progress(1)
    progress(2)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_is_left_clean(
    time: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = ReadingProgress(["a", "b"])
    time.now += 3
    progress(1)
    progress(2)
    written = capsys.readouterr().err
    assert written.startswith("\rreading: 1 of 2 texts, 00:03 left") and written.endswith(f"\r{'':<78}\r")
