"""The bundle: an exact set of files, whole or not at all, and nothing in it that can do harm."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ulmfit import bundle as module
from ulmfit import whole_file
from ulmfit.bundle import (
    CARD_FILE,
    CLASSIFIER,
    ENCODER_FILE,
    FILES,
    HEAD_FILE,
    INFO_FILE,
    LANGUAGE_MODEL,
    Bundle,
    BundleInfo,
    is_bundle,
    load_bundle,
    model_card,
    read_info,
    save_bundle,
)
from ulmfit.config import TokenizerConfig
from ulmfit.errors import BundleError
from ulmfit.text.tokenizer import META_FILE, MODEL_FILE, Tokenizer

EMBEDDING, HIDDEN, LAYERS, HEAD_HIDDEN = 4, 6, 2, 5
Weights = tuple[dict[str, Tensor], dict[str, Tensor]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat and the dog ran"] * 20, TokenizerConfig(vocab_size=320))


def make_weights(vocabulary: int, seed: int = 0) -> Weights:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    encoder = {
        "embedding.weight": normal(vocabulary, EMBEDDING),
        "rnns.0.weight_hh_l0": normal(4 * HIDDEN, HIDDEN),
        "rnns.0.bias_hh_l0": normal(4 * HIDDEN),
    }
    head = {"linears.0.weight": normal(HEAD_HIDDEN, 3 * EMBEDDING), "steps": torch.tensor(7)}
    return encoder, head


def make_info(tokenizer: Tokenizer, kind: str = CLASSIFIER, **changes: Any) -> BundleInfo:
    sizes = {"vocab_size": tokenizer.vocab_size, "embedding_dim": EMBEDDING}
    info = BundleInfo(
        kind,
        {**sizes, "hidden_dim": HIDDEN, "num_layers": LAYERS},
        labels=["bad", "good"] if kind == CLASSIFIER else [],
        pooling={"bptt": 70, "max_len": 1400, "head_hidden": HEAD_HIDDEN} if kind == CLASSIFIER else {},
        provenance={"name": "Reviews", "data_set": "imdb", "seed": 3, "parent": Path("a/b")},
        metrics={"accuracy": 0.9123456},
    )
    return replace(info, **changes)


@pytest.fixture
def saved(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return save_bundle(tmp_path / "bundle", make_info(tokenizer), *make_weights(tokenizer.vocab_size), tokenizer)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """As an attacker would: `bundle.json` changed, its checksums right."""
    values = json.loads((folder / INFO_FILE).read_text())
    values["checksums"].pop(INFO_FILE, None)  # older bundles have none
    for name in values["checksums"]:
        if (folder / name).is_file():
            values["checksums"][name] = module.sha256_of(folder / name)
    change(values)
    (folder / INFO_FILE).write_text(json.dumps(values))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# -- what is written and read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LANGUAGE_MODEL, CLASSIFIER])
def test_exact_file_set(tokenizer, tmp_path, kind):
    folder = save_bundle(
        tmp_path / "new" / "bundle", make_info(tokenizer, kind), *make_weights(tokenizer.vocab_size), tokenizer
    )
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "bundle.json",
        "encoder.safetensors",
        "head.safetensors",
        "tokenizer.json",
        "tokenizer.model",
    ]
    assert sorted(FILES) == sorted(p.name for p in folder.iterdir())
    assert [p.name for p in folder.parent.iterdir()] == ["bundle"]
    assert is_bundle(folder)
    assert not is_bundle(folder.parent)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_others_may_read_what_the_umask_lets_them(saved):
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o777 & ~umask
    assert all(path.stat().st_mode & (0o444 & ~umask) == 0o444 & ~umask for path in saved.iterdir())


def test_round_trip_is_exact(tokenizer, saved):
    encoder, head = make_weights(tokenizer.vocab_size)
    loaded = load_bundle(str(saved), CLASSIFIER)
    assert isinstance(loaded, Bundle)
    assert equal(loaded.encoder, encoder)
    assert equal(loaded.head, head)
    assert loaded.tokenizer.fingerprint == loaded.info.tokenizer_fingerprint == tokenizer.fingerprint
    assert loaded.tokenizer.encode("the cat") == tokenizer.encode("the cat")
    assert loaded.path == saved
    assert loaded.info == read_info(saved)
    expected = make_info(tokenizer)
    for field in ("kind", "architecture", "direction", "labels", "pooling", "metrics"):
        assert getattr(loaded.info, field) == getattr(expected, field)
    assert loaded.info.provenance == {**expected.provenance, "parent": str(Path("a/b"))}


def test_half_is_exact_to_its_precision(tokenizer, tmp_path, saved):
    encoder, head = make_weights(tokenizer.vocab_size)
    half = save_bundle(tmp_path / "half", make_info(tokenizer), encoder, head, tokenizer, half=True)
    loaded = load_bundle(half)
    assert equal(loaded.encoder, {k: v.half().float() for k, v in encoder.items()})
    assert loaded.head["steps"].dtype == torch.int64  # a count is no weight
    assert int(loaded.head["steps"]) == 7
    for name, tensor in encoder.items():
        assert torch.allclose(loaded.encoder[name], tensor, rtol=2**-11, atol=2**-24)
    assert (half / ENCODER_FILE).stat().st_size < 0.6 * (saved / ENCODER_FILE).stat().st_size


def test_weights_as_training_leaves_them(tokenizer, tmp_path):
    """Parameters with gradients, transposed views, other precisions, NaN; nothing in memory changes."""
    encoder, head = make_weights(tokenizer.vocab_size)
    encoder["rnns.0.weight_hh_l0"] = encoder["rnns.0.weight_hh_l0"].t().contiguous().t().double()
    encoder["embedding.weight"] = torch.nn.Parameter(encoder["embedding.weight"].bfloat16())
    head["linears.0.weight"][0, 0] = torch.nan
    folder = save_bundle(tmp_path / "b", make_info(tokenizer), encoder, head, tokenizer)
    loaded = load_bundle(folder)
    assert all(not v.requires_grad and v.is_contiguous() for v in loaded.encoder.values())
    assert torch.equal(loaded.encoder["rnns.0.weight_hh_l0"], encoder["rnns.0.weight_hh_l0"].float())
    assert torch.equal(loaded.encoder["embedding.weight"], encoder["embedding.weight"].detach().float())
    assert loaded.head["linears.0.weight"].isnan().sum() == 1
    assert encoder["embedding.weight"].requires_grad


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_direction_stays(tokenizer, tmp_path, direction):
    info = make_info(tokenizer, direction=direction)
    save_bundle(tmp_path / "b", info, *make_weights(tokenizer.vocab_size), tokenizer)
    assert read_info(tmp_path / "b").direction == direction
    assert f"reading {direction}" in (tmp_path / "b" / CARD_FILE).read_text()


def test_model_card(tokenizer):
    card = model_card(make_info(tokenizer, labels=["a|b", "c\n# d", "é"], metrics={"macro_f1": 0.5}))
    assert card.startswith("# Reviews\n\nA ULMFiT classifier (Howard & Ruder 2018), reading forward.\n")
    assert "| labels | a\\|b, c # d, é |\n" in card
    assert f"| vocab size | {tokenizer.vocab_size} |\n" in card
    assert "| macro f1 | 0.5 |\n" in card
    assert card.count("\n# ") == 0
    assert model_card(make_info(tokenizer, LANGUAGE_MODEL, provenance={})).startswith("# Language model\n")


def test_read_info_is_light(saved):
    code = (
        "import sys; from ulmfit.bundle import read_info, is_bundle; print(read_info(sys.argv[1]).labels);"
        "heavy = ('torch', 'lightning', 'safetensors', 'sentencepiece', 'pandas', 'numpy');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['bad', 'good']", "[]"]


# -- refused ---------------------------------------------------------------------------------------------------------


def test_no_bundle(tmp_path):
    for folder, sentence in (
        (tmp_path / "none", "no bundle at .*none, expected a folder written by 'ulmfit train'"),
        (tmp_path, "holds no bundle.json, expected a folder written by 'ulmfit train'"),
    ):
        for read in (read_info, load_bundle):
            with pytest.raises(BundleError, match=sentence):
                read(folder)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="no bundle at"):
        read_info(tmp_path / "file")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(saved, name):
    (saved / name).unlink()
    with pytest.raises(BundleError, match=f"(lacks {name}; copy or write it again|holds no {name})"):
        load_bundle(saved)


@pytest.mark.parametrize("name", [name for name in FILES if name != INFO_FILE])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_refused(tokenizer, tmp_path_factory, name, data):
    folder = tmp_path_factory.getbasetemp() / "flipped"
    if not folder.is_dir():
        save_bundle(folder, make_info(tokenizer), *make_weights(tokenizer.vocab_size), tokenizer)
    content = (folder / name).read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[position] ^= data.draw(st.integers(1, 255))
    try:
        for damaged in (bytes(changed), content[:position], content + b"\0"):
            (folder / name).write_bytes(damaged)
            with pytest.raises(BundleError, match=f"{name} does not match its checksum in bundle.json"):
                load_bundle(folder)
    finally:
        (folder / name).write_bytes(content)
    load_bundle(folder)


def _read_or_fail_well(folder: Path) -> None:
    """What can be read can be described and written again; else one printable sentence comes out."""
    sentence = ""
    try:
        model_card(load_bundle(folder).info).encode()
    except BundleError as error:
        sentence = str(error)
    assert "\n" not in sentence
    assert len(sentence.encode()) < 600


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_changed_byte_of_the_description_is_refused(tokenizer, tmp_path_factory, data):
    """Or says the same, as another space does."""
    folder = tmp_path_factory.getbasetemp() / "described"
    if not folder.is_dir():
        save_bundle(folder, make_info(tokenizer), *make_weights(tokenizer.vocab_size), tokenizer)
    content = (folder / INFO_FILE).read_bytes()
    changed = bytearray(content)
    changed[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / INFO_FILE).write_bytes(changed)
    try:
        try:
            same = json.loads(changed) == json.loads(content)
        except ValueError:
            same = False
        if same:
            load_bundle(folder)
        else:
            with pytest.raises(BundleError) as caught:
                load_bundle(folder)
            assert "\n" not in str(caught.value) and len(str(caught.value).encode()) < 600
    finally:
        (folder / INFO_FILE).write_bytes(content)


def test_a_description_has_its_own_checksum(saved):
    values = json.loads((saved / INFO_FILE).read_text())
    values["provenance"]["dataset"] = "another"
    (saved / INFO_FILE).write_text(json.dumps(values))
    with pytest.raises(BundleError, match=r"bundle.json does not match its own checksum; copy or write the bundle"):
        read_info(saved)
    del values["checksums"][INFO_FILE]  # as older versions wrote it
    (saved / INFO_FILE).write_text(json.dumps(values))
    assert load_bundle(saved).info.provenance["dataset"] == "another"


def test_the_shipped_models_are_whole():
    for path in (Path(module.__file__).parent / "pretrained").glob("*/bundle.json"):
        assert INFO_FILE in load_bundle(path.parent).info.checksums


@pytest.mark.parametrize(
    ("kind", "wanted", "sentence"),
    [
        (
            LANGUAGE_MODEL,
            CLASSIFIER,
            "is a language model, expected a classifier; make one with 'ulmfit train stage=cl",
        ),
        (
            CLASSIFIER,
            LANGUAGE_MODEL,
            "is a classifier, expected a language model; make one with 'ulmfit train stage=lm",
        ),
    ],
)
def test_the_wrong_kind(tokenizer, tmp_path, kind, wanted, sentence):
    folder = save_bundle(tmp_path / "b", make_info(tokenizer, kind), *make_weights(tokenizer.vocab_size), tokenizer)
    for read in (read_info, load_bundle):
        assert read(folder, kind)
        with pytest.raises(BundleError, match=sentence):
            read(folder, wanted)


@pytest.mark.parametrize("version", [2, 0, "1", None, [1], "\ud800" * 99])
def test_another_format(saved, version):
    rewrite(saved, lambda values: values.update(format_version=version, a_new_field=1))
    with pytest.raises(BundleError, match=r"has format .*, this version reads 1; update ulmfit") as caught:
        load_bundle(saved)
    str(caught.value).encode()


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"kind": "transformer"}, "kind is 'transformer'"),
    "kind list": ({"kind": [CLASSIFIER]}, "kind is "),
    "unknown field": ({"evil": 1}, "it holds 'evil'"),
    "architecture": ({"architecture": [1]}, "architecture must hold"),
    "huge vocabulary": ({"architecture": {"vocab_size": 10**12}}, "vocab_size is 1000000000000"),
    "huge layers": ({"architecture": {"num_layers": 65}}, "num_layers is 65"),
    "bool": ({"architecture": {"num_layers": True}}, "num_layers is True"),
    "float": ({"architecture": {"hidden_dim": 6.0}}, "hidden_dim is 6.0"),
    "zero": ({"architecture": {"embedding_dim": 0}}, "embedding_dim is 0"),
    "extra size": ({"architecture": {"more": 1}}, "architecture must hold"),
    "direction": ({"direction": "sideways"}, "direction is 'sideways'"),
    "labels text": ({"labels": "ab"}, "labels is not a list of strings"),
    "labels numbers": ({"labels": [1, 2]}, "labels is not a list of strings"),
    "one label": ({"labels": ["a"]}, "needs two labels or more"),
    "same labels": ({"labels": ["a", "b", "a"]}, "a label stands twice"),
    "unprintable label": ({"labels": ["a", "\ud800"]}, "surrogates not allowed"),
    "pooling": ({"pooling": {"bptt": -1}}, "pooling.bptt is -1"),
    "pooling none": ({"pooling": None}, "pooling is not an object"),
    "metrics": ({"metrics": {"accuracy": "high"}}, "metrics.accuracy is 'high'"),
    "huge metric": ({"metrics": {"accuracy": 10**400}}, "metrics.accuracy is 1000"),
    "metrics list": ({"metrics": [1]}, "metrics is not an object"),
    "provenance": ({"provenance": "me"}, "provenance is not an object"),
    "checksums list": ({"checksums": []}, "checksums is not an object"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values(saved, name):
    change, sentence = HOSTILE[name]

    def apply(values: dict[str, Any]) -> None:
        for key, value in change.items():
            old = values.get(key)
            values[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value

    rewrite(saved, apply)
    with pytest.raises(BundleError, match=sentence) as caught:
        read_info(saved)
    assert len(str(caught.value)) < 300 + len(str(saved))
    str(caught.value).encode()


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_dim": 60_000},
        {"embedding_dim": 60_000},
        {"num_layers": 64, "hidden_dim": 60_000},
    ],
)
def test_sizes_the_weights_do_not_fill(saved, sizes):
    """Such a bundle would otherwise make the reader allocate gigabytes for a network before it compares shapes."""
    rewrite(saved, lambda values: values["architecture"].update(sizes))
    read_info(saved)
    with pytest.raises(BundleError, match=r"weights in .* are fewer than bundle\.json says"):
        load_bundle(saved)


def test_a_head_the_weights_do_not_fill(saved):
    rewrite(saved, lambda values: values["pooling"].update(head_hidden=10_000_000))
    with pytest.raises(BundleError, match=r"weights in .* are fewer than bundle\.json says"):
        load_bundle(saved)


def test_a_tokenizer_that_does_not_fit(tokenizer, saved):
    other = Tokenizer.train(["some other words entirely"] * 20, TokenizerConfig(vocab_size=300))
    other.save(saved)
    rewrite(saved, lambda values: None)
    with pytest.raises(BundleError, match=f"{other.vocab_size} pieces and fingerprint {other.fingerprint}.*not belong"):
        load_bundle(saved)
    tokenizer.save(saved)
    rewrite(saved, lambda values: values["architecture"].update(vocab_size=100))
    with pytest.raises(BundleError, match=f"{tokenizer.vocab_size} pieces.*expects 100 and .*do not belong together"):
        load_bundle(saved)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["\ud800", 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
SIZES = st.dictionaries(
    st.sampled_from(["vocab_size", "embedding_dim", "hidden_dim", "num_layers", "bptt", "max_len", "head_hidden"]),
    json_values | st.integers(-1, 10**7),
)


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_only_our_error_comes_out_of_a_hostile_description(tokenizer, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.is_dir():
        save_bundle(folder, make_info(tokenizer), *make_weights(tokenizer.vocab_size), tokenizer)
    content = (folder / INFO_FILE).read_text()
    values = json.loads(content)
    del values["checksums"][INFO_FILE]
    for name in data.draw(st.lists(st.sampled_from([*values, "other"]), min_size=1, max_size=3, unique=True)):
        if name in ("architecture", "pooling") and data.draw(st.booleans()):
            values[name].update(data.draw(SIZES))
        else:
            values[name] = data.draw(json_values)
    whole = data.draw(st.sampled_from([values] * 9 + [data.draw(json_values)]))
    (folder / INFO_FILE).write_text(json.dumps(whole))
    try:
        _read_or_fail_well(folder)
    finally:
        (folder / INFO_FILE).write_text(content)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "1", "null", '"a"', "{}", "[" * 100_000, '{"a":' * 100_000, "NaN", "1" * 5000, "\ufeff{}"],
)
def test_malformed_description(saved, content):
    (saved / INFO_FILE).write_text(content)
    with pytest.raises(BundleError):
        load_bundle(saved)
    (saved / INFO_FILE).write_bytes(b"\xff" + content.encode())
    with pytest.raises(BundleError, match="is not a bundle description"):
        load_bundle(saved)


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_pickle_is_never_executed(saved, tmp_path, name, writer):
    trace = tmp_path / "executed"
    bomb = {"embedding.weight": Bomb(trace)}
    if writer == "pickle":
        (saved / name).write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, saved / name)
    pickle.loads(pickle.dumps(bomb))
    assert trace.exists()  # it would have gone off
    trace.unlink()
    if name != INFO_FILE:
        with pytest.raises(BundleError, match="does not match its checksum"):
            load_bundle(saved)
        rewrite(saved, lambda values: None)
    if name == CARD_FILE:
        load_bundle(saved)
    else:
        with pytest.raises(BundleError):
            load_bundle(saved)
    assert not trace.exists()


def test_no_pickle_among_the_code():
    source = Path(module.__file__).parent
    for name in ("bundle.py", "text/tokenizer.py"):
        text = (source / name).read_text(encoding="utf-8")
        assert "import pickle" not in text
        assert "torch.load" not in text


def _header(header: object, payload: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + payload


def _tensor(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 1 << 62),
        _header(b"not json"),
        _header([]),
        _header(_tensor(shape=(10**9, 10**9))),
        _header(_tensor(shape=(1 << 62, 4))),
        _header(_tensor(offsets=(0, 10**12))),
        _header(_tensor(offsets=(4, 0)), b"1234"),
        _header(_tensor(shape=(-1,)), b"1234"),
        _header(_tensor(dtype="F4", shape=(8,)), b"1234"),
        _header(_tensor(dtype="object"), b"1234"),
        _header(_tensor(dtype="F8_E8M0", shape=(4,)), b"1234"),
        _header(_tensor(dtype="C64", shape=(1,), offsets=(0, 8)), b"12345678"),
        _header({**_tensor(), "b": _tensor()["a"]}, b"1234"),
        _header(_tensor()),
        _header({"a": 5}),
        _header(b'{"a":' * 20_000),
        _header({"__metadata__": {"x": 5}, **_tensor()}, b"1234"),
        _header(_tensor(shape=(0,), offsets=(0, 0))),
    ],
)
@pytest.mark.parametrize("name", [ENCODER_FILE, HEAD_FILE])
def test_hostile_weights(saved, name, content):
    (saved / name).write_bytes(content)
    rewrite(saved, lambda values: None)
    with pytest.raises(BundleError) as caught:
        load_bundle(saved)
    assert len(str(caught.value)) < 500 + len(str(saved))


# -- whole or not at all ---------------------------------------------------------------------------------------------


def test_a_bundle_is_replaced_and_its_neighbours_stay(tokenizer, saved):
    (saved / "notes.txt").write_text("mine")
    (saved / ".git").mkdir()
    (saved / ".git" / "HEAD").write_text("ref")
    encoder, head = make_weights(tokenizer.vocab_size, seed=1)
    save_bundle(saved, make_info(tokenizer, LANGUAGE_MODEL), encoder, head, tokenizer)
    loaded = load_bundle(saved, LANGUAGE_MODEL)
    assert equal(loaded.encoder, encoder)
    assert (saved / "notes.txt").read_text() == "mine"
    assert (saved / ".git" / "HEAD").read_text() == "ref"
    assert [p.name for p in saved.parent.iterdir()] == ["bundle"]


def test_an_empty_folder_is_filled(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert (
        save_bundle(tmp_path / "empty", make_info(tokenizer), *make_weights(tokenizer.vocab_size), tokenizer)
        == tmp_path / "empty"
    )
    monkeypatch.chdir(tmp_path)
    assert save_bundle("relative", make_info(tokenizer), *make_weights(tokenizer.vocab_size), tokenizer) == Path(
        "relative"
    )
    assert load_bundle("relative").info.labels == ["bad", "good"]


def test_a_folder_with_other_things_is_not_touched(tokenizer, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for place in ("data", "file"):
        with pytest.raises(BundleError, match=f"{place} holds something else than a bundle, expected a new or empty"):
            save_bundle(tmp_path / place, make_info(tokenizer), *make_weights(tokenizer.vocab_size), tokenizer)
    assert contents(tmp_path) == {os.path.join("data", "README.md"): b"years of work", "file": b"x"}


def _fail_at(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    if step == "weights":
        monkeypatch.setattr(safetensors.torch, "save", full)
    elif step == "tokenizer":
        monkeypatch.setattr(Tokenizer, "save", full)
    elif step == "text":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        original, calls = os.replace, iter(range(100))

        def replace_until(source: Any, target: Any) -> None:
            # Two renames are the tokenizer's, the next (2) works if there is no old bundle, and where two cannot be
            # exchanged the old one goes aside (3) and the new one comes in (4).
            if next(calls) == int(step):
                full()
            original(source, target)

        monkeypatch.setattr(os, "replace", replace_until)
        monkeypatch.setattr(whole_file, "_exchange", lambda new, final: False)


@pytest.mark.parametrize("step", ["weights", "tokenizer", "text", "2", "3", "4"])
def test_a_failure_leaves_the_old_bundle_whole(tokenizer, saved, monkeypatch, step):
    before = contents(saved)
    with monkeypatch.context() as patch:
        _fail_at(patch, step)
        with pytest.raises(OSError, match="No space left"):
            save_bundle(saved, make_info(tokenizer), *make_weights(tokenizer.vocab_size, 1), tokenizer)
    assert contents(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["bundle"]
    load_bundle(saved)


@pytest.mark.parametrize("step", ["weights", "tokenizer", "text", "2"])
def test_a_failure_leaves_nothing_new(tokenizer, tmp_path, monkeypatch, step):
    _fail_at(monkeypatch, step)
    with pytest.raises(OSError, match="No space left"):
        save_bundle(tmp_path / "bundle", make_info(tokenizer), *make_weights(tokenizer.vocab_size), tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_the_old_bundle_whole(tokenizer, saved, monkeypatch):
    before = contents(saved)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "model_card", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_bundle(saved, make_info(tokenizer), *make_weights(tokenizer.vocab_size, 1), tokenizer)
    assert contents(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["bundle"]


def test_a_description_that_could_not_be_read_is_not_written(tokenizer, saved):
    before = contents(saved)
    for change, sentence in (
        ({"labels": ["only"]}, "a classifier needs two labels or more"),
        ({"direction": "up"}, "direction is 'up'"),
        ({"architecture": {}}, "architecture must hold"),
        ({"kind": "x"}, "kind is 'x'"),
    ):
        with pytest.raises(BundleError, match=f"cannot be written to .*: {sentence}"):
            save_bundle(saved, make_info(tokenizer, **change), *make_weights(tokenizer.vocab_size), tokenizer)
    assert contents(saved) == before


def test_metrics_of_any_number_type_are_written(tokenizer, saved):
    info = make_info(tokenizer, metrics={"loss": torch.tensor(0.5), "steps": 3})
    save_bundle(saved, info, *make_weights(tokenizer.vocab_size), tokenizer)
    assert read_info(saved).metrics == {"loss": 0.5, "steps": 3.0}
    assert set(asdict(info)) == {field.name for field in fields(BundleInfo)}


def test_a_copy_is_as_good(saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "elsewhere")
    shutil.rmtree(saved)
    assert load_bundle(copy).path == copy
    assert {MODEL_FILE, META_FILE, HEAD_FILE} < set(contents(copy))
