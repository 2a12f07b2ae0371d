"""Text to ids and back without loss, in every script; training that repeats itself; files that fail with a sentence."""

from __future__ import annotations

import bz2
import io
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ulmfit.config import RulesConfig, TokenizerConfig
from ulmfit.errors import BundleError, DataError, UsageError
from ulmfit.text import tokenizer as module
from ulmfit.text.rules import MARKERS
from ulmfit.text.tokenizer import KINDS, META_FILE, MODEL_FILE, Tokenizer

LINES = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "NASA sent a rocket to the Moon in 1969; it was SOOOOO good, very very very good!",
    "Die Größe der Straße überrascht die Bürger von Zürich und München.",
    "中文维基百科是一个自由的百科全书，由志愿者编写。",
    "Two lines\nin one text, and the third.",
]
CORPUS = [f"{random.Random(i).choice(LINES)} {LINES[i % 5]}" for i in range(200)]
TYPED = [
    "<bos>",
    "<pad>",
    "<unk>",
    "<s>",
    "</s>",
    "<0x41>",
    "<0x00>",
    "\u2581<bos>\u2581",
    *MARKERS,
    "xxbos xxup",
    "▅",
    " ⁇ ",
]
any_text = st.lists(
    st.text(max_size=8) | st.sampled_from([*TYPED, " ", "\n", "\t", "\0", "the", "The", "中文", "😀", "\ud800"]),
    max_size=10,
).map("".join)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.train(CORPUS, TokenizerConfig(kind=request.param, vocab_size=420, sampling_alpha=0.3))


@pytest.fixture(scope="module")
def saved() -> Tokenizer:
    return Tokenizer.train(CORPUS, TokenizerConfig(vocab_size=400))


# -- text and ids ----------------------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(texts=st.lists(any_text, max_size=4))
@example(texts=["", " ", "  a  ", "\n", "\u2581", "\0"])
@example(texts=TYPED)
def test_any_text_comes_back_and_holds_no_control_id(tokenizer, texts):
    batch = tokenizer.encode_batch(texts)
    assert len(batch) == len(texts)
    for text, ids, document in zip(texts, batch, tokenizer.documents(texts), strict=True):
        assert tokenizer.encode(text) == ids
        assert document.tolist() == [tokenizer.bos_id, *ids]
        assert tokenizer.decode(ids) == tokenizer.rules.normalise(text)
        assert min(ids, default=3) > tokenizer.bos_id  # with byte fallback not even the unknown id
        assert max(ids, default=0) < tokenizer.vocab_size


@pytest.mark.parametrize("threads", [1, 3])
def test_batch_equals_single(tokenizer, threads):
    texts = [*CORPUS[:40], "", "\n", *TYPED]
    assert tokenizer.encode_batch(texts, threads=threads) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.documents([]) == []


@settings(max_examples=100, deadline=None)
@given(text=any_text)
def test_sampled_pieces_read_alike(tokenizer, text):
    for ids in tokenizer.encode_batch([text] * 3, sampling=True):
        assert tokenizer.decode(ids) == tokenizer.rules.normalise(text)
        assert min(ids, default=3) > tokenizer.bos_id


def test_sampling_differs_only_when_switched_on(tokenizer):
    text = CORPUS[0]
    assert len({tuple(ids) for ids in tokenizer.encode_batch([text] * 20, sampling=True)}) > 5
    assert len({tuple(d.tolist()) for d in tokenizer.documents([text] * 20, sampling=True)}) > 5
    assert len({tuple(ids) for ids in tokenizer.encode_batch([text] * 20)}) == 1
    off = Tokenizer(tokenizer._model, replace(tokenizer.config, sampling_alpha=0.0))
    assert off.encode_batch([text], sampling=True) == [tokenizer.encode(text)]


def test_seeded_sampling_repeats_itself(tokenizer):
    def draw(seed: int, threads: int) -> list[list[int]]:
        tokenizer.seed_sampling(seed)
        return tokenizer.encode_batch(CORPUS[:30], threads=threads, sampling=True)

    assert draw(5, 1) == draw(5, 1) == draw(5, 3)
    assert draw(5, 1) != draw(6, 1)
    assert draw(2**40, 1) == draw(2**40, 1)


