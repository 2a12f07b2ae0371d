"""LSTMs with their weights laid out once: the same bits as `nn.LSTM`, and chunks that leave out ended documents."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.heads import ClassifierHead, ConcatPool
from ulmfit.nn.models import TextClassifier, chunks_with_little_padding
from ulmfit.nn.packed import PackedLSTM, pack_weights
from ulmfit.nn.processor import cpu_multiplies_bfloat16

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN here")
needs_bfloat16 = pytest.mark.skipif(not cpu_multiplies_bfloat16(), reason="no bfloat16 units here")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]


def encoders(dtype: torch.dtype = torch.float32) -> tuple[AWDLSTM, AWDLSTM]:
    """The same network as it was trained, and packed."""
    torch.manual_seed(0)
    plain = AWDLSTM(Architecture(50, 16, 32, 2)).eval().to(dtype)
    packed = copy.deepcopy(plain)
    pack_weights(packed)
    return plain, packed


def tokens(rows: int, steps: int) -> Tensor:
    return torch.randint(50, (rows, steps), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "steps"), [(3, 9), (17, 6), (64, 70)])
def test_same_bits_with_and_without_a_state(dtype: torch.dtype, rows: int, steps: int) -> None:
    plain, packed = encoders(dtype)
    read = tokens(rows, steps)
    with torch.inference_mode():
        _, state = plain(read)
        for before in (None, state):
            expected, expected_state = plain(read, before)
            found, found_state = packed(read, before)
            assert torch.equal(found, expected)
            for pair, expected_pair in zip(found_state, expected_state, strict=True):
                assert all(map(torch.equal, pair, expected_pair))


@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows_as_step_by_step(rows: int) -> None:
    plain, packed = encoders()
    with torch.inference_mode():
        assert torch.allclose(packed(tokens(rows, 12))[0], plain(tokens(rows, 12))[0], atol=1e-6)


def test_weights_laid_out_once_and_anew_for_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    _, packed = encoders()
    made = []
    pack = PackedLSTM._pack
    monkeypatch.setattr(PackedLSTM, "_pack", lambda layer: made.append(layer) or pack(layer))
    with torch.inference_mode():
        first = packed(tokens(3, 9))[0]
        assert torch.equal(packed(tokens(3, 9))[0], first) and len(made) == 2
        twin = copy.deepcopy(packed)
        assert torch.equal(twin(tokens(3, 9))[0], first) and len(made) == 4
        twin.double()
        assert twin(tokens(3, 9))[0].dtype == torch.float64
        assert torch.equal(twin.float()(tokens(3, 9))[0], first) and len(made) == 6


def test_gradients_are_those_of_the_layer() -> None:
    plain, packed = encoders()
    for model in (plain, packed):
        model(tokens(3, 9))[0].sum().backward()
    expected = [p.grad for p in plain.parameters()]
    for found, gradient in zip(packed.parameters(), expected, strict=True):
        assert found.grad is not None and gradient is not None and torch.equal(found.grad, gradient)


def test_left_alone_where_there_is_no_onednn() -> None:
    plain, _ = encoders()
    elsewhere = copy.deepcopy(plain).to("meta")
    pack_weights(elsewhere)
    assert not elsewhere.cheap_calls and isinstance(elsewhere.rnns[0], nn.LSTM)
    with torch.backends.mkldnn.flags(enabled=False):
        pack_weights(plain)
    assert not plain.cheap_calls


class TestChunks:
    """Chunks of a batch whose documents end at different steps."""

    @given(st.lists(st.integers(1, 300), min_size=1, max_size=80), st.integers(1, 100))
    def test_all_steps_in_order_with_little_padding(self, lengths: list[int], most: int) -> None:
        ends = sorted(lengths, reverse=True)
        chunks = chunks_with_little_padding(ends, most)
        assert [first for first, _ in chunks] == [0, *(end for _, end in chunks[:-1])] and chunks[-1][1] == ends[0]
        for first, end in chunks:
            unread = [n for n in ends if n > first]
            padding = sum(max(0, end - n) for n in unread)
            assert 0 < end - first <= most and padding <= max(64, len(unread) * (end - first) / 16)

    @pytest.mark.parametrize(
        ("ends", "expected"),
        [
            ([12], [(0, 12)]),
            ([9, 8, 8], [(0, 9)]),
            ([150, 10], [(0, 70), (70, 140), (140, 150)]),
            ([48] + [24] * 95, [(0, 24), (24, 48)]),
        ],
    )
    def test_examples(self, ends: list[int], expected: list[tuple[int, int]]) -> None:
        assert chunks_with_little_padding(ends, 70) == expected

    @pytest.mark.parametrize("max_len", [1000, 30])
    def test_the_same_logits_as_from_whole_chunks(self, max_len: int) -> None:
        plain, packed = encoders()
        torch.manual_seed(1)
        head = ClassifierHead(48, 8, 3).eval()
        lengths = torch.tensor([3, 150, 24, 25, 26, 24, 24, 40, 1] + [24] * 20)
        read = tokens(len(lengths), 150)
        with torch.inference_mode():
            found = TextClassifier(packed, head, 70, max_len).eval()(read, lengths)
            expected = TextClassifier(plain, head, 70, max_len).eval()(read, lengths)
        assert torch.allclose(found, expected, atol=1e-5)

    def test_chunks_of_a_network_that_can_be_trained_are_of_bptt_steps(self) -> None:
        plain, packed = encoders()
        ends, whole, cut = [48] + [24] * 95, [(0, 30), (30, 60)], [(0, 24), (24, 48)]
        head = ClassifierHead(48, 8, 3)
        assert TextClassifier(plain, head, 30).eval()._chunks(ends, 48) == whole
        assert TextClassifier(packed, head, 30).eval()._chunks(ends, 48) == cut
        assert TextClassifier(packed, head, 30).train()._chunks(ends, 48) == whole


def test_norms_folded_into_the_layers_after_them() -> None:
    torch.manual_seed(0)
    head = ClassifierHead(12, 8, 3)
    for _ in range(5):
        head(3 * torch.randn(16, 12) + 1)  # statistics of a training
    for norm in head.norms:
        nn.init.normal_(norm.get_parameter("weight"))
        nn.init.normal_(norm.get_parameter("bias"))
    head.eval()
    folded = copy.deepcopy(head)
    folded.fold_norms()
    features = 3 * torch.randn(7, 12) + 1
    assert not list(folded.norms) and torch.allclose(folded(features), head(features), atol=1e-6)
    assert (head(features) - ClassifierHead(12, 8, 3).eval()(features)).abs().max() > 0.1


def test_pooling_of_whole_chunks_needs_no_mask() -> None:
    hidden, lengths = torch.randn(4, 10, 6), torch.tensor([10, 10, 10, 10])
    pools = []
    for whole in (False, True):
        pool = ConcatPool.empty(4, 6, hidden)
        for start in (0, 5):
            chunk, position = hidden[:, start : start + 5], torch.arange(start, start + 5)
            pool = pool.add_whole(chunk) if whole else pool.add(chunk, position, lengths, 100)
        pools.append(pool.features())
    assert torch.equal(*pools)
