"""The two stages as the command line runs them: texts to caches, weights from a parent, training, bundle, plots."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ulmfit import plots
from ulmfit.bundle import Bundle, load_bundle, save_bundle
from ulmfit.config import LMConfig, TrainConfig
from ulmfit.data.cache import NoDocuments, TokenCache, build_token_cache
from ulmfit.data.locate import has_split
from ulmfit.data.sources import content_key, iter_texts, load_splits, total_chars
from ulmfit.data.tables import Splits
from ulmfit.errors import BundleError, DataError
from ulmfit.inference import Predictor
from ulmfit.nn.build import language_model_from, new_text_classifier
from ulmfit.nn.models import LanguageModel, TextClassifier
from ulmfit.tasks.locations import PRETRAINED, Parent, cache_folder
from ulmfit.tasks.scoring import classification_report, write_json
from ulmfit.text.tokenizer import Tokenizer
from ulmfit.training import engine
from ulmfit.training.checkpoints import CHECKPOINTS

log = logging.getLogger("ulmfit")


@dataclass
class StageResult:
    """The bundle written and its figures; `main` is false in all but one process of distributed training."""

    bundle: Path
    metrics: dict[str, Any]
    main: bool = True


@dataclass
class LMInputs:
    """What a language-model stage trains on, ready."""

    model: LanguageModel
    tokenizer: Tokenizer
    train: TokenCache
    valid: TokenCache | None
    direction: str


@dataclass
class ClassifierInputs:
    """What the classifier stage trains on, ready; `train` is a function of the epoch with subword sampling."""

    model: TextClassifier
    tokenizer: Tokenizer
    splits: Splits
    classes: list[str]
    train: TokenCache | Callable[[int], TokenCache]
    train_labels: list[int]
    valid: TokenCache | None
    valid_labels: list[int] | None
    direction: str


def prepare_language_model(config: TrainConfig, parent: Parent) -> LMInputs:
    """Tokenizer, caches and network of lm_pretrain or lm_finetune."""
    bundle = None if parent.path is None else load_bundle(parent.path)
    direction = config.stage.lm.direction or (bundle.info.direction if bundle else "forward")
    tokenizer = tokenizer_for(config, bundle, config.stage.lm)
    train = lm_cache(config, tokenizer, "lm")
    valid = _valid_cache(config, tokenizer)
    log.info("%d documents, %d tokens to learn from, starting %s", len(train), len(train.tokens), _from(parent))
    engine.seed_everything(config.seed)
    if bundle is None:
        return LMInputs(engine.new_language_model(config.model, tokenizer, train), tokenizer, train, valid, direction)
    model, transfer = engine.language_model_for(bundle, tokenizer)
    if transfer is not None:
        log.info("vocabulary: %s", transfer)
    return LMInputs(model, tokenizer, train, valid, direction)


def labelled_splits(config: TrainConfig) -> tuple[Splits, list[str]]:
    """The rows of a classifier and its classes, with every label looked at before any work is done.

    Raises:
        DataError: as `load_splits`, or no labels, or a label in validation or test that is not in training.
    """
    splits = load_splits(config.dataset)
    classes = splits.classes
    for table in (splits.valid, splits.test):
        if table is not None and table.labels is not None:
            table.label_ids(classes)
    if splits.train is not None and len(classes) > max(20, len(splits.train) // 2):
        log.warning(
            "%d documents have %d different labels: is '%s' the right column (dataset.label)?",
            len(splits.train),
            len(classes),
            config.dataset.label,
        )
    return splits, classes


def prepare_classifier(config: TrainConfig, parent: Parent) -> ClassifierInputs:
    """Splits, tokens and network of the classifier stage."""
    splits, classes = labelled_splits(config)
    assert splits.train is not None  # `classes` has seen to it
    if parent.path is None:
        tokenizer = tokenizer_for(config, None, config.stage.lm)
        engine.seed_everything(config.seed)
        language_model = engine.new_language_model(config.model, tokenizer)
        direction = config.stage.lm.direction or "forward"
    else:
        bundle = load_bundle(parent.path)
        tokenizer, direction = bundle.tokenizer, bundle.info.direction
        language_model = language_model_from(bundle)
    log.info("%d labelled documents in %d classes, starting %s", len(splits.train), len(classes), _from(parent))
    engine.seed_everything(config.seed)
    train = engine.training_documents(splits.train.texts, tokenizer, config.tokenizer.sampling_alpha, config.seed)
    valid, valid_labels = None, None
    if splits.valid is not None:
        valid = TokenCache.from_texts(splits.valid.texts, tokenizer, torch.get_num_threads())
        valid_labels = splits.valid.label_ids(classes)
    model = new_text_classifier(language_model.encoder, len(classes), config.stage.classifier)
    train_labels = splits.train.label_ids(classes)
    return ClassifierInputs(model, tokenizer, splits, classes, train, train_labels, valid, valid_labels, direction)


def train_language_model(config: TrainConfig, stage: str, parent: Parent, folder: Path) -> StageResult:
    """lm_pretrain or lm_finetune: writes `folder/bundle`, `folder/metrics.json` and the plots."""
    started = time.monotonic()
    given = prepare_language_model(config, parent)
    result = engine.fit_language_model(
        given.model,
        given.train,
        given.valid,
        config.stage.lm,
        given.direction,
        config.seed,
        config.trainer,
        config.logger,
        folder,
        stage,
    )
    target = folder / "bundle"
    if not result.main:
        engine.wait_for_all()  # until rank 0 has written the bundle
        return StageResult(target, {}, main=False)
    provenance = engine.provenance(
        stage, config.dataset.name, parent_name(parent), len(given.train.tokens), result.steps, config.seed
    )
    info = engine.language_model_info(given.model, given.direction, provenance, result.metrics)
    model = given.model
    save_bundle(
        target, info, model.encoder.state_dict(), model.decoder.state_dict(), given.tokenizer, config.stage.lm.half
    )
    finished = _finish(folder, StageResult(target, dict(result.metrics)), started)
    engine.wait_for_all()
    return finished


def train_classifier(config: TrainConfig, parent: Parent, folder: Path) -> StageResult:
    """Writes `folder/bundle`, `folder/metrics.json` (with the test figures, if there is a test split) and the plots."""
    started = time.monotonic()
    given = prepare_classifier(config, parent)
    result = engine.fit_classifier(
        given.model,
        given.train,
        given.train_labels,
        given.valid,
        given.valid_labels,
        config.stage.classifier,
        given.direction,
        config.seed,
        config.trainer,
        config.logger,
        folder,
    )
    target = folder / "bundle"
    if not result.main:
        engine.wait_for_all()  # until rank 0 has written the bundle
        return StageResult(target, {}, main=False)
    provenance = engine.provenance(
        "classifier", config.dataset.name, parent_name(parent), len(given.train_labels), result.steps, config.seed
    )
    model = given.model
    info = engine.classifier_info(model, given.direction, given.classes, provenance, result.metrics)
    save_bundle(
        target, info, model.encoder.state_dict(), model.head.state_dict(), given.tokenizer, config.stage.classifier.half
    )
    metrics: dict[str, Any] = dict(result.metrics)
    metrics |= _test_figures(target, given.splits, given.classes, folder)
    finished = _finish(folder, StageResult(target, metrics), started)
    engine.wait_for_all()
    return finished


def _test_figures(bundle: Path, splits: Splits, classes: list[str], folder: Path) -> dict[str, Any]:
    if splits.test is None or splits.test.labels is None:
        return {}
    probabilities = Predictor([bundle]).probabilities(splits.test.texts)
    report = classification_report(probabilities, splits.test.label_ids(classes), classes)
    plots.save(plots.plot_confusion(report["confusion"], classes), folder / "confusion_matrix.png")
    return {"test": report}


def _finish(folder: Path, result: StageResult, started: float) -> StageResult:
    history = plots.read_history(folder)
    if history:
        plots.save(plots.plot_losses(history), folder / "loss.png")
        plots.save(plots.plot_rates(history), folder / "learning_rates.png")
    result.metrics["seconds"] = round(time.monotonic() - started, 1)
    write_json(folder / "metrics.json", result.metrics)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # only needed to resume
    return result


def tokenizer_for(config: TrainConfig, parent: Bundle | None, lm: LMConfig) -> Tokenizer:
    """The parent's, or one learnt from this text (kept in the cache, so that a resumed run has the same)."""
    if parent is not None and lm.vocabulary == "keep":
        return parent.tokenizer
    wanted = json.dumps([asdict(config.tokenizer), content_key(config.dataset, "lm")], sort_keys=True)
    folder = cache_folder(config.cache) / "tokenizers" / hashlib.sha256(wanted.encode()).hexdigest()[:16]
    if (folder / "tokenizer.json").is_file():
        try:
            return Tokenizer.load(folder)
        except BundleError as error:
            raise DataError(f"the cached tokenizer {folder} is damaged; delete the folder and run again") from error
    log.info("learning a %s vocabulary of %d pieces", config.tokenizer.kind, config.tokenizer.vocab_size)
    tokenizer = Tokenizer.train(iter_texts(config.dataset, "lm"), config.tokenizer)
    tokenizer.save(folder)
    return tokenizer


def lm_cache(config: TrainConfig, tokenizer: Tokenizer, split: str) -> TokenCache:
    """The documents of a split (or of `lm`) as tokens, in the cache on disk."""
    return build_token_cache(
        iter_texts(config.dataset, split),
        tokenizer,
        cache_folder(config.cache) / "tokens",
        content_key(config.dataset, split),
        total_chars(config.dataset, split),
        progress=config.trainer.enable_progress_bar,
    )


def _valid_cache(config: TrainConfig, tokenizer: Tokenizer) -> TokenCache | None:
    if not has_split(config.dataset, "valid"):
        return None
    try:
        return lm_cache(config, tokenizer, "valid")
    except NoDocuments:
        log.warning("there is too little text for a validation set, so the last weights are kept")
        return None


def _from(parent: Parent) -> str:
    return parent.why if parent.path is None else f"from {parent.path} ({parent.why})"


def parent_name(parent: Parent) -> str:
    """How a bundle made from `parent` refers to it."""
    if parent.path is None:
        return "scratch"
    # Where the package is installed says nothing about a shipped model.
    return parent.path.name if parent.path.parent == PRETRAINED else str(parent.path)