def test_without_byte_fallback_a_foreign_character_is_unknown():
    plain = Tokenizer.train(CORPUS, TokenizerConfig(vocab_size=200, byte_fallback=False))
    assert plain.unk_id in plain.encode("the 🦊 dog")
    assert plain.unk_id not in plain.encode("the dog")
    assert not any(map(plain.is_byte, range(plain.vocab_size)))
    for text in TYPED:
        assert not {plain.pad_id, plain.bos_id} & set(plain.encode(text))
    assert "🦊" not in plain.decode(plain.encode("the 🦊 dog"))


def test_control_ids_vanish_and_numpy_ids_are_read(tokenizer):
    document = tokenizer.documents(["The dog\nsleeps"])[0]
    assert tokenizer.decode([0, 0, *document, 0]) == "The dog\nsleeps"
    assert tokenizer.decode([]) == ""
    assert tokenizer.pieces[:3] == ["<pad>", "<unk>", "<bos>"]
    assert tokenizer.is_byte(tokenizer.encode("\0")[-1])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_ids_can_be_read(tokenizer, data):
    """What a model generates need not be the pieces of a text, nor valid UTF-8."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=60))
    text = tokenizer.decode(ids)
    text.encode()
    assert len(text) <= 10_000 * (len(ids) + 1)


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_ids_out_of_range(tokenizer, wrong):
    with pytest.raises(UsageError, match=f"the id {wrong} is no piece of this tokenizer, expected 0 to"):
        tokenizer.decode([5, wrong])


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_training_repeats_itself(kind):
    config = TokenizerConfig(kind=kind, vocab_size=400)
    first = Tokenizer.train(CORPUS, config)
    again = Tokenizer.train((text for text in CORPUS), config)  # an iterator is read once
    assert again.fingerprint == first.fingerprint
    assert again.pieces == first.pieces
    assert again._model == first._model


def test_training_repeats_itself_in_another_process():
    code = (
        "import json, sys; from ulmfit.config import TokenizerConfig; from ulmfit.text.tokenizer import Tokenizer;"
        "print(Tokenizer.train(json.load(sys.stdin), TokenizerConfig(vocab_size=400)).fingerprint)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(CORPUS),
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout.strip() == Tokenizer.train(CORPUS, TokenizerConfig(vocab_size=400)).fingerprint


def test_fingerprint_tells_what_changes_ids():
    config = TokenizerConfig(kind="bpe", vocab_size=400)
    base = Tokenizer.train(CORPUS, config)
    assert len(base.fingerprint) == 16
    others = [
        Tokenizer.train(CORPUS, replace(config, kind="unigram")),
        Tokenizer.train(CORPUS, replace(config, vocab_size=380)),
        Tokenizer.train([*CORPUS, "zebra " * 50], config),
        Tokenizer(base._model, replace(config, rules=RulesConfig(case=False))),
        Tokenizer(base._model, replace(config, rules=RulesConfig(unicode="nfkc"))),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert Tokenizer(base._model, replace(config, sampling_alpha=0.5)).fingerprint == base.fingerprint


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("corpus", [["a"], ["word word"], ["中"], ["\t\0"], CORPUS[:3]])
def test_a_small_corpus_gives_a_smaller_vocabulary(kind, corpus):
    small = Tokenizer.train(corpus, TokenizerConfig(kind=kind, vocab_size=20_000))
    assert 259 + len(MARKERS) < small.vocab_size < 1000
    for text in [*CORPUS[:5], *corpus]:
        assert small.decode(small.encode(text)) == text


def test_the_model_holds_no_path():
    assert b"/" not in Tokenizer.train(["a b c " * 20], TokenizerConfig(vocab_size=300))._model


def test_progress_counts_documents():
    seen: list[int] = []
    Tokenizer.train(("the dog" for _ in range(2500)), TokenizerConfig(vocab_size=300), progress=seen.append)
    assert seen == [1000, 2000]


def test_only_the_sample_is_held(monkeypatch: pytest.MonkeyPatch):
    """The generator is drained, but what goes to SentencePiece is about `sample_chars`."""
    given_chars = 0

    def corpus() -> Iterator[str]:
        nonlocal given_chars
        for i in range(3_000):
            given_chars += len(CORPUS[i % 200])
            yield CORPUS[i % 200]

    original, kept = module.sample, []
    monkeypatch.setattr(module, "sample", lambda *a: kept.extend(original(*a)) or kept)
    Tokenizer.train(corpus(), TokenizerConfig(vocab_size=400, sample_chars=20_000))
    assert given_chars > 300_000
    assert 15_000 < sum(map(len, kept)) < 45_000


@pytest.mark.parametrize("corpus", [[], [""], [" \n "], ["\r\n", "\n"]])
def test_no_text(corpus):
    with pytest.raises(DataError, match="is empty, expected at least one document"):
        Tokenizer.train(iter(corpus))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": "unigrams"}, "tokenizer.kind is 'unigrams', expected one of unigram, bpe; did you mean 'unigram'?"),
        ({"kind": "word"}, "tokenizer.kind is 'word', expected one of unigram, bpe"),
        ({"vocab_size": 100}, "tokenizer.vocab_size is 100, expected 300 to 10000000"),
        ({"vocab_size": -1, "byte_fallback": False}, "tokenizer.vocab_size is -1, expected 50 to 10000000"),
        ({"character_coverage": 2.0}, "tokenizer.character_coverage is 2.0, expected 0.98 to 1.0"),
        ({"max_piece_length": 0}, "tokenizer.max_piece_length is 0, expected 1 to 512"),
        ({"sample_chars": 0}, "tokenizer.sample_chars is 0, expected 1 to 1000000000000"),
    ],
)
def test_wrong_configuration(change, sentence):
    with pytest.raises(UsageError) as caught:
        Tokenizer.train(CORPUS, TokenizerConfig(**change))
    assert str(caught.value) == sentence


def test_more_characters_than_pieces():
    corpus = ["".join(chr(0x4E00 + i) for i in range(500))] * 3
    with pytest.raises(
        UsageError, match="a bpe vocabulary of 300 pieces cannot be learnt from 3 lines of text; choose"
    ):
        Tokenizer.train(corpus, TokenizerConfig(kind="bpe", vocab_size=300, character_coverage=1.0))


# -- files -----------------------------------------------------------------------------------------------------------


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    tokenizer.save(tmp_path / "new" / "folder")  # again, over the old files
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [META_FILE, MODEL_FILE]
    loaded = Tokenizer.load(str(tmp_path / "new" / "folder"))
    assert loaded.config == tokenizer.config
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.pieces == tokenizer.pieces
    assert loaded.encode_batch(CORPUS) == tokenizer.encode_batch(CORPUS)


def test_goes_to_a_worker(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.config == tokenizer.config
    assert copy.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])


def test_a_failed_save_leaves_the_old_files(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(self: Path, content: bytes) -> None:
        with open(self, "wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        tokenizer.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def _edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        meta = json.loads((folder / META_FILE).read_text())
        change(meta)
        (folder / META_FILE).write_text(json.dumps(meta))

    return edit


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: [p.unlink() for p in f.iterdir()], "holds no tokenizer.model"),
    "no model": (lambda f: (f / MODEL_FILE).unlink(), "holds no tokenizer.model"),
    "no description": (lambda f: (f / META_FILE).unlink(), "holds no tokenizer.json"),
    "empty model": (lambda f: (f / MODEL_FILE).write_bytes(b""), "not a SentencePiece model"),
    "cut model": (
        lambda f: (f / MODEL_FILE).write_bytes((f / MODEL_FILE).read_bytes()[:900]),
        "SentencePiece|fingerprint",
    ),
    "text as model": (lambda f: (f / MODEL_FILE).write_text("hello"), "not a SentencePiece model"),
    "pickle as model": (lambda f: (f / MODEL_FILE).write_bytes(pickle.dumps([1])), "not a SentencePiece model"),
    "empty description": (lambda f: (f / META_FILE).write_text(""), "not a tokenizer description"),
    "list": (lambda f: (f / META_FILE).write_text("[]"), "not a tokenizer description"),
    "deep": (lambda f: (f / META_FILE).write_text("[" * 100_000), "not a tokenizer description"),
    "latin-1": (lambda f: (f / META_FILE).write_bytes(b"\xff{}"), "not a tokenizer description"),
    "no config": (_edit(lambda m: m.pop("config")), "not a tokenizer description .'config'"),
    "unknown key": (_edit(lambda m: m["config"].update(x=1)), "unexpected keyword argument 'x'"),
    "no rules": (_edit(lambda m: m["config"].update(rules=None)), "not a tokenizer description"),
    "wrong type": (_edit(lambda m: m["config"].update(sampling_alpha="much")), "sampling_alpha is 'much'"),
    "number as form": (_edit(lambda m: m["config"]["rules"].update(unicode=5)), "unicode is 5"),
    "unknown form": (_edit(lambda m: m["config"]["rules"].update(unicode="nfd")), "expected one of nfc, nfkc, none"),
    "newer": (_edit(lambda m: m.update(format_version=2, config={"new": 1})), "format 2, this version reads 1; update"),
    "other rules": (_edit(lambda m: m["config"]["rules"].update(case=False)), "not from the same tokenizer"),
    "other fingerprint": (_edit(lambda m: m.update(fingerprint="x" * 99)), "not from the same tokenizer"),
    "number as fingerprint": (_edit(lambda m: m.update(fingerprint=[])), "not from the same tokenizer"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_give_one_sentence(saved, name, tmp_path):
    folder = tmp_path / "tokenizer"
    saved.save(folder)
    damage, sentence = DAMAGE[name]
    damage(folder)
    with pytest.raises(BundleError, match=sentence) as caught:
        Tokenizer.load(folder)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value) or "SentencePiece" in str(caught.value)


def test_files_of_two_tokenizers_are_told_apart(saved, tmp_path):
    other = Tokenizer.train(CORPUS[:50], TokenizerConfig(vocab_size=350))
    saved.save(tmp_path / "a")
    other.save(tmp_path / "b")
    os.replace(tmp_path / "b" / MODEL_FILE, tmp_path / "a" / MODEL_FILE)
    with pytest.raises(BundleError, match=f"{other.fingerprint}.*{saved.fingerprint}.*not from the same tokenizer"):
        Tokenizer.load(tmp_path / "a")


def test_a_model_of_another_kind_is_refused():
    """SentencePiece's own defaults number the special pieces differently."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=200, hard_vocab_limit=False, minloglevel=2
    )
    with pytest.raises(BundleError, match=r"unknown and begin pieces \(-1, 0, 1\), expected \(0, 1, 2\)"):
        Tokenizer(model.getvalue(), TokenizerConfig())


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_hostile_models_fail_with_a_sentence(saved, data):
    model = bytearray(saved._model)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(model)))
        model[start : start + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    try:
        changed = Tokenizer(bytes(model), TokenizerConfig())
    except BundleError:
        return
    changed.decode(range(changed.vocab_size))
    changed.encode(CORPUS[0])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    values=json_values
    | st.fixed_dictionaries(
        {"format_version": st.just(1) | json_values, "fingerprint": json_values},
        optional={
            "config": json_values
            | st.fixed_dictionaries(
                {"rules": json_values | st.dictionaries(st.sampled_from([*asdict(RulesConfig())]), json_values)},
                optional={name: json_values for name in asdict(TokenizerConfig()) if name != "rules"},
            )
        },
    )
)
def test_hostile_descriptions_fail_with_a_sentence(saved, tmp_path_factory, values):
    folder = tmp_path_factory.getbasetemp() / "hostile"
    saved.save(folder)
    (folder / META_FILE).write_text(json.dumps(values))
    with pytest.raises(BundleError):
        Tokenizer.load(folder)


