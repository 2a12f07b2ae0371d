"""Rules are exact, switchable, and closed to whatever a text may hold."""

from __future__ import annotations

import unicodedata
from dataclasses import fields, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import rules_configs as configs

from ulmfit.config import RulesConfig
from ulmfit.errors import UsageError
from ulmfit.text.rules import CAPITALISED, ELONGATED, ESCAPE, MARKERS, NEWLINE, REPEATED, UPPER, Rules

RULES = Rules()
OFF = RulesConfig(unicode="none", html=False, case=False, elongation=False, repetition=False)
SPACE = "\u2581"  # SentencePiece's sign for a space

# Short parts that the rules care about, so that their combinations are met often.
PARTS = [
    *MARKERS, SPACE, " ", "  ", "\n", "\r", "\r\n", "\t", "\0", "\u2028", "\ud800", "\udfff", "\ufeff",
    "a", "A", "aa", "aaaa", "AAAA", "so", "Word", "WORD", "wOrd", "1", "1111", "\u0661", "_", ".", "....", "!", "don't",
    "very very very", "A A A", "aaaa aaaa aaaa", "b b b", "x1 x1 x1", "ß", "ẞ", "İ", "ı", "ŉ", "ΑΣ", "Σας",
    "ǅ", "Ǆ", "ﬁ", "Ⓐ", "ⒶB", "Ⅷ", "𝐀", "𐐀𐐨", "🅰", "é", "e\u0301", "E\u0301", "각", "中文", "文文文文文", "😀",
    "😀😀😀😀", "<br />", "&amp;", "&",
]  # fmt: skip
texts = st.lists(st.sampled_from(PARTS) | st.text(max_size=4), max_size=12).map("".join)


@settings(max_examples=1500, deadline=None)
@given(texts, configs)
@example("ⒶB", RulesConfig())  # an upper-case sign that is no letter, before one that is
@example("a" * 10_001 + "b" * 20_004, RulesConfig())
@example(" ".join(["very"] * 10_007), RulesConfig())
@example(" ".join(["long" * 1000] * 9), RulesConfig())
@example(f"{REPEATED}3{REPEATED}a a a", RulesConfig())
@example(f"a{ELONGATED}9999{ELONGATED}", RulesConfig())
@example("aaaa1111bbbb", RulesConfig())
@example("\n\n\n\n\n    \n x", RulesConfig())
def test_inverse_is_exact(text, config):
    rules = Rules(config)
    marked = rules.apply(text)
    assert rules.invert(marked) == rules.normalise(text)
    assert "\n" not in marked
    marked.encode("utf-8")


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_without_normalisation_nothing_is_lost(text):
    rules = Rules(RulesConfig(unicode="none", html=False))
    assert rules.invert(rules.apply(text)) == text.replace("\r\n", "\n").replace("\r", "\n")


def test_every_character_alone_and_in_a_word_comes_back():
    plain = Rules(RulesConfig(unicode="none", html=False))
    for start in range(0, 0x20000, 0x1000):
        chars = [chr(c) for c in range(start, start + 0x1000) if not 0xD800 <= c < 0xE000]
        text = " ".join(f"{c} {c}b {c}B a{c} A{c} {c * 5}" for c in chars).replace("\r", "")
        assert plain.invert(plain.apply(text)) == text


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("The cat", f"{CAPITALISED}the cat"),
        ("NASA I", f"{UPPER}nasa {CAPITALISED}i"),
        ("iPhone McDonald", "iPhone McDonald"),  # mixed case stays as it is
        ("Éa ΣΑΣ Ünter", f"{CAPITALISED}éa {UPPER}σας {CAPITALISED}ünter"),
        ("sooo soooo", f"sooo so{ELONGATED}4{ELONGATED}"),
        ("!!!!!", f"!{ELONGATED}5{ELONGATED}"),
        ("10000000", "10000000"),  # digits are no elongation: the count would not be told from them
        ("very very", "very very"),
        ("a very very very good", f"a {REPEATED}3{REPEATED}very good"),
        ("No no no", f"{CAPITALISED}no no no"),
        ("ha ha ha ha!", f"{REPEATED}4{REPEATED}ha!"),
        ("ha ha ha_", "ha ha ha_"),
        ("one\ntwo", f"one{NEWLINE} two"),
        ("AAAA AAAA AAAA", f"{REPEATED}3{REPEATED}{UPPER}a{ELONGATED}4{ELONGATED}"),
        (f"{CAPITALISED}{SPACE}", f"{ESCAPE}a{ESCAPE}g"),
    ],
)
def test_marked_form(text, marked):
    assert RULES.apply(text) == marked
    assert RULES.invert(marked) == text


