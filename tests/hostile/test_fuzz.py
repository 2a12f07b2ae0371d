"""Damaged and invented files of every kind: nothing but our own error comes out (hypothesis; longer in `stress`)."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stress.fuzz_targets import NAMES, workshop

from ulmfit.errors import UlmfitError

FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def targets() -> Iterator[dict[str, Any]]:
    pytest.importorskip("pyarrow")
    place = workshop()
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    yield place.targets()
    logging.disable(disabled)
    shutil.rmtree(place.folder)


def ends_well(targets: dict[str, Any], name: str, content: bytes) -> None:
    message = ""
    try:
        targets[name].read(content)
    except UlmfitError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 2000


def test_these_are_all_targets(targets: dict[str, Any]) -> None:
    assert set(targets) == set(NAMES)
    for target in targets.values():
        for seed in target.seeds:
            ends_well({"": target}, "", seed)


edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), st.binary(max_size=9)), min_size=1, max_size=5)


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(which=st.integers(0, 99), changes=edits, repeated=st.integers(0, 3))
def test_damaged_files(
    targets: dict[str, Any], name: str, which: int, changes: list[tuple[float, int, bytes]], repeated: int
) -> None:
    seeds = targets[name].seeds
    content = bytearray(seeds[which % len(seeds)])
    for place, removed, new in changes:
        start = int(place * len(content))
        content[start : start + removed] = new
    ends_well(targets, name, bytes(content) + bytes(content[-20:]) * repeated)


cells = st.text(st.sampled_from("ab,;\t\"'\n\r \ufeff\u2028é猫🙂\u202e=_"), max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "a", "\ud800", 10**30, 1 << 63, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=3),
    max_leaves=5,
)
KEYS = {
    "jsonl": ["text", "label"],
    "bundle.json": [
        "kind",
        "architecture",
        "labels",
        "pooling",
        "metrics",
        "checksums",
        "provenance",
        "format_version",
    ],
    "tokenizer.json": ["format_version", "fingerprint", "vocab_size", "config"],
}


@pytest.mark.parametrize("name", ["csv", "tsv", "text"])
@FEW
@given(rows=st.lists(st.lists(cells, max_size=4), max_size=6), header=st.booleans(), encoding=st.sampled_from([8, 16]))
def test_invented_tables(
    targets: dict[str, Any], name: str, rows: list[list[str]], header: bool, encoding: int
) -> None:
    delimiter = "\t" if name == "tsv" else ","
    lines = [*([["text", "label"]] if header else []), *rows]
    ends_well(targets, name, "\n".join(map(delimiter.join, lines)).encode(f"utf-{encoding}"))


@pytest.mark.parametrize("name", KEYS)
@FEW
@given(data=st.data())
def test_invented_records(targets: dict[str, Any], name: str, data: st.DataObject) -> None:
    record = data.draw(st.dictionaries(st.sampled_from(KEYS[name]) | st.text(max_size=2), json_values, max_size=5))
    if name != "jsonl":
        record = json.loads(targets[name].seeds[0]) | record
    ends_well(targets, name, json.dumps(record).encode())


@FEW
@given(
    tensors=st.dictionaries(
        st.sampled_from(["embedding.weight", "a", "__metadata__"]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F64", "U16", "C64", "x"]),
                "shape": st.lists(st.integers(-1, 5) | st.sampled_from([1 << 31, 1 << 62]), max_size=3),
                "data_offsets": st.tuples(st.integers(-1, 40), st.integers(-1, 40)),
            }
        )
        | json_values,
        max_size=3,
    ),
    payload=st.binary(max_size=40),
    length=st.none() | st.integers(0, (1 << 64) - 1),
)
def test_invented_weights(targets: dict[str, Any], tensors: dict[str, Any], payload: bytes, length: int | None) -> None:
    header = json.dumps(tensors).encode()
    size = struct.pack("<Q", len(header) if length is None else length)
    ends_well(targets, "safetensors", size + header + payload)


@FEW
@given(
    meta=st.fixed_dictionaries(
        {
            "format_version": st.sampled_from([1, 2, None]),
            "tokens": st.integers(-2, 20) | json_values,
            "documents": st.integers(-2, 5) | json_values,
            "characters": st.integers(-2, 20) | json_values,
            "dtype": st.sampled_from(["uint16", "uint32", "object", "O", "int64", "S9"]),
        }
    ),
    offsets=st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(0, 20), max_size=5),
    tokens=st.binary(max_size=40),
)
def test_invented_caches(targets: dict[str, Any], meta: dict[str, Any], offsets: list[int], tokens: bytes) -> None:
    parts = json.dumps(meta).encode(), struct.pack(f"<{len(offsets)}q", *offsets)
    ends_well(targets, "cache", struct.pack("<HH", *map(len, parts)) + b"".join(parts) + tokens)


@FEW
@given(file=st.sampled_from(["metrics.json", "config.yaml"]), record=st.dictionaries(
    st.sampled_from(["lm", "test", "valid_accuracy", "valid_perplexity", "seconds", "seed", "stage", "trainer", "x"]),
    json_values | st.fixed_dictionaries({"error": json_values, "macro_f1": json_values, "name": json_values}),
    max_size=5,
))  # fmt: skip
def test_invented_runs(targets: dict[str, Any], file: str, record: dict[str, Any]) -> None:
    ends_well(targets, "run folder", f"{file}\0{json.dumps(record)}".encode())
