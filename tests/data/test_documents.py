"""Every document exactly once over all ranks, within the bounds, nearly no padding, and resumable."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ulmfit.data.cache import TokenCache
from ulmfit.data.documents import DocumentBatches
from ulmfit.errors import DataError, UsageError


def documents(lengths: list[int]) -> list[np.ndarray]:
    """Documents that start with the marker 2 and are distinguishable by their tokens."""
    return [np.array([2, *range(3 + i, 2 + i + n)], dtype=np.int64) for i, n in enumerate(lengths)]


def batches(lengths: list[int], **settings: object) -> DocumentBatches:
    values: dict[str, object] = {"labels": None, "batch_size": 8, "tokens_per_batch": 1000, "shuffle": True, "seed": 0}
    return DocumentBatches(documents(lengths), **(values | settings))  # type: ignore[arg-type]


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=120),
    batch_size=st.integers(1, 40),
    budget=st.integers(1, 1500),
    ranks=st.integers(1, 4),
    shuffle=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=300, deadline=None)
def test_every_document_once_within_bounds(
    lengths: list[int], batch_size: int, budget: int, ranks: int, shuffle: bool, seed: int
) -> None:
    settings_ = {
        "batch_size": batch_size,
        "tokens_per_batch": budget,
        "shuffle": shuffle,
        "seed": seed,
        "world_size": ranks,
    }
    if shuffle and len(lengths) < ranks:
        with pytest.raises(DataError, match="fewer than"):
            batches(lengths, **settings_)
        return
    steps = set()
    for epoch in (0, 1, 7):
        seen: list[int] = []
        excess = 0
        for rank in range(ranks):
            loader = batches(lengths, rank=rank, **settings_)
            loader.set_epoch(epoch)
            plan = loader.plan()
            steps.add(len(loader))
            assert len(plan) == len(loader) > 0
            for index in plan:
                if len(index) == 0:
                    assert not shuffle and len(plan) == 1
                    continue
                longest = max(lengths[i] for i in index)
                excess += len(index) > batch_size or (len(index) > 1 and longest * len(index) > budget)
                seen += index.tolist()
        assert sorted(seen) == list(range(len(lengths)))
        if not shuffle or len(lengths) % ranks == 0 or len(plan) * ranks < len(lengths) - ranks:
            assert excess == 0
    assert len(steps) == 1 or not shuffle  # the same on every rank and in every epoch


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=120),
    batch_size=st.integers(1, 20),
    ranks=st.integers(2, 4),
    epoch=st.integers(0, 3),
)
@example(lengths=[1] * 9, batch_size=2, ranks=2, epoch=0)
@settings(max_examples=100, deadline=None)
def test_ranks_step_through_what_one_process_would(lengths: list[int], batch_size: int, ranks: int, epoch: int) -> None:
    """Of the documents; with the padded tokens bounded for each rank, one process may cut elsewhere."""
    if len(lengths) < ranks:
        return

    def plan(rank: int, world_size: int, batch_size: int, shuffle: bool) -> list[list[int]]:
        whole = {"tokens_per_batch": 10**6, "world_size": world_size, "batch_size": batch_size, "shuffle": shuffle}
        loader = batches(lengths, rank=rank, **whole)
        loader.set_epoch(epoch)
        return [index.tolist() for index in loader.plan()]

    alone = plan(0, 1, batch_size * ranks, True)
    if min(map(len, alone)) >= ranks:  # otherwise a rank would have nothing to do in a step
        steps = zip(*(plan(rank, ranks, batch_size, True) for rank in range(ranks)), strict=True)
        parts = [list(step) for step in steps]
        assert all(max(map(len, step)) - min(map(len, step)) <= 1 for step in parts)
        assert [sorted(i for part in step for i in part) for step in parts] == [sorted(batch) for batch in alone]
    alone = plan(0, 1, batch_size, False)
    dealt = [batch for rank in range(ranks) for batch in plan(rank, ranks, batch_size, False)]
    assert sorted(dealt) == sorted(alone + [[]] * max(0, ranks - len(alone)))


@pytest.mark.parametrize("batch_size", [32, 64])
@pytest.mark.parametrize("shuffle", [True, False])
def test_little_padding_on_realistic_lengths(batch_size: int, shuffle: bool) -> None:
    rng = np.random.default_rng(0)
    shapes = {
        "reviews": np.clip(rng.lognormal(5.4, 0.7, 5000), 5, 3000),
        "questions": np.clip(rng.lognormal(2.5, 0.4, 5000), 4, 60),
        "mixture": np.concatenate([rng.integers(1, 40, 3000), rng.integers(300, 3000, 2000)]),
    }
    for name, lengths in shapes.items():
        loader = batches(lengths.astype(int).tolist(), batch_size=batch_size, tokens_per_batch=20_000, shuffle=shuffle)
        assert loader.padding_share() < 0.05, name
        # ... without buying that by many small batches
        fewest = sum(1 / min(batch_size, max(1, 20_000 // int(n))) for n in lengths)
        assert len(loader) < 1.06 * fewest + 2


def test_batch_contents() -> None:
    loader = DocumentBatches(documents([3, 1, 5]), [7, 8, 9], 8, 1000, shuffle=False, seed=0)
    (batch,) = list(loader)
    assert batch.index.tolist() == [2, 0, 1]
    assert batch.lengths.tolist() == [5, 3, 1]
    assert batch.labels.tolist() == [9, 7, 8]
    assert batch.tokens.tolist() == [[2, 5, 6, 7, 8], [2, 3, 4, 0, 0], [2, 0, 0, 0, 0]]
    assert all(part.dtype == torch.int64 for part in batch)
    backward = DocumentBatches(documents([3, 1, 5]), None, 8, 1000, shuffle=False, seed=0, direction="backward")
    (batch,) = list(backward)
    assert batch.tokens.tolist() == [[2, 8, 7, 6, 5], [2, 4, 3, 0, 0], [2, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [-1, -1, -1]


def test_token_cache_and_arrays_give_the_same_batches() -> None:
    lengths = [4, 9, 1, 30, 12, 12]
    cache = TokenCache.from_documents([d.tolist() for d in documents(lengths)], vocab_size=1000)
    for direction in ("forward", "backward"):
        settings_ = {"batch_size": 2, "tokens_per_batch": 40, "shuffle": True, "seed": 3, "direction": direction}
        pairs = zip(
            DocumentBatches(cache, list(range(6)), **settings_),  # type: ignore[arg-type]
            DocumentBatches(documents(lengths), list(range(6)), **settings_),  # type: ignore[arg-type]
            strict=True,
        )
        for ours, theirs in pairs:
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_index_restores_the_order() -> None:
    lengths = np.random.default_rng(1).integers(1, 300, 500).tolist()
    order = torch.cat([batch.index for batch in batches(lengths, shuffle=False)])
    found = torch.cat([batch.lengths for batch in batches(lengths, shuffle=False)])
    restored = torch.empty_like(found)
    restored[order] = found
    assert restored.tolist() == lengths
    longest = [int(batch.lengths.max()) for batch in batches(lengths, shuffle=False)]
    assert longest[0] == max(lengths)


def test_a_document_over_the_budget_is_alone() -> None:
    for epoch in range(5):
        loader = batches([500, 2000, 30, 1500, 40, 999, 20, 20], tokens_per_batch=1000)
        loader.set_epoch(epoch)
        assert [1] in [index.tolist() for index in loader.plan()]
        assert [3] in [index.tolist() for index in loader.plan()]


def test_shuffle_is_a_function_of_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 400).tolist()

    def plan(seed: int, epoch: int) -> list[tuple[int, ...]]:
        loader = batches(lengths, seed=seed)
        loader.set_epoch(epoch)
        return [tuple(index.tolist()) for index in loader.plan()]

    assert plan(0, 3) == plan(0, 3)
    assert plan(0, 3) != plan(0, 4)
    assert plan(0, 3) != plan(1, 3)
    # neighbours change between epochs: few batches return as they were
    assert len({frozenset(b) for b in plan(0, 3)} & {frozenset(b) for b in plan(0, 4)}) < len(plan(0, 3)) / 4
    # and batches do not come sorted by length
    firsts = [lengths[b[0]] for b in plan(0, 3)]
    assert firsts not in (sorted(firsts), sorted(firsts, reverse=True))


def test_no_batch_of_one_at_the_end() -> None:
    # batch norm learns nothing from one row; 129 documents at 64 would leave one over
    for epoch in range(10):
        loader = batches([20] * 129, batch_size=64, tokens_per_batch=20_000)
        loader.set_epoch(epoch)
        assert len(loader) == 3
        assert min(len(index) for index in loader.plan()) >= 16


def test_ranks_step_on_similar_lengths() -> None:
    lengths = np.random.default_rng(0).integers(5, 1000, 2000).tolist()
    plans = [batches(lengths, rank=rank, world_size=4, tokens_per_batch=4000).plan() for rank in range(4)]
    spread = []
    for step in zip(*plans, strict=True):
        longest = [max(lengths[i] for i in index) for index in step]
        spread.append(max(longest) - min(longest))
    assert np.mean(spread) < 30


def test_resume_inside_an_epoch() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 100).tolist()
    whole = batches(lengths)
    whole.set_epoch(2)
    wanted = [batch.index.tolist() for batch in whole]
    half = batches(lengths)
    half.set_epoch(2)
    iterator = iter(half)
    for _ in range(5):
        next(iterator)
    state = half.state_dict()
    resumed = batches(lengths)
    resumed.load_state_dict(state)
    resumed.set_epoch(2)  # Lightning announces the epoch again
    assert [batch.index.tolist() for batch in resumed] == wanted[5:]
    assert [batch.index.tolist() for batch in resumed] == wanted  # the next pass is whole
    resumed.load_state_dict(state)
    resumed.set_epoch(3)
    assert len(list(resumed)) == len(resumed)
    # a pass broken off without a state starts anew
    next(iter(whole))
    assert [batch.index.tolist() for batch in whole] == wanted


def test_state_of_other_settings_is_refused() -> None:
    state = batches([5, 6, 7]).state_dict()
    with pytest.raises(UsageError, match="batch_size=8, now it is 4"):
        batches([5, 6, 7], batch_size=4).load_state_dict(state)
    with pytest.raises(UsageError, match="documents=3, now it is 4"):
        batches([5, 6, 7, 8]).load_state_dict(state)


def test_lightning_reaches_set_epoch_through_the_sampler() -> None:
    loader = batches([5, 6, 7])
    loader.sampler.set_epoch(4)
    assert loader.epoch == 4


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="2 labels for 3 documents"):
        batches([1, 2, 3], labels=[0, 1])
    with pytest.raises(ValueError, match="document 1 has no tokens"):
        DocumentBatches([np.array([2]), np.array([], dtype=np.int64)], None, 1, 1, False, 0)
    with pytest.raises(DataError, match="0 documents"):
        batches([])
    with pytest.raises(ValueError, match="direction"):
        batches([1], direction="sideways")


def test_a_chunk_bounds_what_is_read_at_a_time() -> None:
    lengths = [3] * 100 + [12] * 40 + [50] * 30 + [1000] * 3
    batches = DocumentBatches(
        [np.ones(n, dtype=np.uint16) for n in lengths], None, 64, 2500, shuffle=False, seed=0, chunk=(10, 160)
    )
    seen = []
    for batch in batches:
        rows, longest = batch.tokens.shape
        assert rows <= 64 and rows * min(longest, 10) <= 160 and (rows == 1 or rows * longest <= 2500)
        seen += batch.index.tolist()
    assert sorted(seen) == list(range(len(lengths)))
    # ceil(100 / 53), ceil(40 / 16), ceil(30 / 16) and, by the 2,500 tokens, 2 and 1
    assert len(batches) <= 2 + 3 + 2 + 2 + 3
