"""The scikit-learn estimator, with and without scikit-learn."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import ulmfit
from ulmfit.errors import DataError, UsageError

FRUIT = ["a red apple from the tree", "sweet pears and apples", "the orchard is full of plums", "ripe cherries"]
SEA = ["the ship left the harbour", "waves hit the old boat", "sailors fear the storm", "a whale near the coast"]
TEXTS = [f"{text} {i}" for i in range(12) for text in (*FRUIT, *SEA)]
LABELS = [7, 7, 7, 7, 10, 10, 10, 10] * 12
PARAMETERS: dict[str, Any] = {
    "init": "scratch",
    "model": "tiny",
    "lm_epochs": 1,
    "epochs": 12,
    "lr": 0.02,
    "config": (
        "trainer=cpu",
        "trainer.threads=1",
        "tokenizer.vocab_size=350",
        "stage.classifier.batch_size=8",
        "stage.classifier.dropout.multiplier=0",
        "stage.lm.batch_size=4",
        "callbacks@stage.classifier.method=[full,uniform,stlr]",
    ),
}


@pytest.fixture(scope="module")
def fitted() -> ulmfit.UlmfitClassifier:
    return ulmfit.UlmfitClassifier(**PARAMETERS).fit(TEXTS, LABELS)


def test_learns_and_gives_labels_back_as_they_were(fitted: ulmfit.UlmfitClassifier) -> None:
    assert fitted.classes_.tolist() == [7, 10]  # as text, 10 sorts before 7
    probabilities = fitted.predict_proba(["a basket of apples and cherries", "the boat in the storm"])
    assert probabilities.shape == (2, 2)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert probabilities.argmax(1).tolist() == [0, 1]
    predicted = fitted.predict(TEXTS)
    assert predicted.dtype == np.asarray(LABELS).dtype
    assert fitted.score(TEXTS, LABELS) == np.mean(predicted == LABELS) > 0.95


def test_same_seed_same_predictions(fitted: ulmfit.UlmfitClassifier) -> None:
    again = ulmfit.UlmfitClassifier(**PARAMETERS).fit(np.array(TEXTS), np.array(LABELS)[:, None])
    np.testing.assert_array_equal(again.predict_proba(TEXTS[:5]), fitted.predict_proba(TEXTS[:5]))


def test_parameters() -> None:
    model = ulmfit.UlmfitClassifier(epochs=3)
    assert model.get_params()["epochs"] == 3
    assert model.set_params(epochs=4, lr=0.1) is model
    assert repr(model) == "UlmfitClassifier(epochs=4, lr=0.1)"
    with pytest.raises(UsageError, match=r"no parameter 'epoch'.*did you mean 'epochs'"):
        model.set_params(epoch=4)


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (TEXTS, LABELS[1:], "96 texts and 95 labels"),
        (TEXTS, [1] * 96, "needs two classes"),
        ("one text", LABELS, "put it in"),
        ([1, 2, 3], [1, 2, 3], "row 1 is a int, expected a text"),
        (np.array([TEXTS, TEXTS]).T, LABELS, "expected one text a row"),
        (TEXTS[:3], ["a", "b", None], "row 3 of the labels has no label"),
        (TEXTS[:2], np.array(["a", 1], dtype=object), "of several types"),
        (TEXTS[:2], ["a ", "a"], "not all different"),
    ],
)
def test_wrong_data(texts: Any, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ulmfit.UlmfitClassifier(**PARAMETERS).fit(texts, labels)


def test_before_fit() -> None:
    with pytest.raises(UsageError, match="not fitted yet"):
        ulmfit.UlmfitClassifier().predict(["a"])


def test_within_scikit_learn(fitted: ulmfit.UlmfitClassifier) -> None:
    base = pytest.importorskip("sklearn.base")
    model_selection = pytest.importorskip("sklearn.model_selection")
    pipeline = pytest.importorskip("sklearn.pipeline")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    validation = pytest.importorskip("sklearn.utils.validation")
    clone = base.clone(fitted)
    assert clone.get_params() == fitted.get_params()
    assert not hasattr(clone, "learner_")
    assert base.is_classifier(fitted)
    validation.check_is_fitted(fitted)
    lower = preprocessing.FunctionTransformer(lambda texts: [text.lower() for text in texts])
    steps = pipeline.make_pipeline(lower, base.clone(fitted).set_params(epochs=2, lm_epochs=0))
    steps.fit(TEXTS, LABELS)
    assert set(steps.predict(["APPLES"])) <= {7, 10}
    quick = base.clone(fitted).set_params(epochs=4, lm_epochs=0)
    scores = model_selection.cross_val_score(quick, np.array(TEXTS), np.array(LABELS), cv=2, scoring="neg_log_loss")
    assert scores.shape == (2,)
    assert np.isfinite(scores).all()


def test_scikit_learn_is_not_needed() -> None:
    code = "import sys; sys.modules['sklearn'] = None; import ulmfit; m = ulmfit.UlmfitClassifier(epochs=1); print(m)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "UlmfitClassifier(epochs=1)\n"
