"""Two runs or more beside each other: what differs in settings and environment first, then what changed in cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meftbench.errors import UserError
from meftbench.records.outcome import outcomes
from meftbench.records.store import Run
from meftbench.verdicts.change import Change
from meftbench.verdicts.comparable import differing as what_differs
from meftbench.verdicts.compare import compare
from meftbench.verdicts.environment import differences

SHOWN = 200  # changes of a pair; `meftbench compare` prints all


@dataclass(frozen=True)
class Pair:
    """A run held against the first one.

    title: the names of both.  differing: settings of the protocol and of the environment, as `name: before | after`.
    refused: why they are not compared, or "".  summary: how many numbers got each judgement.  changes: those that are
    no noise, worst first.  more: how many of these are not listed.
    """

    title: str
    differing: tuple[str, ...]
    refused: str
    summary: str
    notes: tuple[str, ...]
    changes: tuple[Change, ...]
    more: int


def side_by_side(runs: Sequence[Run], names: Sequence[str]) -> list[Pair]:
    """Each later run held against the first."""
    return [_pair(runs[0], run, f"{names[0]} and {name}") for run, name in zip(runs[1:], names[1:], strict=True)]


def _pair(first: Run, second: Run, title: str) -> Pair:
    protocols = [run.suite.get("protocol") or {} for run in (first, second)]
    cells = [{outcome.cell_id: outcome for outcome in outcomes(run)} for run in (first, second)]
    pairs = [(cells[0][cell_id], cells[1][cell_id]) for cell_id in cells[0] if cell_id in cells[1]]
    of_protocol = [f"protocol {text}" for text in differences(*protocols)]
    differing = (*of_protocol, *what_differs(first, second, pairs))
    try:
        comparison = compare(first, second)
    except UserError as error:
        return Pair(title, differing, str(error).partition(": ")[2], "", (), (), 0)
    changes = comparison.shown(only_changed=True)
    return Pair(
        title,
        differing,
        "",
        comparison.summary(),
        tuple(comparison.notes),
        tuple(changes[:SHOWN]),
        max(0, len(changes) - SHOWN),
    )
