"""`ulmfit evaluate`: figures of a bundle, or of an ensemble of classifiers, on a split of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ulmfit.bundle import LANGUAGE_MODEL, load_bundle, read_info
from ulmfit.config import EvaluateConfig
from ulmfit.data.cache import TokenCache, build_token_cache
from ulmfit.data.content import word_count
from ulmfit.data.sources import content_key, iter_texts, load_splits, total_chars
from ulmfit.errors import DataError
from ulmfit.tasks.locations import cache_folder, classifiers_to_use, resolve_bundle


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Print and return the figures, and write them to `config.output`."""
    figures = _figures(config)
    if config.output is not None:
        from ulmfit.tasks.scoring import write_json

        write_json(Path(config.output), figures)
    return figures


def _figures(config: EvaluateConfig) -> dict[str, Any]:
    if len(config.bundle) == 1:
        path = resolve_bundle(config.bundle[0], None)
        if read_info(path).kind == LANGUAGE_MODEL:
            return _language_model(path, config)
    return _classifiers(classifiers_to_use(config.bundle, config.runs), config)


def _classifiers(paths: list[Path], config: EvaluateConfig) -> dict[str, Any]:
    import torch

    from ulmfit.inference import Predictor
    from ulmfit.tasks.reading import ReadingProgress
    from ulmfit.tasks.scoring import classification_report, format_report

    table = load_splits(config.dataset).of(config.split)
    if table is None:
        raise DataError(
            f"the data set {config.dataset.name} has no {config.split} split; set dataset.{config.split} to its file "
            "or evaluate on another split"
        )
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    predictor = Predictor(list(paths), config.trainer.accelerator, precision=config.precision)
    labels = table.label_ids(predictor.classes)
    shown = config.trainer.enable_progress_bar
    probabilities = predictor.probabilities(
        table.texts, config.batch_size, progress=ReadingProgress(table.texts, shown)
    )
    report = classification_report(probabilities, labels, predictor.classes)
    print(format_report(report, config.split))
    if config.precision != "32":
        exact = Predictor(list(paths), config.trainer.accelerator).probabilities(
            table.texts, config.batch_size, progress=ReadingProgress(table.texts, shown)
        )
        difference = abs(probabilities - exact)
        report["precision"] = {
            "name": config.precision,
            "error_with_32": 1 - float((exact.argmax(1) == labels).mean()),
            "same_labels": float((probabilities.argmax(1) == exact.argmax(1)).mean()),
            "largest_difference": float(difference.max()),
            "mean_difference": float(difference.mean()),
        }
        print(
            "precision={name} costs: with 32 bits the error is {error_with_32:.1%}, {same_labels:.1%} of the labels "
            "are the same, probabilities differ by {largest_difference:.4f} at most, {mean_difference:.4f} in the "
            "mean".format(**report["precision"])
        )
    return report


def _language_model(path: Path, config: EvaluateConfig) -> dict[str, Any]:
    import torch

    from ulmfit.inference import pick_device, score_language_model
    from ulmfit.nn.build import language_model_from
    from ulmfit.nn.reduced import reduce_precision

    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)

    bundle = load_bundle(path, LANGUAGE_MODEL)
    characters = sum(len(text) + 1 for text in iter_texts(config.dataset, config.split))
    cache: TokenCache = build_token_cache(
        iter_texts(config.dataset, config.split),
        bundle.tokenizer,
        cache_folder(config.cache) / "tokens",
        content_key(config.dataset, config.split),
        total_chars(config.dataset, config.split),
        progress=config.trainer.enable_progress_bar,
    )
    model = language_model_from(bundle).to(pick_device(config.trainer.accelerator)).eval()
    reduce_precision(model.encoder, config.precision)
    score = score_language_model(model, cache, characters, bundle.info.direction)
    figures: dict[str, Any] = {
        "bits_per_character": score.bits_per_character,
        "perplexity": score.perplexity,
        "nll": score.nll,
        "tokens": score.tokens,
        "characters": score.characters,
        "documents": len(cache),
    }
    per_word = ""
    words = word_count(config.dataset, config.split)
    if words is not None:
        figures |= {"words": words, "word_perplexity": score.per_word(words)}
        per_word = f", {figures['word_perplexity']:.2f} per word of the {words} that published figures count"
    print(
        f"{config.split}: {score.bits_per_character:.4f} bits per character, perplexity {score.perplexity:.2f} per "
        f"piece{per_word} ({len(cache)} documents, {score.tokens} pieces, {score.characters} characters)"
    )
    return figures
