"""The long tests (`make stress`), and the table of what they measured, printed at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS = pytest.StashKey[list[tuple[str, str]]]()


class Table:
    """Collects one row for each figure that a test has measured."""

    def __init__(self, rows: list[tuple[str, str]]) -> None:
        self._rows = rows

    def add(self, name: str, figure: str) -> None:
        """For example `add("kills survived / tried: classifier", "67 / 67")`."""
        self._rows.append((name, figure))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.hookimpl(tryfirst=True)  # before the markers select
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.stress)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    width = max(len(name) for name, _ in rows)
    terminalreporter.section("stress")
    for name, figure in rows:
        terminalreporter.write_line(f"{name:<{width}}  {figure}")


@pytest.fixture
def table(pytestconfig: pytest.Config) -> Table:
    """Where a stress test puts its figures: `table.add(name, figure)`."""
    return Table(pytestconfig.stash[ROWS])
