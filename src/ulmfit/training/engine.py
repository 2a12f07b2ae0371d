"""From token caches and a network to trained weights and a bundle. The command line and the learners meet here."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch

from ulmfit import __version__, memory
from ulmfit.bundle import CLASSIFIER, LANGUAGE_MODEL, Bundle, BundleInfo
from ulmfit.config import ClassifierConfig, LMConfig, LoggerConfig, ModelConfig, TrainerConfig
from ulmfit.data.cache import TokenCache
from ulmfit.data.datamodule import ClassifierDataModule, LMDataModule
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.build import TransferReport, language_model_from, transfer_vocabulary
from ulmfit.nn.models import LanguageModel, TextClassifier
from ulmfit.text.tokenizer import Tokenizer
from ulmfit.training.classifier import ClassifierModule
from ulmfit.training.lm import LMModule
from ulmfit.training.trainer import FitResult, fit, quiet_lightning


def seed_everything(seed: int) -> None:
    """Python's, NumPy's and torch's random numbers, in all processes alike."""
    with quiet_lightning():
        lightning.seed_everything(seed, verbose=False)


@contextmanager
def own_randomness() -> Iterator[None]:
    """Within it, seeds may be set; afterwards the caller's random numbers go on as if nothing had drawn any."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpu:
            torch.cuda.set_rng_state_all(on_gpu)


def new_language_model(
    model: ModelConfig, tokenizer: Tokenizer, frequencies: TokenCache | None = None
) -> LanguageModel:
    """A language model from scratch.

    With `frequencies` the decoder's bias starts at the log frequencies of the pieces: without that, the first steps
    teach the top layer a constant output in its stead, and a deep network can stay there.
    """
    architecture = Architecture(tokenizer.vocab_size, model.embedding_dim, model.hidden_dim, model.num_layers)
    network = LanguageModel(AWDLSTM(architecture))
    if frequencies is not None:
        sample = torch.from_numpy(frequencies.tokens[: 1 << 24].astype("int64"))
        counts = torch.bincount(sample, minlength=tokenizer.vocab_size).float() + 1
        network.decoder.bias.data.copy_((counts / counts.sum()).log())
    return network


def language_model_for(bundle: Bundle, tokenizer: Tokenizer) -> tuple[LanguageModel, TransferReport | None]:
    """The model of `bundle`, its vocabulary transferred if `tokenizer` is another one."""
    model = language_model_from(bundle)
    if tokenizer.fingerprint == bundle.tokenizer.fingerprint:
        return model, None
    return transfer_vocabulary(model, bundle.tokenizer.pieces, tokenizer.pieces)


def language_model_parts(
    model: LanguageModel, train: TokenCache, valid: TokenCache | None, config: LMConfig, direction: str, seed: int
) -> tuple[LMModule, LMDataModule]:
    """What a Lightning trainer needs. The network is put into training mode, which Lightning leaves to its caller."""
    module = LMModule(model, config)
    module.train()
    return module, LMDataModule(train, valid, config, direction, seed)


def fit_language_model(
    model: LanguageModel,
    train: TokenCache,
    valid: TokenCache | None,
    config: LMConfig,
    direction: str,
    seed: int,
    trainer: TrainerConfig,
    logger: LoggerConfig,
    folder: Path | None,
    title: str = "language model",
    callbacks: Sequence[lightning.Callback] = (),
) -> FitResult:
    """Train `model` in place; see `fit`. The outcome depends on `seed`, not on random numbers drawn before."""
    module, data = language_model_parts(model, train, valid, config, direction, seed)
    return _seeded(seed, module, data, config, trainer, logger, folder, ("valid_loss", "min"), title, callbacks)


def _seeded(seed: int, *given: Any) -> FitResult:
    """`fit`, with its random numbers from `seed`; what it has freed goes back, for the next one would add to it."""
    seed_everything(seed)
    with memory.kept():
        return fit(*given)


def classifier_parts(
    model: TextClassifier,
    train: TokenCache | Callable[[int], TokenCache],
    train_labels: Sequence[int],
    valid: TokenCache | None,
    valid_labels: Sequence[int] | None,
    config: ClassifierConfig,
    direction: str,
    seed: int,
) -> tuple[ClassifierModule, ClassifierDataModule]:
    """As `language_model_parts`."""
    weights = balanced_weights(train_labels, model.classes) if config.class_weights == "balanced" else None
    module = ClassifierModule(model, config, weights)
    module.train()
    return module, ClassifierDataModule(train, train_labels, valid, valid_labels, config, direction, seed)


def fit_classifier(
    model: TextClassifier,
    train: TokenCache | Callable[[int], TokenCache],
    train_labels: Sequence[int],
    valid: TokenCache | None,
    valid_labels: Sequence[int] | None,
    config: ClassifierConfig,
    direction: str,
    seed: int,
    trainer: TrainerConfig,
    logger: LoggerConfig,
    folder: Path | None,
    title: str = "classifier",
    callbacks: Sequence[lightning.Callback] = (),
) -> FitResult:
    """Train `model` in place, as `fit_language_model`. `train` may be a function of the epoch (subword sampling)."""
    module, data = classifier_parts(model, train, train_labels, valid, valid_labels, config, direction, seed)
    return _seeded(seed, module, data, config, trainer, logger, folder, ("valid_accuracy", "max"), title, callbacks)


def balanced_weights(labels: Sequence[int], classes: int) -> list[float]:
    """Weights inversely proportional to the classes' counts, mean 1 over the documents; 0 for an absent class."""
    counts = [0] * classes
    for label in labels:
        counts[label] += 1
    present = sum(1 for n in counts if n)
    return [len(labels) / (present * n) if n else 0.0 for n in counts]


