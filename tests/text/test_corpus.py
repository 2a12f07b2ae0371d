"""The lines a tokenizer learns from: nothing skipped, an even sample, bounded memory."""

from __future__ import annotations

import pytest

from ulmfit.config import RulesConfig
from ulmfit.text.corpus import sample, sentences
from ulmfit.text.rules import NEWLINE, Rules


def test_sample_is_bounded_even_when_early_lines_are_short():
    lines = ["ab"] * 5_000 + ["x" * 1000] * 20_000
    kept = sample(iter(lines), 10_000)
    assert 10_000 / 2 < sum(map(len, kept)) <= 20_000


def test_sample_is_even_and_keeps_order():
    kept = sample((f"{i:05}" for i in range(20_000)), 5 * 2_000)
    assert len(kept) == 2_000
    assert kept == sorted(kept)
    thirds = [sum(lower <= int(line) < lower + 5_000 for line in kept) for lower in range(0, 20_000, 5_000)]
    assert all(400 < share < 600 for share in thirds)
    assert sample(iter(["short"]), 10_000) == ["short"]


@pytest.mark.parametrize(
    "text",
    [
        "x" * 5_000,
        "中" * 4_000,
        "word " * 2_000,
        " " * 3_000 + "x",
        "x" + " " * 3_000,
        "ab\n\ncd  \n",
        ("x" * 999 + " ") * 5,
        "y" * 1500 + " " + "z " * 900,
    ],
)
def test_long_lines_are_cut_where_sentencepiece_would_skip_them(text):
    rules = Rules(RulesConfig(elongation=False, repetition=False))
    lines = list(sentences([text], rules, None))
    assert all(0 < len(line) <= 1000 and len(line.encode()) <= 4192 and line.strip() for line in lines)
    assert "".join("".join(lines).replace(NEWLINE, "").split()) == "".join(text.split())  # nothing else is lost


def test_lines_end_with_the_line_break_marker():
    lines = list(sentences(["Two lines\nin one", "", " \n ", "last"], Rules(RulesConfig(case=False)), None))
    assert lines == [f"Two lines{NEWLINE}", f"in one{NEWLINE}", f"last{NEWLINE}"]


def test_a_very_long_line_takes_linear_time():
    text = "word and " * 500_000
    assert sum(map(len, sentences([text], Rules(), None))) > 4_000_000
