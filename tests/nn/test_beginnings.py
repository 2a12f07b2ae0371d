"""At work, steps with which many documents begin alike are read once, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.heads import ClassifierHead
from ulmfit.nn.models import TextClassifier
from ulmfit.nn.packed import pack_weights
from ulmfit.nn.processor import onednn_has

pytestmark = pytest.mark.skipif(
    not onednn_has("_reorder_mkldnn_rnn_layer_weight"), reason="this torch does not multiply with oneDNN"
)


def classifiers(max_len: int = 100) -> tuple[TextClassifier, TextClassifier]:
    """One whose calls are cheap, and one that reads all steps of all documents."""
    torch.manual_seed(0)
    encoder = AWDLSTM(Architecture(50, 16, 24, 2))
    packed = copy.deepcopy(encoder)
    pack_weights(packed)
    head = ClassifierHead(48, 8, 3)
    return TextClassifier(packed, head, 10, max_len).eval(), TextClassifier(encoder, head, 10, max_len).eval()


def documents(rows: int, beginnings: int, alike: int, lengths: Tensor) -> Tensor:
    """(rows, T) tokens of which the first `alike` are those of one of `beginnings`."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(50, (rows, int(lengths.max())), generator=generator)
    heads = torch.randint(50, (beginnings, alike), generator=generator)
    tokens[:, :alike] = heads[torch.arange(rows) % beginnings, : tokens.size(1)]
    tokens[:, 0] = 1  # the begin marker
    return tokens


def tokens_read(model: TextClassifier, tokens: Tensor, lengths: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    read = 0
    forward = AWDLSTM.forward

    def counted(self: AWDLSTM, tokens: Tensor, *rest: object) -> object:
        nonlocal read
        read += tokens.numel()
        return forward(self, tokens, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(AWDLSTM, "forward", counted)
        model(tokens, lengths)
    return read


LENGTHS = [
    torch.full((130,), 14),
    torch.arange(130) % 30 + 4,  # some end where all are still alike
    torch.arange(130) % 30 + 1,  # one ends after its begin marker
    torch.full((130,), 3),  # all end there
    torch.full((130,), 1),
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{int(lengths.min())} to {int(lengths.max())}")
@pytest.mark.parametrize("beginnings", [1, 20, 130])
def test_the_same_features_and_logits(lengths: Tensor, beginnings: int) -> None:
    some, all_of_them = classifiers()
    tokens = documents(130, beginnings, 4, lengths)
    with torch.inference_mode():
        found, right = some.pool(tokens, lengths), all_of_them.pool(tokens, lengths)
        torch.testing.assert_close(found[0], right[0], atol=1e-6, rtol=1e-5)
        assert found[1].steps == right[1].steps
        torch.testing.assert_close(some(tokens, lengths), all_of_them(tokens, lengths), atol=1e-6, rtol=1e-5)


def test_each_beginning_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    some, _ = classifiers()
    lengths = torch.full((130,), 14)
    alike = documents(130, 20, 4, lengths)
    once = sum(len(alike[:, : t + 1].unique(dim=0)) for t in range(4))
    assert once <= 1 + 3 * 20
    assert tokens_read(some, alike, lengths, monkeypatch) == once + 130 * 10
    different = documents(130, 130, 4, lengths)
    assert tokens_read(some, different, lengths, monkeypatch) == sum(
        len(different[:, : t + 1].unique(dim=0)) if t < 2 else 130 for t in range(14)
    )


def test_few_documents_and_long_ones_are_read_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is gained by one more call for a few tokens, and not all steps of a long document are pooled."""
    some, _ = classifiers()
    lengths = torch.full((65,), 14)
    assert tokens_read(some, documents(65, 1, 4, lengths), lengths, monkeypatch) == 65 * 14
    some, all_of_them = classifiers(max_len=10)
    lengths = torch.full((130,), 14)
    tokens = documents(130, 1, 4, lengths)
    assert tokens_read(some, tokens, lengths, monkeypatch) == 130 * 14
    with torch.inference_mode():
        torch.testing.assert_close(some(tokens, lengths), all_of_them(tokens, lengths), atol=1e-6, rtol=1e-5)
