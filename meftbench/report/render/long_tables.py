"""Long tables on a terminal: as rich prints them, in a hundredth of the time.

rich measures and wraps each cell of a table anew, a tenth of a millisecond a cell: ten thousand rows take more than ten
seconds. Tables of runs have only numbers that are never wrapped, and a first column that may be folded.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

LONG = 300  # rows; below this rich prints a table in less than half a second


def print_long_table(table: Table, out: Console) -> None:
    """Print a table without borders whose first column is on the left and may have several lines; the others hold one
    line, on the right. The headings, the gaps and the caption are as rich prints them."""
    from rich.text import Text

    gap = " " * table.padding[1]
    columns = [[_texts(cell) for cell in (column.header, *column.cells)] for column in table.columns]
    widths = [max(len(line) for cell in column for line in cell) for column in columns]
    first_width = max(widths[0], table.columns[0].min_width or 0)
    room = out.width - sum(widths[1:]) - len(gap) * len(widths[1:])
    first_width = min(first_width, max(room, 1))
    whole = Text()
    for cells in zip(*columns, strict=True):
        first = [part for line in cells[0] for part in _folded(line, first_width)]
        for lines in zip_longest(first, *cells[1:], fillvalue=""):
            numbers = (line.rjust(width) for line, width in zip(lines[1:], widths[1:], strict=True))
            whole.append(gap.join([lines[0].ljust(first_width), *numbers]).rstrip() + "\n", _style(cells[0]))
    whole.right_crop(1)
    out.print(whole, soft_wrap=True)
    if table.caption:
        total = first_width + sum(widths[1:]) + len(gap) * len(widths[1:])
        out.print(Text(str(table.caption), style="dim italic", justify="center"), width=min(total, out.width))
