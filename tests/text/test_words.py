"""Ids of documents by their raw words are those of the rules over the text and SentencePiece over each marked word."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import cache, partial
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import rules_configs as configs

from ulmfit import native
from ulmfit.config import RulesConfig, TokenizerConfig
from ulmfit.text import compiled_words, words
from ulmfit.text.rules import MARKERS
from ulmfit.text.tokenizer import KINDS, Tokenizer
from ulmfit.text.word_table import PADDING, WordTable, keys

SHIPPED = Path(words.__file__).parents[1] / "pretrained" / "en-small"
LINES = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on. Two, three; four! (Or five?)",
    'NASA sent a rocket to the Moon in 1969; it was SOOOOO good, very very very good! "Oh", he said.',
    "Die Größe der Straße überrascht die Bürger von Zürich und München.",
    "中文维基百科是一个自由的百科全书，由志愿者编写。",
    "Two lines.\nin one text, and the third.\n",
]
# What decides whether a document can be read by its raw words, so that combinations are met often.
PARTS = [
    *MARKERS, "\u2581", " ", " ", " ", " ", "  ", "    ", "\n", "\n\n\n\n", "\r", "\t", "\0", "\u2028", "\xa0", "\x1f",
    "\ud800", "\ufeff", "a", "A", "so", "soooo", "very", "very", "Very", "very.", "_", ".", "..", "....", ",", "'s",
    "!", ")", "(", "x1", "1", "1111", "\u0661", "The", "the", "THE", "don't", "é", "e\u0301", "中文", "😀", "😀😀😀😀",
    "sixteen-letters.", "eight.88", "seventeen-letters", "very very very", "a a a",
    "very very very-much-better-than-this",
    "<br />", "<br>", "&amp;", "&", "\x7f", "ß", "İ", "Σας", "🅰",
]  # fmt: skip
texts = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=14).map("".join)


def corpus() -> list[str]:
    return [f"{random.Random(i).choice(LINES)} {LINES[i % 5]}" for i in range(200)]


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    marked = tokenizer.rules.apply(text)
    encode = tokenizer._processor.encode
    return [i for word in marked.split(" ") for i in (encode(word) or encode(" ")[:1])] if marked else []


@cache
def with_rules(model: bytes, kind: str, rules: tuple[Any, ...], loops: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(model, TokenizerConfig(kind=kind, rules=RulesConfig(*rules)))
    assert not loops or tokenizer.compile() == (kind == "unigram")
    return tokenizer


@pytest.fixture(scope="module", params=["arrays", pytest.param("loops", marks=needs.numba)])
def loops(request: pytest.FixtureRequest) -> bool:
    """Whether documents are read by compiled loops."""
    return bool(request.param == "loops")


@pytest.fixture(scope="module", params=[*KINDS, "without bytes", "shipped"])
def models(request: pytest.FixtureRequest) -> tuple[bytes, TokenizerConfig]:
    if request.param == "shipped":
        tokenizer = Tokenizer.load(SHIPPED)
    elif request.param == "without bytes":
        tokenizer = Tokenizer.train(corpus(), TokenizerConfig(vocab_size=200, byte_fallback=False))
    else:
        tokenizer = Tokenizer.train(corpus(), TokenizerConfig(kind=request.param, vocab_size=420))
    return tokenizer._model, tokenizer.config


@pytest.fixture(autouse=True, scope="module")
def small_bounds() -> Iterator[None]:
    """So that what happens to much text, to a full table and to full blocks happens here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "_FEW_CHARS", 0)
        patch.setattr(words, "_BLOCK_CHARS", 60)
        patch.setattr(words, "_LARGE", 150)
        patch.setattr(words, "_KEPT_WORDS", 20)
        patch.setattr(words, "WordTable", partial(WordTable, bits=5))
        yield


@settings(max_examples=1500, deadline=None)
@given(batch=st.lists(texts, min_size=1, max_size=6), config=configs)
@example(batch=["", " ", "  ", "   ", "    ", "\n", "\n\n\n\n", "\0", "a\0", "a", "a\0\0"], config=RulesConfig())
@example(batch=["x\tvery very very.", "very", "very very", "very"], config=RulesConfig())
@example(batch=["very very veryy", "very very very_", "very very very\u2028x", "avery very very"], config=RulesConfig())
@example(batch=["a", "", "", "b", " ", ""], config=RulesConfig())
@example(batch=["seventeen-letters seventeen-letters seventeen-letters"], config=RulesConfig())
@example(batch=["seventeenletters1 seventeenletters1 seventeenletters1."], config=RulesConfig())
@example(batch=[f"x eight.88{'y' * 90} eight.88"], config=RulesConfig())  # alike in what is compared first
@example(batch=["The. The, The\n The.\n .The the THE. .\n"], config=RulesConfig())
def test_equals_the_rules_and_pieces_of_each_word(models, loops, batch, config):
    model, trained = models
    tokenizer = with_rules(model, trained.kind, astuple(config), loops)
    expected = [plain(tokenizer, text) for text in batch]
    for _ in range(2):  # words that are new, and known ones
        assert [document.tolist() for document in tokenizer.documents(batch)] == [[2, *ids] for ids in expected]
    assert tokenizer.encode_batch(batch) == expected
    assert [tokenizer.encode(text) for text in batch] == expected
    for text, ids in zip(batch, expected, strict=True):
        if trained.byte_fallback:
            assert tokenizer.decode(ids) == tokenizer.rules.normalise(text)


