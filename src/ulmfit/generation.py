"""Text that a language model writes: drawn, or the most probable by beam search."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ulmfit.bundle import LANGUAGE_MODEL, Bundle
from ulmfit.errors import BundleError, UsageError
from ulmfit.inference import pick_device
from ulmfit.nn.awd_lstm import State, select_rows
from ulmfit.nn.build import language_model_from
from ulmfit.nn.models import LanguageModel
from ulmfit.text.tokenizer import Tokenizer


@torch.inference_mode()
def generate(
    bundle: Bundle,
    prompt: str = "",
    tokens: int = 60,
    samples: int = 1,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    beams: int = 0,
    seed: int = 0,
    model: LanguageModel | None = None,
) -> list[str]:
    """Texts that go on from `prompt`, which they include, until `tokens` more pieces or the end of the document.

    The prompt is read once and the state carried from piece to piece, so nothing is forgotten and time is linear.
    (fastai's `predict` reads the whole text again for every word, and with `only_last_word=True` forgets it.)

    Args:
        temperature: 0 always takes the most probable piece.
        top_k: draw among this many pieces; 0: all.
        top_p: draw among the most probable pieces that hold this share of the probability.
        beams: > 0: beam search of this width instead of drawing; returns the best `samples`.

    Raises:
        UsageError: a value out of range, or a backward model (its text would have to be written from the end).
    """
    if bundle.info.kind != LANGUAGE_MODEL:
        raise BundleError(f"{bundle.path} is a classifier, expected a language model")
    if bundle.info.direction == "backward":
        raise UsageError(f"{bundle.path} reads backward, expected a forward language model to write with")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or tokens < 1 or samples < 1:
        raise UsageError("expected temperature >= 0, 0 < top_p <= 1, top_k >= 0, tokens >= 1 and samples >= 1")
    model = (model or language_model_from(bundle).to(pick_device("auto"))).eval()
    tokenizer = bundle.tokenizer
    start = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    device = next(model.parameters()).device
    if beams > 0:
        found = _beam_search(model, start, tokens, max(beams, samples), tokenizer.bos_id, device)
        return [tokenizer.decode(ids) for ids in found[:samples]]
    generator = torch.Generator(device=device).manual_seed(seed)
    scores, state = _read(model, torch.tensor([start], device=device), None)
    scores, state = (
        scores.expand(samples, -1),
        select_rows(state, torch.zeros(samples, dtype=torch.long, device=device)),
    )
    rows = [list(start) for _ in range(samples)]
    ended = [False] * samples
    for step in range(tokens):
        following = _draw(scores, temperature, top_k, top_p, generator)  # (samples, 1)
        for row, piece in enumerate(following[:, 0].tolist()):
            ended[row] = ended[row] or piece == tokenizer.bos_id  # the next document would begin
            if not ended[row]:
                rows[row].append(piece)
        if all(ended) or step == tokens - 1:
            break
        scores, state = _read(model, following, state)
    return [tokenizer.decode(row) for row in rows]


def _read(model: LanguageModel, tokens: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Reads `tokens` (N, T) on from `state` -> log-probabilities (N, V) of the next piece and the new state."""
    hidden, state = model.encoder(tokens, state)  # (N, T, E)
    scores = model.decoder(hidden[:, -1], model.encoder.embedding.weight).float()
    scores[:, [Tokenizer.pad_id, Tokenizer.unk_id]] = -torch.inf
    return scores.log_softmax(-1), state


def _draw(scores: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """(N, V) logits -> (N, 1) ids."""
    if temperature < 1e-4:  # the quotient below would not be a number
        return scores.argmax(-1, keepdim=True)
    scores = scores / temperature
    if 0 < top_k < scores.size(-1):
        lowest = scores.topk(top_k).values[:, -1:]
        scores = scores.masked_fill(scores < lowest, -torch.inf)
    if top_p < 1:
        ordered, index = scores.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        scores = torch.full_like(scores, -torch.inf).scatter(
            -1, index, ordered.masked_fill(before >= top_p, -torch.inf)
        )
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)


def _beam_search(
    model: LanguageModel, start: list[int], tokens: int, beams: int, end: int, device: torch.device
) -> list[list[int]]:
    """The `beams` best continuations by mean log-probability, best first."""
    log_probs, state = _read(model, torch.tensor([start], device=device), None)  # (rows, V)
    scores = torch.zeros(1, device=device)
    rows = [list(start)]
    finished: list[tuple[float, list[int]]] = []
    for step in range(1, tokens + 1):
        total = (scores[:, None] + log_probs).flatten()
        best, flat = total.topk(min(2 * beams, total.numel()))  # at most `beams` of them end
        kept: list[tuple[float, int, int]] = []
        for value, position in zip(best.tolist(), flat.tolist(), strict=True):
            row, piece = divmod(position, log_probs.size(-1))
            if piece == end:
                finished.append((value / step, rows[row]))
            elif len(kept) < beams and value > -math.inf:
                kept.append((value, row, piece))
        rows = [[*rows[row], piece] for _, row, piece in kept]
        scores = torch.tensor([value for value, _, _ in kept], device=device)
        if step == tokens:
            break
        state = select_rows(state, torch.tensor([row for _, row, _ in kept], device=device))
        log_probs, state = _read(model, torch.tensor([[piece] for _, _, piece in kept], device=device), state)
    finished += [(score / tokens, row) for score, row in zip(scores.tolist(), rows, strict=True)]
    return [row for _, row in sorted(finished, key=lambda found: -found[0])]
