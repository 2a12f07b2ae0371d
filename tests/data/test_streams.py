"""Language-model windows: exact layout, nothing lost, the same for any number of ranks and after a resume."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from ulmfit.data.cache import TokenCache
from ulmfit.data.streams import LMStream
from ulmfit.errors import DataError, UsageError

BOS = 2


def cache(lengths: list[int]) -> TokenCache:
    """Documents of unique ids (but for the begin marker), so that a token tells its place."""
    ids = iter(range(3, 10**6))
    return TokenCache.from_documents([[BOS, *(next(ids) for _ in range(n - 1))] for n in lengths], 10**6)


def random_cache(total: int, seed: int = 0) -> TokenCache:
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(min(int(rng.integers(1, 40)), total - sum(lengths)))
    return cache(lengths)


def joined(stream: LMStream) -> tuple[Tensor, Tensor]:
    """All windows of an epoch side by side: (B, L) inputs and targets."""
    inputs, targets = zip(*stream, strict=True)
    return torch.cat(inputs, 1), torch.cat(targets, 1)


def flat(source: TokenCache) -> npt.NDArray[np.int64]:
    return np.asarray(source.tokens, dtype=np.int64)


def test_layout() -> None:
    """14 tokens on 2 rows: L = 13 // 2 = 6, windows of 4 and 2; token 14 is left over."""
    source = TokenCache.from_documents([[2, 10, 11, 12, 13], [2, 20, 21], [2, 30, 31, 32, 33, 34]], 100)
    batches = list(LMStream(source, batch_size=2, bptt=4))
    expected = [
        ([[2, 10, 11, 12], [20, 21, 2, 30]], [[10, 11, 12, 13], [21, 2, 30, 31]]),
        ([[13, 2], [31, 32]], [[2, 20], [32, 33]]),
    ]
    assert [(x.tolist(), y.tolist()) for x, y in batches] == expected
    assert all(x.dtype == y.dtype == torch.int64 and x.is_contiguous() for x, y in batches)


@pytest.mark.parametrize("random_bptt", [False, True])
@pytest.mark.parametrize(
    ("total", "rows", "bptt"), [(1000, 7, 13), (1001, 4, 70), (50, 49, 70), (641, 64, 5), (900, 1, 1), (2, 1, 70)]
)
def test_rows_are_consecutive_and_each_target_follows_its_input(
    total: int, rows: int, bptt: int, random_bptt: bool
) -> None:
    source = random_cache(total)
    stream = LMStream(source, rows, bptt, random_bptt)
    inputs, targets = joined(stream)
    length = (total - 1) // rows
    assert inputs.shape == targets.shape == (rows, length)
    assert stream.tokens_per_epoch == rows * length
    # Row r is [r * L, (r + 1) * L): each token is an input once and, but for the very first, a target once.
    assert inputs.flatten().tolist() == flat(source)[: rows * length].tolist()
    assert targets.flatten().tolist() == flat(source)[1 : rows * length + 1].tolist()
    assert total - 1 - rows * length < rows  # fewer tokens are left out than there are rows
    widths = [x.size(1) for x, _ in LMStream(source, rows, bptt, random_bptt)]
    assert len(widths) == len(stream) and min(widths) > 0
    if not random_bptt:
        assert all(width == bptt for width in widths[:-1]) and widths[-1] <= bptt


class TestDirection:
    def test_backward_reverses_each_document_after_its_marker(self) -> None:
        source = TokenCache.from_documents([[2, 10, 11, 12], [2], [2, 20, 21, 22, 23], [2, 30]], 100)
        inputs, targets = joined(LMStream(source, 1, 3, direction="backward"))
        stream = [2, 12, 11, 10, 2, 2, 23, 22, 21, 20, 2, 30]
        assert inputs[0].tolist() == stream[:-1] and targets[0].tolist() == stream[1:]

    def test_the_cache_is_not_touched(self) -> None:
        source = random_cache(300)
        before = flat(source).copy()
        joined(LMStream(source, 4, 10, direction="backward", shuffle=True))
        assert np.array_equal(flat(source), before)

    def test_backward_shuffles_into_the_same_order(self) -> None:
        source = random_cache(300)
        orders = []
        for direction in ("forward", "backward"):
            x, _ = joined(LMStream(source, 1, 10, direction=direction, shuffle=True, seed=3))
            starts = np.flatnonzero(x[0].numpy() == BOS).tolist()
            ends = [*starts[1:], x.size(1)]
            orders.append([tuple(sorted(x[0, a:b].tolist())) for a, b in zip(starts, ends, strict=True)][:-1])
        assert orders[0] == orders[1]