def test_a_document_read_in_blocks_by_threads(models, loops):
    """A table that all fill at once, or one for each thread, with words that push each other out."""
    tokenizer = with_rules(models[0], models[1].kind, astuple(models[1].rules), loops)
    documents = [f"{line} {number}" for number in range(40) for line in LINES]
    expected = [[tokenizer.bos_id, *plain(tokenizer, text)] for text in documents]

    def read(shift: int) -> bool:
        order = documents[shift:] + documents[:shift]
        found = [ids.tolist() for ids in tokenizer.documents(order)]
        return found == expected[shift:] + expected[:shift]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(0, 160, 10)))


def test_what_is_kept_is_bounded_and_stays_at_home(models):
    tokenizer = Tokenizer(*models)
    size = len(pickle.dumps(tokenizer))
    for start in range(0, 3000, 100):
        tokenizer.documents([f"{i} {'w' * (i % 90)}{i} {'x' * 100}{i}" for i in range(start, start + 100)])
        tokenizer.encode(" ".join(f"seen{i}" for i in range(start, start + 30)))
    for kept in (tokenizer._words._known, tokenizer._words._others):
        assert 0 < len(kept) <= 20
        assert max(map(len, kept)) <= 64
    assert len(pickle.dumps(tokenizer)) == size


@needs.numba
@pytest.mark.parametrize("config", [RulesConfig(), RulesConfig(case=False, elongation=False, repetition=False)])
def test_compiled_loops_know_every_code_point(config):
    """Within words, at their ends, before and behind letters of either case, twice, and as a word of their own."""
    tokenizer = with_rules(Tokenizer.load(SHIPPED)._model, "unigram", astuple(config), loops=True)
    chars = [chr(code) for code in range(0x11000) if not 0xD800 <= code < 0xE000]
    words = [
        f"a{c}b A{c}B {c} {c}{c}a {c}A{c}. {c.upper()}{c.lower()} {c.lower()}{c}\n{c.upper()}b, aB{c}" for c in chars
    ]
    documents = [" ".join(words[i : i + 40]) for i in range(0, len(words), 40)]
    for text, ids in zip(documents, tokenizer.documents(documents), strict=True):
        assert ids[1:].tolist() == plain(tokenizer, text)


@needs.numba
def test_words_of_all_lengths_are_read_by_compiled_loops():
    tokenizer = with_rules(Tokenizer.load(SHIPPED)._model, "unigram", astuple(RulesConfig()), loops=True)
    letters = "abcdefghijklmnopqrstuvwxyz-ABC1É中" * 40
    documents = [f"{letters[:n]} x{letters[:n]}\n {letters[n:n]}.{letters[: n // 3]}, {'A1' * n}" for n in range(600)]
    for text, ids in zip(documents, tokenizer.documents(documents), strict=True):
        assert ids[1:].tolist() == plain(tokenizer, text)


@needs.numba
def test_a_model_of_another_kind_is_not_read_by_compiled_loops():
    """SentencePiece gives symbols that a user has defined a score of their own."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, vocab_size=200, hard_vocab_limit=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=["umps", "leep"],
        pad_id=0, unk_id=1, bos_id=2, eos_id=-1, minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer(model.getvalue(), TokenizerConfig())
    assert not tokenizer.compile()
    batch = ["the fox jumps, the dog sleeps"]
    assert tokenizer.encode_batch(batch) == [plain(tokenizer, batch[0])]


def foreign(texts: list[str], **how: Any) -> Tokenizer:
    """A model that somebody else trained, without what ours have."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=420, hard_vocab_limit=False,
        remove_extra_whitespaces=False, pad_id=0, unk_id=1, bos_id=2, eos_id=-1, minloglevel=2, **how,
    )  # fmt: skip
    return Tokenizer(model.getvalue(), TokenizerConfig())


@needs.numba
def test_a_model_that_normalises_is_not_read_by_compiled_loops():
    assert foreign(corpus(), normalization_rule_name="identity", byte_fallback=True).compile()
    for name in ("nfkc", "nmt_nfkc", "nmt_nfkc_cf"):
        assert not foreign(corpus(), normalization_rule_name=name, byte_fallback=True).compile(), name


@needs.numba
def test_a_model_without_our_markers_is_read_by_compiled_loops():
    """Each line break is a word that is left to others."""
    tokenizer = foreign(corpus(), normalization_rule_name="identity")
    assert tokenizer.compile()
    batch = ["\n" * 2000, "\n.\n" * 300 + "The end", "A\n\nB " * 200]
    assert tokenizer.encode_batch(batch) == [plain(tokenizer, text) for text in batch]


