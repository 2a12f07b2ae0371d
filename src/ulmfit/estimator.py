"""`UlmfitClassifier`: both stages behind scikit-learn's conventions; scikit-learn itself is not needed."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ulmfit.config import ModelConfig, TrainConfig
from ulmfit.data.rows import clean_label
from ulmfit.errors import DataError, UsageError, did_you_mean
from ulmfit.learner.classifier import TextClassifierLearner
from ulmfit.learner.factories import language_model_learner, text_classifier_learner
from ulmfit.learner.text_data import TextData


class UlmfitClassifier:
    """Fine-tunes a language model on the texts, then a classifier on it.

        model = UlmfitClassifier().fit(texts, labels)
        model.predict_proba(["A wonderful film"])  # (1, C), columns as in model.classes_

    It may stand in a `Pipeline`, be cloned and cross-validated: parameters are kept as given, everything learnt ends
    in an underscore, labels of any type come back as that type.

    Args:
        init: language model to start from: folder of a bundle, name of a shipped model, or "scratch"; None is the
            shipped model.
        lm_epochs: epochs of the language model; None is what the configuration says, 0 leaves it as it is.
        epochs: epochs of the classifier; None is what the configuration says.
        lm_lr, lr: highest learning rates of the two; None is what the configuration says.
        direction: "forward" or "backward"; None is what `init` reads.
        model: from scratch: the shape, or the name of one.
        valid_fraction: share of the training texts by which the best weights are chosen; 0 keeps the last.
        config: words that `ulmfit train` would take, or a whole `TrainConfig`.
        random_state: seed.
        progress: whether to report on standard error while training.

    Attributes:
        classes_: (C,) the labels, sorted as `numpy.unique` does.
        learner_: the classifier's learner, with `save`, `plot_losses` and the rest.
    """

    _estimator_type = "classifier"  # scikit-learn before 1.6

    classes_: npt.NDArray[Any]
    learner_: TextClassifierLearner

    def __init__(
        self,
        init: str | Path | None = None,
        lm_epochs: int | None = None,
        epochs: int | None = None,
        lm_lr: float | None = None,
        lr: float | None = None,
        direction: str | None = None,
        model: str | ModelConfig | None = None,
        valid_fraction: float = 0.1,
        config: TrainConfig | Sequence[str] = (),
        random_state: int = 0,
        progress: bool = False,
    ) -> None:
        self.init = init
        self.lm_epochs = lm_epochs
        self.epochs = epochs
        self.lm_lr = lm_lr
        self.lr = lr
        self.direction = direction
        self.model = model
        self.valid_fraction = valid_fraction
        self.config = config
        self.random_state = random_state
        self.progress = progress

    def fit(self, X: Iterable[str], y: Iterable[Any], unlabelled: Iterable[str] | None = None) -> UlmfitClassifier:
        """Train on texts `X` with labels `y`, both (N,).

        Args:
            unlabelled: more texts of the same kind, for the language model.

        Raises:
            DataError: another number of labels than texts, an empty label, only one class, no texts.
            UsageError: a parameter that cannot be used.
        """
        labels = np.asarray(y if isinstance(y, np.ndarray) else list(y))
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels.ravel()
        if labels.ndim != 1:
            raise DataError(f"got labels of shape {labels.shape}, expected one label for each text: (N,)")
        rows = [clean_label(label, f"row {row} of the labels") for row, label in enumerate(labels.tolist(), 1)]
        try:
            classes, first = np.unique(labels, return_index=True)
        except TypeError as error:
            raise DataError("the labels are of several types, expected all of one, such as all text") from error
        names = [rows[i] for i in first]
        if len(set(names)) < len(names):
            raise DataError(f"the labels {', '.join(map(repr, classes.tolist()))} are not all different as text")
        data = TextData.from_lists(
            _texts(X),
            rows,
            unlabelled=unlabelled,
            valid_fraction=self.valid_fraction,
            seed=self.random_state,
        )
        shared: dict[str, Any] = {"seed": self.random_state, "config": self.config, "progress": self.progress}
        shared |= {"model": self.model, "direction": self.direction}
        init: Any = self.init
        if self.lm_epochs != 0:
            init = language_model_learner(data, init, **shared)
            init.fine_tune(self.lm_epochs, self.lm_lr)
        learner = text_classifier_learner(data, init, **shared)
        learner.fine_tune(self.epochs, self.lr)
        self.classes_, self.learner_ = classes, learner
        self._order = [learner.classes.index(name) for name in names]
        return self

    def predict_proba(self, X: Iterable[str]) -> npt.NDArray[np.float32]:
        """(N, C) probabilities, columns in the order of `classes_`.

        Raises:
            UsageError: not fitted yet.
        """
        if not hasattr(self, "learner_"):
            raise UsageError("this UlmfitClassifier is not fitted yet, expected fit(texts, labels) before predictions")
        probabilities, _ = self.learner_.get_preds(_texts(X))
        return probabilities[:, self._order]

    def predict(self, X: Iterable[str]) -> npt.NDArray[Any]:
        """(N,) the most probable labels, of the type that `fit` was given."""
        probabilities = self.predict_proba(X)
        best: npt.NDArray[Any] = self.classes_[probabilities.argmax(1)]
        return best

    def score(self, X: Iterable[str], y: Iterable[Any]) -> float:
        """Accuracy: the share of texts whose predicted label is the one in `y`."""
        return float(np.mean(self.predict(X) == np.asarray(y if isinstance(y, np.ndarray) else list(y))))

    # ------------------------------------------------------------------------------------- scikit-learn's protocol

    @classmethod
    def _parameters(cls) -> list[str]:
        return sorted(name for name in inspect.signature(cls.__init__).parameters if name != "self")

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name; `deep` changes nothing, none of them is an estimator."""
        return {name: getattr(self, name) for name in self._parameters()}

    def set_params(self, **params: Any) -> UlmfitClassifier:
        """Change parameters.

        Raises:
            UsageError: an unknown name.
        """
        known = self._parameters()
        for name, value in params.items():
            if name not in known:
                raise UsageError(
                    f"UlmfitClassifier has no parameter '{name}', expected one of {', '.join(known)}"
                    + did_you_mean(name, known)
                )
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(one_d_array=True, two_d_array=False, string=True),
            non_deterministic=False,
        )

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "learner_")

    def __repr__(self) -> str:
        defaults = {name: p.default for name, p in inspect.signature(type(self)).parameters.items()}
        given = (f"{name}={value!r}" for name, value in self.get_params().items() if value != defaults[name])
        return f"UlmfitClassifier({', '.join(given)})"


def _texts(X: Iterable[str]) -> list[str]:
    """A column of texts as a list.

    Raises:
        DataError: several columns, a single text, or an element that is not a text.
    """
    shape = getattr(X, "shape", None)
    if shape is not None and len(shape) == 2 and shape[1] == 1:
        X = np.asarray(X).ravel()
    elif shape is not None and len(shape) != 1:
        raise DataError(f"got texts of shape {tuple(shape)}, expected one text a row: (N,)")
    if isinstance(X, str):
        raise DataError("a single text was given where a list of texts is expected; put it in [ ]")
    texts = list(X)
    for row, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise DataError(f"row {row} is a {type(text).__name__}, expected a text")
    return [str(text) for text in texts]
