"""Trainings as results: a row a method and task, with its best learning rate, the score over seeds, and the memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from meftbench.report.tables import NARROWEST, count, left_out, methods_in_order, print_table, rows_of, setting_text

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console, JustifyMethod

# Trainings that differ in one of these are not in the same table or panel; if in another, not the same method.
COMPARED = (
    *("run", "model", "task", "batch_size", "micro_batch_size", "sequence_length"),
    *("precision", "head", "attention_requested", "optimizer", "optimizer_impl", "device"),
)
_APART = (*COMPARED, "method", "training")
_SAID_WHERE_THEY_DIFFER = ("run", "head", "attention_requested", "optimizer", "optimizer_impl", "device")
FURTHER = ("score_untrained", "score_test", "score_mismatched")


def mean_of(values: Sequence[float]) -> float:
    """The mean; NaN or infinite where a value is."""
    return statistics.fmean(values) if all(map(math.isfinite, values)) else sum(values)


@dataclass(frozen=True)
class Spread:
    """Values of one number over seeds, in the order of the seeds. Missing where a seed has none."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean_of(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds (n - 1); None of one seed."""
        if len(self.values) < 2:
            return None
        return statistics.stdev(self.values) if all(map(math.isfinite, self.values)) else math.nan

    def said(self, digits: int = 3) -> str:
        """`0.812 ± 0.004`."""
        about = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{about}"


@dataclass(frozen=True)
class Result:
    """A method on a task with the learning rate that is best on validation.

    rows: of the frame, those of the rate, a seed each.  rates: all that were tried, with the mean score of each.
    own: what its training has of its own among the results, such as `ordinary`.
    score: on validation, the same rows that chose rate and checkpoint; of the seeds that have one, NaN if none has.
    undefined: seeds that finished without a score (a correlation with a constant).
    further: of other evaluations, by metric.
    """

    rows: tuple[dict[str, Any], ...]
    learning_rate: float
    rates: dict[float, float]
    score: Spread
    time_s: Spread
    tokens_per_s: Spread
    own: str = ""
    undefined: tuple[int, ...] = ()
    further: dict[str, Spread] = field(default_factory=dict)

    @property
    def first(self) -> dict[str, Any]:
        return self.rows[0]

    @property
    def activation_bytes(self) -> float | None:
        found: float | None = self.first["activation_peak_bytes"]
        return found

    @property
    def method(self) -> str:
        """With what its training has of its own: `meft1-exact (ordinary)`."""
        said = str(self.first["method"])
        return f"{said} ({self.own})" if self.own else said

    @property
    def seeds(self) -> list[int]:
        return [row["seed"] for row in self.rows]

    def said_score(self) -> str:
        """`0.812 ± 0.004`, or that there is none."""
        if len(self.undefined) == len(self.rows):
            return "undefined"
        return self.score.said() + (f" (undefined: seed {_listed([*self.undefined])})" if self.undefined else "")


def trained(frame: DataFrame) -> DataFrame:
    """The cells that were trained on a task."""
    return frame[frame["task"].notna()]


def untrained(frame: DataFrame) -> DataFrame:
    """The cells of which only steps were measured."""
    return frame[frame["task"].isna()]