# -- real text -------------------------------------------------------------------------------------------------------

DATA = Path(os.environ.get("ULMFIT_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def _articles(path: Path, chars: int) -> list[str]:
    with bz2.open(path, "rt", encoding="utf-8") as file:
        text = "".join(islice(file, chars // 100))[:chars]
    return text.split("\n\n")


@pytest.mark.data
@pytest.mark.parametrize(
    ("path", "kind", "chars_per_token"),
    [
        ("wikipedia-en/part-0.txt.bz2", "unigram", (3.2, 4.4)),
        ("wikipedia-en/part-0.txt.bz2", "bpe", (3.2, 4.4)),
        ("wikipedia-de/wiki.txt.bz2", "unigram", (3.0, 4.4)),
        ("wikipedia-zh/wiki.txt.bz2", "unigram", (1.2, 1.8)),
        ("wikipedia-zh/wiki.txt.bz2", "bpe", (1.2, 1.8)),
    ],
)
def test_real_text(path, kind, chars_per_token):
    if not (DATA / path).is_file():
        pytest.skip(f"no real data sets in {DATA}; set ULMFIT_DATA")
    articles = _articles(DATA / path, 1_000_000)
    half = len(articles) // 2
    tokenizer = Tokenizer.train(articles[:half], TokenizerConfig(kind=kind, vocab_size=8000))
    assert tokenizer.vocab_size == 8000
    held_out = articles[half:]
    documents = tokenizer.encode_batch(held_out)
    for text, ids in zip(held_out, documents, strict=True):
        assert tokenizer.decode(ids) == tokenizer.rules.normalise(text)
    tokens = sum(map(len, documents))
    low, high = chars_per_token
    assert low < sum(map(len, held_out)) / tokens < high
    assert sum(tokenizer.is_byte(i) for ids in documents for i in ids) / tokens < 0.05
