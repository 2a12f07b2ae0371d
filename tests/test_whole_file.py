"""Files and folders that appear whole or not at all, and locks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ulmfit import whole_file as module
from ulmfit.errors import InUseError
from ulmfit.locks import locked
from ulmfit.ranks import main_process
from ulmfit.whole_file import partial_folder, put_folder, remove_abandoned, whole_file


def test_replaces_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    with whole_file(path) as partial:
        partial.write_text("first", encoding="utf-8")
        assert not path.exists()
    with whole_file(path) as partial:
        partial.write_text("second", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "first"
    assert path.read_text(encoding="utf-8") == "second"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    path.write_text("as it was", encoding="utf-8")

    def fail() -> None:
        with whole_file(path) as partial:
            partial.write_text("half", encoding="utf-8")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text(encoding="utf-8") == "as it was"
    assert list(tmp_path.iterdir()) == [path]


# -- folders ----------------------------------------------------------------------------------------------------------


def fill(path: Path, text: str) -> None:
    with partial_folder(path) as partial:
        (partial / "content").write_text(text)
        put_folder(partial, path, stays=lambda name: name.startswith("my"))


@pytest.mark.parametrize("exchanges", [True, False], ids=["at once", "one after the other"])
def test_a_folder_takes_the_place_of_another(tmp_path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchanges:
        monkeypatch.setattr(module, "_exchange", lambda new, final: False)
    path = tmp_path / "above" / "folder"
    fill(path, "first")
    (path / "my notes").mkdir()
    (path / "my notes" / "a.txt").write_text("mine")
    (path / "my link").symlink_to("nowhere")
    (path / "other").write_text("goes")
    fill(path, "second")
    assert (path / "content").read_text() == "second"
    assert sorted(entry.name for entry in path.iterdir()) == ["content", "my link", "my notes"]
    assert (path / "my notes" / "a.txt").read_text() == "mine"
    assert [entry.name for entry in path.parent.iterdir()] == ["folder"]


def test_a_failure_leaves_the_folder_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder"
    fill(path, "first")
    monkeypatch.setattr(module, "_exchange", lambda new, final: False)
    renamed = []

    def replace(old: Path, new: Path) -> None:
        renamed.append(old)
        if len(renamed) == 3:
            raise OSError(5, "Input/output error")
        rename(old, new)

    rename = os.replace
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="Input/output"):
        fill(path, "second")
    assert (path / "content").read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_only_what_nobody_works_on_is_abandoned(tmp_path: Path) -> None:
    left = tmp_path / ".folder.0123456789ab.partial"
    other = tmp_path / ".other.0123456789ab.partial"
    for path in (left, other, tmp_path / ".mine.partial"):
        path.mkdir()
    with partial_folder(tmp_path / "folder") as partial:
        assert not left.exists()
        remove_abandoned(tmp_path)
        assert partial.is_dir()
        assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([".mine.partial", partial.name])
    assert [entry.name for entry in tmp_path.iterdir()] == [".mine.partial"]


# -- locks ------------------------------------------------------------------------------------------------------------


def test_a_lock_is_for_one(tmp_path: Path) -> None:
    path = tmp_path / "run" / ".lock"
    with locked(path):
        with pytest.raises(InUseError, match=rf"run is in use by process {os.getpid()} on .*; wait"), locked(path):
            raise AssertionError
        assert path.is_file()
    assert not path.exists()
    path.write_text("process 1 on earth\n")  # of one that was killed
    with locked(path):
        assert str(os.getpid()) in path.read_text()


@pytest.mark.parametrize(
    ("environment", "main"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_one_process_of_several_is_the_main_one(
    environment: dict[str, str], main: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main_process() is main