def results(frame: DataFrame) -> list[Result]:
    """The results of a run or several: by task as they come, within one in the order of the methods.

    Of the rates of a method that which most seeds have, and of those the best mean score.
    """
    from pandas import notna

    done = trained(frame)
    done = done[done["status"] == "ok"] if "score" in done else done[:0]
    order = methods_in_order(frame)
    # What all trainings of a table share is no name for one of them.
    shared: dict[tuple[Any, ...], set[str]] = {}
    for row in rows_of(done):
        said = {*str(row["training"]).split(", ")}
        shared[_table_of(row)] = shared.get(_table_of(row), said) & said
    found: list[Result] = []
    for _, rows in done.groupby(list(_APART), dropna=False, sort=False):
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for row in rows_of(rows.sort_values("seed")):
            by_rate.setdefault(float(row["learning_rate"]), []).append(row)
        scores = {rate: _spread(mine, "score") for rate, mine in by_rate.items()}
        means = {rate: spread.mean if spread.values else math.nan for rate, spread in scores.items()}
        # A seed without a score, or a mean that is not finite, is the worst of all.
        best = max(
            by_rate,
            key=lambda rate: (len(by_rate[rate]), len(scores[rate].values), math.isfinite(means[rate]), means[rate]),
        )
        mine = tuple(by_rate[best])
        score = scores[best] if scores[best].values else Spread((math.nan,))
        undefined = tuple(row["seed"] for row in mine if row["score"] is None)
        further = {
            name: _spread(mine, name) for name in FURTHER if name in done and any(notna(row[name]) for row in mine)
        }
        own = _without(mine[0]["training"], shared[_table_of(mine[0])])
        time_s, tokens_per_s = _spread(mine, "training_time_s"), _spread(mine, "training_tokens_per_s")
        found.append(Result(mine, best, means, score, time_s, tokens_per_s, own, undefined, further))
    tasks = list(dict.fromkeys(result.first["task"] for result in found))
    models = list(dict.fromkeys(result.first["model"] for result in found))
    return sorted(
        found,
        key=lambda r: (models.index(r.first["model"]), tasks.index(r.first["task"]), order.index(r.first["method"])),
    )


def _table_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in COMPARED)


def _without(training: str, shared: set[str]) -> str:
    return ", ".join(part for part in training.split(", ") if part and part not in shared)


def _spread(rows: Sequence[dict[str, Any]], name: str) -> Spread:
    return Spread(tuple(float(row[name]) for row in rows if row.get(name) is not None))


ROOMY = 120  # columns of a terminal that has room for all that is said
HEAD = ("method", "score", "activation", "% of full", "time", "tokens/s", "rate", "trained")


@dataclass(frozen=True)
class Table:
    """The results of a model on a task. lines: of texts under `head`.  notes: what was cut, how it was scored.

    narrow_head, narrow_lines: the same in the 80 columns of a terminal; `narrow_note` says what they leave unsaid.
    """

    title: str
    head: tuple[str, ...]
    lines: list[tuple[str, ...]]
    notes: list[str]
    narrow_head: tuple[str, ...] = ()
    narrow_lines: list[tuple[str, ...]] = field(default_factory=list)
    narrow_note: str = ""


def tables(found: Iterable[Result]) -> list[Table]:
    """A table a model, task, shape and setting; its title says how they differ."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in found:
        groups.setdefault(_table_of(result.first), []).append(result)
    differing = differing_settings([mine[0].first for mine in groups.values()])
    return [_table(mine, differing) for mine in groups.values()]


def differing_settings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The settings beside model, task, shape and precision, in which `rows` differ."""
    return [name for name in _SAID_WHERE_THEY_DIFFER if len({row[name] for row in rows}) > 1]


