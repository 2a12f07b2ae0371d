"""Pre-training as `docs/pretraining.md` describes it: packed, against the clock, published, gone on with elsewhere."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from ulmfit.bundle import LANGUAGE_MODEL, load_bundle, read_info
from ulmfit.config import LMConfig, TrainConfig, TrainerConfig
from ulmfit.data.cache import TokenCache
from ulmfit.errors import BundleError, DataError, UsageError
from ulmfit.hydra_config import load_config
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.models import LanguageModel
from ulmfit.shards import is_shard
from ulmfit.tasks import evaluate, inspect, pack, report, train
from ulmfit.tasks.locations import choose_parent, resolve_bundle
from ulmfit.text.tokenizer import Tokenizer
from ulmfit.training import clock
from ulmfit.training.lm import LMModule

pytestmark = pytest.mark.usefixtures("no_pictures")
Settings = Callable[..., TrainConfig]
WORDS = ["river", "city", "the", "a", "of", "was", "built", "known", "in", "north", "bridge", "music", "year", "and"]


def articles(path: Path, number: int = 60) -> Path:
    rng = random.Random(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = (f"= {rng.choice(WORDS)} {i} =\n{' '.join(rng.choices(WORDS, k=150))}.\n" for i in range(number))
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ULMFIT_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


@pytest.fixture
def packed(tmp_path: Path, caches: Path) -> Path:
    text = articles(tmp_path / "articles.txt")
    words = ["experiment=pretrain_en_base", "dataset=wikipedia", f"dataset.path={text}", "dataset.valid_fraction=0.2"]
    words += ["tokenizer.vocab_size=340", f"output={tmp_path / 'packed'}", f"cache={caches}"]
    pack.run(load_config("pack", words))
    return tmp_path / "packed"


def against_the_clock(packed: Path, folder: Path, *more: str) -> TrainConfig:
    """The documented command, for a CPU and two seconds."""
    words = ["experiment=pretrain_en_base", "dataset=packed", f"dataset.path={packed}", "model=tiny", "trainer=cpu"]
    words += ["trainer.threads=1", "trainer.enable_progress_bar=false", "stage.lm.minutes=0.03"]
    words += [
        "stage.lm.batch_size=8",
        "stage.lm.valid_every=20",
        f"runs={folder / 'runs'}",
        f"cache={folder / 'cache'}",
    ]
    config = load_config("train", [*words, *more])
    assert isinstance(config, TrainConfig)
    return config


def test_packed_text_to_a_pair_of_models(
    packed: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for direction in ("forward", "backward"):
        metrics = train.run(against_the_clock(packed, tmp_path, f"stage.lm.direction={direction}"))
        assert metrics["valid_loss"] > 0
    for name, direction in (("en-base", "forward"), ("en-base-backward", "backward")):
        bundle = load_bundle(models / name, LANGUAGE_MODEL)
        assert bundle.info.direction == direction
        assert bundle.info.provenance["name"] == name
        assert bundle.info.provenance["steps"] >= 1
        assert bundle.info.provenance["dataset"] == "articles"  # whose text was packed
        assert bundle.info.provenance["licence"] == "CC BY-SA 3.0, as the text"
        assert any(is_shard(path.name) for path in bundle.path.iterdir())
        card = (models / name / "README.md").read_text()
        assert card.startswith(f"# {name}\n")
        assert "| licence | CC BY-SA 3.0, as the text |" in card
        assert "| valid bits per character |" in card
        assert resolve_bundle(name, LANGUAGE_MODEL) == models / name
        parent = choose_parent("en-base", "lm_finetune", None, "x", direction)
        assert parent.path == models / name  # the one of the pair that reads so
    assert choose_parent("en-base", "lm_finetune", None, "x", None).path == models / "en-base"
    with pytest.raises(BundleError, match=r"no bundle at en-bas,.* did you mean 'en-base'"):
        resolve_bundle("en-bas", LANGUAGE_MODEL)
    text = f"dataset.path={tmp_path / 'articles.txt'}"
    figures = evaluate.run(
        load_config(
            "evaluate", ["bundle=en-base", "dataset=wikipedia", text, "dataset.valid_fraction=0.2", "split=valid"]
        )
    )
    trained = read_info(models / "en-base").metrics["valid_bits_per_character"]
    assert figures["bits_per_character"] == pytest.approx(trained, rel=0.02)  # less the tokens that fill no row
    capsys.readouterr()
    report.run(load_config("report", [f"runs={tmp_path / 'runs'}"]))
    assert "bits_per_character" in capsys.readouterr().out


def test_only_pre_training_reads_packed_tokens(packed: Path, tmp_path: Path) -> None:
    for config in (
        against_the_clock(packed, tmp_path, "stage=classifier", "publish=null"),
        against_the_clock(packed, tmp_path, "stage=all"),
    ):
        with pytest.raises(DataError, match="holds no text, so only stage=lm_pretrain reads it"):
            train.run(config)
    with pytest.raises(DataError, match="holds no text"):
        inspect.run(load_config("inspect", ["dataset=packed", f"dataset.path={packed}"]))
    assert not (tmp_path / "runs").exists()


def test_packing_anew_needs_another_folder(packed: Path) -> None:
    with pytest.raises(DataError, match="holds something already"):
        pack.run(load_config("pack", ["experiment=pretrain_en_base", f"output={packed}"]))


def test_publishing_is_for_language_models() -> None:
    with pytest.raises(UsageError, match="publish=mine is for language models"):
        train.run(load_config("train", ["stage=classifier", "publish=mine"]))
    with pytest.raises(UsageError, match="publish=a/b: expected the name of a folder"):
        load_config("train", ["publish=a/b"])
    with pytest.raises(UsageError, match=r"stage\.lm\.minutes=1.*: expected null, because max_steps=5"):
        load_config("train", ["stage.lm.minutes=1", "stage.lm.max_steps=5"])


# ------------------------------------------------------------------------------------------------ the plan


@pytest.fixture
def each_look_takes_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = count()
    monkeypatch.setattr(clock, "_now", lambda: float(next(seconds)))


def plan(minutes: float, valid: bool = False, **settings: Any) -> LMConfig:
    cache = TokenCache.from_documents([[2, *range(3, 40)] * 40 for _ in range(40)], 40)
    model = LanguageModel(AWDLSTM(Architecture(40, 4, 4, 1)))
    config = LMConfig(batch_size=8, bptt=20, random_bptt=False, minutes=minutes, **settings)
    trainer = TrainerConfig(accelerator="cpu", devices=1, precision="32-true", enable_progress_bar=False)
    return clock.plan(minutes, model, cache, cache if valid else None, config, "forward", 0, trainer)


@pytest.mark.usefixtures("each_look_takes_a_second")
def test_the_steps_that_fit() -> None:
    """At a second a batch, ten minutes less 3 % and half a minute of measuring are 550 batches."""
    planned = plan(10)
    assert planned.max_steps == 582 - 32
    assert planned.epochs == 2  # of 380 batches
    assert planned.minutes is None
    assert plan(100).max_steps == 97 * 60 - 62  # never more than a minute goes into measuring
    assert plan(0.001).max_steps == 1


@pytest.mark.usefixtures("each_look_takes_a_second")
def test_what_validation_and_accumulation_cost() -> None:
    planned = plan(10)
    assert planned.max_steps is not None
    accumulating = planned.optim.__class__(accumulate=2)
    assert plan(10, optim=accumulating).max_steps == planned.max_steps // 2
    validated = plan(10, valid=True, valid_every=5).max_steps  # 20 of 380 batches take 1 s, so 19 s each 5 steps
    assert validated == int((582 - 32 - 19) / (1 + 19 / 5))


def test_planning_leaves_the_network_alone() -> None:
    import torch

    model = LanguageModel(AWDLSTM(Architecture(40, 4, 4, 1)))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    cache = TokenCache.from_documents([[2, *range(3, 40)] * 40 for _ in range(40)], 40)
    state = torch.get_rng_state()
    clock.plan(
        0.005, model, cache, None, LMConfig(batch_size=8), "forward", 0, TrainerConfig(accelerator="cpu", devices=1)
    )
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------ another machine


class Gone(Exception):
    """The machine went away."""


@pytest.fixture
def goes_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the training fail at a step."""
    step = LMModule.training_step

    def at(number: int) -> None:
        def training_step(self: LMModule, batch: Any, batch_idx: int) -> Any:
            if self.trainer.global_step == number:
                raise Gone
            return step(self, batch, batch_idx)

        monkeypatch.setattr(LMModule, "training_step", training_step)

    return at


