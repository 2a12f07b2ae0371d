"""The module that starts trainings with several processes, for tests here and in tests/stress."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def launch() -> ModuleType:
    """`launch.py` of this folder."""
    path = Path(__file__).with_name("launch.py")
    spec = importlib.util.spec_from_file_location("launch", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["launch"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module
