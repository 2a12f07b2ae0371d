"""Files from fastai, without fastai: what is refused, with which words, and which piece gets which row."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ulmfit.bundle import LANGUAGE_MODEL, load_bundle
from ulmfit.config import RulesConfig, TokenizerConfig
from ulmfit.errors import BundleError
from ulmfit.fastai_import import (
    language_model_from_fastai,
    read_fastai_checkpoint,
    read_fastai_vocabulary,
    save_imported,
    words_of_pieces,
)
from ulmfit.nn.awd_lstm import Architecture
from ulmfit.nn.build import language_model_from
from ulmfit.pickled_data import read_pickled_data
from ulmfit.text.rules import CAPITALISED, UPPER
from ulmfit.text.tokenizer import Tokenizer

V, E, H, LAYERS = 12, 4, 6, 3
State = dict[str, Tensor]
WORDS = ["xxunk", "xxpad", "xxbos", "xxfld", "xxup", "xxmaj", "the", "cat", ".", "sat", "mat", "xxfake"]


def language_model_state() -> State:
    """A language model as fastai 2 names it."""
    rng = torch.Generator().manual_seed(0)
    embedding = torch.randn(V, E, generator=rng)
    state = {"0.encoder.weight": embedding, "0.encoder_dp.emb.weight": embedding}
    for i, (inputs, hidden) in enumerate(Architecture(V, E, H, LAYERS).layer_sizes()):
        state[f"0.rnns.{i}.weight_hh_l0_raw"] = torch.randn(4 * hidden, hidden, generator=rng)
        state[f"0.rnns.{i}.module.weight_ih_l0"] = torch.randn(4 * hidden, inputs, generator=rng)
        state[f"0.rnns.{i}.module.bias_ih_l0"] = torch.randn(4 * hidden, generator=rng)
        state[f"0.rnns.{i}.module.bias_hh_l0"] = torch.randn(4 * hidden, generator=rng)
    return state | {"1.decoder.weight": embedding, "1.decoder.bias": torch.randn(V, generator=rng)}


def classifier_state() -> State:
    state = {
        name.replace("0.", "0.module.", 1): tensor
        for name, tensor in language_model_state().items()
        if name.startswith("0.")
    }
    for i, (inputs, outputs) in enumerate(((3 * E, 5), (5, 2))):
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"1.layers.{i}.0.{name}"] = torch.rand(inputs)
        state[f"1.layers.{i}.0.num_batches_tracked"] = torch.tensor(7)
        state[f"1.layers.{i}.2.weight"] = torch.randn(outputs, inputs)
    return state


def saved(folder: Path, state: object, **options: Any) -> Path:
    torch.save(state, folder / "model.pth", **options)
    return folder / "model.pth"


def refused(path: Path, read: Callable[[Path], object] = read_fastai_checkpoint) -> str:
    with pytest.raises(BundleError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "The cat sat on the mat. THE CAT sat. The dog ran to the catalogue and sat on it"
    return Tokenizer.train([text] * 20, TokenizerConfig(kind="bpe", vocab_size=400))


# -- hostile files ---------------------------------------------------------------------------------------------------


class Hostile:
    """Whoever loads it with pickle runs a command."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", ["alone", "in a list", "as a label", "in a dict"])
def test_hostile_vocabularies_do_nothing(tmp_path, protocol, place):
    hostile = Hostile(tmp_path / "victim")
    content: object = hostile
    if place == "in a list":
        content = ["the", hostile]
    elif place == "as a label":
        content = [["the"], hostile]
    elif place == "in a dict":
        content = {"vocab": ["the"], "other": hostile}
    path = tmp_path / "itos.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    message = refused(path, read_fastai_vocabulary)
    assert "it holds a Python object" in message and "mkdir" in message and "executes code" in message
    assert not (tmp_path / "victim").exists()
    pickle.loads(path.read_bytes())  # the file is as dangerous as it is meant to be
    assert (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"(S'echo'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'echo'\no.",  # OBJ
        b"\x80\x02cbuiltins\nint\n(K\x01tR.",  # allowed as an argument, not as a call
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04echo\x85R.",  # STACK_GLOBAL
        b"\x80\x04K\x01K\x02\x93.",
        b"\x80\x02ccollections\nCounter\n.",
        b"\x80\x02]}K\x05sb.",
        b"P1\n.",
        b"\x80\x02\x82\x01.",  # extension registry
        b"\x80\x05\x96\x00\x00\x00\x00\x00\x00\x00\x7f.",  # an array of 2 ** 63 bytes
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a memo of 2 ** 31 entries
        b"\x80\x02}(]K\x01u.",  # a list as key
        b"\x80\x02.",
        b"e.",
        b"h\x05.",
        b"",
        b"words\nare\nno\npickle",
    ],
)
def test_hostile_programs_end_in_a_sentence(tmp_path, program):
    path = tmp_path / "itos.pkl"
    path.write_bytes(program)
    assert "is not a vocabulary: " in refused(path, read_fastai_vocabulary)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["alone", "beside the weights", "as the optimiser"])
