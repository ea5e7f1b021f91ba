"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from opsd.errors import printable


def markdown_table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Return a table that ends in a newline, the cells with control characters and `|` escaped."""
    lines = [[printable(cell).replace("|", "\\|") for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
