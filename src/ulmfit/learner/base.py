"""What both learners share: fastai's verbs over the engine, the history of all fits, bundles."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ulmfit import plots
from ulmfit.bundle import Bundle, BundleInfo, save_bundle
from ulmfit.config import FitConfig, ScheduleConfig, TrainConfig
from ulmfit.errors import NotFinished, UsageError
from ulmfit.interruption import CHECKPOINTS
from ulmfit.learner.plans import Rate, as_frozen, by_method
from ulmfit.learner.text_data import TextData
from ulmfit.nn.models import LanguageModel, TextClassifier
from ulmfit.text.tokenizer import Tokenizer
from ulmfit.training import engine
from ulmfit.training.lr_find import LRFindResult, find_lr
from ulmfit.training.trainer import FitResult, quiet_lightning
from ulmfit.validation import validate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Self = TypeVar("Self", bound="Learner")


class Learner(ABC):
    """A network with its data and what is known of its training. Made by the functions `..._learner`.

    Several fits in a row go on with the same weights. Nothing is written but by `save`, unless `folder` was given:
    then each fit leaves its log there.

    Attributes:
        model: the network, in plain torch.
        tokenizer: turns text into its ids.
        direction: "forward" or "backward".
        config: all settings; `config.stage` holds those that training uses.
        history: (step, value) of every figure logged, over all fits: `train_loss_step`, `valid_loss`, `lr_0`, ...
        metrics: validation figures of the last fit.
    """

    model: LanguageModel | TextClassifier
    title = ""

    def __init__(
        self,
        data: TextData,
        config: TrainConfig,
        tokenizer: Tokenizer,
        direction: str,
        parent: str,
        folder: str | Path | None = None,
    ) -> None:
        self.data = data
        self.config = config
        self.tokenizer = tokenizer
        self.direction = direction
        self.parent = parent
        self.folder = None if folder is None else Path(folder)
        self.history: plots.Series = {}
        self.metrics: dict[str, float] = {}
        self.trained = False  # whether predictions mean something
        self._fits = 0
        self._steps = 0
        self._first_trained = 0  # index of the lowest layer group that `fit` trains

    # ------------------------------------------------------------------------------------------------ training

    def fit(self, epochs: int, lr: Rate = None) -> None:
        """Train at a constant rate those layer groups that are not frozen.

        Args:
            epochs: passes over the training data.
            lr: a number is the rate of every group; `slice(a, b)` goes geometrically from `a` for the lowest group to
                `b` for the highest; `slice(b)` is `b / 10` for all but the highest; None is what the configuration
                says, discriminative rates included.

        Raises:
            UsageError: no epochs, or a rate that is not above 0.
            UlmfitError: the loss is not a number any more.
        """
        self._train(self._planned(epochs, lr, ScheduleConfig("constant")))

    def fit_one_cycle(
        self,
        epochs: int,
        lr_max: Rate = None,
        div: float = 25.0,
        div_final: float = 1e5,
        pct_start: float = 0.25,
        moms: Sequence[float] | None = (0.8, 0.7, 0.8),
    ) -> None:
        """As `fit`, but the rate rises from `lr_max / div` and falls to `lr_max / div_final`, both along a cosine.

        Args:
            pct_start: share of the steps in which it rises.
            moms: Adam's first beta at the start, at the peak and at the end (fastai's values for texts); None leaves
                it as configured.

        Raises:
            UsageError, UlmfitError: as `fit`.
        """
        momentum = None if moms is None else [float(mom) for mom in moms]
        schedule = ScheduleConfig("one_cycle", pct_start=pct_start, div=div, final_div=div_final, momentum=momentum)
        validate(schedule)
        self._train(self._planned(epochs, lr_max, schedule))

    def fine_tune(self, epochs: int | None = None, lr: Rate = None) -> None:
        """Train by the paper's schedule, or whatever `config` says in its place; afterwards nothing is frozen.

        A language model gets discriminative and slanted triangular rates (Howard & Ruder 2018, section 3.2), a
        classifier gradual unfreezing as well (section 3.3), one layer group more in each epoch.

        Args:
            epochs: None is what the configuration says.
            lr: rate of the highest layer group; the lower ones follow, unless a slice says otherwise.

        Raises:
            UsageError, UlmfitError: as `fit`.
        """
        plan = by_method(self._stage, epochs, lr)
        self._first_trained = 0
        self._train(plan)

    def lr_find(self, start: float = 1e-5, end: float = 1.0, steps: int = 100) -> LRFindResult:
        """Try growing rates on all layer groups, then undo it; see `.suggestion` and `.plot()` of the result.

        The rates found are for the highest group, the lower ones' discriminative as in `fine_tune`.

        Raises:
            UsageError: a range that does not grow, or fewer than 10 steps.
        """
        with engine.own_randomness(), quiet_lightning():
            engine.seed_everything(self.config.seed)
            module, data = self._parts(self._stage)
            return find_lr(module, data, self._stage, self.config.trainer, start, end, steps)

    # ------------------------------------------------------------------------------------------------ freezing

    def freeze_to(self, n: int) -> None:
        """Freeze the layer groups below group `n` for the next fits; a negative `n` counts from the top, as in fastai.

        `freeze_to(-2)` trains the two highest groups, `freeze_to(1)` all but the lowest. Groups are, lowest first,
        [embedding, layers..., head] of a classifier and [layers..., embedding and decoder] of a language model.

        Raises:
            UsageError: there is no such group.
        """
        groups = len(self.model.layer_groups())
        if not -groups <= n < groups:
            raise UsageError(f"got freeze_to({n}), expected {-groups} to {groups - 1}: there are {groups} layer groups")
        self._first_trained = n % groups

    def freeze(self) -> None:
        """Train only the highest layer group: `freeze_to(-1)`."""
        self.freeze_to(-1)

    def unfreeze(self) -> None:
        """Train all layer groups: `freeze_to(0)`."""
        self.freeze_to(0)

    # ------------------------------------------------------------------------------------------------ what came of it

    def plot_losses(self) -> Figure:
        """Training and validation loss over all fits.

        Raises:
            UsageError: nothing has been trained yet.
        """
        return plots.plot_losses(self._logged())

    def plot_rates(self) -> Figure:
        """Learning rate of each layer group over all fits.

        Raises:
            UsageError: nothing has been trained yet.
        """
        return plots.plot_rates(self._logged())

    @abstractmethod
    def validate(self, split: str = "valid") -> dict[str, float]:
        """Figures of the network as it is, on a split."""

    @abstractmethod
    def show_results(self, n: int = 5, split: str = "valid") -> None:
        """Display what the network makes of `n` texts of a split."""

    # ------------------------------------------------------------------------------------------------ bundles

    def bundle(self) -> Bundle:
        """The network as a bundle in memory; the weights are not copied."""
        encoder, head = self._weights()
        return Bundle(self._info(), encoder, head, self.tokenizer, Path("this learner"))

    def save(self, path: str | Path, half: bool = False) -> Path:
        """Write a bundle: the folder that `ulmfit.load` and the command line take.

        Args:
            half: weights as float16, half the size.

        Raises:
            BundleError: `path` holds something else than a bundle.
        """
        encoder, head = self._weights()
        return save_bundle(path, self._info(), encoder, head, self.tokenizer, half)

    def save_encoder(self, path: str | Path) -> Path:
        """The same as `save`: a bundle is what `load_encoder` takes the encoder from."""
        return self.save(path)

    @abstractmethod
    def load(self: Self, path: str | Path) -> Self:
        """Go on from a bundle of the same kind; its architecture, tokenizer and direction replace the learner's."""

    @abstractmethod
    def load_encoder(self: Self, path: str | Path) -> Self:
        """Take encoder, tokenizer and direction from a bundle of either kind; then freeze, as fastai does."""

    # ------------------------------------------------------------------------------------------------ for subclasses

    @property
    @abstractmethod
    def _stage(self) -> FitConfig:
        """The section of `config` that training uses."""

    @abstractmethod
    def _parts(self, config: FitConfig) -> tuple[Any, Any]:
        """Lightning module and data, without validation."""

    @abstractmethod
    def _fit(self, config: FitConfig, seed: int, folder: Path, title: str) -> FitResult:
        """Call the engine."""

    @abstractmethod
    def _info(self) -> BundleInfo: ...

    @abstractmethod
    def _weights(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """State of encoder and head."""

    def _provenance(self, stage: str, size: int) -> dict[str, Any]:
        return engine.provenance(stage, self.data.name, self.parent, size, self._steps, self.config.seed)

    def _warn_if_untrained(self) -> None:
        if not self.trained:
            warnings.warn(
                "nothing has been trained yet, so this is guesswork; call fine_tune first", UserWarning, stacklevel=3
            )

    def _planned(self, epochs: int, lr: Rate, schedule: ScheduleConfig) -> FitConfig:
        return as_frozen(self._stage, epochs, lr, schedule, self._first_trained, len(self.model.layer_groups()))

    def _train(self, config: FitConfig) -> None:
        groups = len(self.model.layer_groups())
        title = self.title
        if self._first_trained:
            title += f", {groups - self._first_trained} of {groups} layer groups (unfreeze() trains all)"
        seed = self.config.seed + self._fits  # not the same order and dropout again in a second fit
        self._fits += 1
        with self._fit_folder() as folder, engine.own_randomness():
            try:
                result = self._fit(config, seed, folder, title)
                self.metrics = result.metrics
            except NotFinished as end:
                warnings.warn(f"{end}; the network has the weights of that moment", UserWarning, stacklevel=3)
            finally:  # also when it is interrupted: the network then has the weights of that moment
                self.trained = True
                self._record(plots.read_history(folder))
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)

    def _record(self, logged: plots.Series) -> None:
        for name, points in logged.items():
            self.history.setdefault(name, []).extend((step + self._steps, value) for step, value in points)
        self._steps += max((points[-1][0] + 1 for points in logged.values() if points), default=0)

    def _logged(self) -> plots.Series:
        if not self.history:
            raise UsageError("nothing has been trained yet, so there is nothing to plot; call fine_tune or fit first")
        return self.history

    @contextmanager
    def _fit_folder(self) -> Iterator[Path]:
        """Where a fit keeps its log and best weights."""
        if self.folder is None:
            with tempfile.TemporaryDirectory(prefix="ulmfit-") as folder:
                yield Path(folder)
            return
        number = 1
        while (self.folder / f"fit-{number}").exists():  # a fit does not resume another
            number += 1
        folder_of_fit = self.folder / f"fit-{number}"
        folder_of_fit.mkdir(parents=True)
        yield folder_of_fit
