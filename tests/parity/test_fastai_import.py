"""Checkpoints that fastai wrote, imported: the same outputs for the same ids."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ulmfit.config import TokenizerConfig
from ulmfit.errors import BundleError
from ulmfit.fastai_import import (
    FastaiWeights,
    language_model_from_fastai,
    read_fastai_checkpoint,
    read_fastai_vocabulary,
)
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.build import load_named
from ulmfit.nn.heads import ClassifierHead
from ulmfit.nn.models import LanguageModel, TextClassifier
from ulmfit.text.tokenizer import Tokenizer

pytestmark = pytest.mark.fastai

SIZES = Architecture(31, 12, 20, 3)
WORDS = ["xxunk", "xxpad", "xxbos", "xxfld", "xxrep", "xxwrep", "xxup", "xxmaj", *(f"w{i}" for i in range(23))]
RATES = {"output_p": 0.1, "hidden_p": 0.1, "input_p": 0.1, "embed_p": 0.1, "weight_p": 0.1}
CONFIG = {"emb_sz": 12, "n_hid": 20, "n_layers": 3, "pad_token": 1, "bidir": False, **RATES}
BPTT, MAX_LEN = 10, 40


def tokens(*shape: int) -> Tensor:
    return torch.randint(2, 31, shape, generator=torch.Generator().manual_seed(2))


def randomise(model: torch.nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)


def loaders(fastai: Any, folder: Path) -> Any:
    documents = [(fastai.LMTensorText(tokens(40)),) for _ in range(8)]
    loader = fastai.LMDataLoader(documents, lens=[40] * 8, bs=4, seq_len=9)
    dls = fastai.DataLoaders(loader, loader, path=folder)
    dls.vocab = WORDS
    return dls


@pytest.fixture
def lm_learner(fastai: Any, tmp_path: Path) -> Any:
    """A language model learner after a little training, so that its optimiser has a state and learning rates."""
    model = fastai.get_language_model(fastai.AWD_LSTM, 31, CONFIG | {"tie_weights": True, "out_bias": True})
    randomise(model)
    learner = fastai.LMLearner(
        loaders(fastai, tmp_path),
        model,
        loss_func=fastai.CrossEntropyLossFlat(),
        splitter=fastai.awd_lstm_lm_split,
        path=tmp_path,
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(1, 1e-3)
    model.eval()
    model.reset()
    return learner


@pytest.fixture
def classifier_learner(fastai: Any, tmp_path: Path) -> Any:
    model = fastai.get_text_classifier(fastai.AWD_LSTM, 31, 3, seq_len=BPTT, config=CONFIG, max_len=MAX_LEN)
    randomise(model)
    model.train()
    model[1].layers(torch.randn(64, 36))  # running statistics
    model.eval()
    return fastai.TextLearner(
        loaders(fastai, tmp_path),
        model,
        loss_func=fastai.CrossEntropyLossFlat(),
        splitter=fastai.awd_lstm_clas_split,
        path=tmp_path,
    )


def as_language_model(weights: FastaiWeights) -> LanguageModel:
    """With the same ids as fastai's."""
    model = LanguageModel(AWDLSTM(weights.architecture))
    load_named(model.encoder, weights.encoder, "encoder")
    assert weights.decoder_bias is not None
    load_named(model.decoder, {"bias": weights.decoder_bias}, "decoder")
    return model.eval()


def as_classifier(weights: FastaiWeights) -> TextClassifier:
    assert weights.head is not None
    encoder, head = AWDLSTM(weights.architecture), ClassifierHead(36, len(weights.head["linears.0.weight"]), 3)
    load_named(encoder, weights.encoder, "encoder")
    load_named(head, weights.head, "head")
    return TextClassifier(encoder, head, BPTT, MAX_LEN).eval()


def their_logits(learner: Any, documents: Tensor) -> Tensor:
    learner.model.reset()
    with torch.no_grad():
        out = learner.model(documents)[0]
    return out.as_subclass(Tensor)


def assert_language_model(weights: FastaiWeights, learner: Any, bias: bool = True) -> None:
    ids = tokens(3, 15)
    assert weights.architecture == SIZES
    if not bias:
        assert weights.decoder_bias is None
        weights = FastaiWeights(weights.architecture, weights.encoder, learner.model[1].decoder.bias.detach())
    with torch.no_grad():
        assert torch.allclose(as_language_model(weights)(ids)[0], their_logits(learner, ids), atol=1e-5)


