"""Tables of text on a terminal: drawn by rich, or, since that takes a tenth of a millisecond a cell, as plain lines.

Ten thousand rows would take rich more than ten seconds. What is printed is the same, but for styles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from meftbench.escapes import visible
from meftbench.report.console import text_of
from meftbench.report.results import print_table

if TYPE_CHECKING:
    from rich.console import Console

LONG = 300  # rows; below this rich draws a table in less than half a second


@dataclass(frozen=True)
class TextTable:
    """A table without borders: a first column on the left, of which a cell may have several lines, then numbers, which
    are never wrapped, on the right.

    heads: may have several lines.  rows: texts of a row's cells; a row of one cell is a heading of those below it.
    gap: characters between columns.  first_width: of the first column, at least.  least_width: of the whole table.
    caption: below the table; "" for none.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    gap: int
    first_width: int
    least_width: int
    caption: str

    def print(self, out: Console) -> None:
        """Print the table, whatever its length."""
        if len(self.rows) > LONG:
            self.print_lines(out)
        else:
            self.print_drawn(out)

    def print_drawn(self, out: Console) -> None:
        """Print the table as rich draws it."""
        from rich.table import Table

        table = Table(box=None, padding=(0, self.gap, 0, 0), pad_edge=False, show_edge=False)
        table.add_column(self.heads[0], overflow="fold", min_width=self.first_width)
        for head in self.heads[1:]:
            table.add_column(head, justify="right", no_wrap=True)
        for first, *numbers in self.rows:
            table.add_row(text_of(first, style="" if numbers else "italic"), *map(text_of, numbers))
        table.caption = self.caption or None
        print_table(table, out, self.least_width)

    def print_lines(self, out: Console) -> None:
        """Print the table as lines of text."""
        from rich.segment import Segment, Segments

        widths = self._widths(max(out.width, self.least_width))
        gap = " " * self.gap
        # Headings of fewer lines stand at the bottom.
        from_below = zip_longest(*(cell.splitlines()[::-1] for cell in self.heads), fillvalue="")
        lines = [self._line(cells, widths, gap) for cells in from_below][::-1]
        for first, *numbers in self.rows:
            for number, part in enumerate(_folded(first, widths[0])):
                lines.append(self._line([part, *numbers], widths, gap) if number == 0 else part)
        # As one segment: rich would split a Text into its lines and join them again.
        out.print(Segments([Segment("\n".join([*map(visible, lines), ""]))]), soft_wrap=True, end="")
        if self.caption:
            total = sum(widths) + self.gap * (len(widths) - 1)
            out.print(text_of(self.caption, style="dim italic"), width=min(total, out.width), justify="center")

    def _widths(self, room: int) -> list[int]:
        """Characters of each column: of numbers what they need, of the first what it needs or is left for it."""
        numbers = [max(map(len, head.splitlines())) for head in self.heads[1:]]
        first = max(self.first_width, *(len(line) for line in self.heads[0].splitlines()))
        for cell, *others in self.rows:
            first = max(first, *(len(line) for line in cell.split("\n")))
            for index, text in enumerate(others):
                if len(text) > numbers[index]:
                    numbers[index] = len(text)
        left = room - sum(numbers) - self.gap * len(numbers)
        return [max(self.first_width, min(first, left)), *numbers]

    @staticmethod
    def _line(cells: Sequence[str], widths: Sequence[int], gap: str) -> str:
        first, *numbers = cells
        aligned = (text.rjust(width) for text, width in zip(numbers, widths[1:], strict=False))
        return gap.join([first.ljust(widths[0]), *aligned]).rstrip()


def _folded(text: str, width: int) -> Iterator[str]:
    """The lines of a text, those that are longer than `width` characters in pieces."""
    for line in text.split("\n"):
        if len(line) <= width:
            yield line
        else:
            yield from (line[start : start + width] for start in range(0, len(line), width))
