"""Splits depend on content and seed alone, keep the class shares, and lose no row."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ulmfit.config import DatasetConfig
from ulmfit.data.sources import load_splits
from ulmfit.data.splits import limited, low_shot, stratified_parts, text_key, threshold_part
from ulmfit.errors import DataError, UsageError

TEXTS = [f"text number {i}" for i in range(1000)]
LABELS = ["rare" if i % 20 == 0 else "often" if i % 2 else "usual" for i in range(1000)]


def test_text_key_ignores_whitespace_and_case() -> None:
    assert text_key(" A\tCat\n") == text_key("a cat")
    assert text_key("a cat") != text_key("acat")


def test_every_class_gives_its_share() -> None:
    parts = stratified_parts(TEXTS, LABELS, 0, 0.1, 0.2)
    counts = Counter(zip(LABELS, parts, strict=True))
    assert {key: counts[key] for key in counts if key[0] == "rare"} == {
        ("rare", "train"): 35,
        ("rare", "valid"): 5,
        ("rare", "test"): 10,
    }
    assert counts["often", "valid"] == 50
    assert counts["usual", "test"] == 90


def test_order_of_rows_does_not_matter_and_seed_does() -> None:
    parts = dict(zip(TEXTS, stratified_parts(TEXTS, LABELS, 3, 0.1, 0.1), strict=True))
    rows = list(zip(TEXTS, LABELS, strict=True))
    random.Random(0).shuffle(rows)
    texts, labels = zip(*rows, strict=True)
    assert dict(zip(texts, stratified_parts(texts, labels, 3, 0.1, 0.1), strict=True)) == parts
    assert dict(zip(TEXTS, stratified_parts(TEXTS, LABELS, 4, 0.1, 0.1), strict=True)) != parts


def test_copies_of_a_text_stay_together() -> None:
    texts = [f"Text {i % 50}" if i % 2 else f"text  {i % 50} " for i in range(200)]
    labels = ["xy"[(i % 50) % 2] for i in range(200)]
    parts = stratified_parts(texts, labels, 0, 0.2, 0.2)
    places: dict[bytes, set[str]] = {}
    for text, part in zip(texts, parts, strict=True):
        places.setdefault(text_key(text), set()).add(part)
    assert all(len(found) == 1 for found in places.values())
    assert set(parts) == {"train", "valid", "test"}


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), min_size=1, max_size=80),
    st.floats(0, 0.5),
    st.floats(0, 0.49),
    st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_each_class_keeps_a_training_row(rows: list[tuple[int, int]], valid: float, test: float, seed: int) -> None:
    texts, labels = [f"t{i}" for i, _ in rows], [f"c{c}" for _, c in rows]
    parts = stratified_parts(texts, labels, seed, valid, test)
    assert len(parts) == len(rows)
    assert {label for label, part in zip(labels, parts, strict=True) if part == "train"} == set(labels)


def test_threshold_shares_are_close() -> None:
    counts = Counter(threshold_part(text, 0, 0.1, 0.2) for text in TEXTS)
    assert counts["valid"] == pytest.approx(100, abs=35)
    assert counts["test"] == pytest.approx(200, abs=45)


def test_low_shot_is_balanced_nested_and_seeded() -> None:
    chosen = low_shot(TEXTS, LABELS, 90, 0)
    assert Counter(LABELS[i] for i in chosen) == {"rare": 30, "often": 30, "usual": 30}
    assert chosen == sorted(chosen)
    assert set(low_shot(TEXTS, LABELS, 45, 0)) < set(chosen)
    assert low_shot(TEXTS, LABELS, 90, 1) != chosen
    # 50 rare rows are all there are; the others fill up
    assert Counter(LABELS[i] for i in low_shot(TEXTS, LABELS, 250, 0)) == {"rare": 50, "often": 100, "usual": 100}
    assert max(Counter(LABELS[i] for i in low_shot(TEXTS, LABELS, 10, 0)).values()) == 4


def test_low_shot_errors() -> None:
    with pytest.raises(DataError, match="train_size=2 cannot hold all 3 classes"):
        low_shot(TEXTS, LABELS, 2, 0)
    with pytest.raises(DataError, match="train_size=1001 is more than the 1000 training rows"):
        low_shot(TEXTS, LABELS, 1001, 0)


def test_limit_keeps_every_class_of_a_sorted_file() -> None:
    rows = limited([f"t{i}" for i in range(100)], ["a"] * 50 + ["b"] * 40 + ["c"] * 10, 20, 0)
    assert Counter("a" if i < 50 else "b" if i < 90 else "c" for i in rows) == {"a": 10, "b": 8, "c": 2}
    assert limited(["x"], ["a"], 5, 0) == [0]


def test_validation_rows_do_not_depend_on_train_size_or_its_seed() -> None:
    plain = load_splits(DatasetConfig(valid="", valid_fraction=0.2))
    small = load_splits(DatasetConfig(train_size=12, train_seed=5))
    assert len(small.train) == 12  # type: ignore[arg-type]
    assert set(Counter(small.train.labels).values()) == {2}  # type: ignore[union-attr,arg-type]
    assert small.valid == load_splits(DatasetConfig()).valid
    assert plain.valid is None  # an empty name switches the split off


def test_fractions_must_leave_training_rows() -> None:
    with pytest.raises(UsageError, match="sum must be below 1"):
        load_splits(DatasetConfig(valid_fraction=0.5, test_fraction=0.5))


@pytest.mark.parametrize("seed", range(5))
def test_empty_texts_are_spread_like_others(seed: int) -> None:
    """They are one text for no split: with equal places all would go to validation, or all into a low-shot sample."""
    texts = [f"text {i}" if i % 2 else "" for i in range(400)]
    labels = ["a" if i % 4 < 2 else "b" for i in range(400)]
    for half in (stratified_parts(texts, labels, seed, 0.25, 0.0), stratified_parts(texts, None, seed, 0.25, 0.0)):
        valid = [i for i, part in enumerate(half) if part == "valid"]
        assert len(valid) == 100
        assert 30 < sum(not texts[i] for i in valid) < 70
    assert 30 < sum(not texts[i] for i in low_shot(texts, labels, 100, seed)) < 70
    assert 30 < sum(not texts[i] for i in limited(texts, labels, 100, seed)) < 70