def assert_classifier(weights: FastaiWeights, learner: Any) -> None:
    ids = tokens(4, 25)
    assert weights.architecture == SIZES
    with torch.no_grad():
        mine = as_classifier(weights)(ids, torch.full((4,), 25))
    assert torch.allclose(mine, their_logits(learner, ids), atol=1e-5)


# -- fastai 2 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_opt", [True, False])
def test_language_model_save(lm_learner, with_opt):
    path = lm_learner.save("lm", with_opt=with_opt)
    if with_opt:  # the file names classes of fastai and numpy, which are not needed to read it
        assert "fastcore.foundation.L" in torch.serialization.get_unsafe_globals_in_checkpoint(path)
    before = torch.serialization.get_safe_globals()
    weights = read_fastai_checkpoint(path)
    assert weights.head is None
    assert_language_model(weights, lm_learner)
    added = set(torch.serialization.get_safe_globals()) - set(before)  # torch adds its own as it imports its parts
    assert not [name for name in map(str, added) if "torch" not in name]


def test_language_model_save_encoder(lm_learner, tmp_path):
    lm_learner.save_encoder("encoder")
    assert_language_model(read_fastai_checkpoint(tmp_path / "models" / "encoder.pth"), lm_learner, bias=False)


def test_half_precision(lm_learner, tmp_path):
    lm_learner.model.half()
    weights = read_fastai_checkpoint(lm_learner.save("half", with_opt=False))
    lm_learner.model.float()
    assert_language_model(weights, lm_learner)


def test_classifier_save(classifier_learner, tmp_path):
    weights = read_fastai_checkpoint(classifier_learner.save("classifier", with_opt=False))
    assert weights.decoder_bias is None
    assert_classifier(weights, classifier_learner)


def test_classifier_save_encoder(classifier_learner, tmp_path):
    whole = read_fastai_checkpoint(classifier_learner.save("classifier"))
    classifier_learner.save_encoder("encoder")
    encoder = read_fastai_checkpoint(tmp_path / "models" / "encoder.pth")
    assert encoder.head is None and encoder.encoder.keys() == whole.encoder.keys()
    assert all(torch.equal(encoder.encoder[name], whole.encoder[name]) for name in whole.encoder)


def test_export_is_refused(fastai, lm_learner, tmp_path):
    torch.save(SimpleNamespace(learner=lm_learner.model), tmp_path / "plain.pkl")
    torch.save({"model": lm_learner.model, "cls": fastai.LMLearner}, tmp_path / "export.pkl")
    for name in ("plain.pkl", "export.pkl"):
        with pytest.raises(BundleError, match=r"learn.export do, and loading such executes code.*learn.save"):
            read_fastai_checkpoint(tmp_path / name)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_heads_without_dropout(fastai, classifier_learner, rate):
    """Where a rate is zero fastai leaves the layer out, and the next ones have other numbers."""
    config = CONFIG | {"output_p": 0.0}
    model = fastai.get_text_classifier(fastai.AWD_LSTM, 31, 3, seq_len=BPTT, config=config, max_len=MAX_LEN, ps=[rate])
    randomise(model)
    classifier_learner.model = model.eval()
    path = classifier_learner.save("classifier", with_opt=False)
    assert "1.layers.0.1.weight" in torch.load(path)
    assert_classifier(read_fastai_checkpoint(path), classifier_learner)


def test_bidirectional(fastai, lm_learner):
    lm_learner.model = fastai.get_language_model(
        fastai.AWD_LSTM, 31, CONFIG | {"bidir": True, "tie_weights": True, "out_bias": True}
    )
    with pytest.raises(BundleError, match="is a bidirectional LSTM"):
        read_fastai_checkpoint(lm_learner.save("both", with_opt=False))


def test_a_classifiers_vocabulary(fastai, tmp_path):
    words = fastai.L([["xxunk", "xxpad", "the"], fastai.CategoryMap(["neg", "pos"])])
    fastai.save_pickle(tmp_path / "vocab.pkl", words)
    assert read_fastai_vocabulary(tmp_path / "vocab.pkl") == ["xxunk", "xxpad", "the"]
    fastai.save_pickle(tmp_path / "o2i.pkl", fastai.Numericalize(vocab=["xxunk", "xxpad", "the"]).o2i)
    assert read_fastai_vocabulary(tmp_path / "o2i.pkl") == ["xxunk", "xxpad", "the"]