def _table(mine: list[Result], differing: list[str]) -> Table:
    from pandas import notna

    row = mine[0].first
    full = next((r.activation_bytes for r in mine if r.first["method"] == "full"), None)
    further = [name for name in FURTHER if any(name in result.further for result in mine)]
    head = (HEAD[0], HEAD[1], *(name.removeprefix("score_") for name in further), *HEAD[2:])
    narrow_head = (*head[: -len(HEAD) + 2], "activation\nMiB", "% of\nfull", "time\ns", "tokens\n/s", "rate", "trained")
    seeds = sorted({seed for result in mine for seed in result.seeds})
    lines, narrow = [], []
    for result in mine:
        held, source = result.activation_bytes, result.first["activation_peak_bytes_source"]
        weights = result.first["parameters_trainable"]
        share = f"{held / full:.0%}" if held is not None and full else "-"
        lines.append((
            result.method,
            result.said_score() + ("" if result.seeds == seeds else f" (seed {_listed(result.seeds)})"),
            *(result.further[name].said() if name in result.further else "-" for name in further),
            "-" if held is None else f"{held / 2**20:,.1f} MiB ({source})",
            share,
            f"{result.time_s.mean:,.1f} s" if result.time_s.values else "-",
            f"{result.tokens_per_s.mean:,.0f}" if result.tokens_per_s.values else "-",
            f"{result.learning_rate:g} of {', '.join(f'{rate:g}' for rate in sorted(result.rates))}",
            "-" if weights is None else f"{weights:,}",
        ))  # fmt: skip
        tried = len(result.rates)
        narrow.append((
            result.method,
            (result.score.said() if math.isfinite(result.score.mean) else result.said_score())
            + ("" if result.seeds == seeds and not result.undefined else "*"),
            *lines[-1][2 : -len(HEAD) + 2],
            "-" if held is None else f"{held / 2**20:,.1f}",
            share,
            f"{result.time_s.mean:,.1f}" if result.time_s.values else "-",
            lines[-1][-3],
            f"{result.learning_rate:g}{f' of {tried}' if tried > 1 else ''}",
            count(weights),
        ))  # fmt: skip
    micro = "" if row["micro_batch_size"] == row["batch_size"] else f" (micro-batch {row['micro_batch_size']})"
    shape = f"batch {row['batch_size']}{micro} × {row['sequence_length']} tokens"
    rest = "".join(f", {setting_text(name, row[name])}" for name in differing)
    title = f"{row['task']}: {row['model']}, {shape}, {row['precision']}{rest}"
    over = f"mean ± standard deviation over seeds {_listed(seeds)}"
    scored = f"Score: {row['scored_by']} on validation, {over}, measured"
    if len(seeds) == 1:
        scored = f"Score: {row['scored_by']} on validation, seed {seeds[0]} alone, measured"
    notes = [f"{scored}. Validation chose the checkpoint and the learning rate as well: it flatters."]
    constants = (said.get("score_constant") for result in mine for said in result.rows)
    if constant := [value for value in constants if notna(value)]:
        notes.append(f"The best answer that is always the same scores {constant[0]:.3f}, counted.")
    if row["cuts"]:
        notes.append(f"Not the published sets: {'; '.join(row['cuts'])}.")
    sources = sorted({result.first["activation_peak_bytes_source"] for result in mine if result.activation_bytes})
    unsaid = [f"Memory is {' and '.join(sources)}"] if sources else []
    unsaid += ["a rate is the best of so many"] if any(len(result.rates) > 1 for result in mine) else []
    unsaid += [f"*: {r.method} has seed {_listed(r.seeds)} alone" for r in mine if r.seeds != seeds]
    unsaid += [f"*: {r.method} has no score of seed {_listed([*r.undefined])}" for r in mine if r.undefined]
    return Table(title, head, lines, notes, narrow_head, narrow, f"{'; '.join(unsaid)}." if unsaid else "")


def _listed(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds))


# Columns that a narrow terminal does without, the first one first, counted from the last.
_SPARED = {"tokens/s": -3, "% of full": -5, "trained": -1, "time": -4, "rate": -2, "activation": -6}


def print_quality(frame: DataFrame, out: Console) -> None:
    """Print a table a task; nothing where nothing was trained."""
    from rich.table import Table as RichTable
    from rich.text import Text

    for table in tables(results(frame)):
        out.print(Text(table.title, style="bold"))
        roomy = out.width >= ROOMY
        head, lines, notes = table.head, table.lines, table.notes
        methods, least = None, 0  # as wide as they are
        if not roomy:
            head, lines = table.narrow_head, table.narrow_lines
            columns = [[*name.splitlines(), *(line[i] for line in lines)] for i, name in enumerate(head)]
            widths = {i: 1 + max(map(len, column)) for i, column in enumerate(columns)}
            spared = left_out(widths, {name: index % len(head) for name, index in _SPARED.items()}, out.width)
            shown = [i for i in range(len(head)) if i not in {_SPARED[name] % len(head) for name in spared}]
            head, lines = tuple(head[i] for i in shown), [tuple(line[i] for i in shown) for line in lines]
            numbers = sum(widths[i] for i in shown[1:])
            methods = max(NARROWEST, min(widths[0] - 1, out.width - numbers - 1))
            least = methods + 1 + numbers
            unsaid = [f"No room at this width for {', '.join(spared)}."] if spared else []
            notes = [table.narrow_note, *unsaid, *notes]
        drawn = RichTable(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for place, name in enumerate(head):
            justify: JustifyMethod = "left" if place == 0 else "right"
            width = methods if place == 0 else None
            drawn.add_column(name, justify=justify, overflow="fold", no_wrap=place > 0, width=width)
        for line in lines:
            drawn.add_row(*map(Text, line))
        print_table(drawn, out, least)
        for note in notes:
            out.print(Text(note))
