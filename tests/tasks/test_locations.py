"""Which bundle a command takes when it is not told, and what it says of one that it cannot take."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from ulmfit.bundle import CLASSIFIER, LANGUAGE_MODEL
from ulmfit.errors import BundleError, UsageError
from ulmfit.tasks import locations
from ulmfit.tasks.locations import (
    cache_folder,
    choose_parent,
    classifiers_to_use,
    language_model_to_use,
    resolve_bundle,
)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def shipped(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped models that holds a forward one."""
    folder = tmp_path / "pretrained"
    shutil.copytree(trained / "lm" / "bundle", folder / "en-small")
    monkeypatch.setattr(locations, "PRETRAINED", folder)
    return folder / "en-small"


@pytest.fixture
def nothing_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "PRETRAINED", tmp_path / "nothing")


def put(source: Path, target: Path, age: int, **provenance: str) -> Path:
    """A copy of a bundle with another origin, `age` seconds old."""
    shutil.copytree(source, target)
    description = target / "bundle.json"
    content = json.loads(description.read_text())
    content["provenance"] |= provenance
    content["checksums"].pop("bundle.json", None)  # that of the description itself
    description.write_text(json.dumps(content))
    then = 1_700_000_000 - age
    os.utime(description, (then, then))
    return target


def test_order(runs: Path, trained: Path, trained_backward: Path, shipped: Path) -> None:
    lm, backward = trained / "lm" / "bundle", trained_backward / "lm" / "bundle"

    def parent(stage: str, init: str | None = None, direction: str | None = None) -> Path | None:
        return choose_parent(init, stage, runs, "helpdesk", direction).path

    assert parent("classifier") == parent("lm_finetune") == parent("all") == shipped
    put(lm, runs / "other" / "bundle", 0, dataset="other")
    pretrained = put(lm, runs / "pretrained" / "bundle", 1, stage="lm_pretrain")
    assert parent("classifier") == shipped
    assert parent("lm_finetune") == parent("all") == pretrained
    old = put(lm, runs / "old" / "bundle", 50)
    assert parent("classifier") == old
    new = put(lm, runs / "all-1" / "lm" / "bundle", 10)
    assert parent("classifier") == new
    newest = put(backward, runs / "backward" / "bundle", 5)
    assert parent("classifier") == parent("classifier", direction="backward") == newest
    assert parent("classifier", direction="forward") == new
    assert parent("all") == pretrained  # what was fine-tuned already is not fine-tuned again
    assert parent("classifier", str(trained / "lm")) == lm
    for stage in ("lm_pretrain", "lm_finetune", "classifier", "all"):
        assert parent(stage, "scratch") is None
    assert parent("lm_pretrain") is None
    assert choose_parent(None, "classifier", None, "helpdesk", None).path == shipped


@pytest.mark.usefixtures("nothing_ships")
def test_from_scratch_when_there_is_nothing(runs: Path, trained: Path) -> None:
    for direction, said in ((None, "no forward model ships"), ("backward", "no backward model ships")):
        parent = choose_parent(None, "all", runs, "helpdesk", direction)
        assert parent.path is None and said in parent.why
        assert parent.fingerprint == "scratch"


def test_no_backward_model_ships(runs: Path, shipped: Path) -> None:
    assert choose_parent(None, "all", runs, "helpdesk", "backward").path is None


def test_another_direction(runs: Path, trained: Path) -> None:
    with pytest.raises(UsageError, match=r"reads forward, but stage\.lm\.direction=backward"):
        choose_parent(str(trained / "lm"), "classifier", runs, "helpdesk", "backward")


def test_a_half_written_bundle_is_passed_over(runs: Path, trained: Path) -> None:
    good = put(trained / "lm" / "bundle", runs / "a" / "bundle", 10)
    damaged = put(trained / "lm" / "bundle", runs / "b" / "bundle", 0)
    (damaged / "bundle.json").write_text("{")
    put(trained / "lm" / "bundle", runs / "c" / ".bundle.123.partial", 0)
    assert choose_parent(None, "classifier", runs, "helpdesk", None).path == good


def test_names_of_bundles(trained: Path, shipped: Path) -> None:
    lm, classifier = trained / "lm" / "bundle", trained / "classifier" / "bundle"
    for kind, bundle in ((LANGUAGE_MODEL, lm), (CLASSIFIER, classifier)):
        for name in (bundle, bundle.parent, trained):
            assert resolve_bundle(str(name), kind) == bundle
            assert resolve_bundle(str(name), None) == (classifier if name == trained else bundle)
    assert resolve_bundle("en-small", LANGUAGE_MODEL) == shipped


@pytest.mark.usefixtures("shipped")
def test_what_is_no_bundle(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is a language model, expected a classifier"):
        resolve_bundle(str(trained / "lm"), CLASSIFIER)
    with pytest.raises(BundleError, match="is a classifier, expected a language model"):
        resolve_bundle(str(trained / "classifier" / "bundle"), LANGUAGE_MODEL)
    with pytest.raises(BundleError, match=r"holds no bundle\.json"):
        resolve_bundle(str(tmp_path), CLASSIFIER)
    with pytest.raises(BundleError, match=r"no bundle at en-smal,.*did you mean 'en-small'"):
        resolve_bundle("en-smal", LANGUAGE_MODEL)


@pytest.mark.usefixtures("nothing_ships")
def test_newest_for_using(
    trained: Path, runs: Path, trained_backward: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BundleError, match="there is no classifier in"):
        classifiers_to_use([], str(runs))
    with pytest.raises(BundleError, match="there is no language model in"):
        language_model_to_use(None, str(runs))
    assert classifiers_to_use([], str(trained)) == [trained / "classifier" / "bundle"]
    assert "the newest classifier" in capsys.readouterr().err
    put(trained_backward / "lm" / "bundle", runs / "backward" / "bundle", 0)
    lm = put(trained / "lm" / "bundle", runs / "forward" / "bundle", 9)
    assert language_model_to_use(None, str(runs)) == lm  # a backward model cannot write
    both = [str(trained), str(trained_backward)]
    assert classifiers_to_use(both, str(runs)) == [Path(name) / "classifier" / "bundle" for name in both]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("ULMFIT_CACHE", str(tmp_path / "ours"))
    assert cache_folder("given") == Path("given")
    assert cache_folder("") == tmp_path / "ours"
    monkeypatch.delenv("ULMFIT_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder("") == tmp_path / "xdg" / "ulmfit"
