"""`ulmfit.load`: a bundle, or several as an ensemble, ready to use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from ulmfit.bundle import CLASSIFIER, LANGUAGE_MODEL, Bundle, is_bundle, load_bundle
from ulmfit.data.cache import TokenCache
from ulmfit.errors import BundleError, DataError, UsageError
from ulmfit.generation import generate
from ulmfit.inference import LMScore, Predictor, pick_device, score_language_model
from ulmfit.nn.build import language_model_from
from ulmfit.nn.models import LanguageModel
from ulmfit.tasks.locations import resolve_bundle

_PIECES_PER_WORD = 4  # more than English needs


class LanguageModelPredictor:
    """A language model at work: writes on from a prompt, and says how well it predicts a text.

    Args:
        bundle: of a language model, or its folder.
        device: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
        model: the bundle's network where it exists already; it is used as it is, not copied.

    Raises:
        BundleError: not a language model.
    """

    def __init__(self, bundle: Bundle | Path | str, device: str = "auto", model: LanguageModel | None = None) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle, LANGUAGE_MODEL)
        network = language_model_from(self.bundle) if model is None else model
        self.model = network.to(pick_device(device)).eval()

    def predict(
        self,
        text: str = "",
        tokens: int = 60,
        n_words: int | None = None,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.9,
        seed: int = 0,
    ) -> str:
        """`text` and how it goes on; the end of a document ends it earlier.

        Args:
            tokens: pieces to write.
            n_words: words to write in place of `tokens`.

        Raises:
            UsageError: a value out of range, or a backward model.
        """
        if n_words is None:
            return self.generate(text, tokens, 1, temperature, top_k, top_p, seed=seed)[0]
        if n_words < 1:
            raise UsageError(f"got n_words={n_words}, expected at least 1")
        written = self.generate(text, _PIECES_PER_WORD * n_words, 1, temperature, top_k, top_p, seed=seed)[0]
        words = len(text.split()) + n_words
        kept = re.match(rf"(?:\s*\S+){{0,{words}}}", written)
        return kept.group() if kept else written

    def generate(
        self,
        text: str = "",
        tokens: int = 60,
        samples: int = 1,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.9,
        beams: int = 0,
        seed: int = 0,
    ) -> list[str]:
        """Several texts that go on from one; see `generation.generate` for the arguments."""
        if not isinstance(text, str):
            raise UsageError(f"got a {type(text).__name__} to go on from, expected one text")
        return generate(self.bundle, text, tokens, samples, temperature, top_k, top_p, beams, seed, model=self.model)

    def score(self, texts: Sequence[str]) -> LMScore:
        """Likelihood, perplexity per piece and bits per character of texts.

        Raises:
            DataError: no text.
        """
        kept = [text for text in texts if text.strip()]
        if isinstance(texts, str) or not kept:
            raise DataError("there is no text to score; give a list of at least one text that is not empty")
        cache = TokenCache.from_texts(kept, self.bundle.tokenizer, threads=torch.get_num_threads())
        characters = sum(len(text) + 1 for text in kept)
        return score_language_model(self.model, cache, characters, self.bundle.info.direction)

    def __repr__(self) -> str:
        return f"LanguageModelPredictor('{self.bundle.path}', {self.bundle.info.direction})"


def load(
    path: str | Path | Sequence[str | Path], device: str = "auto", precision: str = "32"
) -> Predictor | LanguageModelPredictor:
    """A bundle ready to use: a classifier as a `Predictor`, a language model as a `LanguageModelPredictor`.

    Args:
        path: folder of a bundle, or of a run that holds one; several classifiers make an ensemble, whose
            probabilities are averaged.
        device: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
        precision: of classifiers: "32", or faster and less exact "auto", "bf16", "int8"; see `Predictor`.

    Raises:
        BundleError: no bundle there, a damaged one, or an ensemble of what does not fit together.
    """
    if not isinstance(path, str | Path):
        return Predictor([resolve_bundle(str(one), CLASSIFIER) for one in path], device, precision=precision)
    bundle = load_bundle(find_bundle(path))
    if bundle.info.kind == CLASSIFIER:
        return Predictor([bundle], device, precision=precision)
    return LanguageModelPredictor(bundle, device)


def find_bundle(path: str | Path) -> Path:
    """The folder of a bundle of either kind; in a run that holds both, the classifier's.

    Raises:
        BundleError: no bundle there.
    """
    if is_bundle(Path(path)):
        return Path(path)
    try:
        return resolve_bundle(str(path), CLASSIFIER)
    except BundleError:
        return resolve_bundle(str(path), LANGUAGE_MODEL)
