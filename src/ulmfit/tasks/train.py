"""`ulmfit train`: one stage, or language model and classifier one after the other."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ulmfit.config import TrainConfig
from ulmfit.data.sources import content_key
from ulmfit.tasks.locations import Parent, choose_parent
from ulmfit.tasks.run_folder import kept_if_used, run_folder, write_config

log = logging.getLogger("ulmfit")


def run(config: TrainConfig) -> dict[str, Any]:
    """Train, write the run folder, print the outcome; returns the figures of `metrics.json`.

    A finished run with the same configuration, data and parent is not repeated: its figures are returned.
    """
    stage = config.stage.name
    parent = choose_parent(config.init, stage, Path(config.runs), config.dataset.name, config.stage.lm.direction)
    data = content_key(config.dataset, "train" if stage == "classifier" else "lm")
    folder = run_folder(config, parent.fingerprint, data)
    finished = folder / "metrics.json"
    if finished.is_file():
        log.info("%s is finished already; delete it or change a setting (seed=1) to train again", folder)
        metrics: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
        _show(metrics, stage, folder)
        return metrics
    with kept_if_used(folder):
        write_config(config, folder)
        outcome = _train(config, stage, parent, folder)
    if outcome is None:
        return {}
    _show(outcome, stage, folder)
    return outcome


def _train(config: TrainConfig, stage: str, parent: Parent, folder: Path) -> dict[str, Any] | None:
    """The figures; None in the helper processes of distributed training."""
    # Not at the top: torch and Lightning load only when there is something to train.
    from ulmfit.tasks.scoring import write_json
    from ulmfit.tasks.stages import labelled_splits, train_classifier, train_language_model
    from ulmfit.training.trainer import check_trainer

    check_trainer(config.trainer, config.logger)
    if stage in ("lm_pretrain", "lm_finetune"):
        language_model = train_language_model(config, stage, parent, folder)
        return language_model.metrics if language_model.main else None
    if stage == "classifier":
        classifier = train_classifier(config, parent, folder)
        return classifier.metrics if classifier.main else None
    done = folder / "lm" / "metrics.json"
    if done.is_file():  # an interrupted run that had finished this half
        lm_metrics = json.loads(done.read_text(encoding="utf-8"))
    else:
        labelled_splits(config)  # a wrong label must not come up after hours of the language model
        first = train_language_model(config, "lm_finetune", parent, folder / "lm")
        lm_metrics = first.metrics
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
