"""Predictions depend on the text alone; an ensemble is the mean of its members; a corpus is scored whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ulmfit.bundle import Bundle, load_bundle
from ulmfit.data.cache import TokenCache
from ulmfit.errors import BundleError, UsageError
from ulmfit.inference import LMScore, Predictor, pick_device, score_language_model
from ulmfit.nn.awd_lstm import AWDLSTM
from ulmfit.nn.build import language_model_from, text_classifier_from
from ulmfit.nn.models import LanguageModel

TEXTS = [
    "My laptop does not start.",
    "",
    "   ",
    "Wo ist mein Paket? 包裹在哪里？ 📦",
    "The printer on the second floor prints only blank pages " * 150,
    "hi",
    "Somebody logged in to my account from another country!",
]


def shaken(bundle: Bundle, seed: int) -> Bundle:
    """The same bundle with other weights, whose predictions differ from text to text."""
    generator = torch.Generator().manual_seed(seed)

    def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: value + 0.3 * torch.randn(value.shape, generator=generator) if value.dim() == 2 else value
            for name, value in tensors.items()
        }

    return replace(bundle, encoder=moved(bundle.encoder), head=moved(bundle.head))


@pytest.fixture
def forward(trained: Path) -> Bundle:
    return shaken(load_bundle(trained / "classifier" / "bundle"), 1)


@pytest.fixture
def backward(trained_backward: Path) -> Bundle:
    return shaken(load_bundle(trained_backward / "classifier" / "bundle"), 2)


@pytest.fixture(params=["forward", "backward", "ensemble"])
def predictor(request: pytest.FixtureRequest, forward: Bundle, backward: Bundle) -> Predictor:
    return Predictor({"forward": [forward], "backward": [backward], "ensemble": [forward, backward]}[request.param])


def test_a_batch_is_its_documents_one_by_one(predictor: Predictor) -> None:
    together = predictor.probabilities(TEXTS)
    alone = np.concatenate([predictor.probabilities([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    reversed_order = predictor.probabilities(TEXTS[::-1], batch_size=3, tokens_at_a_time=200)[::-1]
    np.testing.assert_allclose(together, reversed_order, atol=1e-5)
    for row, text in zip(together, TEXTS, strict=True):
        one = predictor.predict_one(text)
        np.testing.assert_allclose(list(one.probabilities.values()), row, atol=1e-5)
    assert together.std(0).max() > 0.01  # or the comparisons would say nothing
    np.testing.assert_allclose(together.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(together[1], together[2], atol=1e-6)  # white space is no text


@pytest.mark.parametrize("threads", [2, 3, 9])
def test_batches_read_at_the_same_time(predictor: Predictor, threads: int) -> None:
    before = torch.get_num_threads()
    alone = predictor.probabilities(TEXTS)
    counted: list[int] = []
    torch.set_num_threads(threads)
    try:
        together = predictor.probabilities(TEXTS, batch_size=1, progress=counted.append)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert counted == sorted(counted) and counted[-1] == len(TEXTS)


def test_predictions(predictor: Predictor) -> None:
    probabilities = predictor.probabilities(TEXTS)
    for row, found in zip(probabilities, predictor.predict(TEXTS), strict=True):
        assert found.label == predictor.classes[row.argmax()]
        assert found.probability == found.probabilities[found.label] == pytest.approx(row.max())
        assert list(found.probabilities) == predictor.classes


def test_direction_matters(forward: Bundle) -> None:
    other = replace(forward, info=replace(forward.info, direction="backward"))
    assert not np.allclose(
        Predictor([forward]).probabilities(TEXTS), Predictor([other]).probabilities(TEXTS), atol=1e-3
    )


def test_an_ensemble_is_the_mean(forward: Bundle, backward: Bundle) -> None:
    members = [Predictor([bundle]).probabilities(TEXTS) for bundle in (forward, backward)]
    np.testing.assert_allclose(Predictor([forward, backward]).probabilities(TEXTS), np.mean(members, 0), atol=1e-6)


def test_members_with_their_labels_in_another_order(forward: Bundle, backward: Bundle) -> None:
    order = [3, 0, 5, 1, 4, 2]
    head = dict(backward.head)
    head["linears.1.weight"] = head["linears.1.weight"][order]
    labels = [backward.info.labels[i] for i in order]
    other = replace(backward, head=head, info=replace(backward.info, labels=labels))
    expected = Predictor([forward, backward]).probabilities(TEXTS)
    ensemble = Predictor([forward, other])
    assert ensemble.classes == forward.info.labels
    np.testing.assert_allclose(ensemble.probabilities(TEXTS), expected, atol=1e-6)
    assert ensemble.predict_one(TEXTS[0]).probabilities == pytest.approx(
        dict(zip(ensemble.classes, map(float, expected[0]), strict=True)), abs=1e-5
    )


def test_what_is_no_ensemble(forward: Bundle, trained: Path) -> None:
    other = replace(forward, info=replace(forward.info, labels=[*forward.info.labels[:-1], "else"]))
    with pytest.raises(BundleError, match="members of an ensemble need the same labels"):
        Predictor([forward, other])
    with pytest.raises(BundleError, match="expected the folder of at least one bundle"):
        Predictor([])
    with pytest.raises(BundleError, match="is a language model, expected a classifier"):
        Predictor([trained / "lm" / "bundle"])
    with pytest.raises(BundleError, match="is a language model, expected a classifier"):
        Predictor([load_bundle(trained / "lm" / "bundle")])


def test_networks_that_exist_already(forward: Bundle) -> None:
    model = text_classifier_from(forward)
    model.train()
    given = Predictor([forward], models=[model])
    found, expected = given.probabilities(TEXTS), Predictor([forward]).probabilities(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-6)  # loaded ones have their norms folded


def test_no_texts_and_progress(forward: Bundle, backward: Bundle) -> None:
    seen: list[int] = []
    predictor = Predictor([forward, backward])
    predictor.probabilities(TEXTS, batch_size=2, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == len(TEXTS)


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")
    for wrong in ("nonsense", "meta:x"):
        with pytest.raises(UsageError, match=f"the device '{wrong}' is not on this machine"):
            pick_device(wrong)


# ------------------------------------------------------------------------------------------------ a corpus


def language_model(bundle: Bundle) -> LanguageModel:
    return language_model_from(shaken(bundle, 3)).eval()


def documents(count: int, vocabulary: int) -> TokenCache:
    rng = np.random.default_rng(0)
    made = [[2, *rng.integers(3, vocabulary, rng.integers(1, 90)).tolist()] for _ in range(count)]
    return TokenCache.from_documents(made, vocabulary)


@pytest.fixture
def lm(trained: Path) -> LanguageModel:
    return language_model(load_bundle(trained / "lm" / "bundle"))


@torch.no_grad()
def nll_of(model: LanguageModel, ids: list[int]) -> float:
    """In one go, with the state from the first token to the last."""
    logits = model(torch.tensor([ids[:-1]]))[0][0].double()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))


@pytest.mark.parametrize("bptt", [7, 70, 100_000])
def test_score_is_that_of_one_stream(lm: LanguageModel, bptt: int) -> None:
    cache = documents(30, 400)
    assert 1000 < len(cache.tokens) < 2000  # one row
    score = score_language_model(lm, cache, 5000, bptt=bptt)
    expected = nll_of(lm, cache.tokens.tolist())
    assert score.tokens == len(cache.tokens) - 1
    assert score.nll == pytest.approx(expected, rel=1e-5)
    assert score.bits_per_character == pytest.approx(expected / math.log(2) / 5000, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(expected / (len(cache.tokens) - 1)), rel=1e-5)
    assert score.per_word(500) == pytest.approx(math.exp(expected / 500), rel=1e-4)


def test_score_of_a_backward_model(lm: LanguageModel) -> None:
    cache = documents(20, 400)
    reversed_ids = [i for d in range(20) for i in (2, *cache.document(d)[:0:-1].tolist())]
    assert score_language_model(lm, cache, 1, "backward").nll == pytest.approx(nll_of(lm, reversed_ids), rel=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("count", [1, 2, 50, 333])
def test_every_token_is_predicted_once(lm: LanguageModel, rows: int, count: int) -> None:
    cache = documents(count, 400)
    seen: list[int] = []

    class Counting(LanguageModel):
        def total_nll(self, tokens: Tensor, targets: Tensor, state: object = None, chunk: int = 1024):  # type: ignore[no-untyped-def, override]
            seen.extend(targets.flatten().tolist())
            return super().total_nll(tokens, targets, state, chunk)  # type: ignore[arg-type]

    lm.__class__ = Counting
    score = score_language_model(lm, cache, 1, rows=rows)
    assert sorted(seen) == sorted(cache.tokens[1:].tolist())
    assert score.tokens == len(cache.tokens) - 1


def test_rows_change_little(lm: LanguageModel) -> None:
    cache = documents(400, 400)
    one, many = (score_language_model(lm, cache, 1, rows=rows) for rows in (1, 8))
    assert many.nll == pytest.approx(one.nll, rel=2e-4)


def test_a_corpus_of_one_token() -> None:
    assert LMScore(0.0, 1, 1).bits_per_character == 0


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_weights_of_a_bundle_are_not_kept_beside_the_models(forward: Bundle, trained: Path) -> None:
    predictor = Predictor([trained / "classifier" / "bundle", forward])
    for bundle, model, _ in predictor._members:
        assert not bundle.encoder and not bundle.head
        assert sum(parameter.nbytes for parameter in model.parameters()) > 0
    assert forward.encoder and forward.head  # the caller's own stays whole


def test_the_begin_marker_is_read_once_for_single_texts(forward: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    encode = AWDLSTM.forward

    def counted(self: AWDLSTM, tokens: torch.Tensor, *rest: Any) -> Any:
        read.append(tokens.numel())
        return encode(self, tokens, *rest)

    predictor = Predictor([forward])
    monkeypatch.setattr(AWDLSTM, "forward", counted)
    text = "where is my invoice"
    pieces = len(forward.tokenizer.encode(text))
    first = [predictor.predict_one(text) for _ in range(2)]
    assert read == [1, pieces, pieces]
    assert first[0] == first[1]
    predictor.predict_one("")  # the marker alone
    assert read[3:] == [1]


def test_a_network_that_still_learns_is_read_anew(forward: Bundle) -> None:
    model = text_classifier_from(forward).eval()
    predictor = Predictor([forward], models=[model])
    before = predictor.predict_one("where is my invoice").probabilities
    with torch.no_grad():
        model.encoder.embedding.weight.mul_(-1)
    after = predictor.predict_one("where is my invoice").probabilities
    whole = dict(zip(predictor.classes, predictor.probabilities(["where is my invoice"])[0].tolist(), strict=True))
    assert after != before
    assert after == pytest.approx(whole, abs=1e-5)


def test_no_more_after_the_first_step_than_is_read_at_once(forward: Bundle) -> None:
    model = text_classifier_from(forward).eval()
    with torch.inference_mode():
        first = model.first_step(forward.tokenizer.bos_id)
        tokens = torch.full((1, model.longest_at_once - 1), 9)
        whole = model(
            torch.cat([torch.tensor([[forward.tokenizer.bos_id]]), tokens], 1), torch.tensor([tokens.numel() + 1])
        )
        torch.testing.assert_close(model.after(first, tokens), whole, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="expected at most"):
            model.after(first, torch.full((1, model.longest_at_once), 9))
