"""`ulmfit find_lr`: the learning-rate range test for a stage, with a plot and a suggestion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ulmfit import plots
from ulmfit.config import FindLRConfig
from ulmfit.errors import UlmfitError
from ulmfit.tasks.locations import choose_parent


def run(config: FindLRConfig) -> dict[str, Any]:
    """Print the suggestion and where the plot is; nothing is trained for good.

    `stage=all` tests its first half, the language model.

    Raises:
        UlmfitError: the loss never fell, so there is nothing to suggest.
    """
    from ulmfit.tasks import inputs
    from ulmfit.tasks.scoring import write_json
    from ulmfit.training import engine
    from ulmfit.training.lr_find import find_lr
    from ulmfit.training.trainer import check_trainer

    check_trainer(config.trainer, config.logger)
    stage = config.stage.name
    parent = choose_parent(config.init, stage, Path(config.runs), config.dataset.name, config.stage.lm.direction)
    limits = (config.trainer, config.start, config.end, config.steps)
    if stage == "classifier":
        labelled = inputs.prepare_classifier(config, parent)
        classifier, documents = engine.classifier_parts(
            labelled.model,
            labelled.train,
            labelled.train_labels,
            None,
            None,
            config.stage.classifier,
            labelled.direction,
            config.seed,
        )
        result = find_lr(classifier, documents, config.stage.classifier, *limits)
    else:
        text = inputs.prepare_language_model(config, parent)
        language_model, streams = engine.language_model_parts(
            text.model, text.train, None, config.stage.lm, text.direction, config.seed
        )
        result = find_lr(language_model, streams, config.stage.lm, *limits)
    folder = Path(config.runs) / config.dataset.name / f"find_lr-{stage}"
    figure = plots.plot_lr_find(result.rates, result.losses, result.suggestion)
    picture = plots.save(figure, folder / "lr_find.png")
    write_json(
        folder / "lr_find.json", {"rates": result.rates, "losses": result.losses, "suggestion": result.suggestion}
    )
    if result.suggestion is None:
        raise UlmfitError(
            f"the loss never fell between {config.start:g} and {config.end:g} in {len(result.rates)} steps, so there "
            f"is no rate to suggest; see {picture} or try other start and end values"
        )
    key = "classifier" if stage == "classifier" else "lm"
    print(f"suggested learning rate {result.suggestion:.2g}:  stage.{key}.optim.lr={result.suggestion:.2g}")
    print(f"plot: {picture}")
    return {"suggestion": result.suggestion, "steps": len(result.rates)}
