"""Documents that begin alike share the nodes of their steps."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ulmfit.nn.prefix_tree import prefix_tree

DOCUMENTS = st.lists(st.lists(st.integers(0, 2), min_size=0, max_size=6), min_size=1, max_size=12).filter(any)


@given(documents=DOCUMENTS, most=st.integers(1, 20), padding=st.integers(0, 2))
def test_each_beginning_is_one_node_and_each_document_ends_once(
    documents: list[list[int]], most: int, padding: int
) -> None:
    lengths = torch.tensor([len(each) for each in documents])
    tokens = torch.full((len(documents), int(lengths.max())), padding)
    for row, document in enumerate(documents):
        tokens[row, : len(document)] = torch.tensor(document)
    found: dict[int, list[int]] = {}
    before: list[list[int]] = [[]]  # what the nodes of the step before stand for
    step, parts = 0, list(prefix_tree(tokens, lengths).parts(most))
    for part in parts:
        assert len(part.tokens) <= most or len(part.starts) == 2
        assert part.starts[0] == part.end_starts[0] == 0
        for t in range(len(part.starts) - 1):
            nodes = slice(part.starts[t], part.starts[t + 1])
            now = [
                before[parent] + [token]
                for parent, token in zip(part.parents[nodes].tolist(), part.tokens[nodes].tolist(), strict=True)
            ]
            step += 1
            assert sorted(now) == sorted(map(list, {tuple(d[:step]) for d in documents if len(d) >= step}))
            for node, document in part.ends[part.end_starts[t] : part.end_starts[t + 1]].tolist():
                assert document not in found
                found[document] = now[node]
            before = now
    assert step == lengths.max()
    assert found == {row: document for row, document in enumerate(documents) if document}
