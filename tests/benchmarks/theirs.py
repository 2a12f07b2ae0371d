"""fastai's side of each case: what its documentation tells a user to call, with our pieces and weights as its own."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import material
from ours import bundle_of, steps_clock, stop_clock, timed_process, timed_tokens

Settings = dict[str, Any]
Measure = Callable[[], dict[str, Any]]


def import_package(folder: Path, settings: Settings) -> Measure:
    return lambda: timed_process([sys.executable, "-c", "from fastai.text.all import *"])


class Pieces:
    """Our pieces as a tokenizer for fastai, which calls it with texts."""

    def __init__(self, bundle: Path) -> None:
        from ulmfit.text.tokenizer import Tokenizer

        self.tokenizer = Tokenizer.load(bundle)
        # fastai pads with id 1, ours is 0: the first two trade places.
        self.order = [1, 0, *range(2, self.tokenizer.vocab_size)]
        self.vocabulary = [self.tokenizer.pieces[i] for i in self.order]

    def __call__(self, items: Iterable[str]) -> Iterator[list[str]]:
        pieces = self.tokenizer.pieces
        for text in items:
            yield [pieces[self.tokenizer.bos_id], *(pieces[i] for i in self.tokenizer.encode(str(text)))]


def _shape(bundle: Path) -> dict[str, Any]:
    import json

    shape = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["architecture"]
    return {"emb_sz": shape["embedding_dim"], "n_hid": shape["hidden_dim"], "n_layers": shape["num_layers"]}


def _take_weights(model: Any, bundle: Path, order: list[int]) -> None:
    """The bundle's weights in fastai's language model or classifier, by name; a head stays random."""
    import re

    from safetensors.torch import load_file

    encoder = {name: tensor.float() for name, tensor in load_file(bundle / "encoder.safetensors").items()}
    bias = load_file(bundle / "head.safetensors")["bias"].float()
    state = model.state_dict()
    taken = 0
    for name, tensor in state.items():
        bare = re.sub(r"^0\.(module\.)?", "", name)
        layer = re.fullmatch(r"rnns\.(\d)\.(?:module\.)?(\w+?)(?:_raw)?", bare)
        if bare in ("encoder.weight", "encoder_dp.emb.weight", "1.decoder.weight"):
            tensor.copy_(encoder["embedding.weight"][order])
        elif layer:
            tensor.copy_(encoder[f"rnns.{layer[1]}.{layer[2]}"])
        elif bare == "1.decoder.bias":
            tensor.copy_(bias[order])
        else:
            continue
        taken += 1
    assert taken >= 4 * len({name for name in encoder if "weight_ih" in name}) + 2, list(state)
    model.load_state_dict(state)


def tokenise(folder: Path, settings: Settings) -> Measure:
    from fastai.text import all as fastai

    texts = material.articles(folder, settings["their_bytes"])
    size = sum(len(text.encode()) for text in texts) / 1e6
    if settings["their_tokenizer"] == "spacy":
        tokenizer = fastai.WordTokenizer()
    else:
        tokenizer = fastai.SentencePieceTokenizer(
            sp_model=material.SHIPPED / "tokenizer.model", cache_dir=str(folder / "fastai-pieces")
        )

    def measure() -> dict[str, Any]:
        started = time.perf_counter()
        rules, workers = fastai.defaults.text_proc_rules, settings["threads"] if settings["threads"] > 1 else 0
        found = list(fastai.parallel_tokenize(texts, tok=tokenizer, rules=rules, n_workers=workers))
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "work": size, "tokens": sum(len(tokens) for _, tokens in found)}

    return measure


def _lm_datasets(texts: list[str], bundle: Path) -> tuple[Any, Pieces]:
    """fastai's datasets of our pieces; a last, tiny part is for validation, which none of the measurements makes."""
    import pandas
    from fastai.text import all as fastai

    pieces = Pieces(bundle)
    frame = pandas.DataFrame({"text": texts, "valid": [False] * (len(texts) - 1) + [True]})
    block = fastai.DataBlock(
        blocks=fastai.TextBlock.from_df("text", vocab=pieces.vocabulary, is_lm=True, tok=pieces, rules=[]),
        get_x=fastai.ColReader("text"),
        splitter=fastai.ColSplitter("valid"),
    )
    return block.datasets(frame), pieces


def lm_loader(folder: Path, settings: Settings) -> Measure:
    from fastai.text import all as fastai

    datasets, _ = _lm_datasets(material.articles(folder, settings["bytes"]), material.SHIPPED)
    ids = fastai.L([item[0] for item in datasets.train])  # in memory, as numbers
    lengths = [len(document) for document in ids]

    def measure() -> dict[str, Any]:
        started = time.perf_counter()
        loader = fastai.LMDataLoader(
            ids, lens=lengths, bs=settings["batch_size"], seq_len=settings["bptt"], shuffle=True
        )
        batches = sum(1 for _ in loader)
        return {"seconds": time.perf_counter() - started, "work": batches}

    return measure


def _steps_callback(steps: int) -> Any:
    """Ends an epoch after so many steps, and makes no validation."""
    from fastai.text import all as fastai

    class Steps(fastai.Callback):  # type: ignore[name-defined, misc]
        order = 100

        def after_batch(self) -> None:
            if self.training and self.iter + 1 >= steps:
                raise fastai.CancelTrainException

        def before_validate(self) -> None:
            raise fastai.CancelValidException

    return Steps()