class TestShuffle:
    def documents(self, stream: LMStream) -> list[tuple[int, ...]]:
        """Whole documents in the order of a one-row stream."""
        x, y = joined(stream)
        row = [*x[0].tolist(), y[0, -1].item()]
        starts = [i for i, token in enumerate(row) if token == BOS]
        return [tuple(row[a:b]) for a, b in zip(starts, [*starts[1:], len(row)], strict=True)]

    def test_each_epoch_has_its_own_order_of_the_same_documents(self) -> None:
        source = random_cache(500)
        stream = LMStream(source, 1, 20, shuffle=True, seed=1)
        orders = []
        for epoch in range(3):
            stream.set_epoch(epoch)
            orders.append(self.documents(stream))
        whole = [tuple(source.document(i).tolist()) for i in range(len(source))]
        assert all(sorted(order) == sorted(whole) for order in orders)
        assert len({tuple(order) for order in [*orders, whole]}) == 4

    def test_order_depends_on_seed_and_epoch_only(self) -> None:
        source = random_cache(500)
        first = LMStream(source, 1, 20, shuffle=True, seed=1)
        first.set_epoch(0)
        joined(first)
        first.set_epoch(5)
        second = LMStream(source, 1, 20, shuffle=True, seed=1)
        second.set_epoch(5)
        assert torch.equal(joined(first)[0], joined(second)[0])
        other = LMStream(source, 1, 20, shuffle=True, seed=2)
        other.set_epoch(5)
        assert not torch.equal(joined(other)[0], joined(second)[0])

    def test_unshuffled_epochs_are_alike(self) -> None:
        stream = LMStream(random_cache(500), 3, 20)
        first = joined(stream)[0]
        stream.set_epoch(1)
        assert torch.equal(joined(stream)[0], first)


class TestRandomLengths:
    def widths(self, row_length: int, bptt: int = 70, epoch: int = 0, seed: int = 0) -> npt.NDArray[np.int64]:
        source = TokenCache(np.zeros(row_length + 1, dtype=np.uint16), np.array([0, row_length + 1]))
        stream = LMStream(source, 1, bptt, random_bptt=True, seed=seed)
        stream.set_epoch(epoch)
        return np.array([x.size(1) for x, _ in stream])

    def test_number_is_fixed_and_the_sum_exact(self) -> None:
        """Schedules are laid out for a number of steps; short rows and windows are the hard cases."""
        for bptt in (1, 2, 3, 5, 8, 20, 70):
            for row_length in (1, 2, 5, 11, 69, 70, 71, 200, 1003):
                counts = set()
                for epoch in range(8):
                    widths = self.widths(row_length, bptt, epoch)
                    assert widths.sum() == row_length and widths.min() >= 1
                    counts.add(len(widths))
                assert len(counts) == 1, (bptt, row_length, counts)

    def test_epochs_and_seeds_differ(self) -> None:
        first = self.widths(5000).tolist()
        assert self.widths(5000).tolist() == first
        assert self.widths(5000, epoch=1).tolist() != first
        assert self.widths(5000, seed=1).tolist() != first

    def test_distribution(self) -> None:
        """N(70, 5), in 5 % of cases N(35, 5) (Merity et al. 2017, section 4.1)."""
        widths = self.widths(1_400_000)
        short = widths[widths < 52]
        usual = widths[widths >= 52]
        assert len(short) / len(widths) == pytest.approx(0.05, abs=0.006)  # 4 standard deviations
        assert usual.mean() == pytest.approx(70, abs=0.4) and short.mean() == pytest.approx(35, abs=1)
        assert usual.std() == pytest.approx(5, abs=0.3) and short.std() == pytest.approx(5, abs=0.6)
        assert abs(np.corrcoef(widths[:-1], widths[1:])[0, 1]) < 0.03  # rounding borrows from neighbours, barely


class TestRanks:
    @pytest.mark.parametrize("options", [{}, {"random_bptt": True}, {"shuffle": True, "direction": "backward"}])
    @pytest.mark.parametrize(("rows", "world_size"), [(4, 2), (6, 3), (7, 3), (2, 4)])
    def test_shards_side_by_side_are_the_single_stream(
        self, rows: int, world_size: int, options: dict[str, Any]
    ) -> None:
        source = random_cache(1500)
        single = list(LMStream(source, rows, 17, **options))
        ranks = [{"rank": r, "world_size": world_size} for r in range(world_size)]
        shards = [list(LMStream(source, rows, 17, **rank, **options)) for rank in ranks]
        assert {len(shard) for shard in shards} == {len(single)}
        for step, (inputs, targets) in enumerate(single):
            assert torch.equal(torch.cat([shard[step][0] for shard in shards]), inputs)
            assert torch.equal(torch.cat([shard[step][1] for shard in shards]), targets)


