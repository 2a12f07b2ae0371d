"""Networks from bundles, weights by name with shapes checked, and the transfer of a vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ulmfit.bundle import CLASSIFIER, LANGUAGE_MODEL, Bundle
from ulmfit.config import ClassifierConfig, DropoutConfig
from ulmfit.errors import BundleError
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.heads import ClassifierHead
from ulmfit.nn.models import LanguageModel, TextClassifier


@dataclass(frozen=True)
class TransferReport:
    """How many pieces of a new vocabulary found their row in the old one."""

    matched: int
    total: int

    def __str__(self) -> str:
        new = self.total - self.matched
        return f"{self.matched} of {self.total} pieces kept their embedding, {new} start from the mean"


def language_model_from(bundle: Bundle, dropout: DropoutConfig | None = None) -> LanguageModel:
    """The language model of a bundle, or a classifier's encoder with a new decoder bias.

    Raises:
        BundleError: if weights are missing, unknown, or of the wrong shape.
    """
    model = LanguageModel(AWDLSTM(Architecture(**bundle.info.architecture), dropout))
    load_named(model.encoder, bundle.encoder, f"the encoder of {bundle.path}")
    if bundle.info.kind == LANGUAGE_MODEL:
        load_named(model.decoder, bundle.head, f"the decoder of {bundle.path}")
    return model


def text_classifier_from(bundle: Bundle, dropout: DropoutConfig | None = None) -> TextClassifier:
    """The classifier of a bundle, as it was trained.

    Raises:
        BundleError: if the bundle is a language model, or weights do not fit.
    """
    if bundle.info.kind != CLASSIFIER:
        raise BundleError(f"{bundle.path} is a language model, expected a classifier; train one with stage=classifier")
    pooling = bundle.info.pooling
    encoder = AWDLSTM(Architecture(**bundle.info.architecture), dropout)
    head = ClassifierHead(3 * encoder.architecture.embedding_dim, pooling["head_hidden"], len(bundle.info.labels))
    load_named(encoder, bundle.encoder, f"the encoder of {bundle.path}")
    load_named(head, bundle.head, f"the head of {bundle.path}")
    return TextClassifier(encoder, head, pooling["bptt"], pooling["max_len"])


def new_text_classifier(encoder: AWDLSTM, classes: int, config: ClassifierConfig) -> TextClassifier:
    """A fresh head on `encoder`."""
    head = ClassifierHead(
        3 * encoder.architecture.embedding_dim, config.head_hidden, classes, dropout=config.head_dropout
    )
    return TextClassifier(encoder, head, config.bptt, config.max_len)


def transfer_vocabulary(
    model: LanguageModel, old: Sequence[str], new: Sequence[str]
) -> tuple[LanguageModel, TransferReport]:
    """The same model for another tokenizer: matching pieces keep their row, new ones get the mean row.

    (Howard & Ruder's scripts do so for words; embedding rows and decoder biases alike.)

    Args:
        old, new: piece strings in the order of their ids.
    """
    index = {piece: i for i, piece in enumerate(old)}
    source = torch.tensor([index.get(piece, -1) for piece in new])  # (V_new,)
    known = source >= 0
    architecture = Architecture(**{**asdict(model.encoder.architecture), "vocab_size": len(new)})
    result = LanguageModel(AWDLSTM(architecture, model.encoder.dropout))
    result.encoder.rnns.load_state_dict(model.encoder.rnns.state_dict())
    with torch.no_grad():
        for target, values in (
            (result.encoder.embedding.weight, model.encoder.embedding.weight),
            (result.decoder.bias, model.decoder.bias),
        ):
            target.copy_(values.mean(0, keepdim=True).expand_as(target))
            target[known] = values[source[known]]
    return result, TransferReport(int(known.sum()), len(new))


def load_named(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load `tensors` into `module` by name.

    Raises:
        BundleError: naming the first missing or unknown weight, or the one of another shape.
    """
    expected = module.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        detail = f"lacks '{missing[0]}'" if missing else f"has an unknown weight '{unknown[0]}'"
        raise BundleError(f"{what} {detail}; the file is not from this kind of network")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise BundleError(
                f"{what}: '{name}' has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}; "
                "the file is from a network of another shape"
            )
    module.load_state_dict(dict(tensors))
