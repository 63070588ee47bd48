"""How long a run will take, from what earlier cells took on this machine; a range, since no more is known.

A cell takes what the same cell took, or what others of its model took, scaled by the tokens and steps that are
computed; of another model, by its parameters, too.
"""

from __future__ import annotations

import re
import socket
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from meftbench.catalogue.models import MODELS
from meftbench.errors import UserError
from meftbench.plan.cell import Cell
from meftbench.plan.models import RANDOM
from meftbench.plan.protocol import Protocol
from meftbench.records.outcome import as_number
from meftbench.records.record import Record
from meftbench.records.store import RECORDS, SUITE, load_run
from meftbench.runner import host
from meftbench.runner.folder import RUNS

NEWEST = 20  # run folders that are read; older ones are of older code more often than not
MOST_BYTES = 16 * 2**20  # of their records, which are read in about a second
_NEAREST = 100  # other shapes from which the time of one is scaled
_SAME, _SCALED = 1.2, 2.0  # by which factor a cell may take less or more than expected
_ENDED = ("ok", "oom")


@dataclass(frozen=True)
class Past:
    """A cell that ran on this machine.

    key: of the cell, seeds aside.  kind: what cells have in common that can be scaled to each other.
    tokens_and_steps: tokens of a step × steps of all passes.  parameters: None: not known.
    fixed_s, passes_s: seconds that do not grow with these, and that do.
    """

    key: str
    kind: tuple[Any, ...]
    model: str
    tokens_and_steps: float
    parameters: float | None
    fixed_s: float
    passes_s: float

    @property
    def wall_s(self) -> float:
        """Seconds from the start of its process to its end."""
        return self.fixed_s + self.passes_s


@dataclass(frozen=True)
class Expected:
    """Seconds that a cell is expected to take. is_same: told from the same cell, else scaled from others."""

    seconds: float
    is_same: bool

    @property
    def factor(self) -> float:
        """By which factor it may take less or more."""
        return _SAME if self.is_same else _SCALED


@dataclass(frozen=True)
class Duration:
    """What a run is expected to take, in seconds of wall time.

    cells: attempts to make.  same, scaled: of how many the same cell has run, or others that were scaled.
    seconds, low, high: of those together; None: none is known.
    """

    cells: int
    same: int
    scaled: int
    seconds: float | None
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, Any]:
        """`expected_s` of the whole run; None where of some of its cells nothing is known."""
        known = self.same + self.scaled == self.cells
        return {
            "expected_s": self.seconds if known else None,
            "expected_range_s": [self.low, self.high] if known and self.seconds is not None else None,
            "expected_from": {
                "same": self.same,
                "scaled": self.scaled,
                "unknown": self.cells - self.same - self.scaled,
            },
        }

    def sentence(self) -> str:
        """`37 cells, about 4 min (from 22 like cells measured on this machine, 15 scaled from others)`."""
        cells = f"{self.cells} cell{'s' * (self.cells != 1)}"
        if self.seconds is None or self.low is None or self.high is None:
            unknown = "no like cell has run on this machine: the time is not known yet"
            return f"{cells}; {unknown}, and is said after the first" if self.cells else "no cell is left to run"
        sources = [f"from {_cells(self.same, 'like cell')} measured on this machine"] if self.same else []
        others = "others" if self.same else "other cells measured on this machine"
        sources += [f"{self.scaled} scaled from {others}"] if self.scaled else []
        unknown_cells = self.cells - self.same - self.scaled
        rest = f"; of {unknown_cells} more nothing is known yet" if unknown_cells else ""
        part = f"{self.same + self.scaled} of them " if unknown_cells else ""
        return f"{cells}, {part}{span(self.low, self.high)} ({', '.join(sources)}{rest})"


def _cells(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count != 1)}"


def span(low: float, high: float) -> str:
    """`about 4 min`, or `2 to 8 min` where the ends are far apart."""
    middle = (low * high) ** 0.5
    if high <= 1.5 * low:
        return f"about {rounded(middle)}"
    first, last = rounded(low), rounded(high)
    if first == last:
        return f"about {first}"
    number, unit = first.split(" ")
    return f"{number if last.endswith(f' {unit}') else first} to {last}"


