"""Trained models at work, in plain torch: class probabilities and perplexity. Nothing here trains."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ulmfit import memory
from ulmfit.ahead import in_order
from ulmfit.bundle import CLASSIFIER, Bundle, load_bundle
from ulmfit.config import SIDE_BY_SIDE
from ulmfit.data.cache import TokenCache
from ulmfit.data.documents import DocumentBatch, DocumentBatches, batches_to_read
from ulmfit.data.streams import LMStream
from ulmfit.errors import BundleError, UsageError
from ulmfit.nn import reduced
from ulmfit.nn.awd_lstm import State, select_rows
from ulmfit.nn.build import text_classifier_from
from ulmfit.nn.models import FirstStep, LanguageModel, TextClassifier

Probabilities = npt.NDArray[np.float32]
_MOST_READERS = 4  # batches read at the same time; each takes memory


@dataclass(frozen=True)
class Prediction:
    """The most probable label, its probability, and all probabilities by label."""

    label: str
    probability: float
    probabilities: dict[str, float]


class Predictor:
    """One classifier, or an ensemble whose probabilities are averaged (Howard & Ruder 2018, section 3.4).

    Args:
        bundles: classifier bundles or their folders; members may differ in direction, tokenizer and shape,
            not in their labels.
        device: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
        models: the bundles' networks where they exist already; they are used as they are, not copied.
        precision: "32"; or faster, with probabilities that differ a little: "bf16" (by 0.005 at most where we looked),
            "int8" (by 0.07; with torch's kernels also with what else is in the batch), "auto" (bf16 if native, else
            32); see `nn.reduced.reduce_precision`.

    Raises:
        BundleError: no bundle, not a classifier, or members with different labels.
        UsageError: a device or precision that this machine does not have.
    """

    def __init__(
        self,
        bundles: Sequence[Bundle | Path | str],
        device: str = "auto",
        models: Sequence[TextClassifier] | None = None,
        precision: str = "32",
    ) -> None:
        if not bundles:
            raise BundleError("no classifier was given, expected the folder of at least one bundle")
        # oneDNN keeps compiled code for each shape of a batch it has seen: 1,024 of them, or 300 MB after some thousand
        # texts of all lengths. It reads this when the first network runs in a process.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
        self.device = pick_device(device)
        self._members: list[tuple[Bundle, TextClassifier, list[int]]] = []
        for i, given in enumerate(bundles):
            bundle = given if isinstance(given, Bundle) else load_bundle(given, CLASSIFIER)
            if i == 0:
                self.classes: list[str] = bundle.info.labels
            elif sorted(bundle.info.labels) != sorted(self.classes):
                raise BundleError(
                    f"{bundle.path} has the labels {', '.join(bundle.info.labels)}, the first of the ensemble has "
                    f"{', '.join(self.classes)}; members of an ensemble need the same labels"
                )
            order = [bundle.info.labels.index(label) for label in self.classes]
            model = text_classifier_from(bundle) if models is None else models[i]
            if models is None:
                model.head.fold_norms()
            model = model.to(self.device).eval()
            if models is None:
                reduced.reduce_precision(model.encoder, precision)
            # Without the weights of the bundle, which the model has copied.
            self._members.append((replace(bundle, encoder={}, head={}), model, order))
        self._networks_stay = models is None  # as they are
        self._first_steps: dict[int, FirstStep] = {}  # of each member: the begin marker is read once
        if models is None:
            del bundle, model
            memory.give_back()  # what reading and converting took

    def probabilities(
        self,
        texts: Sequence[str],
        batch_size: int = SIDE_BY_SIDE,
        tokens_at_a_time: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Probabilities:
        """(N, C) probabilities in the order of `texts` and `classes`. The result for a text depends on it alone.

        At most `batch_size` texts are read side by side, and memory is bounded by the `tokens_at_a_time` that are read
        (None: 4,480, twice as many in bfloat16, half in int8).
        """
        texts = [_document(text) for text in texts]
        mean = np.zeros((len(texts), len(self.classes)), dtype=np.float64)
        done = 0
        for bundle, model, order in self._members:
            documents = TokenCache.from_texts(texts, bundle.tokenizer, threads=torch.get_num_threads())
            if self._networks_stay:
                reduced.compile_for(model.encoder, len(documents.tokens))
            at_a_time = tokens_at_a_time or reduced.tokens_at_a_time(model.encoder)
            batches = batches_to_read(documents, None, bundle.info.direction, model.bptt, batch_size, at_a_time)
            for index, values in self._read(model, batches):
                mean[index] += values[:, order] / len(self._members)
                done += len(values)
                if progress is not None:
                    progress(done // len(self._members))
        return mean.astype(np.float32)

    def _read(
        self, model: TextClassifier, batches: DocumentBatches
    ) -> Iterator[tuple[npt.NDArray[np.int64], Probabilities]]:
        """Positions and probabilities of each batch; on a CPU, several batches at a time.

        Cores that share the products of one batch mostly wait for each other, and those of int8 are not shared at all.
        """

        def read(batch: DocumentBatch) -> tuple[npt.NDArray[np.int64], Probabilities]:
            with torch.inference_mode():
                logits = model(batch.tokens.to(self.device), batch.lengths)
                return batch.index.numpy(), logits.float().softmax(-1).cpu().numpy()

        threads = torch.get_num_threads()
        readers = 1 if self.device.type != "cpu" else min(_MOST_READERS, threads, len(batches))
        if readers == 1:
            yield from map(read, batches)
            return
        try:
            with ThreadPoolExecutor(readers, "read", torch.set_num_threads, (threads // readers,)) as pool:
                yield from in_order(lambda batch: pool.submit(read, batch), batches, readers)
        finally:
            torch.set_num_threads(threads)  # a thread sets it for itself, but for MKL and for new threads for all

    def predict(self, texts: Sequence[str], batch_size: int = SIDE_BY_SIDE) -> list[Prediction]:
        """Labels and probabilities of many texts."""
        return self._predictions(self.probabilities(texts, batch_size))

    def predict_one(self, text: str) -> Prediction:
        """Label and probabilities of one text, without the machinery of batches."""
        mean = np.zeros(len(self.classes))
        with torch.inference_mode():
            for i, (bundle, model, order) in enumerate(self._members):
                ids = bundle.tokenizer.encode(_document(text))
                if bundle.info.direction == "backward":
                    ids.reverse()
                if self._networks_stay and 0 < len(ids) < model.longest_at_once:
                    if i not in self._first_steps:
                        self._first_steps[i] = model.first_step(bundle.tokenizer.bos_id)
                    logits = model.after(self._first_steps[i], torch.tensor([ids], device=self.device))
                else:
                    tokens = torch.tensor([[bundle.tokenizer.bos_id, *ids]], device=self.device)
                    logits = model(tokens, torch.tensor([tokens.size(1)]))
                mean += logits[0].float().softmax(-1).cpu().numpy()[order] / len(self._members)
        return self._predictions(mean[None])[0]

    def _predictions(self, rows: npt.NDArray[np.floating]) -> list[Prediction]:
        best, listed = rows.argmax(1).tolist(), rows.tolist()
        return [
            Prediction(self.classes[i], row[i], dict(zip(self.classes, row, strict=True)))
            for i, row in zip(best, listed, strict=True)
        ]


def _document(text: str) -> str:
    """White space alone is no text, as where training data is read."""
    return text if text.strip() else ""


@dataclass(frozen=True)
class LMScore:
    """How well a language model predicts a text.

    Attributes:
        nll: summed negative log-likelihood in nats, every token after the first counted once.
        tokens: predicted tokens, begin markers of documents included.
        characters: of the raw text, one added per document for its end.
    """

    nll: float
    tokens: int
    characters: int

    @property
    def perplexity(self) -> float:
        """Per piece; comparable only between models with one tokenizer."""
        return math.exp(min(self.nll / self.tokens, 700))

    @property
    def bits_per_character(self) -> float:
        """Comparable between tokenizers."""
        return self.nll / math.log(2) / self.characters

    def per_word(self, words: int) -> float:
        """Perplexity per word, the likelihood spread over `words`."""
        return math.exp(min(self.nll / words, 700))


def score_language_model(
    model: LanguageModel, cache: TokenCache, characters: int, direction: str = "forward", rows: int = 64, bptt: int = 70
) -> LMScore:
    """Negative log-likelihood of a whole corpus. All tokens but the very first are predicted exactly once.

    The corpus is read as at most `rows` parallel streams of 1,000 tokens or more, plus what is left over. Each stream
    first reads the 140 tokens before it, which are not counted, so that hardly anything depends on their number.
    """
    device = next(model.parameters()).device
    model.eval()
    rows = max(1, min(rows, (len(cache.tokens) - 1) // 1000))
    stream = LMStream(cache, rows, bptt, direction=direction)
    total, count = 0.0, 0
    with torch.inference_mode():
        state = _state_before(model, stream)
        for tokens, targets in stream:
            nll, state = model.total_nll(tokens.to(device), targets.to(device), state)
            total, count = total + float(nll), count + targets.numel()
        left_over = stream.tail()
        if left_over is not None:
            last = None if state is None else select_rows(state, torch.tensor([rows - 1], device=device))
            nll, _ = model.total_nll(left_over[0].to(device), left_over[1].to(device), last)
            total, count = total + float(nll), count + left_over[1].numel()
    return LMScore(total, count, characters)


def _state_before(model: LanguageModel, stream: LMStream, steps: int = 140) -> State | None:
    """The hidden state with which each row begins: zeros for the first, else what the tokens before it leave."""
    tokens = stream.lead_in(min(steps, stream.row_length))
    if tokens is None:
        return None
    _, state = model.encoder(tokens.to(next(model.parameters()).device))
    return [(F.pad(h, (0, 0, 1, 0)), F.pad(c, (0, 0, 1, 0))) for h, c in state]


def pick_device(name: str) -> torch.device:
    """`name`, where "auto" is a GPU if there is one.

    Raises:
        UsageError: a device that this machine does not have.
    """
    if name == "gpu":
        name = "cuda"
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the device '{name}' is not on this machine; use cpu or auto") from error
    return device
