"""WikiText token files: running text, and the words that published perplexities are per."""

from __future__ import annotations

import bz2
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ulmfit.config import DatasetConfig
from ulmfit.data.content import word_count
from ulmfit.data.sources import content_key, iter_texts, load_splits
from ulmfit.data.wikitext import detokenise, raw_articles, words_and_ends
from ulmfit.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("ULMFIT_DATA") or ROOT.parent / "shared" / "data")

# As the files begin and end: a blank line, blank lines around headings, a space before and behind each line.
SMALL = """ \n = First One = \n \n He said : " it 's <unk> , isn 't it ? " ( 1 @,@ 000 @.@ 5 ) \n Second line . \n
 \n = = Part = = \n \n \n = = = Sub @-@ part = = = \n \n Text with k \n = 1 and Ω . \n \n = Second = \n
 End — of 10 % ; $ 5 \n \n"""


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (" = Robert Boulter = ", "= Robert Boulter ="),
        (" = = = 2000 – 2005 = = = ", "=== 2000–2005 ==="),
        (" a guest @-@ starring role in 1 @,@ 000 @.@ 5 of 3 ", "a guest-starring role in 1,000.5 of 3"),
        (' the " big " one , he said : " no ! " ', 'the "big" one, he said: "no!"'),
        (" Teddy 's Story isn 't O 'Brien 's ", "Teddy's Story isn't O'Brien's"),
        (" the players ' choice was ' this ' ", "the players' choice was 'this'"),
        (" ( a ; b ) [ c ] costs $ 5 or 10 % ... ", "(a; b) [c] costs $5 or 10%..."),
        (" the <unk> , a <formula> and — well — Mr. <unk> ", "the <unk>, a <formula> and—well—Mr. <unk>"),
        (" = 1 rad / s ", "= 1 rad / s"),
        ("", ""),
        (" . ", "."),
        (" @-@ ", "@-@"),
    ],
)
def test_detokenise(line: str, text: str) -> None:
    assert detokenise(line) == text


def tokenise(text: str) -> str:
    """What made the files, as far as the property below goes: Moses' rules, and marks for what stood inside a word."""
    text = re.sub(r"(?<=\w)([-,.])(?=\w)", r" @\1@ ", text)
    text = re.sub(r"(?<!@)([,.;:!?%)\]](?=[\s,.;:!?%)\]\"]|$)|[(\[$\"]|—)(?!@)", r" \1 ", text)
    text = re.sub(r"(?<=\w)('(?:s|t|re|ve|ll|d|m))\b", r" \1", text)
    return f" {' '.join(text.split())} "


WORD = st.one_of(
    st.from_regex(r"[A-Za-zé]{1,8}", fullmatch=True),
    st.from_regex(r"[1-9]{1,3}(,[0-9]{3})?(\.[0-9])?%?", fullmatch=True),
    st.from_regex(r"[a-z]{2,5}-[a-z]{2,5}", fullmatch=True),
    st.from_regex(r"[a-z]{2,5}('s|'t|'re|'ll)", fullmatch=True),
    st.from_regex(r"\$[1-9]{1,3}", fullmatch=True),
    st.just("<unk>"),
)
PHRASE = st.lists(WORD, min_size=1, max_size=4).map(" ".join)
CLAUSE = st.one_of(
    PHRASE,
    PHRASE.map(lambda p: f"({p})"),
    PHRASE.map(lambda p: f'"{p}"'),
    st.tuples(PHRASE, PHRASE).map("—".join),
)
LINE = st.lists(CLAUSE, min_size=1, max_size=5).flatmap(
    lambda clauses: st.tuples(
        *(st.sampled_from(["", ",", ";", ":", "."]) for _ in clauses[1:]), st.sampled_from([".", "!", "?"])
    ).map(lambda ends: " ".join(c + e for c, e in zip(clauses, ends, strict=True)))
)


@settings(max_examples=120, deadline=None)
@given(LINE)
def test_detokenising_inverts_tokenising(line: str) -> None:
    assert detokenise(tokenise(line)) == line


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*"=@-,.\"'()[]$%—", "= =", "@-@", "'s", "<unk>", "a", "1", "–"]), max_size=12))
def test_words_survive_whatever_stands_together(words: list[str]) -> None:
    """Only spaces go, and the marks @-@, @,@ and @.@ become what they stand for."""
    plain = re.sub(r"(?<= )@([-,.])@(?= )", r"\1", " ".join(words)).replace(" ", "")
    assert detokenise(" ".join(words)).replace(" ", "").replace("@", "") == plain.replace("@", "")


def small(tmp_path: Path, text: str = SMALL) -> DatasetConfig:
    (tmp_path / "wiki.test.tokens").write_text(text, encoding="utf-8")
    return DatasetConfig("small", str(tmp_path), "wikitext", test="wiki.test.tokens", train="", valid="")


def test_articles_and_words_of_a_small_file(tmp_path: Path) -> None:
    config = small(tmp_path)
    first, second = iter_texts(config, "test")
    assert first.split("\n") == [
        "= First One =",
        "He said: \"it's <unk>, isn't it?\" (1,000.5)",
        "Second line.",
        "== Part ==",
        "=== Sub-part ===",
        "Text with k",
        "= 1 and Ω.",  # a formula cut at its lines is no title: no blank line stands before it
    ]
    assert second == "= Second =\nEnd—of 10%; $5"
    lines = SMALL.split("\n")[:-1]
    assert word_count(config, "test") == sum(len(line.split()) for line in lines) + len(lines) == 60 + 19
    assert word_count(replace(config, limit=1), "test") == sum(map(words_and_ends, list(raw_articles(lines))[:1]))
    assert word_count(replace(config, format="wikipedia"), "test") is None
    assert content_key(config, "test") != content_key(replace(config, format="wikipedia"), "test")


@pytest.mark.parametrize("text", ["", " \n \n", "\n"])
def test_a_file_without_text(tmp_path: Path, text: str) -> None:
    assert list(iter_texts(small(tmp_path, text), "test")) == []


def test_a_file_without_titles_is_one_article(tmp_path: Path) -> None:
    config = small(tmp_path, " one , two \n \n three \n")
    assert list(iter_texts(config, "test")) == ["one, two\nthree"]
    assert word_count(config, "test") == 4 + 3


def test_there_are_no_labels(tmp_path: Path) -> None:
    config = replace(small(tmp_path), train="wiki.test.tokens")
    train = load_splits(config).train
    assert train is not None
    assert train.labels is None
    with pytest.raises(DataError, match="labels"):
        _ = load_splits(config).classes


@pytest.mark.data
@pytest.mark.parametrize(("folder", "words"), [("wikitext-2", 245_569), ("wikitext-103", 245_569)])
def test_published_number_of_words(folder: str, words: int) -> None:
    if not (REAL / folder).is_dir():
        pytest.skip(f"the real data sets are not in {REAL}")
    config = DatasetConfig(folder, str(REAL / folder), "wikitext", test="test.txt.bz2", train="", valid="")
    assert word_count(config, "test") == words
    texts = list(iter_texts(config, "test"))
    assert len(texts) == 60
    lines = bz2.decompress((REAL / folder / "test.txt.bz2").read_bytes()).decode().split("\n")
    assert sum(text.count("\n") + 1 for text in texts) == sum(1 for line in lines if line.strip())
    assert not any(mark in text for text in texts for mark in ("@-@", "@,@", "@.@", " ,", " ; ", "( "))
