"""fastai's networks with the same weights as ours, matched by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulmfit.config import DropoutConfig
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.build import load_named
from ulmfit.nn.heads import ClassifierHead
from ulmfit.nn.models import LanguageModel, TextClassifier

VOCAB, EMBEDDING, HIDDEN, LAYERS, CLASSES = 31, 12, 20, 3, 3
PAD = 1  # fastai's; its embedding row gets no gradient there, so documents here never contain it
RATES = DropoutConfig(input=0.25, hidden=0.15, output=0.1, embedding=0.2, weight=0.3)

# fastai's name -> ours, without the prefix of the encoder ("0." or "0.module.") and of the head.
ENCODER_NAMES = [
    (r"encoder\.weight", r"embedding.weight"),
    (r"rnns\.(\d+)\.weight_hh_l0_raw", r"rnns.\1.weight_hh_l0"),
    (r"rnns\.(\d+)\.module\.(weight_ih_l0|bias_ih_l0|bias_hh_l0)", r"rnns.\1.\2"),
]
HEAD_NAMES = [
    (r"1\.decoder\.bias", "bias"),
    (r"1\.layers\.(\d)\.0\.(\w+)", r"norms.\1.\2"),
    (r"1\.layers\.(\d)\.2\.weight", r"linears.\1.weight"),
]
ALIASES = {"encoder_dp.emb.weight", "1.decoder.weight"}  # the embedding again

Named = Mapping[str, Tensor]


def our_names(tensors: Named) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """fastai's tensors under our names: those of the encoder and those of the head. An unknown name fails."""
    encoder: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = re.sub(r"^0\.(module\.)?", "", name)
        if bare in ALIASES:
            continue
        for names, target in ((ENCODER_NAMES, encoder), (HEAD_NAMES, head)):
            for pattern, ours in names:
                if re.fullmatch(pattern, bare):
                    target[re.sub(pattern, ours, bare)] = tensor
                    break
    assert len(encoder) + len(head) == sum(re.sub(r"^0\.(module\.)?", "", n) not in ALIASES for n in tensors)
    return encoder, head


@pytest.fixture(autouse=True)
def weight_masks_drawn_as_by_fastai(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours draw fewer random numbers, so one seed would not give both networks the same masks."""
    monkeypatch.setattr("ulmfit.nn.awd_lstm.weight_dropout", F.dropout)


@pytest.fixture(scope="session")
def fastai() -> Any:
    """The namespace `from fastai.text.all import *` gives; loaded when the first test needs it."""
    return pytest.importorskip("fastai.text.all")


@pytest.fixture
def renamed() -> Callable[[Named], tuple[dict[str, Tensor], dict[str, Tensor]]]:
    return our_names


@pytest.fixture
def assert_same_gradients() -> Callable[..., None]:
    # Gradients here are about 1; products add up in another order on each kind of processor.
    def check(reference: nn.Module, encoder: nn.Module, head: nn.Module, tolerance: float = 3e-6) -> None:
        gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
        for theirs, ours in zip(our_names(gradients), (encoder, head), strict=True):
            mine = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
            assert mine.keys() == theirs.keys()
            for name, gradient in theirs.items():
                assert gradient.abs().max() > 0, f"{name}: nothing to compare"
                assert torch.allclose(mine[name], gradient, atol=tolerance, rtol=1e-4), name

    return check


@pytest.fixture
def fastai_penalty(fastai: Any) -> Callable[..., float]:
    """AR/TAR as fastai's callback adds it to the loss; `dropped` and `raw` (B, T, E)."""

    def penalty(dropped: Tensor, raw: Tensor, alpha: float, beta: float) -> float:
        regulariser = fastai.RNNRegularizer(alpha=alpha, beta=beta)
        regulariser.learn = SimpleNamespace(
            training=True, loss_grad=torch.zeros(()), rnn=SimpleNamespace(out=dropped.detach(), raw_out=raw.detach())
        )
        regulariser.after_loss()
        return float(regulariser.learn.loss_grad)

    return penalty


def _config(rates: DropoutConfig) -> dict[str, Any]:
    return {
        "emb_sz": EMBEDDING,
        "n_hid": HIDDEN,
        "n_layers": LAYERS,
        "pad_token": PAD,
        "bidir": False,
        "output_p": rates.output,
        "hidden_p": rates.hidden,
        "input_p": rates.input,
        "embed_p": rates.embedding,
        "weight_p": rates.weight,
    }


def _randomise(model: nn.Module) -> None:
    """Weights large enough that documents differ, biases that are not zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)


def _encoder(reference: nn.Module, rates: DropoutConfig) -> AWDLSTM:
    encoder = AWDLSTM(Architecture(VOCAB, EMBEDDING, HIDDEN, LAYERS), rates)
    load_named(encoder, our_names(reference.state_dict())[0], "fastai's encoder")
    return encoder


@pytest.fixture
def language_models(fastai: Any) -> Callable[..., tuple[Any, LanguageModel]]:
    """(fastai's, ours) with the same weights."""

    def build(rates: DropoutConfig = RATES) -> tuple[Any, LanguageModel]:
        config = _config(rates) | {"tie_weights": True, "out_bias": True}
        reference = fastai.get_language_model(fastai.AWD_LSTM, VOCAB, config)
        _randomise(reference)
        reference.reset()
        ours = LanguageModel(_encoder(reference, rates))
        load_named(ours.decoder, our_names(reference.state_dict())[1], "fastai's decoder")
        return reference, ours

    return build


@pytest.fixture
def classifiers(fastai: Any) -> Callable[..., tuple[Any, TextClassifier]]:
    """(fastai's, ours) with the same weights and running statistics."""

    def build(bptt: int = 10, max_len: int = 40, rates: DropoutConfig = RATES) -> tuple[Any, TextClassifier]:
        reference = fastai.get_text_classifier(
            fastai.AWD_LSTM, VOCAB, CLASSES, seq_len=bptt, config=_config(rates), max_len=max_len, pad_idx=PAD
        )
        _randomise(reference)
        reference.train()
        reference[1].layers(torch.randn(64, 3 * EMBEDDING))  # running statistics
        ours = TextClassifier(
            _encoder(reference, rates),
            ClassifierHead(3 * EMBEDDING, 50, CLASSES, dropout=(rates.output, 0.1)),
            bptt,
            max_len,
        )
        load_named(ours.head, our_names(reference.state_dict())[1], "fastai's head")
        return reference, ours

    return build
