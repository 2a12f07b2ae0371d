"""Where bundles and caches are: the newest in the runs folder, those with a name, the user's cache folder.

A model has a name if it ships with the package, or lies in `models/`: that of the working directory, of the repository,
or the folder that $ULMFIT_MODELS names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ulmfit.bundle import CLASSIFIER, LANGUAGE_MODEL, BundleInfo, is_bundle, read_info
from ulmfit.errors import BundleError, UsageError, did_you_mean
from ulmfit.native import user_cache

PRETRAINED = Path(__file__).parent.parent / "pretrained"
REPOSITORY_MODELS = Path(__file__).resolve().parents[3] / "models"
SCRATCH = "scratch"


@dataclass(frozen=True)
class Parent:
    """The bundle a stage starts from (None: random weights) and why it was taken, for the user."""

    path: Path | None
    why: str

    @property
    def fingerprint(self) -> str:
        """Changes with the weights: part of a run's identity."""
        if self.path is None:
            return SCRATCH
        info = read_info(self.path)
        return "".join(info.checksums.get(name, "") for name in info.encoder_files)


def choose_parent(init: str | None, stage: str, runs: Path | None, dataset: str, direction: str | None) -> Parent:
    """Where a stage starts: `init`, else the newest bundle of the stage before on this data set, else what ships.

    Without `runs` no earlier runs are looked at.

    Raises:
        BundleError: `init` is neither a bundle, nor a run folder with one, nor the name of a model.
        UsageError: `init` reads in another direction.
    """
    if init == SCRATCH or (init is None and stage == "lm_pretrain"):
        return Parent(None, "from scratch")
    if init is not None:
        path = resolve_bundle(_reading(init, direction), LANGUAGE_MODEL)
        reads = read_info(path).direction
        if direction not in (None, reads):
            raise UsageError(
                f"{path} reads {reads}, but stage.lm.direction={direction}; choose another init, or init=scratch"
            )
        return Parent(path, "as init says")
    before = {"classifier": ("lm_finetune", "all"), "lm_finetune": ("lm_pretrain",), "all": ("lm_pretrain",)}[stage]
    for path, info in newest_bundles(runs, LANGUAGE_MODEL) if runs is not None else ():
        same_data = info.provenance.get("dataset") == dataset
        if same_data and info.provenance.get("stage") in before and direction in (None, info.direction):
            return Parent(path, f"the newest language model for {dataset}")
    shipped = shipped_model(direction or "forward")
    if shipped is not None:
        return Parent(shipped, "the shipped model")
    return Parent(None, f"from scratch: no {direction or 'forward'} model ships with this version")


def shipped_model(direction: str = "forward") -> Path | None:
    """The pre-trained model that comes with the package, for one direction."""
    for path in sorted(PRETRAINED.glob("*")):
        if is_bundle(path) and read_info(path).direction == direction:
            return path
    return None


def models_folder() -> Path:
    """Where models get a name: $ULMFIT_MODELS, else `models` in the working directory."""
    return Path(os.environ.get("ULMFIT_MODELS") or "models")


def directed_name(name: str, direction: str) -> str:
    """The name of the model of a pair that reads in `direction`: `en-small`, `en-small-backward`."""
    return name if direction == "forward" else f"{name}-{direction}"


def _named(name: str) -> list[Path]:
    """The folders in which a model of this name may lie."""
    if len(Path(name).parts) != 1:
        return []
    return [folder / name for folder in (PRETRAINED, models_folder(), REPOSITORY_MODELS)]


def model_name(path: Path) -> str | None:
    """The name under which a bundle can be asked for, if it has one; elsewhere the same path may not exist."""
    return path.name if path in _named(path.name) else None


def _reading(name: str, direction: str | None) -> str:
    """`name`, or that of the other model of a pair where only it reads in `direction`."""
    other = directed_name(name, direction or "forward")
    if other == name or Path(name).exists():
        return name
    return other if any(map(is_bundle, _named(other))) else name


def resolve_bundle(name: str, kind: str | None) -> Path:
    """A bundle's folder from a path to it, to a run folder that holds one, or a model's name.

    Args:
        kind: None takes any, in a run folder with both the classifier.

    Raises:
        BundleError: nothing there, or of another kind.
    """
    path = Path(name)
    candidates = (path, path / "bundle", *sorted(path.glob("*/bundle")), *_named(name))
    found = [candidate for candidate in candidates if is_bundle(candidate)]
    for candidate in found:
        if kind is None or read_info(candidate).kind == kind:
            return candidate
    if found or path.is_dir():
        read_info(found[0] if found else path, kind)  # says what is wrong with it
    folders = {path.parent for path in _named("any")}
    known = sorted({p.name for folder in folders for p in folder.glob("*") if is_bundle(p)})
    raise BundleError(
        f"no bundle at {name}, expected a folder written by 'ulmfit train'"
        + (f" or one of the models {', '.join(known)}" if known else "")
        + did_you_mean(name, known)
    )


def newest_bundles(runs: Path, kind: str) -> Iterator[tuple[Path, BundleInfo]]:
    """Readable bundles of a kind below `runs`, newest first."""
    found = [path.parent for path in runs.rglob("bundle.json") if not path.parent.name.startswith(".")]
    for path in sorted(found, key=lambda p: (p / "bundle.json").stat().st_mtime, reverse=True):
        try:
            yield path, read_info(path, kind)
        except BundleError:
            continue


def classifiers_to_use(given: list[str], runs: str) -> list[Path]:
    """The classifiers named, or the newest one.

    Raises:
        BundleError: none named and none trained yet.
    """
    if given:
        return [resolve_bundle(name, CLASSIFIER) for name in given]
    for path, _ in newest_bundles(Path(runs), CLASSIFIER):
        print(f"Using {path} (the newest classifier in {runs})", file=sys.stderr)
        return [path]
    raise BundleError(
        f"there is no classifier in {runs} yet; make one with 'ulmfit train', or name one with bundle=PATH"
    )


def language_model_to_use(given: str | None, runs: str) -> Path:
    """The language model named, else the newest, else the shipped one."""
    if given:
        return resolve_bundle(given, LANGUAGE_MODEL)
    for path, info in newest_bundles(Path(runs), LANGUAGE_MODEL):
        if info.direction == "forward":
            print(f"Using {path} (the newest language model in {runs})", file=sys.stderr)
            return path
    shipped = shipped_model()
    if shipped is None:
        raise BundleError(f"there is no language model in {runs} yet; make one with 'ulmfit train stage=lm_finetune'")
    return shipped


def cache_folder(given: str) -> Path:
    """For token caches: as configured, else $ULMFIT_CACHE, else the user's cache folder."""
    return Path(given) if given else user_cache()
