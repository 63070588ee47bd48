"""A figure with what it shows in words and in numbers, saved as the same PNG and SVG on every machine."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from meftbench.records.store import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True)
class Picture:
    """A figure, drawn when it is asked for.

    name: of the files, without ending.  alt: what it shows, for readers who cannot see it.  data: the numbers that it
    shows, a row for each cell and panel; None: they are elsewhere.
    """

    name: str
    title: str
    alt: str = field(repr=False)
    draw: Callable[[], Figure] = field(repr=False)
    data: DataFrame | None = field(default=None, repr=False)

    @cached_property
    def figure(self) -> Figure:
        return self.draw()

    @cached_property
    def png(self) -> bytes:
        """The figure as PNG; the same on every machine and day."""
        return _saved(self.figure, "png", self.name)

    def is_drawn_as(self, png: bytes) -> None:
        """Take the PNG that another process drew of this picture."""
        self.__dict__["png"] = png

    def svg(self) -> str:
        """The figure as SVG text; the same on every machine and day."""
        return _saved(self.figure, "svg", self.name).decode()

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        return self.png

    def write(self, folder: Path) -> None:
        """NAME.png and NAME.svg in `folder`, each in full or not at all. Raises OSError: one cannot be written."""
        replace_file(folder / f"{self.name}.svg", self.svg().encode())
        replace_file(folder / f"{self.name}.png", self.png)


def _saved(figure: Figure, kind: str, salt: str) -> bytes:
    from matplotlib import rc_context

    stream = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with rc_context({"svg.hashsalt": salt, "svg.fonttype": "path", "font.size": 9}):
        figure.savefig(stream, format=kind, dpi=130, metadata=metadata)
    return stream.getvalue()
