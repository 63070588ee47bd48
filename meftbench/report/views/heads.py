"""Where the numbers of runs come from: machine, date, commit, protocol, and how their cells ended."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meftbench.records.store import Run
from meftbench.report.views.endings import ending
from meftbench.verdicts.environment import checkout, machines
from meftbench.verdicts.validation import predicted_for


@dataclass(frozen=True)
class Head:
    """A run in words. commit: as of `checkout`, after the word.  path: without folders of this machine.
    validation: how far predictions were off; "" where nothing was predicted.
    """

    name: str
    machine: str
    date: str
    checkout: str
    commit: str
    cells: str
    description: str
    path: str
    validation: str
    protocol: str


def heads_of(runs: Sequence[Run], names: Sequence[str]) -> list[Head]:
    return [_head(name, run) for name, run in zip(names, runs, strict=True)]


def _head(name: str, run: Run) -> Head:
    started = run.records[0].started_at if run.records else str(run.environment.get("taken_at", "unknown date"))
    checked_out = checkout(run.environment)
    path = run.path.name if run.path.is_absolute() else str(run.path)
    return Head(
        name=name,
        machine=machines(run),
        date=started,
        checkout=checked_out,
        commit=f"commit {checked_out}" if checked_out[:1] in string.hexdigits else checked_out,
        cells=ending(run, path) if run.records else "no cell has finished",
        description=str(run.suite.get("description") or ""),
        path=path,
        validation="; ".join(f"{device}: {about}" for device, about in predicted_for(run).items()),
        protocol=", ".join(_protocol_texts(run.suite.get("protocol") or {})),
    )


def _protocol_texts(protocol: dict[str, Any]) -> list[str]:
    """Settings of a protocol as words; those that are None, and so left to their default, are omitted."""
    return [
        f"{key} {' + '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in protocol.items()
        if value is not None
    ]
