"""The two stages as the command line runs them: texts to caches, weights from a parent, training, bundle, plots."""

from __future__ import annotations

import logging
import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ulmfit import plots
from ulmfit.bundle import save_bundle
from ulmfit.config import LMConfig, TrainConfig
from ulmfit.data.tables import Splits
from ulmfit.inference import Predictor
from ulmfit.interruption import CHECKPOINTS
from ulmfit.tasks.inputs import LMInputs, prepare_classifier, prepare_language_model
from ulmfit.tasks.locations import Parent, directed_name, model_name, models_folder
from ulmfit.tasks.reading import ReadingProgress
from ulmfit.tasks.run_folder import read_record
from ulmfit.tasks.scoring import classification_report, stored, write_json
from ulmfit.training import clock, engine
from ulmfit.training.checkpoints import Beside, recovery_path
from ulmfit.training.processes import wait_for_all

log = logging.getLogger("ulmfit")
PLAN = "plan.json"  # beside a checkpoint: what was planned for the time given


@dataclass
class StageResult:
    """The bundle written and its figures; `main` is false in all but one process of distributed training."""

    bundle: Path
    metrics: dict[str, Any]
    main: bool = True


def train_language_model(config: TrainConfig, stage: str, parent: Parent, folder: Path) -> StageResult:
    """lm_pretrain or lm_finetune: writes `folder/bundle`, `folder/metrics.json` and the plots."""
    started = time.monotonic()
    beside = folder / CHECKPOINTS
    given = prepare_language_model(config, parent, beside / "tokenizer")
    lm = _planned(config, given, folder)

    def keep() -> None:
        given.tokenizer.save(beside / "tokenizer")
        write_json(beside / PLAN, {"max_steps": lm.max_steps, "epochs": lm.epochs})

    result = engine.fit_language_model(
        given.model,
        given.train,
        given.valid,
        lm,
        given.direction,
        config.seed,
        config.trainer,
        config.logger,
        folder,
        stage,
        [Beside(keep)],
    )
    started -= result.earlier
    target = folder / "bundle"
    if not result.main:
        wait_for_all()  # until rank 0 has written the bundle
        return StageResult(target, {}, main=False)
    provenance = engine.provenance(
        stage, given.dataset, parent_name(parent), len(given.train.tokens), result.steps, config.seed
    )
    if given.licence:
        provenance["licence"] = given.licence
    places = [target]
    if config.publish:
        name = directed_name(config.publish, given.direction)
        provenance = {"name": name, **provenance}
        places.append(models_folder() / name)
    if given.valid is not None and given.valid.characters and "valid_loss" in result.metrics:
        bits = result.metrics["valid_loss"] * (len(given.valid.tokens) - 1) / math.log(2)
        result.metrics["valid_bits_per_character"] = bits / (given.valid.characters + len(given.valid))
    info = engine.language_model_info(given.model, given.direction, provenance, result.metrics)
    encoder, decoder = given.model.encoder.state_dict(), given.model.decoder.state_dict()
    for place in places:
        save_bundle(place, info, encoder, decoder, given.tokenizer, lm.half, lm.shard_mib)
    if config.publish:
        log.info("also written to %s: init=%s starts from it", places[-1], places[-1].name)
    finished = _finish(folder, StageResult(target, dict(result.metrics)), started)
    wait_for_all()
    return finished


def _planned(config: TrainConfig, given: LMInputs, folder: Path) -> LMConfig:
    """The stage's settings; against the clock with the steps that fit, which a resumed run finds again."""
    lm = config.stage.lm
    if lm.minutes is None:
        return lm
    plan = folder / CHECKPOINTS / PLAN
    if recovery_path(folder).is_file() and plan.is_file():
        record = read_record(plan)
        return replace(lm, max_steps=record.get("max_steps"), epochs=record.get("epochs", 1), minutes=None)
    planned = clock.plan(
        lm.minutes, given.model, given.train, given.valid, lm, given.direction, config.seed, config.trainer
    )
    log.info("%g minutes are enough for %d steps here, epochs begun: %d", lm.minutes, planned.max_steps, planned.epochs)
    return planned


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
    started -= result.earlier
    target = folder / "bundle"
    if not result.main:
        wait_for_all()  # until rank 0 has written the bundle
        return StageResult(target, {}, main=False)
    provenance = engine.provenance(
        "classifier", config.dataset.name, parent_name(parent), len(given.train_labels), result.steps, config.seed
    )
    if given.licence:
        provenance["licence"] = given.licence
    model = given.model
    info = engine.classifier_info(model, given.direction, given.classes, provenance, result.metrics)
    save_bundle(
        target,
        info,
        model.encoder.state_dict(),
        model.head.state_dict(),
        given.tokenizer,
        config.stage.classifier.half,
        config.stage.classifier.shard_mib,
    )
    metrics: dict[str, Any] = dict(result.metrics)
    metrics |= _test_figures(target, given.splits, given.classes, folder, config.trainer.enable_progress_bar)
    finished = _finish(folder, StageResult(target, metrics), started)
    wait_for_all()
    return finished


def _test_figures(bundle: Path, splits: Splits, classes: list[str], folder: Path, shown: bool) -> dict[str, Any]:
    if splits.test is None or splits.test.labels is None:
        return {}
    texts = splits.test.texts
    probabilities = Predictor([bundle]).probabilities(texts, progress=ReadingProgress(texts, shown))
    report = classification_report(probabilities, splits.test.label_ids(classes), classes)
    plots.save(plots.plot_confusion(report["confusion"], classes), folder / "confusion_matrix.png")
    return {"test": stored(report)}


def _finish(folder: Path, result: StageResult, started: float) -> StageResult:
    history = plots.read_history(folder)
    if history:
        plots.save(plots.plot_losses(history), folder / "loss.png")
        plots.save(plots.plot_rates(history), folder / "learning_rates.png")
    result.metrics["seconds"] = round(time.monotonic() - started, 1)
    write_json(folder / "metrics.json", result.metrics)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # only needed to resume
    return result


def parent_name(parent: Parent) -> str:
    """How a bundle made from `parent` refers to it."""
    if parent.path is None:
        return "scratch"
    return model_name(parent.path) or str(parent.path)