def rounded(seconds: float) -> str:
    """A duration without false precision: `3 s`, `45 s`, `4 min`, `2.5 h`."""
    if seconds < 10:
        return f"{max(1, round(seconds))} s"
    if seconds < 57.5:
        return f"{5 * round(seconds / 5)} s"
    if seconds < 3570:
        return f"{max(1, round(seconds / 60))} min"
    return f"{seconds / 3600:.1f} h"


# --- what earlier cells took ---


def history(out: Path | None = None, runs: Path = RUNS, tell: Callable[[str], None] = lambda note: None) -> list[Past]:
    """The cells of the newest runs under `runs`, as many as are read in about a second, and of the run in `out`, that
    this machine measured.

    A folder that cannot be read is left out, and `tell` is told: it is a reason to know less, and none not to run.
    """
    files = sorted(runs.glob(f"*/{SUITE}"), key=lambda file: file.stat().st_mtime, reverse=True)[:NEWEST]
    folders = {file.parent.resolve() for file in files}
    resumed = out.resolve() if out is not None and (out / SUITE).is_file() else None
    if resumed is not None:
        folders.add(resumed)
    found, here, size = [], host.facts(), 0
    for folder in sorted(folders, key=_changed, reverse=True):
        size += _size(folder / RECORDS)
        if size > MOST_BYTES and folder != resumed:
            continue
        try:
            run = load_run(folder)
        except UserError as error:
            tell(f"the times in {folder} are not used: {error.what}")
            continue
        # Virtual machines often share a name: another processor or number of cores is another machine.
        there = run.environment.get("host") or {}
        if all(there.get(fact) == here[fact] for fact in ("cpu", "cores")):
            found += pasts(run.records, run.suite.get("protocol") or {}, socket.gethostname())
    return found


def _changed(folder: Path) -> float:
    return (folder / SUITE).stat().st_mtime


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def pasts(records: Iterable[Record], protocol: Mapping[str, Any], machine: str) -> list[Past]:
    """What can be told from records of one protocol; only of cells that came to an end on `machine`."""
    steps = _steps(protocol.get("warmup"), protocol.get("steps"), protocol.get("passes"))
    found = []
    for record in records:
        if record.host != machine or record.status not in _ENDED or record.wall_s <= 0:
            continue
        cell = record.cell
        passes_s = min(as_number(record.value("passes_s")) or record.wall_s, record.wall_s)
        found.append(
            Past(
                _key(record.label, str(cell.get("device")), steps),
                _kind(cell.get("device"), cell.get("precision"), cell.get("training")),
                record.model_label,
                float(cell["batch_size"]) * float(cell["sequence_length"]) * steps,
                as_number(record.value("parameters_total")),
                record.wall_s - passes_s,
                passes_s,
            )
        )
    return found


def _steps(warmup: Any, steps: Any, passes: Any) -> float:
    """Steps of all passes together: what a cell's time grows with."""
    return float((as_number(warmup) or 0) + (as_number(steps) or 1)) * max(1, len(passes or ()))


def _key(label: str, device: str, steps: float) -> str:
    return f"{re.sub(r'/seed[0-9]+$', '', label)} on {device}, {steps:g} steps"


def _kind(device: Any, precision: Any, training: Mapping[str, Any] | None) -> tuple[Any, ...]:
    return (
        device,
        precision,
        *((training or {}).get(key) for key in ("task", "epochs", "max_steps", "train_examples")),
    )


# --- what cells will take ---


class Known:
    """What is known of earlier cells, arranged so that the time of a cell is told without going through all of them."""

    def __init__(self, past: Iterable[Past]) -> None:
        self._same: dict[str, list[float]] = {}
        self._of_model: dict[tuple[Any, ...], list[Past]] = {}
        self._of_kind: dict[tuple[Any, ...], list[Past]] = {}
        for entry in sorted(past, key=_work):
            self._same.setdefault(entry.key, []).append(entry.wall_s)
            self._of_model.setdefault((entry.kind, entry.model), []).append(entry)
            if entry.parameters:
                self._of_kind.setdefault(entry.kind, []).append(entry)

    def expected(self, cell: Cell, protocol: Protocol) -> Expected | None:
        """What a cell is expected to take; None: nothing like it has run."""
        steps = _steps(protocol.warmup, protocol.steps, protocol.passes)
        if same := self._same.get(_key(cell.label, cell.device, steps)):
            return Expected(median(same), is_same=True)
        training = cell.training.model_dump(mode="json") if cell.training else None
        kind = _kind(cell.device, cell.precision, training)
        work = cell.batch_size * cell.sequence_length * steps
        if of_model := self._of_model.get((kind, cell.model_label)):
            scaled = [
                entry.fixed_s + entry.passes_s * work / entry.tokens_and_steps for entry in _nearest(of_model, work)
            ]
        elif (of_kind := self._of_kind.get(kind)) and (parameters := parameters_of(cell)):
            scaled = [
                entry.fixed_s + entry.passes_s * work / entry.tokens_and_steps * parameters / entry.parameters
                for entry in _nearest(of_kind, work)
                if entry.parameters
            ]
        else:
            return None
        return Expected(median(scaled), is_same=False)


