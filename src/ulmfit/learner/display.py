"""Tables for people: HTML in a notebook, plain text elsewhere."""

from __future__ import annotations

import html
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

_CELL_CHARS = 400
_LINE_CHARS = 70


class Table:
    """Rows under headings; long cells are cut."""

    def __init__(self, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.headings = list(headings)
        self.rows = [[_short(cell) for cell in row] for row in rows]

    def __repr__(self) -> str:
        blocks = []
        width = max(len(heading) for heading in self.headings)
        for row in self.rows:
            lines = []
            for heading, cell in zip(self.headings, row, strict=True):
                wrapped = textwrap.wrap(cell, _LINE_CHARS) or [""]
                lines += [
                    f"{name:<{width}}  {line}" for name, line in zip([heading] + [""] * 99, wrapped, strict=False)
                ]
            blocks.append("\n".join(line.rstrip() for line in lines))
        return "\n\n".join(blocks)

    def _repr_html_(self) -> str:
        style = "text-align: left; vertical-align: top; white-space: pre-wrap"
        head = "".join(f'<th style="{style}">{html.escape(heading)}</th>' for heading in self.headings)
        rows = (
            "<tr>" + "".join(f'<td style="{style}">{html.escape(cell)}</td>' for cell in row) + "</tr>"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def show(table: Table) -> None:
    """Display a table where the user looks: in the notebook, else on standard output."""
    ipython = sys.modules.get("IPython")  # never imported for this
    if ipython is not None and ipython.get_ipython() is not None:
        ipython.display.display(table)
    else:
        print(table)


def _short(cell: Any) -> str:
    text = f"{cell:.3f}" if isinstance(cell, float) else str(cell)
    return text if len(text) <= _CELL_CHARS else text[: _CELL_CHARS - 1].rstrip() + "…"
