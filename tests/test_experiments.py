"""Every experiment under `conf/` trains: one step of each stage, on a little data in the form that it expects."""

from __future__ import annotations

import bz2
import csv
import io
import random
from pathlib import Path
from typing import Any

import pytest

from ulmfit.bundle import read_info
from ulmfit.conf_files import conf_dir
from ulmfit.config import DatasetConfig, TrainConfig
from ulmfit.hydra_config import load_config
from ulmfit.tasks import train

FOLDER = conf_dir() / "experiment"
EXPERIMENTS = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))
CLASSES = {"ag_news": 4, "dbpedia14": 14, "gnad10": 9, "imdb": 2, "trec6": 6, "yelp_full": 5, "yelp_polarity": 2}
LETTERS = "abcdefghijklmnopqrstuvwxyz"

SMALL = [
    "model=tiny",
    "trainer=cpu",
    "trainer.threads=1",
    "trainer.enable_progress_bar=false",
    "tokenizer.vocab_size=330",
    "stage.lm.max_steps=1",
    "stage.lm.minutes=null",
    "stage.lm.bptt=20",
    "stage.classifier.max_steps=1",
]


def words(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices(LETTERS, k=rng.randint(2, 7))) for _ in range(count))


def table(classes: int, rows: int, columns: list[str], label: str) -> str:
    rng = random.Random(rows)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*columns, label])
    writer.writerows([*(words(rng, 8) for _ in columns), f"class {i % classes}"] for i in range(rows))
    return text.getvalue()


def articles(count: int) -> str:
    rng = random.Random(count)
    return "\n".join(f"= {words(rng, 2)} =\n{words(rng, 60)}\n" for _ in range(count))


def write_data(config: DatasetConfig, folder: Path) -> None:
    """Files of the names, columns and classes that a data set's configuration speaks of."""
    folder.mkdir()
    rows = {"train": 240, "valid": 40, "test": 40, "unlabelled": 20}
    for split, count in rows.items():
        name = getattr(config, split)
        if not name:
            continue
        if config.format == "wikipedia":
            content = articles(count // 4)
        elif split == "unlabelled":
            content = "\n".join(words(random.Random(i), 9) for i in range(count))
        else:
            content = table(CLASSES[config.name], count, config.text, config.label)
        data = content.encode()
        (folder / name.replace("*", "0")).write_bytes(bz2.compress(data) if name.endswith(".bz2") else data)


def settings(name: str, tmp_path: Path, caches: Path) -> TrainConfig:
    config = load_config("train", [f"experiment={name}", *SMALL])
    assert isinstance(config, TrainConfig)
    config.init = "scratch"
    config.runs, config.cache = str(tmp_path / "runs"), str(caches)
    if config.dataset.path is None:
        config.dataset.limit = 60
    else:
        config.dataset.path = str(tmp_path / "data")
        write_data(config.dataset, tmp_path / "data")
    return config


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.filterwarnings("ignore:.*does not reach layer groups:UserWarning")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_one_step_of_each_stage(name: str, tmp_path: Path, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULMFIT_DATA", str(tmp_path))
    monkeypatch.setenv("ULMFIT_MODELS", str(tmp_path / "models"))
    config = settings(name, tmp_path, caches)
    metrics: dict[str, Any] = train.run(config)
    (folder,) = (tmp_path / "runs").glob("*/*")
    assert (tmp_path / "models").exists() == (config.publish is not None)
    bundles = {path.parent: read_info(path.parent) for path in folder.rglob("bundle.json")}
    assert len(bundles) == (2 if config.stage.name == "all" else 1)
    assert {info.provenance["steps"] for info in bundles.values()} == {1}
    if config.stage.name in ("classifier", "all"):
        (labels,) = [info.labels for info in bundles.values() if info.kind == "classifier"]
        assert len(labels) == CLASSES.get(config.dataset.name, 6)
        assert metrics["valid_loss"] > 0
    else:
        assert metrics["valid_perplexity"] > 1
