"""What the stages train on, ready: texts to tokenizer and caches, weights from a parent."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ulmfit.bundle import Bundle, load_bundle
from ulmfit.config import LMConfig, TrainConfig
from ulmfit.data.cache import NoDocuments, TokenCache, build_token_cache
from ulmfit.data.locate import has_split
from ulmfit.data.packed import is_packed, unpack
from ulmfit.data.sources import content_key, iter_texts, load_splits, total_chars
from ulmfit.data.tables import Splits
from ulmfit.errors import BundleError, DataError
from ulmfit.nn.build import language_model_from, new_text_classifier
from ulmfit.nn.models import LanguageModel, TextClassifier
from ulmfit.tasks.locations import Parent, cache_folder
from ulmfit.text.tokenizer import Tokenizer
from ulmfit.training import engine
from ulmfit.whole_file import partial_folder, put_folder

log = logging.getLogger("ulmfit")


@dataclass
class LMInputs:
    """What a language-model stage trains on, ready."""

    model: LanguageModel
    tokenizer: Tokenizer
    train: TokenCache
    valid: TokenCache | None
    direction: str
    dataset: str  # whose text it is
    licence: str


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
    licence: str


def prepare_language_model(config: TrainConfig, parent: Parent, kept: Path | None = None) -> LMInputs:
    """Tokenizer, caches and network of lm_pretrain or lm_finetune.

    Args:
        kept: where an interrupted run has kept its tokenizer; another machine's SentencePiece might learn another one.
    """
    bundle = None if parent.path is None else load_bundle(parent.path)
    direction = config.stage.lm.direction or (bundle.info.direction if bundle else "forward")
    valid: TokenCache | None
    dataset, licence = config.dataset.name, config.dataset.licence
    if is_packed(config.dataset):
        packed = unpack(Path(config.dataset.path or ""), cache_folder(config.cache) / "unpacked")
        tokenizer, train, valid, licence = packed.tokenizer, packed.train, packed.valid, packed.licence
        dataset = packed.dataset or dataset
    else:
        resumed = kept is not None and (kept / "tokenizer.json").is_file()
        tokenizer = Tokenizer.load(kept) if kept and resumed else tokenizer_for(config, bundle, config.stage.lm)
        train = lm_cache(config, tokenizer, "lm")
        valid = _valid_cache(config, tokenizer)
    log.info("%d documents, %d tokens to learn from, starting %s", len(train), len(train.tokens), _from(parent))
    engine.seed_everything(config.seed)
    if bundle is None:
        model = engine.new_language_model(config.model, tokenizer, train)
    else:
        model, transfer = engine.language_model_for(bundle, tokenizer)
        if transfer is not None:
            log.info("vocabulary: %s", transfer)
    return LMInputs(model, tokenizer, train, valid, direction, dataset, _licences(licence, bundle))


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
        bundle = None
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
    licence = _licences(config.dataset.licence, bundle)
    return ClassifierInputs(
        model, tokenizer, splits, classes, train, train_labels, valid, valid_labels, direction, licence
    )


def _licences(licence: str, parent: Bundle | None) -> str:
    """What a model card says of the texts behind the weights: this one's, and those its parent was trained on."""
    given = [licence, str(parent.info.provenance.get("licence", "")) if parent is not None else ""]
    return "; ".join(dict.fromkeys(filter(None, given)))


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
    with partial_folder(folder) as partial:
        tokenizer = Tokenizer.train(iter_texts(config.dataset, "lm"), config.tokenizer)
        tokenizer.save(partial)
        put_folder(partial, folder)
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