def test_hostile_checkpoints_do_nothing(tmp_path, protocol, zipped, place):
    hostile = Hostile(tmp_path / "victim")
    state: object = hostile
    if place == "beside the weights":
        state = {**language_model_state(), "hook": hostile}
    elif place == "as the optimiser":
        state = {"model": language_model_state(), "opt": hostile}
    path = saved(tmp_path, state, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    message = refused(path)
    assert not (tmp_path / "victim").exists()
    if protocol == 2:
        assert f"holds a Python object ('{os.mkdir.__module__}.mkdir')" in message and "learn.export" in message
    else:
        assert "holds more than weights" in message


@pytest.mark.parametrize("name", ["fastcore.foundation\nL", "numpy\ndtype", "numpy._core.multiarray\nscalar"])
def test_names_from_optimisers_reach_nothing(tmp_path, name):
    """A file may build them with arguments and states of its choice; all become the same empty thing."""
    program = b"\x80\x02c" + name.encode() + b"\n(K\x01X\x02\x00\x00\x00f8tR}X\x01\x00\x00\x00aK\x01sb."
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
    last = name.split("\n")[1]
    assert f"holds a {last}, expected weights by name" in refused(tmp_path / "model.pth")


# -- other checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no file"),
        (b"", "is not a torch checkpoint"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "is not a torch checkpoint"),
        (pickle.dumps(["a", "b"]), "is not a torch checkpoint"),
    ],
)
def test_files_of_other_kinds(tmp_path, content, sentence):
    path = tmp_path / "model.pth"
    if content is not None:
        path.write_bytes(content)
    assert sentence in refused(path)


@pytest.mark.parametrize("state", [[torch.zeros(2)], torch.zeros(2), {}, {"model": {}}, 3])
def test_no_weights_by_name(tmp_path, state):
    assert "expected weights by name" in refused(saved(tmp_path, state))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("0.encoder.weight", (V, E, 1), "'0.encoder.weight' has shape (12, 4, 1), expected"),
        ("0.encoder_dp.emb.weight", (V + 1, E), "'0.encoder_dp.emb.weight' has shape (13, 4), expected (12, 4)"),
        ("1.decoder.weight", (V, E + 1), "'1.decoder.weight' has shape (12, 5), expected (12, 4)"),
        ("1.decoder.bias", (V + 1,), "'1.decoder.bias' has shape (13,), expected (12,)"),
        (
            "0.rnns.0.weight_hh_l0_raw",
            (4 * H,),
            "l0_raw' has shape (24,), expected (rows, columns)",
        ),
        (
            "0.rnns.0.weight_hh_l0_raw",
            (4 * H + 1, H),
            "l0_raw' has shape (25, 6), expected (24, 6)",
        ),
        ("0.rnns.1.weight_hh_l0_raw", (4 * E, E), "'0.rnns.1.weight_hh_l0_raw' has shape (16, 4), expected (24, 6)"),
        ("0.rnns.1.module.weight_hh_l0", (2, 2), "'0.rnns.1.module.weight_hh_l0' has shape (2, 2), expected (24, 6)"),
        ("0.rnns.2.module.weight_ih_l0", (16, E), "'0.rnns.2.module.weight_ih_l0' has shape (16, 4), expected (16, 6)"),
        ("0.rnns.2.module.bias_hh_l0", (15,), "'0.rnns.2.module.bias_hh_l0' has shape (15,), expected (16,)"),
    ],
)
def test_wrong_shapes(tmp_path, name, shape, expected):
    state = language_model_state() | {name: torch.zeros(shape)}
    if name == "0.encoder.weight":
        state = {k: torch.zeros(shape) if v.shape == (V, E) else v for k, v in state.items()}
    assert expected in refused(saved(tmp_path, state))


