"""`ulmfit download`: files as they are published become what the configurations of the data sets name."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ulmfit.config import DownloadConfig
from ulmfit.data import published
from ulmfit.data.fetching import Remote
from ulmfit.data.published import PUBLISHED
from ulmfit.data.sources import iter_texts, load_splits, read_table
from ulmfit.errors import DataError, InUseError, UsageError
from ulmfit.hydra_config import load_config
from ulmfit.locks import locked
from ulmfit.tasks import download

Brought = Callable[..., DownloadConfig]


def archive(**members: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as made:
        for name, text in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(text.encode())
            made.addfile(about, io.BytesIO(text.encode()))
    return buffer.getvalue()


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Brought:
    """The files of a data set, put where `download` looks for them before it asks the network."""

    def bring(name: str, contents: list[bytes], rows: dict[str, int]) -> DownloadConfig:
        folder = tmp_path / name
        folder.mkdir()
        files = []
        for remote, content in zip(PUBLISHED[name].files, contents, strict=True):
            (folder / remote.name).write_bytes(content)
            files.append(Remote(remote.address, hashlib.sha256(content).hexdigest(), len(content)))
        changed = dataclasses.replace(PUBLISHED[name], files=tuple(files), rows=rows)
        monkeypatch.setitem(published.PUBLISHED, name, changed)
        config = load_config("download", [f"dataset={name}", f"dataset.path={folder}"])
        assert isinstance(config, DownloadConfig)
        return config

    return bring


def rows(config: DownloadConfig, split: str) -> list[tuple[str, str]]:
    assert config.dataset.path is not None
    table = read_table(Path(config.dataset.path) / getattr(config.dataset, split), label="label")
    assert table.labels is not None
    return list(zip(table.texts, table.labels, strict=True))


def test_trec(brought: Brought, capsys: pytest.CaptureFixture[str]) -> None:
    train = "DESC:manner How did serfdom develop ?\nNUM:date When was caf\u00e9 invented ?\n".encode("latin-1")
    config = brought("trec6", [train, b"ABBR:exp What is NASA ?\n"], {"train": 2, "test": 1})
    download.run(config)
    assert rows(config, "train") == [
        ("How did serfdom develop ?", "description"),
        ("When was caf\u00e9 invented ?", "numeric"),
    ]
    assert rows(config, "test") == [("What is NASA ?", "abbreviation")]
    said = capsys.readouterr().out
    assert "2 train, 1 test" in said and "terms: for research" in said and "ulmfit train dataset=trec6" in said
    download.run(config)
    assert capsys.readouterr().out.strip().endswith("holds trec6 already")


def test_imdb(brought: Brought) -> None:
    reviews = {
        f"aclImdb/{split}/{label}/{i}_9.txt": f"{split} {label} {i}<br />end"
        for split in ("train", "test")
        for label in ("pos", "neg")
        for i in range(20)
    }
    reviews |= {f"aclImdb/train/unsup/{i}_0.txt": f"two\nlines {i}" for i in range(3)}
    reviews |= {"aclImdb/README": "read me", "aclImdb/train/urls_pos.txt": "not a review"}
    config = brought("imdb", [archive(**reviews)], {"train": 40, "test": 40, "unlabelled": 3})
    download.run(config)
    found = rows(config, "train")
    assert sorted(found) == sorted(
        (f"train {label} {i}<br />end", label) for label in ("pos", "neg") for i in range(20)
    )
    assert {label for _, label in found[:10]} == {"pos", "neg"}  # mixed: the first rows are a trial's
    assert sorted(iter_texts(config.dataset, "unlabelled")) == [f"two lines {i}" for i in range(3)]


@pytest.mark.parametrize(
    ("name", "line", "text", "label"),
    [
        (
            "yelp_full",
            r'"5","He said ""great"".\n\nTwice, \""really\""."',
            'He said "great".\n\nTwice, "really".',
            "5_star",
        ),
        ("yelp_polarity", '"1","Awful."', "Awful.", "neg"),
        (
            "dbpedia14",
            '14,"A Book"," It was, of course, written."',
            "A Book It was, of course, written.",
            "WrittenWork",
        ),
    ],
)
def test_archives_of_zhang(brought: Brought, name: str, line: str, text: str, label: str) -> None:
    files = {"x_csv/train.csv": f"{line}\n{line}\n", "x_csv/test.csv": f"{line}\n", "x_csv/readme.txt": "no rows"}
    config = brought(name, [archive(**files)], {"train": 2, "test": 1})
    download.run(config)
    assert rows(config, "test") == [(text, label)]


def test_ag_news_marks_line_breaks_by_a_backslash(brought: Brought) -> None:
    content = b'"4","Chips up","A maker of\\chips said so."\n'
    config = brought("ag_news", [content, content], {"train": 1, "test": 1})
    written = download.run(config)
    assert rows(config, "test") == [("Chips up A maker of chips said so.", "Sci/Tech")]
    assert sorted(written) == ["test", "train"]


def test_files_that_were_brought_stay_and_others_go(brought: Brought, tmp_path: Path) -> None:
    config = brought("ag_news", [b'"4","a","b"\n'] * 2, {"train": 1, "test": 1})
    folder = tmp_path / "ag_news"
    (folder / "test.csv").rename(folder / ".test.csv.part")  # as if it had been fetched
    download.run(config)
    assert sorted(path.name for path in folder.iterdir()) == ["test.csv.bz2", "train.csv", "train.csv.bz2"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'"4","a","b"\n"4","a","b"\n', "gave the rows {'test': 2, 'train': 2}, expected {'train': 1, 'test': 1}"),
        (b'"5","a","b"\n', "cannot be read as published"),
        (b"nonsense", "cannot be read as published"),
        (b"\xff\n", "cannot be read as published"),
    ],
)
def test_nothing_half_written(brought: Brought, tmp_path: Path, content: bytes, reason: str) -> None:
    config = brought("ag_news", [content] * 2, {"train": 1, "test": 1})
    with pytest.raises(DataError) as raised:
        download.run(config)
    assert reason in str(raised.value)
    assert sorted(path.name for path in (tmp_path / "ag_news").iterdir()) == ["test.csv", "train.csv"]


def test_two_at_a_time(brought: Brought, tmp_path: Path) -> None:
    config = brought("ag_news", [b'"4","a","b"\n'] * 2, {"train": 1, "test": 1})
    with (
        locked(tmp_path / "ag_news" / ".download.lock"),
        pytest.raises(InUseError, match="which downloads into it; wait for it"),
    ):
        download.run(config)


def test_data_sets_without_an_address() -> None:
    with pytest.raises(UsageError, match=r"dataset=helpdesk is not published .* expected one of trec6, imdb, ag_news"):
        download.run(load_config("download", ["dataset=helpdesk"]))


@pytest.mark.parametrize(("name", "shown"), [(None, "null"), ("", "''"), ("train.csv.zst", "train.csv.zst")])
def test_names_that_cannot_be_written(name: str | None, shown: str) -> None:
    config = load_config("download", ["dataset=trec6"])
    config.dataset.train = name
    with pytest.raises(UsageError) as raised:
        download.run(config)
    assert str(raised.value).startswith(f"dataset.train={shown}: expected the name of the file to write")


def test_who_lacks_the_files_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULMFIT_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"There is no folder .*; 'ulmfit download dataset=imdb' fetches it"):
        load_splits(load_config("download", ["dataset=imdb"]).dataset)


def test_addresses_are_as_their_publishers_have_them() -> None:
    """Encrypted, each with a checksum; and every data set of the paper."""
    assert set(PUBLISHED) == {"trec6", "imdb", "ag_news", "dbpedia14", "yelp_full", "yelp_polarity"}
    for dataset in PUBLISHED.values():
        for remote in dataset.files:
            assert remote.address.startswith("https://")
            assert len(bytes.fromhex(remote.sha256)) == 32 and remote.size > 1000
