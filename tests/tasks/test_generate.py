"""Text from a language model, held against re-reading everything for each piece."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ulmfit.bundle import Bundle, load_bundle
from ulmfit.config import GenerateConfig
from ulmfit.errors import BundleError, UsageError
from ulmfit.generation import generate
from ulmfit.nn.awd_lstm import AWDLSTM, State
from ulmfit.nn.build import language_model_from
from ulmfit.nn.models import LanguageModel
from ulmfit.tasks import generate as task
from ulmfit.text.tokenizer import Tokenizer

PROMPT = "My printer"


@pytest.fixture
def bundle(trained: Path) -> Bundle:
    return load_bundle(trained / "lm" / "bundle")


@pytest.fixture
def model(bundle: Bundle) -> LanguageModel:
    """Random weights: after two epochs the next piece would always be the same one."""
    model = language_model_from(bundle).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 1.2)
        model.decoder.bias[Tokenizer.bos_id] = -50  # no end
    return model


@torch.no_grad()
def scores_of_next(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    """Log-probabilities after reading the whole text anew."""
    logits = model(torch.tensor([ids]))[0][0, -1]
    logits[: Tokenizer.unk_id + 1] = -torch.inf
    return logits.log_softmax(-1)


def greedy(model: LanguageModel, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(scores_of_next(model, ids).argmax())]
    return ids


def mean_score(model: LanguageModel, ids: list[int], start: int) -> float:
    total = sum(float(scores_of_next(model, ids[:i])[ids[i]]) for i in range(start, len(ids)))
    return total / (len(ids) - start)


def start_of(bundle: Bundle) -> list[int]:
    return [bundle.tokenizer.bos_id, *bundle.tokenizer.encode(PROMPT)]


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what the encoder reads."""
    shapes: list[tuple[int, ...]] = []
    forward = AWDLSTM.forward

    def counting(self: AWDLSTM, tokens: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        shapes.append(tuple(tokens.shape))
        return forward(self, tokens, state)

    with monkeypatch.context() as patch:
        patch.setattr(AWDLSTM, "forward", counting)
        yield shapes


def test_context_is_kept(bundle: Bundle, model: LanguageModel) -> None:
    """fastai's `only_last_word=True` is as fast, but its model is reset before each word and sees only the last."""
    start = start_of(bundle)
    expected = greedy(model, start, 25)
    (text,) = generate(bundle, PROMPT, 25, temperature=0, model=model)
    assert text == bundle.tokenizer.decode(expected)
    assert len(set(expected[len(start) :])) > 2
    forgetful = list(start)
    for _ in range(25):
        forgetful.append(int(scores_of_next(model, forgetful[-1:]).argmax()))
    assert forgetful != expected


def test_a_piece_costs_a_step(bundle: Bundle, model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = (1, len(start_of(bundle)))
    with counted(monkeypatch) as shapes:
        generate(bundle, PROMPT, 9, samples=3, model=model)
    assert shapes == [prompt] + 8 * [(3, 1)]
    with counted(monkeypatch) as shapes:
        generate(bundle, PROMPT, 9, beams=4, model=model)
    assert shapes == [prompt] + 8 * [(4, 1)]


def test_narrow_choices_are_greedy(bundle: Bundle, model: LanguageModel) -> None:
    expected = generate(bundle, PROMPT, 20, temperature=0, model=model)
    assert generate(bundle, PROMPT, 20, temperature=1.5, top_k=1, model=model) == expected
    assert generate(bundle, PROMPT, 20, temperature=1.5, top_p=1e-6, model=model) == expected
    assert generate(bundle, PROMPT, 20, temperature=1e-4, model=model) == expected
    assert generate(bundle, PROMPT, 20, temperature=1.5, seed=1, model=model) != expected


def test_samples(bundle: Bundle, model: LanguageModel) -> None:
    texts = generate(bundle, PROMPT, 12, samples=4, temperature=1, seed=5, model=model)
    assert len(set(texts)) == 4
    assert all(text.startswith(PROMPT) for text in texts)
    assert texts == generate(bundle, PROMPT, 12, samples=4, temperature=1, seed=5, model=model)
    assert texts != generate(bundle, PROMPT, 12, samples=4, temperature=1, seed=6, model=model)


@pytest.mark.parametrize(("top_k", "top_p", "allowed"), [(5, 1.0, 5), (0, 0.6, None), (7, 0.6, None)])
def test_only_likely_pieces_are_drawn(
    bundle: Bundle, model: LanguageModel, top_k: int, top_p: float, allowed: int | None
) -> None:
    ranked, index = scores_of_next(model, start_of(bundle)).exp().sort(descending=True)
    if allowed is None:  # as few as hold the share, of those that top_k left
        ranked = ranked[: top_k or None] / ranked[: top_k or None].sum()
        allowed = int((ranked.cumsum(0) < top_p).sum()) + 1
    texts = generate(bundle, PROMPT, 1, 400, 1.0, top_k, top_p, model=model)
    likely = {bundle.tokenizer.decode([*start_of(bundle), int(i)]) for i in index[:allowed]}
    assert set(texts) <= likely
    assert len(set(texts)) > len(likely) // 2


def test_draws_follow_the_probabilities(bundle: Bundle, model: LanguageModel) -> None:
    probabilities = (scores_of_next(model, start_of(bundle)) / 2).softmax(-1)  # temperature 2
    texts = generate(bundle, PROMPT, 1, 4000, 2.0, model=model)
    for piece in probabilities.topk(3).indices.tolist():
        share = texts.count(bundle.tokenizer.decode([*start_of(bundle), piece])) / 4000
        assert share == pytest.approx(float(probabilities[piece]), abs=0.025)


def test_beam_search_finds_a_better_text(bundle: Bundle, model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: list(ids))
    start = start_of(bundle)
    found = generate(bundle, PROMPT, 12, samples=3, beams=8, model=model)
    scores = [mean_score(model, list(ids), len(start)) for ids in found]  # type: ignore[call-overload]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > mean_score(model, greedy(model, start, 12), len(start)) + 0.01
    assert generate(bundle, PROMPT, 12, beams=1, model=model) == [greedy(model, start, 12)]


def test_beam_search_of_two_steps_is_exhaustive(
    bundle: Bundle, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: list(ids))
    start, size = start_of(bundle), bundle.tokenizer.vocab_size
    first = scores_of_next(model, start)
    both = torch.stack([first[i] + scores_of_next(model, [*start, i]) for i in range(3, size)])
    best = divmod(int(both.argmax()), size)
    (found,) = generate(bundle, PROMPT, 2, beams=size, model=model)
    assert found == [*start, best[0] + 3, best[1]]


def test_the_end_of_a_document_ends_the_text(
    bundle: Bundle, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        model.decoder.bias[Tokenizer.bos_id] = 100
    with counted(monkeypatch) as shapes:
        assert generate(bundle, PROMPT, 50, samples=2, model=model) == [PROMPT, PROMPT]
        assert generate(bundle, PROMPT, 3, beams=2, model=model) == [PROMPT]
    assert len(shapes) == 1 + 3


def test_without_a_prompt(bundle: Bundle, model: LanguageModel) -> None:
    (text,) = generate(bundle, "", 10, temperature=0, model=model)
    assert text == bundle.tokenizer.decode(greedy(model, [Tokenizer.bos_id], 10))


def test_what_cannot_be_written(bundle: Bundle, trained: Path, trained_backward: Path) -> None:
    with pytest.raises(UsageError, match="reads backward, expected a forward language model"):
        generate(load_bundle(trained_backward / "lm" / "bundle"))
    with pytest.raises(BundleError, match="is a classifier, expected a language model"):
        generate(load_bundle(trained / "classifier" / "bundle"))
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"tokens": 0}, {"samples": 0}):
        with pytest.raises(UsageError, match="expected temperature >= 0"):
            generate(bundle, **wrong)  # type: ignore[arg-type]


def test_the_verb(trained: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    result = task.run(GenerateConfig(str(trained), PROMPT, tokens=5, samples=2, seed=4, runs=str(trained)))
    assert result["texts"] == generate(bundle, PROMPT, 5, 2, 0.8, 0, 0.9, seed=4)
    assert capsys.readouterr().out == "\n\n".join(result["texts"]) + "\n"