@pytest.mark.parametrize(
    "missing", [name for name in language_model_state() if name.startswith("0.rnns")] + ["1.decoder.bias"]
)
def test_missing_weights(tmp_path, missing):
    state = language_model_state()
    del state[missing]
    if missing == "1.decoder.bias":
        assert read_fastai_checkpoint(saved(tmp_path, state)).decoder_bias is None
        return
    ours = missing.removeprefix("0.").replace("module.", "").replace("_raw", "")
    assert f"lacks '{ours}'" in refused(saved(tmp_path, state))


def test_a_missing_embedding_or_layer(tmp_path):
    state = language_model_state()
    without = {k: v for k, v in state.items() if v.shape != (V, E)}
    assert "lacks 'embedding.weight'" in refused(saved(tmp_path, without))
    without = {k: v for k, v in state.items() if not k.startswith("0.rnns.1.")}
    assert "lacks 'rnns.1.weight_ih_l0' of shape" in refused(saved(tmp_path, without))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("0.rnns.0.module.weight_ih_l0_reverse", "is a bidirectional LSTM"),
        ("0.rnns.0.layers.0.linear.weight_raw", "is a QRNN"),
        ("0.rnns.0.linear.module.weight", "is a QRNN"),
        ("0.transformer.h.0.weight", "unknown weight '0.transformer.h.0.weight'"),
        ("0.rnns.0.module.weight_ih_l1", "unknown weight '0.rnns.0.module.weight_ih_l1'"),
        ("0.rnns.07.module.weight_ih_l0", "unknown weight '0.rnns.07.module.weight_ih_l0'"),
        ("2.encoder.weight", "unknown weight '2.encoder.weight'"),
        ("1.layers." + "9" * 5000 + ".weight", "unknown weight"),
    ],
)
def test_unknown_names(tmp_path, name, sentence):
    assert sentence in refused(saved(tmp_path, language_model_state() | {name: torch.zeros(2)}))


@pytest.mark.parametrize("alias", ["0.encoder_dp.emb.weight", "1.decoder.weight"])
def test_aliases_must_be_equal(tmp_path, alias):
    state = language_model_state()
    message = refused(saved(tmp_path, state | {alias: state[alias] + 1e-3}))
    assert f"'{alias}' and '0.encoder.weight' differ" in message and "tied" in message


def test_the_copy_after_weight_dropout_is_no_alias_but_serves_alone(tmp_path):
    state = language_model_state()
    raw = state["0.rnns.0.weight_hh_l0_raw"]
    copied = state | {"0.rnns.0.module.weight_hh_l0": torch.zeros_like(raw)}
    assert torch.equal(read_fastai_checkpoint(saved(tmp_path, copied)).encoder["rnns.0.weight_hh_l0"], raw)
    plain = {k.replace("weight_hh_l0_raw", "weight_hh_l0"): v for k, v in state.items()}
    assert torch.equal(read_fastai_checkpoint(saved(tmp_path, plain)).encoder["rnns.0.weight_hh_l0"], raw)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (3, "is not an ordinary tensor"),
        ({"a": 1}, "is not an ordinary tensor"),
        (torch.eye(V).to_sparse(), "is not an ordinary tensor"),
        (torch.zeros(V, device="meta"), "is not an ordinary tensor"),
        (torch.zeros(V, dtype=torch.int64), "torch.int64 numbers"),
        (torch.zeros(V, dtype=torch.complex64), "torch.complex64 numbers"),
        (torch.zeros(1).expand(10**6, 10**6), "in shape (1000000, 1000000) and 4 bytes of them"),
        (torch.zeros(0), "in shape (0,)"),
        (torch.full((V,), torch.nan), "holds infinite numbers or NaN"),
        (torch.full((V,), torch.inf), "holds infinite numbers or NaN"),
    ],
)
def test_tensors_of_other_kinds(tmp_path, value, sentence):
    message = refused(saved(tmp_path, language_model_state() | {"1.decoder.bias": value}))
    assert "'1.decoder.bias'" in message and sentence in message


