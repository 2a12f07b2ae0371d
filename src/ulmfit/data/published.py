"""The data sets of the paper as their authors or mirrors publish them, and how their files become rows.

Addresses, sizes and SHA-256 are those that the Hugging Face `datasets` repository records for them
(`dataset_infos.json` of each data set); the counts of rows are the official ones.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ulmfit.data.fetching import Remote
from ulmfit.errors import DataError
from ulmfit.whole_file import whole_file

PublishedRow = tuple[str, str, str | None]  # split, text, label (None: unlabelled)
_TREC = {"ABBR": "abbreviation", "DESC": "description", "ENTY": "entity", "HUM": "human", "LOC": "location"}
_TREC |= {"NUM": "numeric"}
_AG = ("World", "Sports", "Business", "Sci/Tech")
_DBPEDIA = (
    *("Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder", "MeanOfTransportation", "Building"),
    *("NaturalPlace", "Village", "Animal", "Plant", "Album", "Film", "WrittenWork"),
)


@dataclass(frozen=True)
class Published:
    """A data set on the network.

    Attributes:
        files: what is to be fetched.
        read: the rows in those files, given where they lie by name.
        rows: how many there must be in each split.
        terms: what its authors ask for.
    """

    files: tuple[Remote, ...]
    read: Callable[[Mapping[str, Path]], Iterator[PublishedRow]]
    rows: Mapping[str, int]
    terms: str


def _read_trec(files: Mapping[str, Path]) -> Iterator[PublishedRow]:
    for split, name in (("train", "train_5500.label"), ("test", "TREC_10.label")):
        for line in files[name].read_text(encoding="latin-1").splitlines():
            labels, _, text = line.partition(" ")
            yield split, text, _TREC[labels.partition(":")[0]]


def _read_imdb(files: Mapping[str, Path]) -> Iterator[PublishedRow]:
    """In random order, for in the archive all reviews of a class follow one another."""
    found: list[PublishedRow] = []
    for path, content in _members(files["aclImdb_v1.tar.gz"]):
        if path.suffix != ".txt" or len(path.parts) != 4:  # aclImdb/train/pos/0_9.txt
            continue
        split, label = path.parts[1:3]
        text = content.read().decode("utf-8")
        found.append(("unlabelled", text, None) if label == "unsup" else (split, text, label))
    random.Random(0).shuffle(found)
    yield from found


def _zhang(
    classes: tuple[str, ...], escapes: Mapping[str, str]
) -> Callable[[Mapping[str, Path]], Iterator[PublishedRow]]:
    """Rows of Zhang et al. (2015): number of the class, perhaps a title, text; `escapes` and what they stand for."""

    def read(files: Mapping[str, Path]) -> Iterator[PublishedRow]:
        for name, path in files.items():
            members = _members(path) if name.endswith(".tgz") else iter([(PurePosixPath(name), path.open("rb"))])
            for member, content in members:
                if member.name not in ("train.csv", "test.csv"):
                    continue
                with content, io.TextIOWrapper(content, encoding="utf-8", newline="") as lines:
                    for number, *parts in csv.reader(lines):
                        text = " ".join(map(str.strip, parts))
                        for written, meant in escapes.items():
                            text = text.replace(written, meant)
                        yield member.stem, text, classes[int(number) - 1]

    return read


def _members(path: Path) -> Iterator[tuple[PurePosixPath, Any]]:
    """Names and contents of the files in an archive, read through once; nothing is unpacked to the disk."""
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is not None:
                yield PurePosixPath(member.name), content


_AG_ADDRESS = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv"
_FASTAI_ADDRESS = "https://s3.amazonaws.com/fast-ai-nlp"
_TREC_ADDRESS = "https://cogcomp.seas.upenn.edu/Data/QA/QC"
_YELP = {r"\n": "\n", r"\"": '"'}
_STARS = tuple(f"{n}_star" for n in range(1, 6))

PUBLISHED = {
    "trec6": Published(
        (
            Remote(
                f"{_TREC_ADDRESS}/train_5500.label",
                "9e4c8bdcaffb96ed61041bd64b564183d52793a8e91d84fc3a8646885f466ec3",
                335_858,
            ),
            Remote(
                f"{_TREC_ADDRESS}/TREC_10.label",
                "033f22c028c2bbba9ca682f68ffe204dc1aa6e1cf35dd6207f2d4ca67f0d0e8e",
                23_354,
            ),
        ),
        _read_trec,
        {"train": 5_452, "test": 500},
        "for research; cite Li and Roth (2002) and Hovy et al. (2001)",
    ),
    "imdb": Published(
        (
            Remote(
                "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
                "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
                84_125_825,
            ),
        ),
        _read_imdb,
        {"train": 25_000, "test": 25_000, "unlabelled": 50_000},
        "for research; cite Maas et al. (2011)",
    ),
    "ag_news": Published(
        (
            Remote(
                f"{_AG_ADDRESS}/train.csv",
                "76a0a2d2f92b286371fe4d4044640910a04a803fdd2538e0f3f29a5c6f6b672e",
                29_470_338,
            ),
            Remote(
                f"{_AG_ADDRESS}/test.csv",
                "521465c2428ed7f02f8d6db6ffdd4b5447c1c701962353eb2c40d548c3c85699",
                1_857_427,
            ),
        ),
        _zhang(_AG, {"\\": " "}),
        {"train": 120_000, "test": 7_600},
        "for research, not commercial; cite Zhang et al. (2015)",
    ),
    "dbpedia14": Published(
        (
            Remote(
                f"{_FASTAI_ADDRESS}/dbpedia_csv.tgz",
                "42db5221ddedddb673a4cabcc5f3a7d869714c878bcfe4ba94b29d14aa38e417",
                68_341_743,
            ),
        ),
        _zhang(_DBPEDIA, {}),
        {"train": 560_000, "test": 70_000},
        "CC BY-SA 3.0 and GFDL; cite Zhang et al. (2015)",
    ),
    "yelp_full": Published(
        (
            Remote(
                f"{_FASTAI_ADDRESS}/yelp_review_full_csv.tgz",
                "56006b0a17a370f1e366504b1f2c3e3754e4a3dda17d3e718a885c552869a559",
                196_146_755,
            ),
        ),
        _zhang(_STARS, _YELP),
        {"train": 650_000, "test": 50_000},
        "Yelp's data set agreement: academic use, not to be passed on; cite Zhang et al. (2015)",
    ),
    "yelp_polarity": Published(
        (
            Remote(
                f"{_FASTAI_ADDRESS}/yelp_review_polarity_csv.tgz",
                "528f22e286cad085948acbc3bea7e58188416546b0e364d0ae4ca0ce666abe35",
                166_373_201,
            ),
        ),
        _zhang(("neg", "pos"), _YELP),
        {"train": 560_000, "test": 38_000},
        "Yelp's data set agreement: academic use, not to be passed on; cite Zhang et al. (2015)",
    ),
}


def write_rows(published: Published, files: Mapping[str, Path], targets: Mapping[str, Path]) -> None:
    """The rows in `files` as a CSV file with a header for each split, and unlabelled text one a line, all or none.

    Args:
        files: where the fetched files lie, by name.
        targets: where each split goes; `.gz`, `.bz2` or `.xz` at its end compresses it.

    Raises:
        DataError: the files do not hold what they should.
    """
    counts: Counter[str] = Counter()
    with ExitStack() as replaced:
        partials = {split: replaced.enter_context(whole_file(path)) for split, path in targets.items()}
        with ExitStack() as opened:
            outputs = {
                split: opened.enter_context(_open_text(partial, targets[split])) for split, partial in partials.items()
            }
            writers = {split: csv.writer(file, lineterminator="\n") for split, file in outputs.items()}
            for split in outputs.keys() - {"unlabelled"}:
                writers[split].writerow(("text", "label"))
            try:
                for split, text, label in published.read(files):
                    counts[split] += 1
                    if split == "unlabelled":
                        outputs[split].write(" ".join(text.splitlines()) + "\n")
                    else:
                        writers[split].writerow((text, label))
            except (tarfile.TarError, EOFError, ValueError, KeyError, IndexError, csv.Error) as error:
                raise DataError(f"{', '.join(files)} cannot be read as published ({error!r:.200})") from error
        if counts != Counter(published.rows):
            raise DataError(
                f"{', '.join(files)} gave the rows {dict(sorted(counts.items()))}, expected {dict(published.rows)}"
            )


def _open_text(path: Path, named: Path) -> Any:
    opening: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return opening.get(named.suffix, open)(path, "wt", encoding="utf-8", newline="")
