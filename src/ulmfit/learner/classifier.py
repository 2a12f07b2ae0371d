"""The classifier's learner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ulmfit import plots
from ulmfit.bundle import CLASSIFIER, BundleInfo, load_bundle
from ulmfit.config import ClassifierConfig, FitConfig, TrainConfig
from ulmfit.data.cache import TokenCache
from ulmfit.errors import BundleError, UsageError
from ulmfit.inference import Prediction, Predictor, Probabilities
from ulmfit.learner import display
from ulmfit.learner.base import Learner
from ulmfit.learner.loading import find_bundle
from ulmfit.learner.text_data import TextData
from ulmfit.nn.build import language_model_from, new_text_classifier, text_classifier_from
from ulmfit.nn.models import TextClassifier
from ulmfit.tasks.locations import resolve_bundle
from ulmfit.tasks.scoring import classification_report, format_report
from ulmfit.text.tokenizer import Tokenizer
from ulmfit.training import engine
from ulmfit.training.trainer import FitResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = ("accuracy", "error", "macro_f1", "log_loss", "documents")


@dataclass(frozen=True)
class TopLoss:
    """A text that the classifier gets most wrong: its label, what was predicted instead, and how sure it was.

    Attributes:
        probability: of the true label.
        loss: minus its logarithm, in nats.
    """

    text: str
    label: str
    predicted: str
    probability: float
    loss: float


class TextClassifierLearner(Learner):
    """A classifier in training; see `Learner` for the verbs and `text_classifier_learner` to make one.

    Attributes:
        classes: the labels in the order of all probabilities.
    """

    model: TextClassifier
    title = "classifier"

    def __init__(
        self,
        data: TextData,
        config: TrainConfig,
        tokenizer: Tokenizer,
        direction: str,
        parent: str,
        folder: str | Path | None = None,
    ) -> None:
        super().__init__(data, config, tokenizer, direction, parent, folder)
        self.classes = data.classes
        self._caches: dict[str, TokenCache] = {}

    # ------------------------------------------------------------------------------------------------ predictions

    def predict(self, text: str) -> Prediction:
        """Label and probabilities of one text. Warns when nothing was trained yet."""
        if not isinstance(text, str):
            raise UsageError(f"predict got a {type(text).__name__}, expected one text; use predict_many for several")
        self._warn_if_untrained()
        return self._predictor().predict_one(text)

    def predict_many(self, texts: Sequence[str]) -> list[Prediction]:
        """Labels and probabilities of several texts. Warns when nothing was trained yet."""
        self._warn_if_untrained()
        return self._predictor().predict(_several(texts))

    def get_preds(self, texts: str | Sequence[str] = "valid") -> tuple[Probabilities, npt.NDArray[np.int64] | None]:
        """Probabilities (N, C) in the order of `classes`, and the true classes (N,) where they are known.

        Args:
            texts: name of a split, or the texts themselves.

        Raises:
            UsageError: no such split.
            DataError: a label that is none of the classes.
        """
        self._warn_if_untrained()
        if not isinstance(texts, str):
            return self._predictor().probabilities(_several(texts)), None
        table = self.data.table(texts)
        labels = None if table.labels is None else np.array(table.label_ids(self.classes), dtype=np.int64)
        return self._predictor().probabilities(table.texts), labels

    def validate(self, split: str = "valid") -> dict[str, float]:
        """Accuracy, error, macro F1 and mean log loss on a split.

        Raises:
            UsageError: no such split.
            DataError: it has no labels, or one that is none of the classes.
        """
        report = self._report(split)
        return {name: report[name] for name in FIGURES}

    def print_report(self, split: str = "valid") -> None:
        """Print precision, recall and F1 of each class on a split."""
        print(format_report(self._report(split), split))

    def plot_confusion(self, split: str = "valid") -> Figure:
        """Counts by true and predicted class on a split."""
        return plots.plot_confusion(self._report(split)["confusion"], self.classes)

    def top_losses(self, k: int = 5, split: str = "valid") -> list[TopLoss]:
        """The `k` texts of a split whose true label has the lowest probability, worst first."""
        table = self.data.table(split)
        labels = table.label_ids(self.classes)
        probabilities = self._predictor().probabilities(table.texts)
        true = probabilities[np.arange(len(labels)), labels]
        return [
            TopLoss(
                table.texts[i],
                self.classes[labels[i]],
                self.classes[int(probabilities[i].argmax())],
                float(true[i]),
                float(-np.log(max(true[i], 1e-12))),
            )
            for i in np.argsort(true, kind="stable")[:k]
        ]

    def plot_top_losses(self, k: int = 5, split: str = "valid") -> None:
        """Display `top_losses` as a table."""
        rows = [(top.text, top.label, top.predicted, top.probability, top.loss) for top in self.top_losses(k, split)]
        display.show(display.Table(["text", "label", "predicted", "probability of the label", "loss"], rows))

    def show_results(self, n: int = 5, split: str = "valid") -> None:
        """Display `n` texts of a split, drawn at random by the seed, with label and prediction."""
        table = self.data.table(split)
        chosen = sorted(np.random.default_rng(self.config.seed).permutation(len(table))[:n])
        part = table.take([int(i) for i in chosen])
        predictions = self._predictor().predict(part.texts)
        labels = part.labels or [""] * len(part)
        rows = [
            (text, label, found.label, found.probability)
            for text, label, found in zip(part.texts, labels, predictions, strict=True)
        ]
        display.show(display.Table(["text", "label", "predicted", "probability"], rows))

    # ------------------------------------------------------------------------------------------------ bundles

    def load(self, path: str | Path) -> TextClassifierLearner:
        """Go on from the bundle of a classifier, whose tokenizer, direction and order of labels replace the learner's.

        Raises:
            BundleError: no classifier there, or one with other labels.
        """
        bundle = load_bundle(resolve_bundle(str(path), CLASSIFIER))
        if sorted(bundle.info.labels) != sorted(self.classes):
            raise BundleError(
                f"{path} has the labels {', '.join(bundle.info.labels)}, the data has {', '.join(self.classes)}; "
                "load a classifier for the same labels"
            )
        self.model = text_classifier_from(bundle)
        self.classes = list(bundle.info.labels)
        self._adopt(bundle.tokenizer, bundle.info.direction, str(path))
        self._first_trained = 0
        self.trained = True
        return self

    def load_encoder(self, path: str | Path) -> TextClassifierLearner:
        """Take encoder, tokenizer and direction from a bundle of either kind; then only the head trains, as in fastai.

        The head stays as it is if it fits the encoder's width, else it is a new one.

        Raises:
            BundleError: no bundle there.
        """
        bundle = load_bundle(find_bundle(path))
        encoder = language_model_from(bundle).encoder
        settings = self.config.stage.classifier
        if encoder.architecture.embedding_dim == self.model.encoder.architecture.embedding_dim:
            self.model = TextClassifier(encoder, self.model.head, settings.bptt, settings.max_len)
        else:
            with engine.own_randomness():
                engine.seed_everything(self.config.seed)
                self.model = new_text_classifier(encoder, len(self.classes), settings)
            self.trained = False
        self._adopt(bundle.tokenizer, bundle.info.direction, str(path))
        self.freeze()
        return self

    def _adopt(self, tokenizer: Tokenizer, direction: str, parent: str) -> None:
        self.tokenizer, self.direction, self.parent = tokenizer, direction, parent
        self._caches = {}

    # ------------------------------------------------------------------------------------------------ the engine

    def _predictor(self) -> Predictor:
        return Predictor([self.bundle()], models=[self.model])

    def _report(self, split: str) -> dict[str, Any]:
        table = self.data.table(split)
        labels = table.label_ids(self.classes)
        return classification_report(self._predictor().probabilities(table.texts), labels, self.classes)

    @property
    def _stage(self) -> ClassifierConfig:
        return self.config.stage.classifier

    def _tokens(self, split: str) -> TokenCache:
        if split not in self._caches:
            texts = self.data.table(split).texts
            self._caches[split] = TokenCache.from_texts(texts, self.tokenizer, torch.get_num_threads())
        return self._caches[split]

    def _documents(self, seed: int) -> TokenCache | Callable[[int], TokenCache]:
        alpha = self.config.tokenizer.sampling_alpha
        if alpha > 0:
            return engine.training_documents(self.data.table("train").texts, self.tokenizer, alpha, seed)
        return self._tokens("train")

    def _labels(self, split: str) -> list[int]:
        return self.data.table(split).label_ids(self.classes)

    def _parts(self, config: FitConfig) -> tuple[Any, Any]:
        assert isinstance(config, ClassifierConfig)
        seed = self.config.seed
        return engine.classifier_parts(
            self.model, self._documents(seed), self._labels("train"), None, None, config, self.direction, seed
        )

    def _fit(self, config: FitConfig, seed: int, folder: Path, title: str) -> FitResult:
        assert isinstance(config, ClassifierConfig)
        judged = self.data.has("valid")
        return engine.fit_classifier(
            self.model,
            self._documents(seed),
            self._labels("train"),
            self._tokens("valid") if judged else None,
            self._labels("valid") if judged else None,
            config,
            self.direction,
            seed,
            self.config.trainer,
            self.config.logger,
            folder,
            title,
        )

    def _info(self) -> BundleInfo:
        provenance = self._provenance("classifier", len(self.data.table("train")))
        return engine.classifier_info(self.model, self.direction, self.classes, provenance, dict(self.metrics))

    def _weights(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.model.encoder.state_dict(), self.model.head.state_dict()

    def __repr__(self) -> str:
        return f"TextClassifierLearner({self.data!r}, from {self.parent}, {self.direction}, {self._fits} fits)"


def _several(texts: Sequence[str]) -> list[str]:
    """Texts as a list.

    Raises:
        UsageError: one text, or something else than texts.
    """
    wrong = type(texts).__name__ if isinstance(texts, str) else None
    listed = [] if wrong else list(texts)
    wrong = wrong or next((type(text).__name__ for text in listed if not isinstance(text, str)), None)
    if wrong:
        raise UsageError(f"got a {wrong}, expected a list of texts; use predict for one text")
    return listed
