"""`ulmfit train`: one stage, or language model and classifier one after the other."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ulmfit.bundle import check_place, is_bundle
from ulmfit.config import TrainConfig
from ulmfit.data.locate import locate
from ulmfit.data.packed import is_packed, packed_key
from ulmfit.data.sources import content_key
from ulmfit.durations import duration_of, seconds_of
from ulmfit.errors import UsageError
from ulmfit.interruption import stopped_by_signals
from ulmfit.ranks import main_process
from ulmfit.tasks.locations import Parent, choose_parent
from ulmfit.tasks.run_folder import read_record, remove_leftovers, run_folder, unreadable, working_in, write_config

log = logging.getLogger("ulmfit")


def run(config: TrainConfig) -> dict[str, Any]:
    """Train, write the run folder, print the outcome; returns the figures of `metrics.json`.

    A finished run with the same configuration, data and parent is not repeated: its figures are returned.
    """
    stage = config.stage.name
    if config.publish and stage == "classifier":
        raise UsageError(f"publish={config.publish} is for language models; leave it out, or use another stage")
    parent = choose_parent(config.init, stage, Path(config.runs), config.dataset.name, config.stage.lm.direction)
    folder = run_folder(config, parent.fingerprint, *_content(config))
    bundles = ("lm/bundle", "classifier/bundle") if stage == "all" else ("bundle",)
    with stopped_by_signals():
        if _done(folder, *bundles):
            log.info("%s is finished already; delete it or change a setting (seed=1) to train again", folder)
            metrics: dict[str, Any] | None = read_record(folder / "metrics.json")
            remove_leftovers(folder)
        else:
            with working_in(folder):
                metrics = _work(config, parent, folder, bundles)
    if metrics is None:
        return {}
    try:
        _show(metrics, stage, folder)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # of a finished run, changed since
        raise unreadable(folder / "metrics.json") from error
    return metrics


def _work(config: TrainConfig, parent: Parent, folder: Path, bundles: tuple[str, ...]) -> dict[str, Any] | None:
    """Trains in a folder that is locked; None in all but one process of distributed training."""
    if _done(folder, *bundles):  # by another process, just now
        return read_record(folder / "metrics.json")
    for bundle in bundles:
        check_place(folder / bundle)  # not only once it is trained
    if main_process():
        write_config(config, folder)
    return _train(config, config.stage.name, parent, folder)


def _content(config: TrainConfig) -> list[str]:
    """Fingerprints of the texts that decide a run's result: those to train on, and files to judge it on."""
    if is_packed(config.dataset) and config.stage.name.startswith("lm_"):
        return [packed_key(Path(config.dataset.path or ""))]
    main = "train" if config.stage.name == "classifier" else "lm"
    judged = ("valid", "test") if config.stage.name in ("classifier", "all") else ("valid",)
    found = locate(config.dataset)
    return [content_key(config.dataset, split) for split in (main, *judged) if split == main or found.of(split)]


def _done(folder: Path, *bundles: str) -> bool:
    """Whether a run's figures and bundles are all there."""
    return (folder / "metrics.json").is_file() and all(is_bundle(folder / bundle) for bundle in bundles)


def _train(config: TrainConfig, stage: str, parent: Parent, folder: Path) -> dict[str, Any] | None:
    """The figures; None in all but one process of distributed training."""
    # Not at the top: torch and Lightning load only when there is something to train.
    from ulmfit.tasks.inputs import labelled_splits
    from ulmfit.tasks.scoring import write_json
    from ulmfit.tasks.stages import train_classifier, train_language_model
    from ulmfit.training.trainer import check_trainer

    started = time.monotonic()
    check_trainer(config.trainer, config.logger)
    if stage in ("lm_pretrain", "lm_finetune"):
        language_model = train_language_model(config, stage, parent, folder)
        return language_model.metrics if language_model.main else None
    if stage == "classifier":
        classifier = train_classifier(config, parent, folder)
        return classifier.metrics if classifier.main else None
    if _done(folder / "lm", "bundle"):  # an interrupted run that had finished this half
        lm_metrics = read_record(folder / "lm" / "metrics.json")
    else:
        labelled_splits(config)  # a wrong label must not come up after hours of the language model
        first = train_language_model(config, "lm_finetune", parent, folder / "lm")
        lm_metrics = first.metrics
        limit = seconds_of(config.trainer.max_time)  # is for both
        if limit is not None:
            left = duration_of(limit - (time.monotonic() - started))
            config = replace(config, trainer=replace(config.trainer, max_time=left))
    second = train_classifier(config, Parent(folder / "lm" / "bundle", "this run's"), folder / "classifier")
    if not second.main:
        return None
    metrics = {"lm": lm_metrics, **second.metrics, "seconds": lm_metrics["seconds"] + second.metrics["seconds"]}
    write_json(folder / "metrics.json", metrics)
    return metrics


def _show(metrics: dict[str, Any], stage: str, folder: Path) -> None:
    from ulmfit.tasks.scoring import format_report

    language_model = metrics.get("lm", metrics if stage.startswith("lm") else {})
    if "valid_perplexity" in language_model:
        print(f"language model: validation perplexity {language_model['valid_perplexity']:.2f} per piece")
    if "test" in metrics:
        print(format_report(metrics["test"], "test"))
    elif "valid_accuracy" in metrics:
        print(f"validation accuracy {metrics['valid_accuracy']:.1%}")
    bundle = folder / "classifier" / "bundle" if stage == "all" else folder / "bundle"
    print(f"written to {folder}: bundle, metrics.json, plots ({metrics['seconds']:.0f} s)")
    if stage in ("classifier", "all"):
        print(f'try it:  echo "my laptop does not start" | python -m ulmfit predict bundle={bundle}')
    else:
        print(f"next:  python -m ulmfit train stage=classifier init={bundle}")
