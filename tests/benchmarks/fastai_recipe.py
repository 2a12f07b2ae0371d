"""From CSV to test error with fastai, by the recipe of its text tutorial; prints the error in %.

python fastai_recipe.py FOLDER THREADS BATCH_SIZE reads questions.csv and questions-test.csv.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import material
import pandas
import torch
from fastai.text import all as fastai
from theirs import Pieces, _shape, _take_weights


def main() -> None:
    folder, threads, batch_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    fastai.set_seed(0)
    pieces = Pieces(material.SHIPPED)
    shape = _shape(material.SHIPPED)
    train = pandas.read_csv(folder / "questions.csv")
    test = pandas.read_csv(folder / "questions-test.csv")
    text = {"vocab": pieces.vocabulary, "tok": pieces, "rules": []}
    splitter = fastai.RandomSplitter(0.1, seed=0)
    with tempfile.TemporaryDirectory() as path:
        reading = fastai.DataBlock(
            blocks=fastai.TextBlock.from_df("text", is_lm=True, **text),
            get_x=fastai.ColReader("text"),
            splitter=splitter,
        )
        lm = fastai.language_model_learner(
            reading.dataloaders(train, bs=batch_size),
            fastai.AWD_LSTM,
            config=fastai.awd_lstm_lm_config | shape,
            pretrained=False,
            path=path,
            wd=0.1,
            metrics=[fastai.accuracy, fastai.Perplexity()],
        )
        _take_weights(lm.model, material.SHIPPED, pieces.order)
        lm.freeze()
        with lm.no_bar(), lm.no_logging():
            lm.fit_one_cycle(1, 1e-2)
            lm.unfreeze()
            lm.fit_one_cycle(10, 1e-3)
        lm.save_encoder("finetuned")
        labelling = fastai.DataBlock(
            blocks=(fastai.TextBlock.from_df("text", **text), fastai.CategoryBlock),
            get_x=fastai.ColReader("text"),
            get_y=fastai.ColReader("label"),
            splitter=splitter,
        )
        classifier = fastai.text_classifier_learner(
            labelling.dataloaders(train, bs=batch_size, num_workers=0),
            fastai.AWD_LSTM,
            config=fastai.awd_lstm_clas_config | shape,
            pretrained=False,
            path=path,
            drop_mult=0.5,
            metrics=fastai.accuracy,
        )
        classifier.load_encoder("finetuned")
        with classifier.no_bar(), classifier.no_logging():
            classifier.fit_one_cycle(1, 2e-2)
            classifier.freeze_to(-2)
            classifier.fit_one_cycle(1, slice(1e-2 / (2.6**4), 1e-2))
            classifier.freeze_to(-3)
            classifier.fit_one_cycle(1, slice(5e-3 / (2.6**4), 5e-3))
            classifier.unfreeze()
            classifier.fit_one_cycle(2, slice(1e-3 / (2.6**4), 1e-3))
            probabilities, _ = classifier.get_preds(dl=classifier.dls.test_dl(list(test["text"])))
        classes = list(classifier.dls.vocab[1])
    found = [classes[i] for i in probabilities.argmax(1).tolist()]
    wrong = sum(a != b for a, b in zip(found, test["label"], strict=True))
    print(100 * wrong / len(found))


if __name__ == "__main__":
    main()
