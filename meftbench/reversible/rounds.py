"""Loops whose rounds do the same with other rows of the same number, such as over the tiles of a stream.

A trace without values, which asks only for what each round allocates, may leave out all but the first rounds: it is
told how many, and what one of them allocated (prediction/loops.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby
from typing import Any, Protocol

RUN = 7  # rounds in a row that a trace runs: the first may differ, and some must be alike for the others to be known


class Leaving(Protocol):
    """Who wants rounds to be left out."""

    def round_begins(self) -> Any:
        """The last round that is run begins. What this returns is given to `left_out`."""

    def left_out(self, rounds: int, begun: Any) -> None:
        """That round has ended, and so many more like it are left out."""


_leaving: ContextVar[Leaving | None] = ContextVar("leaving", default=None)


@contextmanager
def left_out_by(leaving: Leaving) -> Iterator[None]:
    """Within it, `rounds` leaves rounds out."""
    token = _leaving.set(leaving)
    try:
        yield
    finally:
        _leaving.reset(token)


def rounds(parts: list[slice]) -> Iterator[slice]:
    """The parts, in order. For loops whose rounds differ in the rows alone, and keep nothing for each round."""
    leaving = _leaving.get()
    if leaving is None:
        yield from parts
        return
    for _, alike in groupby(parts, key=lambda rows: rows.stop - rows.start):
        of_one_size = list(alike)
        for rows in of_one_size[: RUN - 1]:
            yield rows
        for rows in of_one_size[RUN - 1 : RUN]:
            begun = leaving.round_begins()
            yield rows
            if len(of_one_size) > RUN:
                leaving.left_out(len(of_one_size) - RUN, begun)
