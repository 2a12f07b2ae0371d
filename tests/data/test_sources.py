"""Reading every format, and one clear sentence for every kind of bad file."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from ulmfit.config import DatasetConfig
from ulmfit.data import sources
from ulmfit.data.sources import content_key, iter_texts, load_splits, read_table, total_bytes, total_chars
from ulmfit.errors import DataError, UsageError

ROWS = [("a cat", "x"), ('say "hi", twice', "y"), ("two\nlines", "x"), ("ünïcödé 漢字", "y")]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def as_csv(rows: list[tuple[str, str]], delimiter: str = ",") -> str:
    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    return f"text{delimiter}label\n" + "".join(f"{quoted(t)}{delimiter}{label}\n" for t, label in rows)


def rows_of(path: Path, **settings: object) -> list[tuple[str, str]]:
    table = read_table(path, label="label", **settings)  # type: ignore[arg-type]
    assert table.labels is not None
    return list(zip(table.texts, table.labels, strict=True))


# ---------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", as_csv(ROWS)),
        ("bom.csv", "\ufeff" + as_csv(ROWS)),
        ("crlf.csv", as_csv(ROWS).replace("\n", "\r\n")),
        ("mixed.csv", as_csv(ROWS).replace('x\n"say', 'x\r\n"say').replace('y\n"two', 'y\r"two')),
        ("semicolon.csv", as_csv(ROWS, ";")),
        ("a.tsv", as_csv(ROWS, "\t")),
        ("a.jsonl", "\n".join(json.dumps({"label": label, "text": t}) for t, label in ROWS)),
        ("packed.csv.gz", gzip.compress(as_csv(ROWS).encode(), mtime=0)),
        ("packed.csv.bz2", bz2.compress(as_csv(ROWS).encode())),
        ("packed.csv.xz", lzma.compress(as_csv(ROWS).encode())),
        ("hidden.csv", gzip.compress(as_csv(ROWS).encode(), mtime=0)),
    ],
)
def test_same_rows_from_every_text_format(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert rows_of(write(tmp_path / name, content)) == ROWS


def test_zstandard(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    path = write(tmp_path / "a.csv.zst", zstandard.ZstdCompressor().compress(as_csv(ROWS).encode()))
    assert rows_of(path) == ROWS


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"id": [1, 2, 3, 4], "text": [t for t, _ in ROWS], "label": [label for _, label in ROWS]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == ROWS
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": ["x", None]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="row 2, has no label"):
        rows_of(tmp_path / "b.parquet")
    write(tmp_path / "c.parquet", "text,label\n")
    with pytest.raises(DataError, match="not a readable parquet file"):
        rows_of(tmp_path / "c.parquet")


def test_encoding(tmp_path: Path) -> None:
    for encoding in ("utf-16", "cp1252"):
        path = write(tmp_path / f"{encoding}.csv", as_csv([("café", "x"), ("b", "y")]).encode(encoding))
        assert rows_of(path, encoding=encoding) == [("café", "x"), ("b", "y")]


def test_columns_are_joined_and_labels_tidied(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "title,body,stars\nGood,Very good,5.0\n,Only body, 4 \n")
    table = read_table(path, text=["title", "body"], label="stars")
    assert table.texts == ["Good\nVery good", "Only body"]
    assert table.labels == ["5.0", "4"]
    path = write(tmp_path / "a.jsonl", '{"text": "a", "label": 1}\n\n{"text": null, "label": 2.0}\n')
    assert rows_of(path) == [("a", "1"), ("", "2")]


def test_csv_without_header_by_position(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '3,"Title","Body, more"\n4,T,B\n')
    table = read_table(path, text=["1", "2"], label="0")
    assert (table.texts, table.labels) == (["Title\nBody, more", "T\nB"], ["3", "4"])


def test_tsv_with_literal_quotes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"Never" again\tx\n5" disk\ty\n"open\tx\n')
    assert rows_of(path) == [('"Never" again', "x"), ('5" disk', "y"), ('"open', "x")]


def test_fields_longer_than_pythons_limit(tmp_path: Path) -> None:
    long = "word " * 50_000
    assert rows_of(write(tmp_path / "a.csv", as_csv([(long, "x")]))) == [(long, "x")]


def test_only_line_feeds_end_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\u2028still one\x0bstill\x85one\ntwo\r\nthree\rfour")
    assert read_table(path).texts == ["one\u2028still one\x0bstill\x85one", "two", "three", "four"]


def test_fasttext(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "__label__x a cat\n__label__y\t a dog \n")
    assert rows_of(path) == [("a cat", "x"), ("a dog ", "y")]
    assert read_table(path).texts == ["a cat", "a dog "]
    write(path, "__label__x __label__y both\n")
    with pytest.raises(DataError, match="line 1, has 2 labels"):
        rows_of(path)


def test_empty_documents_stay_in_tables_and_leave_language_model_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "train.csv", "text,label\n,x\n  ,y\nhello,x\nworld,y\n")
    config = DatasetConfig(path=str(tmp_path), valid_fraction=0)
    assert load_splits(config).train.texts == ["", "", "hello", "world"]  # type: ignore[union-attr]
    assert "2 of 4 documents of the train split are empty" in caplog.text
    assert list(iter_texts(config, "lm")) == ["hello", "world"]


def test_wikipedia_blocks_and_wikitext_tokens(tmp_path: Path) -> None:
    blocks = write(tmp_path / "wiki.txt", "= One =\nFirst.\nSecond.\n\n= Two words =\nThird.\n\n= 3 =\n")
    assert read_table(blocks).texts == ["= One =\nFirst.\nSecond.", "= Two words =\nThird.", "= 3 ="]
    tokens = " \n = One = \n \n Intro . \n \n = = Part = = \n \n Text . \n \n = Two = \n \n Intro . \n"
    path = write(tmp_path / "wikitext.txt", tokens)
    assert read_table(path).texts == ["= One =\nIntro .\n= = Part = =\nText .", "= Two =\nIntro ."]
    untitled = write(tmp_path / "untitled.txt", "a\nb\n\n\nc\n")
    assert read_table(untitled, format="wikipedia").texts == ["a\nb", "c"]


def test_hugging_face_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})

    def split(texts: list[str], labels: list[int]) -> object:
        return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)

    saved = datasets.DatasetDict(
        train=split(["a", "b"], [0, 1]), validation=split(["c"], [1]), unsupervised=split(["d"], [-1])
    )
    saved.save_to_disk(tmp_path / "saved")
    config = DatasetConfig(path=str(tmp_path / "saved"))
    splits = load_splits(config)
    assert (splits.train.texts, splits.train.labels) == (["a", "b"], ["no", "yes"])  # type: ignore[union-attr]
    assert (splits.valid.labels, splits.unlabelled.texts) == (["yes"], ["d"])  # type: ignore[union-attr]
    assert splits.test is None
    assert list(iter_texts(config, "lm")) == ["a", "b", "d"]
    assert len(content_key(config, "lm")) == 64
    with pytest.raises(DataError, match=r"no column 'body'.*'text', 'label'"):
        load_splits(DatasetConfig(path=str(tmp_path / "saved"), text=["body"]))


def test_frames_and_lists() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": ["a", None, "c"], "label": [1.0, 2.0, 1.0]})
    table = sources.table_from_frame(frame)
    assert (table.texts, table.labels) == (["a", "", "c"], ["1", "2", "1"])
    frame.loc[1, "label"] = float("nan")
    with pytest.raises(DataError, match="frame, row 2, has no label"):
        sources.table_from_frame(frame)
    with pytest.raises(DataError, match=r"no column 'txt'.*'text', 'label'.*did you mean 'text'"):
        sources.table_from_frame(frame, text="txt")
    assert sources.table_from_frame(frame, label=None).labels is None
    assert sources.table_from_lists(("a", " "), [True, False]).texts == ["a", ""]
    with pytest.raises(DataError, match="2 texts and 1 labels"):
        sources.table_from_lists(["a", "b"], ["x"])
    with pytest.raises(DataError, match="single string"):
        sources.table_from_lists("a text")


# ---------------------------------------------------------------------------------------------- finding files


def test_names_that_are_recognised(tmp_path: Path) -> None:
    for name in ("reviews_train.csv", "reviews-dev.csv", "reviews.test.csv.gz"):
        content = as_csv([(f"{name} 1", "x"), (f"{name} 2", "y")]).encode()
        write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    write(tmp_path / "unsup.txt", "more\ntext\n")
    write(tmp_path / "README.md", "not data")
    splits = load_splits(DatasetConfig(path=str(tmp_path)))
    assert splits.train.texts == ["reviews_train.csv 1", "reviews_train.csv 2"]  # type: ignore[union-attr]
    assert splits.valid.texts == ["reviews-dev.csv 1", "reviews-dev.csv 2"]  # type: ignore[union-attr]
    assert splits.test.texts == ["reviews.test.csv.gz 1", "reviews.test.csv.gz 2"]  # type: ignore[union-attr]
    assert splits.unlabelled.texts == ["more", "text"]  # type: ignore[union-attr]


def test_numbered_parts_are_read_in_natural_order(tmp_path: Path) -> None:
    for i in (0, 2, 10):
        write(tmp_path / f"part-{i}.txt", f"= {i} =\ntext\n")
    write(tmp_path / "valid.txt", "= v =\n")
    config = DatasetConfig(path=str(tmp_path))
    assert list(iter_texts(config, "train")) == ["= 0 =\ntext", "= 2 =\ntext", "= 10 =\ntext"]
    assert list(iter_texts(config, "valid")) == ["= v ="]
    config.train = "part-1*.txt"
    assert list(iter_texts(config, "lm")) == ["= 10 =\ntext"]


def test_folder_for_each_class(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("pos", "neg"):
            write(tmp_path / split / label / "2.txt", f"{split} {label} two\n")
            write(tmp_path / split / label / "10.txt", f"{split} {label} ten")
    write(tmp_path / "train" / "unsup" / "0.txt", "unknown")
    write(tmp_path / "train" / "urls_pos.txt", "ignored")
    splits = load_splits(DatasetConfig(path=str(tmp_path), valid_fraction=0))
    assert splits.train.texts == ["train neg two", "train neg ten", "train pos two", "train pos ten"]  # type: ignore[union-attr]
    assert splits.train.labels == ["neg", "neg", "pos", "pos"]  # type: ignore[union-attr]
    assert len(splits.test) == 4  # type: ignore[arg-type]
    assert splits.unlabelled.texts == ["unknown"]  # type: ignore[union-attr]
    direct = load_splits(DatasetConfig(path=str(tmp_path / "test"), valid_fraction=0))
    assert direct.classes == ["neg", "pos"]


def test_test_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "new.csv", as_csv(ROWS[:1]))
    monkeypatch.chdir(tmp_path)
    splits = load_splits(DatasetConfig(path=None, test="new.csv"))
    assert splits.train is None
    assert splits.test.labels == ["x"]  # type: ignore[union-attr]
    with pytest.raises(DataError, match="no training split"):
        _ = splits.classes


def test_sample_data() -> None:
    splits = load_splits(DatasetConfig())
    assert len(splits.classes) == 6
    assert all(splits.of(name) is not None for name in ("train", "valid", "test", "unlabelled"))


# ---------------------------------------------------------------------------------------------- bad input

GOOD = "text,label\nhello there,x\nworld,y\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("text,label\n", "is empty: it holds no row"),
        ("text,label\na,x\nb,x\n", "has only the class 'x'"),
        ("txt,label\na,x\n", "has no column 'text': it has 'txt', 'label'; did you mean 'txt'"),
        ("text,topic\na,x\n", "has no column 'label': it has 'text', 'topic'"),
        (GOOD + "too,many,fields\n", "line 4, has 3 fields where 2 are expected"),
        (GOOD + '"two\nlines",x\nfew\n', "line 6, has 1 fields where 2 are expected"),
        (GOOD + 'a," never closed,y\nb,y\n', "from line 4 on with unbalanced double quotes"),
        (GOOD + "empty,\n", "line 4, has no label"),
        (GOOD + "nan,NaN\n", "line 4, has the label NaN"),
        (GOOD.encode() + b"caf\xe9,x\n", r"not valid utf-8 at byte 36 \(0xe9\); set dataset.encoding"),
        (("é" * 600_000 + "\n").encode() + b"\xff", "not valid utf-8 at byte 1200001"),
        (b"\xef\xbb\xbftext,label\n\xff,x\n", "at byte 14 "),
        (GOOD.encode("utf-16"), "dataset.encoding=utf-16"),
        (GOOD.encode() + b"a\0b,x\n", "NUL byte at position 34"),
        (b"PK\x03\x04rest of it", "zip archive or spreadsheet"),
        (gzip.compress(GOOD.encode() * 100, mtime=0)[:-20], "cannot be read to its end"),
    ],
)
def test_bad_csv(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = write(tmp_path / "train.csv", content)
    with pytest.raises(DataError, match=message) as caught:
        load_splits(DatasetConfig(path=str(tmp_path), valid_fraction=0))
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": "x"}\n{"text": \n', "line 2, is not valid JSON"),
        ('[{"text": "a", "label": "x"}]\n', "line 1, holds a list where one JSON object"),
        ('{"text": "a", "label": "x"}\n{"text": "b"}\n', "line 2 has no column 'label': it has 'text'"),
        ('{"text": "a", "label": NaN}\n', "line 1, has no label"),
        ('{"text": "a\\u0000b", "label": "x"}\n', "line 1, has a NUL character"),
    ],
)
def test_bad_json_lines(tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path / "train.jsonl", content)
    with pytest.raises(DataError, match=message):
        load_splits(DatasetConfig(path=str(tmp_path)))


def test_broken_surrogates_become_replacement_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a \\ud83d b \\ud83d\\ude00"}\n')
    assert read_table(path).texts == ["a \ufffd b \U0001f600"]


def test_missing_files_and_unclear_folders(tmp_path: Path) -> None:
    write(tmp_path / "data" / "reviews.csv", GOOD)
    for path, message in [
        ("data/review.csv", "no file or folder .*did you mean 'reviews.csv'"),
        ("dta/reviews.csv", "no folder .*dta .*did you mean 'data'"),
        ("data/reviews.csv/x", "no folder"),
    ]:
        with pytest.raises(DataError, match=message):
            load_splits(DatasetConfig(path=str(tmp_path / path)))
    with pytest.raises(DataError, match=r"no file or folder .*holds reviews.csv"):
        load_splits(DatasetConfig(path=str(tmp_path / "data"), test="gold"))
    with pytest.raises(DataError, match=r"dataset.train=\*.tsv matches no file in .*holds reviews.csv"):
        load_splits(DatasetConfig(path=str(tmp_path / "data"), train="*.tsv"))
    write(tmp_path / "data" / "other.csv", GOOD)
    with pytest.raises(DataError, match=r"other.csv, reviews.csv and it is unclear"):
        load_splits(DatasetConfig(path=str(tmp_path / "data")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        load_splits(DatasetConfig(path=str(tmp_path / "empty")))
    with pytest.raises(UsageError, match="did you mean 'csv'"):
        load_splits(DatasetConfig(path=str(tmp_path / "data"), format="cvs"))
    with pytest.raises(DataError, match="not an encoding"):
        load_splits(DatasetConfig(path=str(tmp_path / "data" / "reviews.csv"), encoding="utf8x"))
    with pytest.raises(DataError, match="plain text without labels"):
        read_table(write(tmp_path / "plain.txt", "a\nb\n"), label="label")


def test_unknown_label() -> None:
    table = sources.table_from_lists(["a", "b"], ["pos", "positve"])
    assert sources.table_from_lists(["a"], ["pos"]).label_ids(["neg", "pos"]) == [1]
    with pytest.raises(DataError, match=r"row 2, has the label 'positve'.*did you mean 'positive'"):
        table.label_ids(["neg", "pos", "positive"])


# ---------------------------------------------------------------------------------------------- streams and keys


def test_language_model_text(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", as_csv([(f"train {i}", "xy"[i % 2]) for i in range(40)]))
    write(tmp_path / "test.csv", as_csv([("Test  One", "x"), ("test two", "y")]))
    write(tmp_path / "unlabelled.txt", "test one\nfree\n\n")
    config = DatasetConfig(path=str(tmp_path), train_size=4)
    splits = load_splits(config)
    assert len(splits.train) == 4  # type: ignore[arg-type]
    assert list(iter_texts(config, "train")) == splits.train.texts  # type: ignore[union-attr]
    lm = list(iter_texts(config, "lm"))
    assert len(lm) == 37  # all 36 training texts whatever train_size says, and "free" but not the copy of a test text
    assert lm[-1] == "free"
    assert not set(lm) & set(splits.valid.texts)  # type: ignore[union-attr]
    config.lm_use_test = True
    assert list(iter_texts(config, "lm"))[-4:] == ["test one", "free", "Test  One", "test two"]
    with pytest.raises(UsageError, match="no split 'dev'"):
        iter_texts(config, "dev")


@pytest.mark.parametrize("limit", [None, 7])
def test_streams_equal_tables(tmp_path: Path, limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "labelled" / "train.csv", as_csv([(f"row {i}", "abc"[i % 3]) for i in range(90)]))
    write(tmp_path / "plain" / "train.txt", "".join(f"line {i}\n" for i in range(200)))
    for exact in (8 << 20, 10):
        monkeypatch.setattr(sources, "EXACT_SPLIT_BYTES", exact)
        for name in ("labelled", "plain"):
            config = DatasetConfig(path=str(tmp_path / name), valid_fraction=0.2, test_fraction=0.1, limit=limit)
            splits = load_splits(config)
            tables = {part: splits.of(part).texts for part in ("train", "valid", "test")}  # type: ignore[union-attr]
            assert {part: list(iter_texts(config, part)) for part in tables} == tables
            if limit is None:
                assert len({text for texts in tables.values() for text in texts}) == (90 if name == "labelled" else 200)
            else:
                assert [len(texts) for texts in tables.values()] == [7, 7, 7]


def test_stream_is_read_in_bounded_memory(tmp_path: Path) -> None:
    with bz2.open(tmp_path / "train.txt.bz2", "wt") as file:
        for i in range(1200):
            file.write(f"= Article {i} =\n" + "some words of text " * 500 + "\n\n")
    write(tmp_path / "valid.txt", "= V =\nx\n")
    tracemalloc.start()
    documents = sum(1 for _ in iter_texts(DatasetConfig(path=str(tmp_path)), "lm"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert documents == 1200
    assert peak < 7e6  # of 11 MB of text


def test_content_key_follows_content_and_settings(tmp_path: Path) -> None:
    write(tmp_path / "a" / "train.csv", as_csv(ROWS * 5))
    write(tmp_path / "b" / "train.csv", as_csv(ROWS * 5))

    def key(folder: str, split: str = "lm", **settings: object) -> str:
        return content_key(DatasetConfig(path=str(tmp_path / folder), **settings), split)  # type: ignore[arg-type]

    base = key("a")
    assert key("b") == base == key("a", name="other", train_size=4, train_seed=7)
    different = [
        key("a", split_seed=1),
        key("a", valid_fraction=0.2),
        key("a", text=["label"]),
        key("a", limit=3),
        key("a", "train"),
        key("a", "valid"),
    ]
    assert len({base, *different}) == 7
    assert key("a", "train", train_size=4) != key("a", "train")
    write(tmp_path / "b" / "train.csv", as_csv([*ROWS * 5, ("more", "x")]))
    assert key("b") != base
    write(tmp_path / "a" / "unlabelled.txt", "more\n")
    assert key("a") != base


def test_sizes(tmp_path: Path) -> None:
    text = "".join(f"zeile {i} mit umläuten\n" for i in range(20_000))
    write(tmp_path / "plain" / "train.txt", text)
    write(tmp_path / "packed" / "train.txt.bz2", bz2.compress(text.encode()))
    for folder in ("plain", "packed"):
        config = DatasetConfig(path=str(tmp_path / folder), valid_fraction=0.25)
        assert total_bytes(config, "lm") == pytest.approx(0.75 * len(text.encode()), abs=1)
        assert total_chars(config, "valid") == pytest.approx(0.25 * len(text), abs=1)


def test_importing_and_reading_need_no_heavy_module() -> None:
    code = (
        "import sys; from ulmfit.config import DatasetConfig; from ulmfit.data.sources import load_splits;"
        "load_splits(DatasetConfig()); print([m for m in ('torch','pandas','pyarrow','datasets') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ.copy()
    )
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------- real data

DATA = Path(os.environ.get("ULMFIT_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


@pytest.mark.data
@pytest.mark.skipif(not (DATA / "trec6").is_dir(), reason=f"no real data sets in {DATA}; set ULMFIT_DATA")
def test_real_data() -> None:
    trec = load_splits(DatasetConfig(path=str(DATA / "trec6")))
    assert (len(trec.train), len(trec.valid), len(trec.test)) == (4906, 546, 500)  # type: ignore[arg-type]
    wiki = DatasetConfig(path=str(DATA / "wikipedia-en"))
    assert sum(1 for _ in iter_texts(wiki, "valid")) == 240
    first = next(iter_texts(wiki, "lm"))
    assert first.startswith("= Alphons =\n")
    for name in ("wikitext-2", "wikitext-103"):
        articles = list(iter_texts(DatasetConfig(path=str(DATA / name)), "valid"))
        assert len(articles) == 60
