"""The language model's learner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ulmfit.bundle import LANGUAGE_MODEL, BundleInfo, load_bundle
from ulmfit.config import FitConfig, LMConfig, TrainConfig
from ulmfit.data.cache import TokenCache
from ulmfit.errors import DataError
from ulmfit.inference import score_language_model
from ulmfit.learner import display
from ulmfit.learner.base import Learner
from ulmfit.learner.loading import LanguageModelPredictor, find_bundle
from ulmfit.learner.text_data import TextData
from ulmfit.nn.build import language_model_from
from ulmfit.nn.models import LanguageModel
from ulmfit.tasks import inputs
from ulmfit.tasks.locations import resolve_bundle
from ulmfit.text.tokenizer import Tokenizer
from ulmfit.training import engine
from ulmfit.training.trainer import FitResult


class LanguageModelLearner(Learner):
    """A language model in training; see `Learner` for the verbs and `language_model_learner` to make one."""

    model: LanguageModel
    title = "language model"

    def __init__(
        self,
        data: TextData,
        config: TrainConfig,
        tokenizer: Tokenizer,
        direction: str,
        parent: str,
        folder: str | Path | None = None,
    ) -> None:
        super().__init__(data, config, tokenizer, direction, parent, folder)
        self._caches: dict[str, TokenCache] = {}

    def tokens(self, split: str) -> TokenCache:
        """The documents of a split, or of `lm`, as token ids.

        Raises:
            DataError: there are none.
        """
        if split not in self._caches:
            if split != "lm":
                _ = self.data.has(split) or self.data.table(split)  # which says what there is
            if self.data.config is not None:
                self._caches[split] = inputs.lm_cache(self.config, self.tokenizer, split)
            else:
                texts = list(self.data.texts(split))
                if not texts:
                    raise DataError(f"the {split} texts of '{self.data.name}' are all empty; give texts with words")
                self._caches[split] = TokenCache.from_texts(texts, self.tokenizer, torch.get_num_threads())
        return self._caches[split]

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
        """`text` and how it goes on, see `LanguageModelPredictor.predict`. Warns when nothing was trained yet."""
        self._warn_if_untrained()
        return self._predictor().predict(text, tokens, n_words, temperature, top_k, top_p, seed)

    def validate(self, split: str = "valid") -> dict[str, float]:
        """Loss in nats per piece, perplexity per piece and bits per character on a split.

        Raises:
            UsageError: no such split.
        """
        cache = self.tokens(split)
        characters = sum(len(text) + 1 for text in self.data.texts(split))
        score = score_language_model(self._predictor().model, cache, characters, self.direction)
        return {
            "loss": score.nll / score.tokens,
            "perplexity": score.perplexity,
            "bits_per_character": score.bits_per_character,
            "tokens": score.tokens,
        }

    def show_results(self, n: int = 5, split: str = "valid") -> None:
        """Display beginnings of `n` texts of a split, how they go on, and how the model goes on.

        Raises:
            UsageError: no such split, or a backward model, which cannot write.
        """
        texts = [text for text in self.data.texts(split) if len(text.split()) > 3]
        chosen = np.random.default_rng(self.config.seed).permutation(len(texts))[:n]
        rows = []
        for text in (texts[i] for i in sorted(chosen)):
            words = text.split()
            half = min(len(words) // 2, 12)
            begins = " ".join(words[:half])
            written = self._predictor().predict(begins, n_words=len(words[half : half + 20]))
            rows.append([begins, " ".join(words[half : half + 20]), " ".join(written.split()[half:])])
        display.show(display.Table(["text begins", "goes on", "the model writes"], rows))

    def load(self, path: str | Path) -> LanguageModelLearner:
        """Go on from the bundle of a language model, whose tokenizer and direction replace the learner's.

        Raises:
            BundleError: no language model there.
        """
        return self._take(resolve_bundle(str(path), LANGUAGE_MODEL))

    def load_encoder(self, path: str | Path) -> LanguageModelLearner:
        """As `load`, but also from a classifier, and then frozen below the highest layer group, as in fastai."""
        self._take(find_bundle(path))
        self.freeze()
        return self

    def _take(self, path: Path) -> LanguageModelLearner:
        bundle = load_bundle(path)
        self.model = language_model_from(bundle)
        self.tokenizer, self.direction, self.parent = bundle.tokenizer, bundle.info.direction, str(path)
        self._caches = {}
        self._first_trained = 0
        self.trained = True
        return self

    def _predictor(self) -> LanguageModelPredictor:
        return LanguageModelPredictor(self.bundle(), model=self.model)

    @property
    def _stage(self) -> LMConfig:
        return self.config.stage.lm

    def _parts(self, config: FitConfig) -> tuple[Any, Any]:
        assert isinstance(config, LMConfig)
        return engine.language_model_parts(
            self.model, self.tokens("lm"), None, config, self.direction, self.config.seed
        )

    def _fit(self, config: FitConfig, seed: int, folder: Path, title: str) -> FitResult:
        assert isinstance(config, LMConfig)
        valid = self.tokens("valid") if self.data.has("valid") else None
        trainer, logger = self.config.trainer, self.config.logger
        return engine.fit_language_model(
            self.model, self.tokens("lm"), valid, config, self.direction, seed, trainer, logger, folder, title
        )

    def _info(self) -> BundleInfo:
        size = len(self._caches["lm"].tokens) if "lm" in self._caches else 0
        provenance = self._provenance("lm_finetune", size)
        return engine.language_model_info(self.model, self.direction, provenance, dict(self.metrics))

    def _weights(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.model.encoder.state_dict(), self.model.decoder.state_dict()

    def __repr__(self) -> str:
        return f"LanguageModelLearner({self.data!r}, from {self.parent}, {self.direction}, {self._fits} fits)"