def training_documents(
    texts: Sequence[str], tokenizer: Tokenizer, sampling_alpha: float, seed: int
) -> TokenCache | Callable[[int], TokenCache]:
    """A classifier's training texts as tokens; with `sampling_alpha` > 0 segmented anew in each epoch."""
    if sampling_alpha > 0:
        tokenizer.config.sampling_alpha = sampling_alpha
        return sampled_documents(texts, tokenizer, seed)
    return TokenCache.from_texts(texts, tokenizer, torch.get_num_threads())


def sampled_documents(texts: Sequence[str], tokenizer: Tokenizer, seed: int) -> Callable[[int], TokenCache]:
    """Another segmentation of the same texts for each epoch, a pure function of (seed, epoch)."""

    def documents(epoch: int) -> TokenCache:
        tokenizer.seed_sampling(seed * 10_007 + epoch)
        return TokenCache.from_texts(texts, tokenizer, sampling=True)

    return documents


def language_model_info(
    model: LanguageModel, direction: str, provenance: dict[str, Any], metrics: dict[str, float]
) -> BundleInfo:
    """Description of a language model for its bundle."""
    return BundleInfo(
        LANGUAGE_MODEL, asdict(model.encoder.architecture), direction, provenance=provenance, metrics=metrics
    )


def classifier_info(
    model: TextClassifier, direction: str, labels: Sequence[str], provenance: dict[str, Any], metrics: dict[str, float]
) -> BundleInfo:
    """Description of a classifier for its bundle."""
    pooling = {"bptt": model.bptt, "max_len": model.max_len, "head_hidden": model.head.hidden}
    return BundleInfo(
        CLASSIFIER,
        asdict(model.encoder.architecture),
        direction,
        list(labels),
        pooling,
        provenance=provenance,
        metrics=metrics,
    )


def provenance(stage: str, dataset: str, parent: str, size: int, steps: int, seed: int) -> dict[str, Any]:
    """Where weights come from, for their bundle. `size` counts tokens for a language model, else documents."""
    return {
        "stage": stage,
        "dataset": dataset,
        "parent": parent,
        "documents" if stage == "classifier" else "tokens": size,
        "steps": steps,
        "seed": seed,
        "ulmfit": __version__,
        "torch": torch.__version__,
    }