# -- names of earlier versions ---------------------------------------------------------------------------------------


def test_fastai_1_language_model(lm_learner, tmp_path):
    """It also stores the matrix after weight dropout, as it was at the last step."""
    state = dict(lm_learner.model.state_dict())
    for i in range(3):
        raw = state[f"0.rnns.{i}.weight_hh_l0_raw"]
        state[f"0.rnns.{i}.module.weight_hh_l0"] = torch.nn.functional.dropout(raw, 0.5)
    torch.save({"model": state, "opt": {"state": {}, "param_groups": []}}, tmp_path / "lm.pth")
    assert_language_model(read_fastai_checkpoint(tmp_path / "lm.pth"), lm_learner)


def test_fastai_07_language_model(lm_learner, tmp_path):
    state = {}
    for name, tensor in lm_learner.model.state_dict().items():
        if name == "1.decoder.bias":
            continue
        name = name.replace("encoder_dp.emb", "encoder_with_dropout.embed")
        state[name.replace("weight_hh_l0_raw", "module.weight_hh_l0_raw")] = tensor
    assert "0.encoder_with_dropout.embed.weight" in state and "0.rnns.2.module.weight_hh_l0_raw" in state
    torch.save(state, tmp_path / "fwd_wt103.h5", _use_new_zipfile_serialization=False)
    assert_language_model(read_fastai_checkpoint(tmp_path / "fwd_wt103.h5"), lm_learner, bias=False)


@pytest.mark.parametrize("version", ["1", "0.7"])
def test_heads_with_biases(fastai, classifier_learner, tmp_path, version):
    """fastai 1 and 0.7 had a bias in each linear layer; ours have it in the batch norm before."""
    model = fastai.get_text_classifier(
        fastai.AWD_LSTM, 31, 3, seq_len=BPTT, config=CONFIG, max_len=MAX_LEN, lin_ftrs=[20]
    )
    randomise(model)
    classifier_learner.model = model.eval()
    layers = model[1].layers
    for block in layers:
        linear = next(module for module in block if isinstance(module, torch.nn.Linear))
        linear.bias = torch.nn.Parameter(torch.randn(linear.out_features))
    state = {}
    for name, tensor in classifier_learner.model.state_dict().items():
        if name.startswith("1.layers"):
            _, _, block, module, kind = name.split(".")
            if version == "1":
                name = f"1.layers.{4 * int(block) + int(module)}.{kind}"
            elif kind != "num_batches_tracked":
                name = f"1.layers.{block}.{'bn' if module == '0' else 'lin'}.{kind}"
            else:
                continue
        state[name] = tensor
    assert ("1.layers.6.bias" if version == "1" else "1.layers.1.lin.bias") in state
    torch.save(state, tmp_path / "classifier.pth")
    assert_classifier(read_fastai_checkpoint(tmp_path / "classifier.pth"), classifier_learner)


# -- a whole import --------------------------------------------------------------------------------------------------


def test_rows_and_logits_of_words_survive_the_change_of_vocabulary(lm_learner, tmp_path):
    """A document of words that are pieces: the same hidden states and the same logits of these words."""
    words = ["the", "cat", "sat", "mat", "dog", "ran"]
    vocabulary = [*WORDS[:25], *words]
    tokenizer = Tokenizer.train(
        ["the cat sat on the mat and the dog ran"] * 20, TokenizerConfig(kind="bpe", vocab_size=400)
    )
    weights = read_fastai_checkpoint(lm_learner.save("lm"))
    model, report = language_model_from_fastai(weights, vocabulary, tokenizer)
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(" ".join(words))]])
    theirs = torch.tensor([[vocabulary.index(word) for word in ("xxbos", *words)]])
    assert ids.shape == theirs.shape and report.matched >= len(words) + 3
    with torch.no_grad():
        mine = model.eval()(ids)[0][:, :, ids[0]]
    assert torch.allclose(mine, their_logits(lm_learner, theirs)[:, :, theirs[0]], atol=1e-5)
