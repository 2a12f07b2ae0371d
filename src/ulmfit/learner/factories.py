"""The functions that make learners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ulmfit.config import ModelConfig
from ulmfit.errors import UsageError
from ulmfit.learner.classifier import TextClassifierLearner
from ulmfit.learner.language_model import LanguageModelLearner
from ulmfit.learner.settings import Config, Init, starting_bundle, tokenizer_for, train_config
from ulmfit.learner.text_data import TextData
from ulmfit.nn.build import language_model_from, new_text_classifier
from ulmfit.tasks import stages
from ulmfit.training import engine


def language_model_learner(
    data: TextData,
    init: Init = None,
    *,
    direction: str | None = None,
    model: str | ModelConfig | None = None,
    drop_mult: float | None = None,
    seed: int | None = None,
    config: Config = (),
    folder: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> LanguageModelLearner:
    """A learner that adapts a language model to the texts of `data`, labels unseen.

        lm = language_model_learner(data, batch_size=16)
        lm.fine_tune(epochs=3)

    Args:
        init: where the weights come from: the folder of a bundle, a bundle, another learner, the name of a shipped
            model, or "scratch"; None is the shipped model. It decides the architecture and, unless
            `vocabulary="train"`, the tokenizer. What is pre-trained starts frozen below the highest layer group, as
            in fastai, which matters to `fit` and `fit_one_cycle`.
        direction: "forward" or "backward"; None is what `init` reads.
        model: from scratch: the shape, or the name of one (awd_lstm_base, awd_lstm_small, tiny).
        drop_mult: multiplies all five dropouts.
        seed: of weights, order and dropout; the same seed gives the same network.
        config: words that `ulmfit train` would take, such as "tokenizer.vocab_size=4000", or a whole `TrainConfig`.
        folder: where fits leave their logs; None: nowhere.
        progress: whether to report on standard error while training.
        settings: any field of `config.LMConfig`, such as `batch_size`, `bptt`, `epochs`, `vocabulary`.

    Raises:
        UsageError: an unknown setting or a wrong value.
        BundleError: `init` is no language model.
        DataError: there is too little text.
    """
    given = train_config(data, "lm", config, model, direction, drop_mult, seed, progress, settings)
    bundle, parent = starting_bundle(init if init is not None else given.init, "lm_finetune", data, direction)
    tokenizer = tokenizer_for(data, given, bundle)
    reads = given.stage.lm.direction or (bundle.info.direction if bundle else "forward")
    learner = LanguageModelLearner(data, given, tokenizer, reads, parent, folder)
    with engine.own_randomness():
        engine.seed_everything(given.seed)
        if bundle is None:
            learner.model = engine.new_language_model(given.model, tokenizer, learner.tokens("lm"))
        else:
            learner.model, transfer = engine.language_model_for(bundle, tokenizer)
            learner.trained = True
            learner.freeze()
            if transfer is not None:
                stages.log.info("vocabulary: %s", transfer)
    return learner


def text_classifier_learner(
    data: TextData,
    init: Init = None,
    *,
    direction: str | None = None,
    model: str | ModelConfig | None = None,
    drop_mult: float | None = None,
    seed: int | None = None,
    config: Config = (),
    folder: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> TextClassifierLearner:
    """A learner that classifies the texts of `data`, on the encoder of a language model.

        clf = text_classifier_learner(data, init=lm, max_len=400)
        clf.fine_tune()

    Args:
        init: the language model: its learner, the folder of a bundle, a bundle, the name of a shipped model, or
            "scratch"; None is the shipped model. It decides architecture, tokenizer and direction. With a pre-trained
            encoder only the head trains at first, as in fastai: `fit` and `fit_one_cycle` need `freeze_to` or
            `unfreeze` to reach further, `fine_tune` does not.
        direction: "forward" or "backward", for the shipped model and from scratch.
        model, drop_mult, seed, config, folder, progress: as for `language_model_learner`.
        settings: any field of `config.ClassifierConfig`, such as `batch_size`, `max_len`, `epochs`, `class_weights`.

    Raises:
        DataError: `data` has no labels.
        UsageError: an unknown setting, a wrong value, or another direction than that of `init`.
        BundleError: `init` is no language model.
    """
    given = train_config(data, "classifier", config, model, direction, drop_mult, seed, progress, settings)
    classes = data.classes
    bundle, parent = starting_bundle(init if init is not None else given.init, "classifier", data, direction)
    reads = bundle.info.direction if bundle else given.stage.lm.direction or "forward"
    if direction not in (None, reads):
        raise UsageError(
            f"got direction='{direction}' with a language model that reads {reads}; leave direction out, "
            f"or give init a {direction} language model"
        )
    tokenizer = bundle.tokenizer if bundle else tokenizer_for(data, given, None)
    learner = TextClassifierLearner(data, given, tokenizer, reads, parent, folder)
    with engine.own_randomness():
        engine.seed_everything(given.seed)
        language_model = language_model_from(bundle) if bundle else engine.new_language_model(given.model, tokenizer)
        engine.seed_everything(given.seed)
        learner.model = new_text_classifier(language_model.encoder, len(classes), given.stage.classifier)
    if bundle is not None:
        learner.freeze()
    return learner
