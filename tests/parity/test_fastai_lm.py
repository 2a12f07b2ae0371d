"""The language model beside fastai's: the same numbers where fastai is right, and its defects absent."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ulmfit.config import DropoutConfig
from ulmfit.data.cache import TokenCache
from ulmfit.data.streams import LMStream
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture, State, detach
from ulmfit.nn.build import load_named, transfer_vocabulary
from ulmfit.nn.losses import activation_regularisation
from ulmfit.nn.models import LanguageModel
from ulmfit.training.metrics import TokenPerplexity

pytestmark = pytest.mark.fastai

Models = Callable[..., tuple[Any, LanguageModel]]
NO_DROPOUT = DropoutConfig(0, 0, 0, 0, 0)
VOCAB = 31


def windows(count: int = 3, batch: int = 4, steps: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCAB, (batch, steps), generator=generator) for _ in range(count)]


class TestNetwork:
    def test_eval_outputs_over_consecutive_windows(self, language_models: Models) -> None:
        reference, ours = language_models()
        reference.eval(), ours.eval()
        state: State | None = None
        for tokens in windows():
            logits, raw, _ = reference(tokens)
            assert torch.allclose(ours.encoder(tokens, state)[0], raw, atol=1e-6)
            mine, state = ours(tokens, state)
            assert torch.allclose(mine, logits, atol=1e-5)

    @pytest.mark.parametrize("kind", ["all", "input", "hidden", "output", "embedding", "weight"])
    def test_training_outputs_and_gradients_under_the_same_masks(
        self, language_models: Models, assert_same_gradients: Callable[..., None], kind: str
    ) -> None:
        """Both draw the same masks from one seed only if they draw as many numbers in the same order."""
        rates = DropoutConfig(0.25, 0.15, 0.1, 0.2, 0.3) if kind == "all" else copy.copy(NO_DROPOUT)
        if kind != "all":
            setattr(rates, kind, 0.4)
        reference, ours = language_models(rates)
        reference.train(), ours.train()
        state: State | None = None
        for seed, tokens in enumerate(windows()):
            targets = tokens.roll(-1, 1)
            torch.manual_seed(seed)
            logits, raw, dropped = reference(tokens)
            cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            penalty = 2 * dropped.pow(2).mean() + (raw[:, 1:] - raw[:, :-1]).pow(2).mean()
            (cross_entropy + penalty).backward()
            torch.manual_seed(seed)
            out = ours.loss(tokens, targets, state, ar_alpha=2, tar_beta=1, chunk=7)
            (out.cross_entropy + out.penalty).backward()
            state = detach(out.state)
            assert out.cross_entropy.item() == pytest.approx(cross_entropy.item(), rel=1e-5)
            assert out.penalty.item() == pytest.approx(penalty.item(), rel=1e-5)
        assert_same_gradients(reference, ours.encoder, ours.decoder)

    def test_the_comparison_notices_another_mask(self, language_models: Models) -> None:
        reference, ours = language_models()
        (tokens,) = windows(1)
        torch.manual_seed(0)
        logits, _, _ = reference(tokens)
        torch.manual_seed(1)
        assert not torch.allclose(ours(tokens)[0], logits, atol=1e-2)

    def test_layer_groups(self, fastai: Any, language_models: Models, renamed: Callable[..., Any]) -> None:
        reference, ours = language_models()
        named = {id(p): name for name, p in reference.named_parameters()}
        for theirs, mine in zip(fastai.awd_lstm_lm_split(reference), ours.layer_groups(), strict=True):
            encoder, head = renamed({named[id(p)]: p for p in theirs})
            own = {id(p): name for name, p in ours.named_parameters()}
            expected = {f"encoder.{name}" for name in encoder} | {f"decoder.{name}" for name in head}
            assert {own[id(p)] for p in mine.parameters()} == expected


class TestCheckpoints:
    def test_names_and_shapes_of_a_saved_language_model(self, fastai: Any) -> None:
        """The map of the published checkpoints: a full-size network, 60,000 words."""
        with torch.device("meta"):
            reference = fastai.get_language_model(fastai.AWD_LSTM, 60_000)
        expected = {f"0.{name}": (60_000, 400) for name in ("encoder.weight", "encoder_dp.emb.weight")}
        expected |= {"1.decoder.weight": (60_000, 400), "1.decoder.bias": (60_000,)}
        for i, (inputs, hidden) in enumerate([(400, 1152), (1152, 1152), (1152, 400)]):
            expected |= {
                f"0.rnns.{i}.weight_hh_l0_raw": (4 * hidden, hidden),
                f"0.rnns.{i}.module.weight_ih_l0": (4 * hidden, inputs),
                f"0.rnns.{i}.module.bias_ih_l0": (4 * hidden,),
                f"0.rnns.{i}.module.bias_hh_l0": (4 * hidden,),
            }
        assert {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()} == expected

    def test_a_saved_file_loads_by_name_without_pickled_code(
        self, language_models: Models, renamed: Callable[..., Any], tmp_path: Path
    ) -> None:
        reference, _ = language_models()
        torch.save(reference.state_dict(), tmp_path / "lm.pth")
        torch.save(reference[0].state_dict(), tmp_path / "encoder.pth")  # as `save_encoder` does: without "0."
        encoder, head = renamed(torch.load(tmp_path / "lm.pth", weights_only=True))
        only_encoder, no_head = renamed(torch.load(tmp_path / "encoder.pth", weights_only=True))
        assert not no_head and only_encoder.keys() == encoder.keys()
        ours = LanguageModel(AWDLSTM(Architecture(VOCAB, 12, 20, 3)))
        load_named(ours.encoder, only_encoder, "the file")
        load_named(ours.decoder, head, "the file")
        (tokens,) = windows(1)
        reference.eval(), ours.eval()
        assert torch.allclose(ours(tokens)[0], reference(tokens)[0], atol=1e-5)

    def test_loading_by_name_never_by_position(self, fastai: Any) -> None:
        """fastai's fallback for other versions' files takes weights in order: swapped layers go unnoticed."""
        from fastai.text.learner import load_ignore_keys

        module = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
        tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        swapped = {name: tensors[name] for name in ("b.weight", "b.bias", "a.weight", "a.bias")}
        theirs, ours = copy.deepcopy(module), copy.deepcopy(module)
        load_ignore_keys(theirs, swapped)
        load_named(ours, swapped, "the network")
        assert torch.equal(theirs["a"].weight, tensors["b.weight"])
        assert torch.equal(ours["a"].weight, tensors["a.weight"])

    def test_vocabulary_transfer(self, fastai: Any, language_models: Models, renamed: Callable[..., Any]) -> None:
        from fastai.text.learner import match_embeds

        reference, ours = language_models()
        old = [f"w{i}" for i in range(VOCAB)]
        new = [f"w{i}" for i in (5, 3, 99, 30, 0, 77, 8)]
        encoder, head = renamed(match_embeds(dict(reference.state_dict()), old, new))
        result, report = transfer_vocabulary(ours, old, new)
        assert torch.allclose(result.encoder.embedding.weight, encoder["embedding.weight"], atol=1e-7)
        assert torch.allclose(result.decoder.bias, head["bias"], atol=1e-7)
        assert report.matched == 5


class TestPenalty:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_ar_and_tar(self, fastai_penalty: Callable[..., float], dtype: torch.dtype) -> None:
        raw = torch.randn(5, 7, 12).to(dtype)
        dropped = raw * 1.5
        for alpha, beta in [(2.0, 1.0), (2.0, 0.0), (0.0, 1.0)]:
            ours = activation_regularisation(dropped, raw, alpha, beta)
            expected = fastai_penalty(dropped, raw, alpha, beta)
            assert ours.item() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 2e-3)

    def test_tar_at_batch_size_one(self, fastai_penalty: Callable[..., float]) -> None:
        """fastai asks `len(h) > 1`, the batch size where it means the number of steps, and leaves TAR out."""
        raw = torch.randn(1, 7, 12)
        assert fastai_penalty(raw, raw, 0.0, 1.0) == 0
        ours = activation_regularisation(raw, raw, 0.0, 1.0)
        assert ours.item() == pytest.approx(float((raw[:, 1:] - raw[:, :-1]).pow(2).mean()), rel=1e-6)


def corpus(total: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    documents: list[list[int]] = []
    left = total
    while left:
        size = min(int(rng.integers(1, 30)), left)
        documents.append(rng.integers(2, VOCAB, size).tolist())
        left -= size
    return documents


class TestStream:
    @pytest.mark.parametrize(
        ("total", "batch_size", "bptt"),
        [(500, 4, 10), (501, 7, 13), (97, 8, 72), (400, 1, 7), (10, 9, 5), (281, 4, 70)],
    )
    def test_layout(self, fastai: Any, total: int, batch_size: int, bptt: int) -> None:
        documents = corpus(total)
        loader = fastai.LMDataLoader([torch.tensor(d) for d in documents], bs=batch_size, seq_len=bptt, shuffle=False)
        theirs = [(torch.as_tensor(x), torch.as_tensor(y)) for x, y in loader]
        ours = list(LMStream(TokenCache.from_documents(documents, VOCAB), batch_size, bptt))
        assert len(ours) == len(theirs)
        for mine, expected in zip(ours, theirs, strict=True):
            assert mine[0].tolist() == expected[0].tolist() and mine[1].tolist() == expected[1].tolist()

    def test_validation_perplexity_is_weighted_by_tokens(self, fastai: Any, language_models: Models) -> None:
        """fastai weights windows by their rows: a last window of one step counts like one of 40."""
        reference, ours = language_models()
        documents = corpus(4 * 41 + 1)
        data = [torch.tensor(d) for d in documents]
        loaders = fastai.DataLoaders(*(fastai.LMDataLoader(data, bs=4, seq_len=40, shuffle=False) for _ in range(2)))
        learner = fastai.TextLearner(
            loaders, reference, loss_func=fastai.CrossEntropyLossFlat(), metrics=[fastai.Perplexity()]
        )
        with learner.no_bar(), learner.no_logging():
            theirs = learner.validate()[1]

        ours.eval()
        metric, means, state = TokenPerplexity(), [], None
        for tokens, targets in LMStream(TokenCache.from_documents(documents, VOCAB), 4, 40):
            total, state = ours.total_nll(tokens, targets, state)
            metric.update(total, targets.numel())
            means.append(total.item() / targets.numel())
        whole = LMStream(TokenCache.from_documents(documents, VOCAB), 4, 41)
        (tokens, targets), *rest = whole
        exact = F.cross_entropy(ours(tokens)[0].flatten(0, 1), targets.flatten()).exp().item()
        assert not rest
        assert metric.compute().item() == pytest.approx(exact, rel=1e-5)
        assert theirs == pytest.approx(math.exp(sum(means) / 2), rel=1e-4)  # the mean of two windows' means
        assert abs(theirs - exact) / exact > 0.01


def test_an_epoch_of_training(fastai: Any, language_models: Models, renamed: Callable[..., Any]) -> None:
    """Stream, hidden state, dropout, cross-entropy, AR and TAR together: the weights after an epoch are the same."""
    reference, ours = language_models()
    documents = corpus(4 * 45 + 2)
    data = [torch.tensor(d) for d in documents]
    loaders = fastai.DataLoaders(*(fastai.LMDataLoader(data, bs=4, seq_len=10, shuffle=False) for _ in range(2)))

    class SameMasks(fastai.Callback):  # type: ignore[misc, name-defined]
        def before_batch(self) -> None:
            torch.manual_seed(self.iter)

    learner = fastai.TextLearner(
        loaders,
        reference,
        alpha=2.0,
        beta=1.0,
        loss_func=fastai.CrossEntropyLossFlat(),
        opt_func=lambda params, lr: fastai.SGD(params, lr, mom=0.0, wd=0.0),
        moms=None,
        cbs=[SameMasks()],
    )
    start = copy.deepcopy(ours.state_dict())
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, lr=0.5, wd=0.0)

    optimiser = torch.optim.SGD(ours.parameters(), lr=0.5)
    ours.train()
    state: State | None = None
    for step, (tokens, targets) in enumerate(LMStream(TokenCache.from_documents(documents, VOCAB), 4, 10)):
        torch.manual_seed(step)
        out = ours.loss(tokens, targets, state, ar_alpha=2, tar_beta=1)
        (out.cross_entropy + out.penalty).backward()
        optimiser.step()
        optimiser.zero_grad()
        state = detach(out.state)
    assert step == 4
    encoder, head = renamed(reference.state_dict())
    for theirs, mine, prefix in ((encoder, ours.encoder, "encoder"), (head, ours.decoder, "decoder")):
        for name, tensor in mine.state_dict().items():
            assert (tensor - start[f"{prefix}.{name}"]).abs().max() > 1e-3, f"{name} did not move"
            assert torch.allclose(tensor, theirs[name], atol=1e-5), name


class TestNoStateOnModules:
    def test_deepcopy_after_a_training_step(self, language_models: Models) -> None:
        """fastai keeps the dropped weights, which have a graph, as an attribute, and cannot be copied."""
        reference, ours = language_models()
        (tokens,) = windows(1)
        reference.train()(tokens)[0].sum().backward()
        ours.train()(tokens)[0].sum().backward()
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(reference)
        twin = copy.deepcopy(ours).eval()
        assert torch.equal(twin(tokens)[0], ours.eval()(tokens)[0])

    def test_a_reader_does_not_change_what_the_next_one_sees(self, language_models: Models) -> None:
        reference, ours = language_models()
        first, second, _ = windows()
        reference.eval(), ours.eval()
        theirs, mine = reference(first)[0], ours(first)[0]
        reference(second), ours(second)
        assert not torch.allclose(reference(first)[0], theirs, atol=1e-3)
        assert torch.equal(ours(first)[0], mine)

    def test_token_by_token_with_context(self, fastai: Any, language_models: Models) -> None:
        """What generation needs. fastai's `predict(only_last_word=True)` resets the state for each token."""
        reference, ours = language_models()
        first, second, _ = (tokens[:1] for tokens in windows())
        second[0, -1] = first[0, -1]  # other contexts, the same last token
        data = [torch.tensor(d) for d in corpus(50)]
        loaders = fastai.DataLoaders(*(fastai.LMDataLoader(data, bs=1, seq_len=10) for _ in range(2)))
        learner = fastai.TextLearner(loaders, reference, loss_func=fastai.CrossEntropyLossFlat())
        ours.eval()
        theirs, mine = [], []
        with learner.no_bar(), torch.no_grad():
            for context in (first, second):
                learner.get_preds(dl=[(context,)])
                theirs.append(learner.get_preds(dl=[(context[:, -1:],)])[0][0, -1])
                _, state = ours(context[:, :-1])
                mine.append(ours(context[:, -1:], state)[0][0, -1])
                assert torch.allclose(mine[-1], ours(context)[0][0, -1], atol=1e-5)
        assert torch.equal(theirs[0], theirs[1])  # the context is gone
        assert not torch.allclose(mine[0], mine[1], atol=1e-2)