def test_architecture_is_inferred(tmp_path):
    weights = read_fastai_checkpoint(saved(tmp_path, {"model": language_model_state(), "opt": {}}))
    assert weights.architecture == Architecture(V, E, H, LAYERS)
    one = Architecture(V, E, 99, 1)  # a single layer goes from the embedding's size to itself
    state = {
        k: torch.zeros(4 * E, E) if "weight_" in k else torch.zeros(4 * E)
        for k in language_model_state()
        if k.startswith("0.rnns.0.")
    } | {"0.encoder.weight": torch.zeros(V, E)}
    found = read_fastai_checkpoint(saved(tmp_path, state)).architecture
    assert found.layer_sizes() == one.layer_sizes() and found.num_layers == 1


# -- heads -----------------------------------------------------------------------------------------------------------


def test_head(tmp_path):
    state = classifier_state()
    head = read_fastai_checkpoint(saved(tmp_path, state)).head
    assert head is not None and len(head) == 12
    assert torch.equal(head["norms.1.running_var"], state["1.layers.1.0.running_var"])
    assert torch.equal(head["linears.0.weight"], state["1.layers.0.2.weight"])
    assert head["norms.0.num_batches_tracked"] == 7


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"1.layers.0.2.weight": torch.zeros(5, 11)}, "'1.layers.0.2.weight' has shape (5, 11), expected (5, 12)"),
        ({"1.layers.1.2.weight": torch.zeros(2, 4)}, "'1.layers.1.2.weight' has shape (2, 4), expected (2, 5)"),
        ({"1.layers.1.0.weight": torch.zeros(4)}, "'1.layers.1.0.weight' has shape (4,), expected (5,)"),
        ({"1.layers.1.2.weight": torch.tensor(1.0)}, "'1.layers.1.2.weight' has shape (), expected (1, 5)"),
        ({"1.layers.0.2.bias": torch.zeros(4)}, "'1.layers.0.2.bias' has shape (4,), expected (5,)"),
        ({"1.layers.0.0.weight": None}, "lacks 'norms.0.weight' of shape (12,)"),
        ({"1.layers.2.2.weight": torch.zeros(2, 2)}, "batch norm, linear, batch norm, linear, linear, expected batch"),
        ({"1.layers.1.2.weight": torch.zeros(2, 5), "1.layers.1.2.bias": torch.ones(2)}, "cannot be expressed"),
    ],
)
def test_heads_that_do_not_fit(tmp_path, changes, sentence):
    state = {k: v for k, v in (classifier_state() | changes).items() if v is not None}
    assert sentence in refused(saved(tmp_path, state))


# -- vocabularies ----------------------------------------------------------------------------------------------------

PLAIN = [
    ["the", "cät", "\n", "字"],
    ("the", "cat"),
    [["the", "cat"], ["neg", "pos"]],
    (["the", "cat"], ["neg", "pos"]),
    {"the": 0, "cat": 1},
    {"cat": 1, "the": 0},
    OrderedDict(the=0, cat=1),
    Counter({"the": 0, "cat": 1}),
    defaultdict(int, {"the": 0, "cat": 1}),
    {"vocab": ["the", "cat"], "n": 2.5},
    {"itos": ["the", "cat"], "stoi": {"the": 0}, "ok": True, "none": None, "big": 1 << 80},
]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("content", PLAIN, ids=lambda content: str(content)[:20])
def test_pickled_vocabularies(tmp_path, content, protocol):
    if isinstance(content, OrderedDict | defaultdict) and protocol < 2:
        pytest.skip("these protocols build them by calls to copyreg")
    path = tmp_path / "itos.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    expected = ["the", "cät", "\n", "字"] if content is PLAIN[0] else ["the", "cat"]
    assert read_fastai_vocabulary(path) == expected


data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner) | st.just(())
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(value=data, protocol=st.integers(0, 5))
def test_plain_data_reads_as_pickle_reads_it(value, protocol):
    assert read_pickled_data(pickle.dumps(value, protocol)) == value


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=60), protocol=st.sampled_from([b"", b"\x80\x02", b"\x80\x04"]))
def test_any_bytes_give_data_or_a_value_error(content, protocol):
    with contextlib.suppress(ValueError):
        read_pickled_data(protocol + content)