def _work(entry: Past) -> float:
    return entry.tokens_and_steps


def _nearest(entries: Sequence[Past], work: float) -> Sequence[Past]:
    """Of entries in order of their tokens and steps, those about `work`."""
    middle = bisect_left(entries, work, key=_work)
    first = max(0, min(middle - _NEAREST // 2, len(entries) - _NEAREST))
    return entries[first : first + _NEAREST]


def parameters_of(cell: Cell) -> float | None:
    """About how many parameters a model of the catalogue has, from its configuration; None: it is none, or lacks it."""
    model = MODELS.get(cell.model.removesuffix(RANDOM))
    config = {} if model is None else {**model.config, **cell.model_config_overrides}
    sizes = [config.get(key) for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")]
    if not all(isinstance(size, int) for size in sizes):
        return None
    hidden, layers, inner, vocabulary = map(float, sizes)  # type: ignore[arg-type]
    return layers * (4 * hidden**2 + 3 * hidden * inner) + vocabulary * hidden


def duration(cells: Sequence[Cell], protocol: Protocol, known: Known, at_a_time: int = 1) -> Duration:
    """What `cells`, one entry an attempt, are expected to take together. at_a_time: how many run beside each other."""
    return total([known.expected(cell, protocol) for cell in cells], at_a_time)


def total(expectations: Sequence[Expected | None], at_a_time: int = 1) -> Duration:
    """The sum of what is known."""
    known = [entry for entry in expectations if entry is not None]
    same = sum(entry.is_same for entry in known)
    sums = None
    if known:
        seconds = sum(entry.seconds for entry in known) / at_a_time
        low = sum(entry.seconds / entry.factor for entry in known) / at_a_time
        high = sum(entry.seconds * entry.factor for entry in known) / at_a_time
        sums = (seconds, low, high)
    return Duration(len(expectations), same, len(known) - same, *(sums or (None, None, None)))


class Remaining:
    """The time that is left of a run, told anew after every cell: what was expected, corrected by what cells took.

    expectations: of the attempts, by cell_id and repeat.
    """

    def __init__(self, expectations: Mapping[tuple[str, int], Expected | None], at_a_time: int = 1) -> None:
        self._left, self._at_a_time = dict(expectations), at_a_time
        # Sums of seconds, kept as cells end: to go through all that is left after each cell is quadratic.
        self._expected_s = sum(entry.seconds for entry in self._left.values() if entry is not None)
        self._unknown = sum(entry is None for entry in self._left.values())
        self._ended, self._took_s = 0, 0.0
        self._told_s, self._told_took_s = 0.0, 0.0  # of cells of which something was expected

    @property
    def attempts(self) -> int:
        """How many are left."""
        return len(self._left)

    def ended(self, record: Record) -> None:
        """A cell ended; one that was skipped says nothing about the others."""
        key = (record.cell_id, record.repeat)
        entry = self._left.get(key)
        if key in self._left:
            del self._left[key]
            self._expected_s -= entry.seconds if entry else 0
            self._unknown -= entry is None
        if record.status == "skipped":
            return
        self._ended += 1
        self._took_s += record.wall_s
        if entry is not None:
            self._told_s += entry.seconds
            self._told_took_s += record.wall_s

    def seconds(self) -> float | None:
        """Seconds that are left; None: not known yet."""
        if self._unknown and not self._ended:
            return None
        factor = self._told_took_s / self._told_s if self._told_s else 1.0
        of_unknown = self._unknown * self._took_s / self._ended if self._unknown else 0.0
        return (max(0.0, self._expected_s) * factor + of_unknown) / self._at_a_time

    def text(self) -> str:
        """`about 3 min left`; "" where it is not known yet or nothing is left."""
        seconds = self.seconds()
        return f"about {rounded(seconds)} left" if seconds and self._left else ""
