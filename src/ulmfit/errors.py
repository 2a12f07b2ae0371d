"""The errors a user can meet. Each message is one sentence: what was given, what was expected, how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UlmfitError(Exception):
    """A failure while working (exit code 1)."""

    exit_code = 1


class UsageError(UlmfitError):
    """A wrong request: configuration, option, verb (exit code 2)."""

    exit_code = 2


class DataError(UlmfitError):
    """Input files that cannot be used: missing, empty, malformed (exit code 2)."""

    exit_code = 2


class BundleError(DataError):
    """A bundle that is missing, incomplete, of the wrong kind or damaged (exit code 2)."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`'; did you mean X?'` when one of `known` is close to `given`, else the empty string."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