def test_text_and_json_vocabularies(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes("the\r\ncat\n\u2028x\n\nlast\n".encode())
    assert read_fastai_vocabulary(path) == ["the", "cat", "\u2028x", "", "last"]
    path = tmp_path / "words.json"
    for content in (["the", "cat"], {"the": 0, "cat": 1}, {"vocab": ["the", "cat"]}, [["the", "cat"], ["neg"]]):
        path.write_text(json.dumps(content))
        assert read_fastai_vocabulary(path) == ["the", "cat"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("itos.pkl", pickle.dumps([]), "it holds no words"),
        ("itos.pkl", pickle.dumps(["a", 3]), "entry 1 is of type int"),
        ("itos.pkl", pickle.dumps("abc"), "it holds str"),
        ("itos.pkl", pickle.dumps(Counter("aab")), "its 2 numbers are not the ids 0 to 1"),
        ("itos.pkl", pickle.dumps({"a": "b"}), "no list under 'vocab'"),
        ("itos.pkl", pickle.dumps({"vocab": {"vocab": ["a"]}}), "no list under 'vocab'"),
        ("itos.pkl", pickle.dumps({"a": 1.5, "vocab": 3}), "it holds int"),
        ("itos.txt", b"", "it holds no words"),
        ("itos.txt", b"\xff\xfe", "utf-8"),
        ("itos.json", b"[1", "Expecting"),
        ("itos.json", b"[" * 100_000, "is not a vocabulary"),
    ],
)
def test_files_that_are_no_vocabulary(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path / name, read_fastai_vocabulary)
    assert sentence in message and "one word a line" in message


def test_no_vocabulary_file(tmp_path):
    assert "cannot be read (No such file" in refused(tmp_path / "itos.pkl", read_fastai_vocabulary)


# -- from words to pieces --------------------------------------------------------------------------------------------


class Pieces:
    """A tokenizer of given pieces; real ones differ with the SentencePiece version."""

    pad_id, unk_id, bos_id = 0, 1, 2

    def __init__(self, *pieces: str) -> None:
        self.pieces = ["<pad>", "<unk>", "<bos>", "<0x41>", *pieces]
        self.vocab_size = len(self.pieces)

    def is_byte(self, piece_id: int) -> bool:
        return piece_id == 3


def matched(vocabulary: list[str], *pieces: str) -> list[str | None]:
    return words_of_pieces(vocabulary, Pieces(*pieces))[4:]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("specials", "expected"),
    [
        (["xxunk", "xxpad", "xxbos"], ["xxpad", "xxunk", "xxbos", None]),
        (["_unk_", "_pad_", "xbos"], ["_pad_", "_unk_", "xbos", None]),
        (["xbos", "<pad>", "<unk>", "<bos>", "<0x41>"], [None, None, "xbos", None]),
    ],
)
def test_special_pieces(specials, expected):
    assert words_of_pieces(specials, Pieces()) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("piece", "word"),
    [
        ("▁the", "the"),
        ("the", None),  # within a word
        (f"▁{CAPITALISED}the", "the"),
        (f"▁{UPPER}the", "the"),
        (f"{CAPITALISED}the", "the"),  # after an opening quote: a marker starts a word
        ("▁The", "The"),
        ("▁Cat", "cat"),
        ("▁CAT", "cat"),
        ("▁unheard", None),
        (".", "."),
        ("▁.", "."),
        ("'s", "'s"),
        ("2", None),
        ("▁2", "2"),
        ("▁", None),
        (CAPITALISED, "xxmaj"),
        (f"▁{CAPITALISED}", "xxmaj"),
        (f"▁{UPPER}", "xxup"),
        (f"{CAPITALISED}{CAPITALISED}the", None),
    ],
)
def test_pieces_of_words(piece, word):
    assert matched(["the", "The", "cat", ".", "'s", "2", "xxmaj", "xxup", "t_up"], piece) == [word]


def test_markers_of_07():
    assert matched(["the", "t_up"], CAPITALISED, UPPER) == [None, "t_up"]