class TestResume:
    options: dict[str, Any] = {"random_bptt": True, "shuffle": True, "seed": 4}  # noqa: RUF012

    @pytest.mark.parametrize("position", [0, 1, 5, 11])
    def test_continues_where_the_state_was_taken(self, position: int) -> None:
        source = random_cache(1000)
        stream = LMStream(source, 4, 20, **self.options)
        stream.set_epoch(3)
        whole = list(stream)
        assert len(whole) > 11
        iterator = iter(stream)
        for _ in range(position):
            next(iterator)
        state = stream.state_dict()
        resumed = LMStream(source, 4, 20, **self.options)
        resumed.load_state_dict(state)
        resumed.set_epoch(3)
        rest = list(resumed)
        assert len(rest) == len(whole) - position
        for (x, y), (x_whole, y_whole) in zip(rest, whole[position:], strict=True):
            assert torch.equal(x, x_whole) and torch.equal(y, y_whole)

    def test_the_epoch_after_a_resumed_one_is_whole(self) -> None:
        stream = LMStream(random_cache(1000), 4, 20, **self.options)
        stream.load_state_dict({**stream.state_dict(), "next_batch": 7})
        assert len(list(stream)) == len(stream) - 7
        stream.set_epoch(1)
        assert len(list(stream)) == len(stream)

    def test_state_of_a_finished_epoch_is_the_start_of_the_next(self) -> None:
        stream = LMStream(random_cache(1000), 4, 20, **self.options)
        list(stream)
        assert stream.state_dict() == LMStream(random_cache(1000), 4, 20, **self.options).state_dict()

    def test_a_loaded_state_can_be_saved_again_before_any_batch(self) -> None:
        stream = LMStream(random_cache(1000), 4, 20, **self.options)
        stream.load_state_dict({**stream.state_dict(), "next_batch": 7})
        assert stream.state_dict()["next_batch"] == 7

    def test_a_position_among_other_windows_is_refused(self) -> None:
        state = LMStream(random_cache(1000), 4, 20, **self.options).state_dict()
        with pytest.raises(UsageError, match="made with batch_size=4, now it is 5"):
            LMStream(random_cache(1000), 5, 20, **self.options).load_state_dict(state)


def test_a_text_shorter_than_the_batch_is_an_error() -> None:
    source = cache([3, 4])
    assert len(list(LMStream(source, 6, 10))) == 1
    with pytest.raises(DataError) as caught:
        LMStream(source, 8, 10, world_size=2)
    assert str(caught.value) == (
        "the text has 7 tokens, too few for 8 parallel streams; bring more text or lower stage.lm.batch_size"
    )


def test_windows_are_views_of_one_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """No document is touched to make a batch: fastai's loader joins them anew for each row of each window."""
    source = random_cache(2000)
    monkeypatch.setattr(TokenCache, "document", lambda self, index: pytest.fail("looked at a document"))
    assert len(list(LMStream(source, 4, 20))) == 25


def test_ids_above_65535_survive() -> None:
    source = TokenCache.from_documents([[2, 70_000, 99_999, 65_536]], 100_000)
    assert joined(LMStream(source, 1, 2))[1][0].tolist() == [70_000, 99_999, 65_536]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_corpus_brought_into_order_piece_by_piece(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks much smaller than the corpus, and than a document, give the same batches; also from the middle on."""
    documents = [[2, *range(10 + 20 * i, 10 + 20 * i + 3 * i + 1)] for i in range(6)]
    source = TokenCache.from_documents(documents, 200)
    whole = LMStream(source, 3, 4, direction=direction, shuffle=True, seed=5)
    expected = list(whole)
    monkeypatch.setattr("ulmfit.data.streams._BLOCK", 1)
    stream = LMStream(source, 3, 4, direction=direction, shuffle=True, seed=5)
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(stream, expected, strict=True))
    stream.load_state_dict({**whole.state_dict(), "next_batch": 2})
    assert torch.equal(next(iter(stream))[0], expected[2][0])


def test_lead_in_is_what_stands_before_each_row() -> None:
    source = TokenCache.from_documents([[2, 10, 11, 12, 13], [2, 20, 21], [2, 30, 31, 32, 33, 34]], 100)
    lead_in = LMStream(source, batch_size=2, bptt=4).lead_in(3)
    assert lead_in is not None and lead_in.tolist() == [source.tokens[3:6].tolist()]
    assert LMStream(source, batch_size=1, bptt=4).lead_in(3) is None