def _make_batches(learner: Any, datasets: Any, settings: Settings) -> None:
    """Batches made beforehand: as fast as its loader could be with processes enough."""
    from fastai.text import all as fastai

    ids = fastai.L([item[0] for item in datasets.train])
    size = {"bs": settings["batch_size"], "seq_len": settings["bptt"]}
    ready = list(islice(fastai.LMDataLoader(ids, shuffle=True, num_workers=0, **size), settings["steps"]))

    class Ready(fastai.LMDataLoader):  # type: ignore[name-defined, misc]
        def __iter__(self) -> Iterator[Any]:
            for batch in ready:
                yield fastai.to_device(batch, self.device)

    learner.dls.loaders[0] = Ready(ids, device=learner.dls.device, **size)


def lm_step(folder: Path, settings: Settings) -> Measure:
    import torch
    from fastai.text import all as fastai

    torch.set_num_threads(settings["threads"])
    rows, bptt, steps, bundle = settings["batch_size"], settings["bptt"], settings["steps"], bundle_of(folder, settings)
    texts = material.articles(folder, 10 * rows * bptt * max(32, steps))
    datasets, pieces = _lm_datasets(texts, bundle)
    loaders = datasets.dataloaders(bs=rows, seq_len=bptt, dl_type=fastai.LMDataLoader, val_bs=1)
    config = fastai.awd_lstm_lm_config | _shape(bundle)
    learner = fastai.language_model_learner(
        loaders, fastai.AWD_LSTM, config=config, pretrained=False, path=folder / "fastai", cbs=_steps_callback(steps)
    )
    _take_weights(learner.model, bundle, pieces.order)
    if settings["device"] == "gpu":
        _make_batches(learner, datasets, settings)
    if settings.get("mixed"):
        learner.to_fp16()
    started = steps_clock(learner.model[0], settings)

    def measure() -> dict[str, Any]:
        before = time.perf_counter()
        with learner.no_bar(), learner.no_logging():
            learner.fit_one_cycle(1, 1e-3)
        clock = stop_clock(started(before), settings)
        return {**clock, "work": timed_tokens(settings), "loss": round(float(learner.recorder.losses[-1]), 3)}

    measure()
    return measure


def _classifier(folder: Path, settings: Settings, frame: Any, batch_size: int, max_len: int = 1400) -> Any:
    import torch
    from fastai.text import all as fastai

    torch.set_num_threads(settings["threads"])
    pieces = Pieces(material.SHIPPED)
    block = fastai.DataBlock(
        blocks=(
            fastai.TextBlock.from_df("text", vocab=pieces.vocabulary, seq_len=70, tok=pieces, rules=[]),
            fastai.CategoryBlock,
        ),
        get_x=fastai.ColReader("text"),
        get_y=fastai.ColReader("label"),
        splitter=fastai.ColSplitter("valid"),
    )
    # In this process: with the two that fastai would start, an epoch takes longer.
    loaders = block.dataloaders(frame, bs=batch_size, num_workers=0)
    learner = fastai.text_classifier_learner(
        loaders,
        fastai.AWD_LSTM,
        seq_len=70,
        config=fastai.awd_lstm_clas_config | _shape(material.SHIPPED),
        pretrained=False,
        max_len=max_len,
        metrics=fastai.accuracy,
        path=folder / "fastai",
    )
    _take_weights(learner.model, material.SHIPPED, pieces.order)
    return learner


def _frame(folder: Path, file: str) -> Any:
    import pandas

    rows = material.table(folder, file)
    parts = [{"text": texts, "label": labels, "valid": split == "valid"} for split, (texts, labels) in rows.items()]
    return pandas.concat([pandas.DataFrame(part) for part in parts], ignore_index=True)


def classifier_epoch(folder: Path, settings: Settings) -> Measure:
    frame = _frame(folder, settings["file"])
    learner = _classifier(folder, settings, frame, settings["batch_size"], settings["max_len"])
    texts = int((~frame["valid"]).sum())

    def measure() -> dict[str, Any]:
        started = time.perf_counter()
        with learner.no_bar(), learner.no_logging():
            learner.fit_one_cycle(1, 2e-3)
        clock = stop_clock(started, settings)
        return {**clock, "work": texts, "accuracy": round(float(learner.recorder.values[-1][-1]), 3)}

    with learner.no_bar(), learner.no_logging():
        learner.validate()
    return measure


def _questions(folder: Path, settings: Settings) -> tuple[Any, list[str]]:
    texts = material.questions(folder, settings["texts"])
    return _classifier(folder, settings, _frame(folder, "trec"), 64), texts


def predict_many(folder: Path, settings: Settings) -> Measure:
    learner, texts = _questions(folder, settings)

    def measure() -> dict[str, Any]:
        started = time.perf_counter()
        with learner.no_bar():
            probabilities, _ = learner.get_preds(dl=learner.dls.test_dl(texts))
        return {"seconds": time.perf_counter() - started, "work": len(probabilities)}

    measure()
    return measure


def predict_one(folder: Path, settings: Settings) -> Measure:
    learner, texts = _questions(folder, settings)

    def measure() -> dict[str, Any]:
        started = time.perf_counter()
        with learner.no_bar():
            for text in texts:
                learner.predict(text)
        return {"seconds": time.perf_counter() - started, "work": len(texts)}

    measure()
    return measure


def end_to_end(folder: Path, settings: Settings) -> Measure:
    def measure() -> dict[str, Any]:
        script = Path(__file__).with_name("fastai_recipe.py")
        options = [str(folder), str(settings["threads"]), str(settings["batch_size"])]
        measured = timed_process([sys.executable, str(script), *options])
        error = float(measured.pop("output").strip().splitlines()[-1])
        return {**measured, "test_error": round(error, 2)}

    return measure