def test_each_rule_has_its_switch():
    text = "Soooo <b>GOOD</b> &amp; very very very <br> e\u0301"
    assert Rules(OFF).apply(text) == text
    changed = {
        "html": "Soooo <b>GOOD</b> & very very very\ne\u0301".replace("\n", NEWLINE + " "),
        "unicode": "Soooo <b>GOOD</b> &amp; very very very <br> é",
        "case": f"{CAPITALISED}soooo <b>{UPPER}good</b> &amp; very very very <br> e\u0301",
        "elongation": f"So{ELONGATED}4{ELONGATED} <b>GOOD</b> &amp; very very very <br> e\u0301",
        "repetition": f"Soooo <b>GOOD</b> &amp; {REPEATED}3{REPEATED}very <br> e\u0301",
    }
    assert set(changed) == {field.name for field in fields(RulesConfig)}
    for name, expected in changed.items():
        assert Rules(replace(OFF, **{name: "nfc" if name == "unicode" else True})).apply(text) == expected


@settings(deadline=None)
@given(texts, configs)
def test_nobody_can_type_a_marker(text, config):
    """With all marking rules off, no marker but escapes and line breaks can appear, however it was typed."""
    marked = Rules(replace(config, case=False, elongation=False, repetition=False)).apply(text)
    for marker in (CAPITALISED, UPPER, ELONGATED, REPEATED, SPACE):
        assert marker not in marked
    assert marked.count(NEWLINE) == marked.count(NEWLINE + " ")


@pytest.mark.parametrize("entity", ["&#x1ab0;", "&#6832;", "&#x2581;"])
def test_an_entity_cannot_smuggle_a_marker_in(entity):
    marked = RULES.apply(entity)
    assert marked[0] == ESCAPE
    assert marked[1:].isalpha()
    assert marked[1:].isascii()


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("a<br />b<BR>c<br/>d", "a\nb\nc\nd"),
        ("a \n <br />\r\n<br /> b", "a\n\nb"),
        ("<br>", "\n"),
        ("  <brr> <b r>  ", "  <brr> <b r>  "),
        ("&lt;br&gt; &amp;lt; &quot;&#39;", "<br> &lt; \"'"),
        ("fish &chips; AT&T", "fish &chips; AT&T"),
        ("&#xD800; &#0;", "\ufffd \ufffd"),
        ("&#13;&#10;x", "\nx"),  # line ends are the same however they are written
        ("e&#769;", "é"),
        ("a\r\nb\rc\nd", "a\nb\nc\nd"),
        ("\ud800x\udc00", "?x?"),
        ("\0\x1f\x7f", "\0\x1f\x7f"),
    ],
)
def test_normalise(text, read):
    assert RULES.normalise(text) == read


@pytest.mark.parametrize("form", ["nfc", "nfkc"])
def test_unicode_forms(form):
    text = "ﬁ e\u0301 Å ① ｶﾞ 각"
    assert Rules(RulesConfig(unicode=form)).normalise(text) == unicodedata.normalize(form.upper(), text)
    assert Rules(RulesConfig(unicode="none")).normalise(text) == text


@pytest.mark.parametrize(
    ("form", "hint"), [("nfcc", "; did you mean 'nfc'?"), ("nfkd", "; did you mean 'nfkc'?"), ("zzz", ""), ("", "")]
)
def test_unknown_unicode_form(form, hint):
    with pytest.raises(UsageError) as caught:
        Rules(RulesConfig(unicode=form))
    assert str(caught.value) == f"tokenizer.rules.unicode is '{form}', expected one of nfc, nfkc, none{hint}"


# -- hostile and generated text ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "a" * 300_000,
        "ab " * 100_000,
        " " * 300_000 + "<",
        "<br" + " " * 300_000 + "<br",
        "&#" + "9" * 10_000 + ";",
        "&" * 300_000,
        "X" * 300_000,
        " ".join(["x" * 30_000] * 10),
        "ab " * 100_000 + "ab_",
        "\n" * 300_000,
        "<br>" * 50_000,
    ],
    ids=["run", "words", "spaces", "tag", "number", "ampersands", "upper", "long words", "almost", "lines", "breaks"],
)
def test_hostile_text_takes_linear_time_and_comes_back(text):
    """Quadratic patterns would take minutes here."""
    assert RULES.invert(RULES.apply(text)) == RULES.normalise(text)


def test_a_reference_with_thousands_of_digits_is_read_as_html_says():
    assert RULES.normalise("x&#" + "9" * 10_000 + ";y") == "x\ufffdy"


generated = st.lists(st.sampled_from([*MARKERS, *MARKERS, " ", "a", "B", "9", "99999", "9" * 30, "\n"]), max_size=40)


@settings(max_examples=1000, deadline=None)
@given(generated.map("".join))
def test_stray_markers_of_a_generated_text_vanish_and_stay_small(text):
    read = RULES.invert(text)
    if ESCAPE not in text:
        assert not set(read) & set(MARKERS)
    assert len(read) <= 10_000 * (len(text) + 1)


def test_nested_counts_do_not_multiply():
    bomb = f"{REPEATED}99999999{REPEATED}" + f"a{ELONGATED}99999999{ELONGATED}" * 3
    assert len(RULES.invert(bomb)) <= 30_000
    assert RULES.invert(f"a{ELONGATED}{'9' * 5000}{ELONGATED}") == "a" * 10_000
    assert RULES.invert(f"{REPEATED}0{REPEATED}word x{ELONGATED}0{ELONGATED}") == " "