def test_resumed_on_another_machine(
    settings: Settings, tmp_path: Path, goes_away: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run folder alone is carried over: the text lies elsewhere, the cache is empty, the tokenizer comes along."""

    def config(machine: str, **more: Any) -> TrainConfig:
        return settings(
            "lm_pretrain",
            init="scratch",
            dataset__name="wiki",
            dataset__path=str(tmp_path / machine / "articles.txt"),
            dataset__format="wikipedia",
            dataset__limit=None,
            runs=str(tmp_path / machine / "runs"),
            cache=str(tmp_path / machine / "cache"),
            trainer__checkpoint_minutes=1e-6,
            **more,
        )

    articles(tmp_path / "a" / "articles.txt")
    whole = train.run(config("a"))
    (tmp_path / "a" / "runs").rename(tmp_path / "whole")
    goes_away(17)
    with pytest.raises(Gone):
        train.run(config("a"))

    goes_away(-1)
    shutil.copytree(tmp_path / "a" / "runs", tmp_path / "b" / "runs")
    articles(tmp_path / "b" / "articles.txt")
    shutil.rmtree(tmp_path / "a")

    def learnt_again(*_: Any, **__: Any) -> Tokenizer:
        raise AssertionError("the run has its tokenizer already")

    monkeypatch.setattr(Tokenizer, "train", learnt_again)
    resumed = train.run(config("b"))
    assert resumed["valid_loss"] == whole["valid_loss"]
    files = [read_info(path).checksums["encoder.safetensors"] for path in tmp_path.glob("*/**/bundle")]
    assert len(files) == 2 and len(set(files)) == 1
    (folder,) = (tmp_path / "b" / "runs" / "wiki").iterdir()
    assert not (folder / "checkpoints").exists()


def test_the_plan_outlives_an_interruption(
    packed: Path, models: Path, tmp_path: Path, goes_away: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = against_the_clock(packed, tmp_path, "trainer.checkpoint_minutes=0.000001")
    measured = clock.plan

    def twelve_steps(*given: Any) -> LMConfig:
        planned = measured(*given)
        planned.max_steps = 12
        return planned

    monkeypatch.setattr(clock, "plan", twelve_steps)
    monkeypatch.setattr(clock, "_LONGEST", 0.01)
    goes_away(7)
    with pytest.raises(Gone):
        train.run(config)
    goes_away(-1)
    monkeypatch.setattr(clock, "plan", None)  # nothing is measured again
    train.run(config)
    assert read_info(models / "en-base").provenance["steps"] == 12
