"""ULMFiT: pre-train a language model once, fine-tune it on your text, classify with a few labels."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ulmfit.errors import UlmfitError
    from ulmfit.estimator import UlmfitClassifier
    from ulmfit.inference import Predictor
    from ulmfit.learner.classifier import TextClassifierLearner
    from ulmfit.learner.factories import language_model_learner, text_classifier_learner
    from ulmfit.learner.language_model import LanguageModelLearner
    from ulmfit.learner.loading import LanguageModelPredictor, load
    from ulmfit.learner.text_data import TextData

__version__ = "0.1.0"

__all__ = [
    "LanguageModelLearner",
    "LanguageModelPredictor",
    "Predictor",
    "TextClassifierLearner",
    "TextData",
    "UlmfitClassifier",
    "UlmfitError",
    "__version__",
    "language_model_learner",
    "load",
    "text_classifier_learner",
]

# For torch, which reads it at its first tensor: ask Linux for large pages. A training step on the CPU makes and frees
# many large tensors, and a tenth of its time went into page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Loaded when first used: torch and Lightning take seconds.
_HOMES = {
    "LanguageModelLearner": "ulmfit.learner.language_model",
    "LanguageModelPredictor": "ulmfit.learner.loading",
    "Predictor": "ulmfit.inference",
    "TextClassifierLearner": "ulmfit.learner.classifier",
    "TextData": "ulmfit.learner.text_data",
    "UlmfitClassifier": "ulmfit.estimator",
    "UlmfitError": "ulmfit.errors",
    "language_model_learner": "ulmfit.learner.factories",
    "load": "ulmfit.learner.loading",
    "text_classifier_learner": "ulmfit.learner.factories",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ulmfit' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
