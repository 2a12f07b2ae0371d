"""What the package has to say while it works: one plain line each, on standard error."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ulmfit as package
from ulmfit.config import MethodConfig, UnfreezingConfig

if TYPE_CHECKING:
    from .conftest import CommandLine


@pytest.fixture(autouse=True)
def every_warning() -> Iterator[None]:
    """However often it was shown before."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


@pytest.mark.parametrize("code", [0, 1])
def test_the_process_is_left_as_it_was(ulmfit: CommandLine, code: int) -> None:
    def state() -> tuple[Any, ...]:
        logger = logging.getLogger("ulmfit")
        return list(logger.handlers), logger.level, logger.propagate, warnings.showwarning

    def task(config: Any) -> None:
        assert state() != before
        if code:
            raise RuntimeError("no")

    before = state()
    ulmfit.behaviour = task
    assert ulmfit("train") == code
    assert state() == before


def test_our_warning_is_a_plain_line(ulmfit: CommandLine) -> None:
    def too_few_epochs(config: Any) -> None:
        from ulmfit.training.callbacks import method_callbacks

        method_callbacks(MethodConfig(UnfreezingConfig("gradual")), 0.01, 2, 4)

    ulmfit.behaviour = too_few_epochs
    assert ulmfit("train") == 0
    assert ulmfit.err == (
        "unfreezing.mode=gradual does not reach layer groups [0, 1] of 4 in 2 epochs, so they are never trained: "
        "train for more epochs or use unfreezing.mode=full\n"
    )


def test_a_warning_of_others_says_where(ulmfit: CommandLine) -> None:
    ulmfit.behaviour = lambda config: warnings.warn("far away", RuntimeWarning, stacklevel=1)
    assert ulmfit("train") == 0
    assert "test_cli_logging.py" in ulmfit.err and "RuntimeWarning: far away" in ulmfit.err


@pytest.mark.parametrize(("rank", "expected"), [("0", "hello\ncareful\n"), ("1", "careful\n")])
def test_ranks_above_0_only_warn(
    ulmfit: CommandLine, monkeypatch: pytest.MonkeyPatch, rank: str, expected: str
) -> None:
    def talk(config: Any) -> None:
        logging.getLogger("ulmfit.data.sources").info("hello")
        logging.getLogger("ulmfit").warning("careful")

    monkeypatch.setenv("LOCAL_RANK", rank)
    ulmfit.behaviour = talk
    assert ulmfit("train") == 0
    assert ulmfit.err == expected


def test_a_folder_that_only_looks_like_ours(ulmfit: CommandLine) -> None:
    place = str(Path(package.__file__).parent.parent / "ulmfit_plugin" / "x.py")
    ulmfit.behaviour = lambda config: warnings.warn_explicit("theirs", UserWarning, place, 1)
    assert ulmfit("train") == 0
    assert "x.py:1: UserWarning: theirs" in ulmfit.err