@needs.numba
@pytest.mark.parametrize(
    "text",
    ["\u0627\u0644\u0643\u062a\u0627\u0628 \u0639\u0644\u0649", "\u4e2d\u6587\u7ef4\u57fa \u767e\u79d1", "a"],
)
def test_scripts_without_lower_case_are_read_by_compiled_loops(text):
    tokenizer = Tokenizer.train([text, f"{text} {text}"] * 20, TokenizerConfig(vocab_size=320))
    assert tokenizer.compile()
    assert tokenizer.encode_batch([text * 30]) == [plain(tokenizer, text * 30)]


@needs.numba
def test_without_numba_or_a_compiler_that_works_all_is_as_before(monkeypatch, caplog):
    tokenizer = Tokenizer.load(SHIPPED)
    with monkeypatch.context() as patch:
        patch.setattr(native, "find_spec", lambda name: None)
        assert not tokenizer.compile() and not caplog.messages
    with monkeypatch.context() as patch:
        patch.setattr(compiled_words, "_loops", lambda wide: 1 / 0)
        assert not tokenizer.compile()
        assert "which is slower without: division by zero" in caplog.text
    assert tokenizer.encode_batch(LINES) == [plain(tokenizer, line) for line in LINES]
    assert tokenizer.compile()


def test_a_model_whose_pieces_cross_spaces_is_given_whole_texts():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the dog and the cat and the cow"] * 50), model_writer=model, vocab_size=60,
        model_type="bpe", split_by_whitespace=False, hard_vocab_limit=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False, pad_id=0, unk_id=1, bos_id=2, eos_id=-1, minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer(model.getvalue(), TokenizerConfig(kind="bpe", rules=RulesConfig(case=False)))
    texts = ["the dog and the cat", "and the cow", "", "  the"]
    whole = [tokenizer._processor.encode(text) for text in texts]
    assert any("\u2581" in tokenizer.pieces[i][1:] for i in whole[0])
    assert [tokenizer.encode(text) for text in texts] == whole == tokenizer.encode_batch(texts)
    assert tokenizer.documents([]) == []


def test_a_mark_that_a_piece_joins_to_a_word_is_part_of_the_word():
    texts = ["e.g., this, i.e. that", "e.g. those, it's mine"] * 40
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=70, model_type="bpe", hard_vocab_limit=False,
        split_by_unicode_script=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
        pad_id=0, unk_id=1, bos_id=2, eos_id=-1, minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer(model.getvalue(), TokenizerConfig(kind="bpe"))
    assert "." in {piece[-1] for piece in tokenizer.pieces if len(piece) > 2}
    batch = ["e.g. this.", "this, that, i.e. those.", "mine."]
    for _ in range(2):
        assert tokenizer.encode_batch(batch) == [plain(tokenizer, text) for text in batch]


@pytest.mark.parametrize("vocab_size", [60_000, 70_000])
def test_the_table_gives_back_what_was_put_in(vocab_size):
    """In rows of 16 and 32 bits; of words that find no place, the newest stay."""
    rng = np.random.default_rng(0)
    table = WordTable(vocab_size, 2, bits=6)
    spelled = [f"{'w' * (i % 13)}{i}".encode() for i in range(300)]
    counts = rng.integers(1, 8, len(spelled))
    ids = [rng.integers(3, vocab_size, count) for count in counts]
    low, high = key_of(spelled)
    for start in range(0, len(spelled), 20):
        new = slice(start, start + 20)
        table.add(low[new], high[new], counts[new], np.concatenate(ids[new]))
        rows, missing = table.find(low[: start + 20], high[: start + 20])
        there = np.setdiff1d(np.arange(start + 20), missing)
        assert min(start + 20, 64) * 0.8 < len(there) <= 64
        assert table.counts(rows[there]).tolist() == counts[there].tolist()
        starts = np.cumsum(counts[there]) - counts[there]
        found = table.ids(rows[there], starts, counts[there])
        assert found.tolist() == np.concatenate([ids[i] for i in there]).tolist()
    assert len(np.intersect1d(there, np.arange(280, 300))) > 10
    begin = np.array([table.begin])
    assert table.ids(begin, np.zeros(1, np.int64), table.counts(begin)).tolist() == [2]


def key_of(spelled: list[bytes]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    joined = b" ".join(spelled) + b" " + PADDING
    lengths = np.array([len(word) for word in spelled], dtype=np.int64)
    starts = np.cumsum(lengths + 1) - lengths - 1
    return keys(np.frombuffer(joined + b"\xfe" * (-len(joined) % 8), np.uint8), starts, lengths)


@given(
    st.lists(st.binary(max_size=16).filter(lambda word: 0 not in word and not word.endswith((b"\xfd",))), unique=True)
)
def test_no_two_words_share_a_key(spelled):
    low, high = key_of(spelled)
    assert len(set(zip(low.tolist(), high.tolist(), strict=True))) == len(spelled)
