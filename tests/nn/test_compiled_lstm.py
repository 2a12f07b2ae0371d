"""Compiled layers at work, beside torch's LSTM in double precision on the same rounded numbers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ulmfit.nn import compiled_lstm, matrix_tiles, reading_loops, reduced, register_tiles, vectors
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.compiled_lstm import (
    CompiledBFloat16LSTM,
    CompiledInt8LSTM,
    CompiledLSTM,
    CompiledPartsLSTM,
    CompiledTwoPartsLSTM,
)
from ulmfit.nn.heads import ClassifierHead
from ulmfit.nn.models import TextClassifier
from ulmfit.nn.processor import cpu_multiplies_bfloat16

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(
    not cpu_multiplies_bfloat16() or sys.platform != "linux", reason="no such products on this processor"
)
REDUCED = {"bf16": CompiledBFloat16LSTM, "int8": CompiledInt8LSTM}
PARTS = {"bf16x3": CompiledTwoPartsLSTM, "bf16x6": CompiledPartsLSTM}
KINDS: dict[str, type[CompiledLSTM]] = {**REDUCED, **{k: v for k, v in PARTS.items() if matrix_tiles.multiplies(k)}}
# Relative and absolute, of states and of what is pooled from them.
NEAR = {"bf16": (0.03, 0.02), "int8": (0.05, 0.05), "bf16x3": (3e-4, 3e-4), "bf16x6": (1e-5, 1e-5)}


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    compiled_lstm.is_available.cache_clear()
    yield
    compiled_lstm.is_available.cache_clear()


def _case(rows: int, steps: int, width: int, size: int, seed: int) -> tuple[nn.LSTM, Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    rnn = nn.LSTM(width, size, batch_first=True)
    with torch.no_grad():  # torch draws them for the size alone: one cell with a hundred inputs would have huge sums
        for weight in (rnn.weight_ih_l0, rnn.weight_hh_l0):
            weight *= (size / (width + size)) ** 0.5
    state = torch.randn(1, rows, size).tanh().bfloat16().float(), torch.randn(1, rows, size)
    return rnn, torch.randn(rows, steps, width).bfloat16().float(), state


def _read(kind: str, rnn: nn.LSTM, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode():
        output, (h, c) = KINDS[kind](rnn)(x.bfloat16() if kind == "bf16" else x, state)
    return output, h, c


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(
    rows=st.integers(1, 20), steps=st.integers(1, 4), width=st.integers(1, 140), size=st.integers(1, 140),
    seed=st.integers(0, 99), with_state=st.booleans(),
)  # fmt: skip
def test_close_to_torchs_layer(
    kind: str, rows: int, steps: int, width: int, size: int, seed: int, with_state: bool
) -> None:
    rnn, x, state = _case(rows, steps, width, size, seed)
    if kind in PARTS:  # numbers that need all of them
        x, state = x * 1.2345, (state[0] * 0.98765, state[1])
    before = [each.clone() for each in state]
    found = _read(kind, rnn, x, state if with_state else None)
    assert all(torch.equal(one, other) for one, other in zip(before, state, strict=True))  # not changed in place
    with torch.no_grad():
        output, (h, c) = rnn(x, state if with_state else None)
    rtol, atol = NEAR[kind]
    for one, right in zip(found, (output, h, c), strict=True):
        assert one.shape == right.shape
        torch.testing.assert_close(one.float(), right, rtol=rtol, atol=atol)


def test_a_step_in_8_bits_is_what_its_integers_say() -> None:
    rnn, x, (h, c) = _case(9, 1, 75, 66, 1)
    x, h = torch.randn_like(x), torch.randn_like(h).tanh()
    with torch.no_grad():
        sums = (rnn.bias_ih_l0 + rnn.bias_hh_l0).double().expand(9, -1)
        for values, weight in ((x[:, 0], rnn.weight_ih_l0), (h[0], rnn.weight_hh_l0)):
            unit = values.abs().amax(1, keepdim=True) / 127
            worth = weight.abs().amax(1) / 127
            integers = (values / unit + 0.5).floor().double() @ (weight / worth[:, None]).round().double().t()
            sums = sums + integers * unit * worth
        i, f, g, o = sums.chunk(4, 1)
        after = f.sigmoid() * c[0] + i.sigmoid() * g.tanh()
        output, _, cells = _read("int8", rnn, x, (h, c))
    torch.testing.assert_close(cells[0].double(), after, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output[:, 0].double(), o.sigmoid() * after.tanh(), rtol=1e-5, atol=1e-5)


def test_a_step_in_bfloat16_is_rounded_only_at_its_end() -> None:
    rnn, x, state = _case(9, 1, 75, 66, 2)
    twin = nn.LSTM(75, 66, batch_first=True).double()
    twin.load_state_dict(rnn.state_dict())
    with torch.no_grad():
        twin.weight_ih_l0.copy_(rnn.weight_ih_l0.bfloat16())
        twin.weight_hh_l0.copy_(rnn.weight_hh_l0.bfloat16())
        output, (_, c) = twin(x.double(), (state[0].double(), state[1].double()))
    found, _, cells = _read("bf16", rnn, x, state)
    torch.testing.assert_close(cells.double(), c, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(found.double(), output, rtol=1.01 * 2**-8, atol=3e-6)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_read_as_if_it_were_alone(kind: str, threads: None) -> None:
    """To the last bit, in any batch, on any number of threads, in one call or in two."""
    rnn, x, (h, c) = _case(13, 6, 70, 90, 3)
    x[1] *= 100
    together = _read(kind, rnn, x, (h, c))
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(_read(kind, rnn, x, (h, c)), together, strict=True))
    for row in range(13):
        alone = _read(kind, rnn, x[row : row + 1], (h[:, row : row + 1], c[:, row : row + 1]))
        assert torch.equal(alone[0][0], together[0][row]) and torch.equal(alone[2][0, 0], together[2][0, row])
    first = _read(kind, rnn, x[:, :2], (h, c))
    rest = _read(kind, rnn, x[:, 2:], first[1:])
    assert torch.equal(torch.cat([first[0], rest[0]], 1), together[0])


def _documents(rows: int, longest: int, words: int, seed: int) -> tuple[Tensor, Tensor]:
    """Right-padded tokens (B, T), the first alike in all, and their lengths; many begin alike where words are few."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator)
    tokens = torch.randint(words, (rows, int(lengths.max())), generator=generator)
    tokens[:, 0] = 1
    return tokens, lengths


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 60), longest=st.integers(1, 12), words=st.integers(2, 30), most=st.integers(1, 200),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70)), seed=st.integers(0, 99),
)  # fmt: skip
def test_documents_are_pooled_as_if_each_were_alone(
    kind: str, rows: int, longest: int, words: int, sizes: tuple[int, int, int], most: int, seed: int
) -> None:
    """To the last bit, with few rows a step or many, and in parts or at once; close to what torch makes of them."""
    torch.manual_seed(seed)
    table = torch.randn(words, sizes[0]).bfloat16()
    rnns = [nn.LSTM(size, following, batch_first=True) for size, following in pairwise(sizes)]
    layers = [KINDS[kind](rnn) for rnn in rnns]
    tokens, lengths = _documents(rows, longest, words, seed)
    before = compiled_lstm._ROWS_A_CALL
    with torch.inference_mode():
        together = compiled_lstm.pooled(layers, table, tokens, lengths)
        try:
            compiled_lstm._ROWS_A_CALL = most
            assert torch.equal(compiled_lstm.pooled(layers, table, tokens, lengths), together)
        finally:
            compiled_lstm._ROWS_A_CALL = before
        for row, length in enumerate(lengths.tolist()):
            one = tokens[row : row + 1, :length]
            assert torch.equal(compiled_lstm.pooled(layers, table, one, lengths[row : row + 1])[0], together[row])
            hidden = compiled_lstm.read(layers, table, one, None)[0][0].float()
            last, most_of_all, mean = together[row].chunk(3)
            assert torch.equal(hidden[-1], last) and torch.equal(hidden.amax(0), most_of_all)
            torch.testing.assert_close(mean, hidden.mean(0), rtol=1e-5, atol=1e-6)
        x = table.float()[tokens]
        for rnn in rnns:
            x = rnn(x)[0]
        last = x[torch.arange(rows), lengths - 1]
    torch.testing.assert_close(
        together[:, : sizes[2]], last, rtol=NEAR[kind][0], atol=max(0.05 * (kind in REDUCED), NEAR[kind][1])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_pooled_on_any_number_of_threads(kind: str, threads: None) -> None:
    torch.manual_seed(0)
    layers = [KINDS[kind](nn.LSTM(40, 90)), KINDS[kind](nn.LSTM(90, 40))]
    table, (tokens, lengths) = torch.randn(6, 40), _documents(90, 14, 6, 0)
    with torch.inference_mode():
        found = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(compiled_lstm.pooled(layers, table, tokens, lengths))
        shuffled = torch.randperm(90)
        found.append(compiled_lstm.pooled(layers, table, tokens[shuffled], lengths[shuffled])[shuffled.argsort()])
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_pools_compiled_layers_as_others(kind: str) -> None:
    """Also documents longer than what is pooled, which are read in another way."""
    torch.manual_seed(0)
    encoder = AWDLSTM(Architecture(30, 16, vectors.LEAST_SIZE_TO_COMPILE, 2))
    plain = TextClassifier(encoder, ClassifierHead(48, 8, 3), bptt=5, max_len=11).eval()
    compiled = copy.deepcopy(plain)
    if kind in REDUCED:
        reduced.reduce_precision(compiled.encoder, kind)
        assert compiled.encoder.compiled_layers
    else:
        compiled.encoder.twins = tuple(KINDS[kind](rnn) for rnn in compiled.encoder.rnns if isinstance(rnn, nn.LSTM))
    for longest in (4, 11, 15):
        tokens, lengths = _documents(40, longest, 30, longest)
        with torch.inference_mode():
            (found, counted), (right, expected) = compiled.pool(tokens, lengths), plain.pool(tokens, lengths)
        assert counted.steps == expected.steps
        atol = float((0.05 if kind in REDUCED else 1e-4) * right.abs().max())
        torch.testing.assert_close(found.float(), right, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_what_is_not_a_number(kind: str) -> None:
    rnn, x, _ = _case(4, 3, 10, 20, 4)
    x[0], x[2, 1, 3] = 0, float("nan")
    output, _, c = _read(kind, rnn, x, None)
    with torch.no_grad():
        right = rnn(x[:2], None)[0]
    torch.testing.assert_close(output[:2].float(), right, rtol=NEAR[kind][0], atol=NEAR[kind][1])
    assert output[2, 1:].isnan().all() and c[0, 2].isnan().all()
    assert output[2, 0].isfinite().all() and output[3].isfinite().all()


@pytest.mark.parametrize("kind", REDUCED)
def test_taken_for_networks_that_are_large_enough(kind: str) -> None:
    for size, taken in ((vectors.LEAST_SIZE_TO_COMPILE, True), (16, False)):
        torch.manual_seed(0)
        encoder = AWDLSTM(Architecture(30, 12, size, 2)).eval()
        tokens = torch.randint(30, (3, 9))
        with torch.inference_mode():
            expected, _ = encoder(tokens)
            reduced.reduce_precision(encoder, kind)
            assert all(isinstance(rnn, CompiledLSTM) for rnn in encoder.rnns) is taken
            start, state = encoder(tokens[:, :5])
            found = torch.cat([start, encoder(tokens[:, 5:], state)[0]], 1)
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=float(0.05 * expected.abs().max()))


@pytest.mark.parametrize("kind", REDUCED)
def test_without_a_numba_that_works(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(name: str) -> ModuleType:
        raise ImportError("Numba needs NumPy 2.4 or less")  # as it says it

    caches = (vectors.compiler, reading_loops.layer, reading_loops._rows, register_tiles.multiplier)
    for each in caches:
        each.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(vectors, "import_module", refused)
        patch.setenv("ULMFIT_CACHE", str(tmp_path))  # where nothing is kept that would do without it
        encoder = AWDLSTM(Architecture(30, 12, vectors.LEAST_SIZE_TO_COMPILE, 2)).eval()
        reduced.reduce_precision(encoder, kind)
        assert not any(isinstance(rnn, CompiledLSTM) for rnn in encoder.rnns)
        assert encoder(torch.zeros(1, 2, dtype=torch.int64))[0].shape == (1, 2, 12)
    assert "needs NumPy 2.4 or less" in caplog.text
    for each in caches:
        each.cache_clear()


def test_float32_is_read_in_parts_where_that_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By networks with 32 bits that no longer change, on processors with tiles, and as precisely as torch asks for."""
    tokens, lengths = _documents(40, 9, 30, 0)
    for asked, size, kind, precision, taken in (
        (20_000, 128, "bf16x6", "32", "bf16x6"), (20_000, 128, "bf16x3", "32", "bf16x3"),
        (20_000, 128, "fp32", "32", None), (100, 128, "bf16x6", "32", None), (20_000, 16, "bf16x6", "32", None),
        (20_000, 128, "bf16x6", "int8", None),
    ):  # fmt: skip
        if kind not in KINDS and kind != "fp32":
            continue
        monkeypatch.setattr(reduced, "kind_of_floats", lambda kind=kind: kind)
        torch.manual_seed(0)
        model = TextClassifier(AWDLSTM(Architecture(30, 12, size, 2)), ClassifierHead(36, 8, 3)).eval()
        with torch.inference_mode():
            before = model(tokens, lengths)
            reduced.compile_for(model.encoder, asked)
            assert not model.encoder.twins  # its weights may still change
            reduced.reduce_precision(model.encoder, precision)
            reduced.compile_for(model.encoder, asked)
            assert [each.kind for each in model.encoder.twins] == ([taken] * 2 if taken else [])
            if precision == "32":
                torch.testing.assert_close(model(tokens, lengths), before, rtol=1e-3, atol=1e-4)
        twins = model.encoder.twins
        reduced.compile_for(model.encoder, asked)
        assert model.encoder.twins is twins
        with monkeypatch.context() as patch:
            patch.setattr(reduced, "kind_of_floats", lambda: "fp32")
            reduced.compile_for(model.encoder, 0)
            assert not model.encoder.twins  # another precision is asked for
        reduced.compile_for(model.encoder, asked)
        assert not model.to(torch.float64).encoder.twins


def test_without_tiles(passes_without_tiles: Callable[[str, str], None]) -> None:
    """On a processor with AMX, too, the vectors of one without are right."""
    passes_without_tiles(__file__, "close or alone or 8_bits")