def test_a_vocabulary_of_pieces():
    vocabulary = ["xxbos", "▁xxbos", "▁xxmaj", "▁the", "the", "ing", "▁", "."]
    pieces = Pieces("▁the", "the", "ing", "▁ing", f"▁{CAPITALISED}the", CAPITALISED, ".", "▁")
    found = words_of_pieces(vocabulary, pieces)  # type: ignore[arg-type]
    assert found[2] == "▁xxbos"
    assert found[4:] == ["▁the", "the", "ing", None, "▁the", "▁xxmaj", ".", "▁"]


def test_real_tokenizers_with_and_without_case_markers(tokenizer):
    words = words_of_pieces(["the", "cat", "sat"], tokenizer)
    cased = {tokenizer.pieces[i]: word for i, word in enumerate(words) if word}
    assert cased["▁sat"] == "sat" and set(cased.values()) == {"the", "cat", "sat"}
    plain = Tokenizer.train(
        ["The cat sat on the mat. The end of the cat"] * 20,
        TokenizerConfig(kind="bpe", vocab_size=400, rules=RulesConfig(case=False)),
    )
    found = dict(zip(plain.pieces, words_of_pieces(["the", "cat"], plain), strict=True))
    assert found["▁The"] == "the" and found["▁the"] == "the"


def test_rows_are_exact(tmp_path, tokenizer):
    weights = read_fastai_checkpoint(saved(tmp_path, language_model_state()))
    model, report = language_model_from_fastai(weights, WORDS, tokenizer)
    words = words_of_pieces(WORDS, tokenizer)
    rows, bias = weights.encoder["embedding.weight"], weights.decoder_bias
    assert bias is not None
    for i, word in enumerate(words):
        expected = rows.mean(0) if word is None else rows[WORDS.index(word)]
        assert torch.equal(model.encoder.embedding.weight[i], expected)
        assert torch.equal(model.decoder.bias[i], bias.mean() if word is None else bias[WORDS.index(word)])
    assert (report.matched, report.total) == (sum(word is not None for word in words), tokenizer.vocab_size)
    assert {"xxunk", "xxpad", "xxbos", "the", "cat", ".", "sat"} <= set(words)
    for name, tensor in weights.encoder.items():
        if name.startswith("rnns"):
            assert torch.equal(model.encoder.state_dict()[name], tensor)


def test_no_decoder_bias_is_zero(tmp_path, tokenizer):
    state = language_model_state()
    del state["1.decoder.bias"]
    model, _ = language_model_from_fastai(read_fastai_checkpoint(saved(tmp_path, state)), WORDS, tokenizer)
    assert not model.decoder.bias.any()


def test_a_vocabulary_of_another_size(tmp_path, tokenizer):
    weights = read_fastai_checkpoint(saved(tmp_path, language_model_state()))
    with pytest.raises(BundleError, match="the vocabulary has 11 words, expected 12, one for each row"):
        language_model_from_fastai(weights, WORDS[:-1], tokenizer)


def test_save_imported(tmp_path, tokenizer):
    checkpoint, vocabulary = saved(tmp_path, language_model_state()), tmp_path / "itos.pkl"
    vocabulary.write_bytes(pickle.dumps(WORDS))
    report = save_imported(checkpoint, vocabulary, tokenizer, tmp_path / "bundle", direction="backward")
    bundle = load_bundle(tmp_path / "bundle", LANGUAGE_MODEL)
    assert bundle.info.direction == "backward" and bundle.info.provenance["checkpoint"] == "model.pth"
    assert bundle.info.provenance["transfer"] == str(report)
    expected, _ = language_model_from_fastai(read_fastai_checkpoint(checkpoint), WORDS, tokenizer)
    tokens = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("The cat sat on the mat.")]])
    with torch.no_grad():
        assert torch.equal(language_model_from(bundle).eval()(tokens)[0], expected.eval()(tokens)[0])
    again = save_imported(checkpoint, vocabulary, tmp_path / "bundle", tmp_path / "second")  # the pieces of a bundle
    assert again == report


def test_save_imported_checks_the_direction(tmp_path, tokenizer):
    (tmp_path / "words.txt").write_text("\n".join(WORDS))
    with pytest.raises(BundleError, match="direction is 'up'"):
        save_imported(saved(tmp_path, language_model_state()), tmp_path / "words.txt", tokenizer, tmp_path / "b", "up")
    assert not (tmp_path / "b").exists()
