"""Progress of a sweep on stderr: a bar with the remaining time on a terminal, one line for each cell elsewhere."""

from __future__ import annotations

import os
import sys
from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING

from meftbench.cli.output import put_error
from meftbench.escapes import single_line, visible
from meftbench.records.record import Record
from meftbench.runner import Ended, Event, Noted, Planned, Started
from meftbench.runner.duration import Duration, Remaining
from meftbench.units import format_bytes, format_duration

if TYPE_CHECKING:
    from rich.console import Console

_BAR, _NARROW_BAR, _ROOMY = 24, 10, 76  # characters of the bar; columns from which on it is the longer one
_WORTH_SAYING = 10  # seconds; where less is left, a log has no need to say so
_COLOUR = {"ok": "green", "oom": "yellow", "timeout": "red", "error": "red", "skipped": "dim"}


def line(event: Ended) -> str:
    """`[ 3/20] ok  bert-tiny@random/lora/b8/s128  activation 12.3 MiB counted  1.2 s`"""
    width = len(str(event.total))
    return f"[{event.done:>{width}}/{event.total}] {event.record.status:<7} {ending(event.record)}"


def ending(record: Record) -> str:
    """A record as one line: its cell, its activation memory or what went wrong, and how long it took."""
    label = single_line(record.label)
    name = f"{label} #{record.repeat}" if record.repeat else label
    if record.status == "skipped":
        return f"{name}  {single_line(str(record.status_detail.get('message', '')))}"
    return f"{name}  {_result(record)}  {format_duration(record.wall_s)}"


def _result(record: Record) -> str:
    detail = record.status_detail
    if record.status == "ok":
        metric = record.metrics.get("activation_peak_bytes")
        if metric is None or not isinstance(metric.value, int | float):
            return "activation not taken"
        return f"activation {format_bytes(metric.value)} {metric.source}"
    if record.status == "oom" and "requested_bytes" in detail:
        return f"asked for {format_bytes(detail['requested_bytes'])} more"
    return single_line(f"{detail.get('type', '')}: {detail.get('message', '')}")[:200]


def _without_model(label: str, model_label: str) -> str:
    """The method and shape of a label, which tell the cells of a run apart."""
    return single_line(label.removeprefix(f"{model_label}/"))


def say_note(note: Noted) -> None:
    """Print it on stderr, in one line."""
    put_error(f"note: {single_line(note.text)}")


class Plain:
    """Prints how long the run will take, then a line for each cell that ends.

    verbose: also one for each start, and tracebacks.
    """

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        self.remaining = Remaining({})

    def begin(self, duration: Duration, remaining: Remaining) -> None:
        """Say how long the run will take. remaining: says after each cell what is left."""
        self.remaining = remaining
        self.say(duration.sentence())

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def __call__(self, event: Event) -> None:
        match event:
            case Ended():
                self.remaining.ended(event.record)
                left = self.remaining.text() if (self.remaining.seconds() or 0) >= _WORTH_SAYING else ""
                self.say(line(event) + (f"; {left}" if left else ""))
                if self.verbose and "traceback" in event.record.status_detail:
                    self.say(str(event.record.status_detail["traceback"]).rstrip())
            case Noted():
                say_note(event)
            case Started():
                if self.verbose:
                    self.say(f"start {event.cell.label}")
            case Planned():
                pass  # `begin` has said it

    def say(self, text: str) -> None:
        put_error(text)


class Bar:
    """A bar with count and remaining time, then how cells ended and the last result where there is room.

    Failed cells are printed above it; verbose: all cells.  console: where it is drawn; None: on stderr.
    """

    def __init__(self, verbose: bool, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Column

        self.verbose = verbose
        self.remaining = Remaining({})
        self.counts: Counter[str] = Counter()
        self.console = console or Console(stderr=True, highlight=False)
        # Only the last column gives way: without a ratio, a long label would push bar and time off the line.
        self.progress = Progress(
            BarColumn(bar_width=_BAR if self.console.width >= _ROOMY else _NARROW_BAR),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
            TextColumn(
                "{task.fields[counts]}{task.fields[last]}",
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            console=self.console,
            transient=True,
            expand=True,
        )
        self.task = self.progress.add_task("", total=None, counts="", left="", last="the worker is starting")

    def begin(self, duration: Duration, remaining: Remaining) -> None:
        """Say above the bar how long the run will take. remaining: says after each cell what is left."""
        self.remaining = remaining
        self._print(duration.sentence())
        self._update(0, duration.cells, last="the worker is starting")

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                cell = event.cell
                self._update(event.done, event.total, running=_without_model(cell.label, cell.model_label))
            case Ended():
                self.counts[event.record.status] += 1
                self.remaining.ended(event.record)
                if self.verbose or event.record.status in ("error", "timeout"):
                    self._print(line(event))
                if self.verbose and "traceback" in event.record.status_detail:
                    self._print(str(event.record.status_detail["traceback"]).rstrip())
                self._update(event.done, event.total, last=f"{event.record.status}  {self._ending(event.record)}")
            case Noted():
                self._print(f"note: {event.text}")
            case Planned():
                pass  # `begin` has said it

    def _print(self, text: str) -> None:
        self.console.print(visible(text), markup=False)

    @staticmethod
    def _ending(record: Record) -> str:
        return _without_model(ending(record), record.model_label)

    def _update(self, done: int, total: int, last: str = "", running: str = "") -> None:
        """last: how the last cell ended.  running: the cell that runs, of which the end is shown."""
        from rich.cells import cell_len
        from rich.markup import escape

        counted = "".join(f"{n} {status}  " for status, n in self.counts.items())
        counts = "".join(f"[{_COLOUR[status]}]{n} {status}[/]  " for status, n in self.counts.items())
        left = self.remaining.text()
        if running:
            last = _end_of(running, self._room(done, total, left) - cell_len(counted))
        self.progress.update(
            self.task, completed=done, total=total, counts=counts, left=left, last=escape(single_line(last))
        )

    def _room(self, done: int, total: int, left: str) -> int:
        """Columns of the terminal beside bar, count and remaining time, each with a space behind it."""
        of_bar = _BAR if self.console.width >= _ROOMY else _NARROW_BAR
        return self.console.width - of_bar - len(f"{done:>{len(str(total))}}/{total}") - len(left) - 3


def _end_of(text: str, room: int) -> str:
    """As much of the end of a text as fits, behind an ellipsis: of a label the shape, and of the method what fits."""
    return text if len(text) <= room else f"…{text[-max(room - 1, 1) :]}"


class Silent:
    """Prints no progress (`--quiet`), but the notes: they say what the results lack, or that files were lost."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def __call__(self, event: Event) -> None:
        if isinstance(event, Noted):
            say_note(event)

    def begin(self, duration: Duration, remaining: Remaining) -> None:
        """Nothing is said."""


def progress(quiet: bool, verbose: bool) -> Bar | Plain | Silent:
    """The display that suits stderr: a bar on a terminal, plain lines in a log or where the variable `CI` is set."""
    if quiet:
        return Silent()
    return Bar(verbose) if sys.stderr.isatty() and not os.environ.get("CI") else Plain(verbose)
