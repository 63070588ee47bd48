"""Results of training: for each method and task the best learning rate, the score over seeds, and the memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from meftbench.plan.axes import SETTINGS, SHAPE
from meftbench.report.columns import count
from meftbench.report.console import text_of
from meftbench.report.results import NARROWEST, left_out, methods_in_order, print_table, rows_of, setting_text

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console, JustifyMethod

# Results that differ in one of these stand in different tables and panels; within one, in method or training.
_FURTHER_SETTINGS = [name for name in SETTINGS if name not in ("model", "task", "learning_rate", "seed", "batch")]
COMPARED = ("run", "model", "task", *SHAPE, *_FURTHER_SETTINGS)
_RESULT_KEYS = (*COMPARED, "method", "training")
_IN_TITLE_IF_DIFFERENT = ("run", *(name for name in _FURTHER_SETTINGS if name != "precision"))
FURTHER = ("score_untrained", "score_test", "score_mismatched")


def mean_of(values: Sequence[float]) -> float:
    """The mean; NaN or infinite if a value is."""
    return statistics.fmean(values) if all(map(math.isfinite, values)) else sum(values)


@dataclass(frozen=True)
class Spread:
    """Values of one number over seeds, in the order of the seeds. A seed without one is left out."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean_of(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds (n - 1); None for fewer than two seeds."""
        if len(self.values) < 2:
            return None
        return statistics.stdev(self.values) if all(map(math.isfinite, self.values)) else math.nan

    def said(self, digits: int = 3) -> str:
        """`0.812 ± 0.004`."""
        deviation = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{deviation}"


@dataclass(frozen=True)
class Result:
    """A method on a task with the learning rate that is best on validation.

    rows: the rows of the frame with that learning rate, one per seed.
    rates: all learning rates that were tried, with the mean score of each.
    own: settings of its training that not all results of its table share, such as `ordinary`.
    score: on validation, the rows that also chose learning rate and checkpoint; of the seeds that have one, else NaN.
    undefined: seeds that finished without a score (a correlation with a constant).
    further: scores of other evaluations, by metric.
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
        peak_bytes: float | None = self.first["activation_peak_bytes"]
        return peak_bytes

    @property
    def method(self) -> str:
        """The method's label, with `own` behind it: `meft1-exact (ordinary)`."""
        label = str(self.first["method"])
        return f"{label} ({self.own})" if self.own else label

    @property
    def seeds(self) -> list[int]:
        return [row["seed"] for row in self.rows]

    def said_score(self) -> str:
        """`0.812 ± 0.004`, with the seeds that have none; "undefined" where no seed has one."""
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
    """The results of one run or several, by model, then by task as they occur, then in the order of the methods.

    The learning rate of a method is the one that most seeds have, and of several the one with the best mean score.
    """
    from pandas import notna

    done = trained(frame)
    done = done[done["status"] == "ok"] if "score" in done else done[:0]
    order = methods_in_order(frame)
    # Settings that all training of a table shares do not tell its results apart.
    shared: dict[tuple[Any, ...], set[str]] = {}
    for row in rows_of(done):
        parts = {*str(row["training"]).split(", ")}
        shared[_table_of(row)] = shared.get(_table_of(row), parts) & parts
    all_results: list[Result] = []
    for _, rows in done.groupby(list(_RESULT_KEYS), dropna=False, sort=False):
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for row in rows_of(rows.sort_values("seed")):
            by_rate.setdefault(float(row["learning_rate"]), []).append(row)
        scores = {rate: _spread(seed_rows, "score") for rate, seed_rows in by_rate.items()}
        means = {rate: spread.mean if spread.values else math.nan for rate, spread in scores.items()}
        # After more seeds, more seeds with a score come first, then a finite mean, then a higher one.
        best = max(
            by_rate,
            key=lambda rate: (len(by_rate[rate]), len(scores[rate].values), math.isfinite(means[rate]), means[rate]),
        )
        seed_rows = tuple(by_rate[best])
        score = scores[best] if scores[best].values else Spread((math.nan,))
        undefined = tuple(row["seed"] for row in seed_rows if row["score"] is None)
        further = {
            name: _spread(seed_rows, name)
            for name in FURTHER
            if name in done and any(notna(row[name]) for row in seed_rows)
        }
        own_training = _without(seed_rows[0]["training"], shared[_table_of(seed_rows[0])])
        time_s, tokens_per_s = _spread(seed_rows, "training_time_s"), _spread(seed_rows, "training_tokens_per_s")
        all_results.append(
            Result(seed_rows, best, means, score, time_s, tokens_per_s, own_training, undefined, further)
        )
    tasks = list(dict.fromkeys(result.first["task"] for result in all_results))
    models = list(dict.fromkeys(result.first["model"] for result in all_results))
    return sorted(
        all_results,
        key=lambda r: (models.index(r.first["model"]), tasks.index(r.first["task"]), order.index(r.first["method"])),
    )


def _table_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in COMPARED)


def _without(training: str, shared: set[str]) -> str:
    return ", ".join(part for part in training.split(", ") if part and part not in shared)


def _spread(rows: Sequence[dict[str, Any]], name: str) -> Spread:
    return Spread(tuple(float(row[name]) for row in rows if row.get(name) is not None))


def recorded_constant(group: Sequence[Result]) -> float | None:
    """The score of the best answer that is always the same, of one table; None where no record has it."""
    from pandas import notna

    constants = (row.get("score_constant") for result in group for row in result.rows)
    return next((float(value) for value in constants if notna(value)), None)


def learnt_nothing(group: Sequence[Result]) -> list[str]:
    """The methods of one table of which no seed scores above the best answer that is always the same, sorted.

    Where no record has the score of that answer, it is a score that all seeds of several methods have in common: what
    is learnt differs from seed to seed.
    """
    scored = [result for result in group if math.isfinite(result.score.mean)]
    constant = recorded_constant(group)
    if constant is None:
        alike = [r.score.values[0] for r in scored if len(r.rows) > 1 and len({*r.score.values}) == 1]
        constant = max((value for value in alike if alike.count(value) > 1), default=None)
    if constant is None:
        return []
    return sorted(result.method for result in scored if max(result.score.values) <= constant + _ROUNDING)


_ROUNDING = 1e-9  # of shares of samples, which are at least 1e-7 apart


ROOMY = 120  # columns of a terminal from which on the full table is printed
HEAD = ("method", "score", "activation", "% of full", "time", "tokens/s", "rate", "trained")


@dataclass(frozen=True)
class Table:
    """The results of a model on a task. lines: the texts under `head`.  notes: how it was scored, what was cut.

    narrow_head, narrow_lines: the same for terminals of 80 columns; `narrow_note` says what they leave out.
    """

    title: str
    head: tuple[str, ...]
    lines: list[tuple[str, ...]]
    notes: list[str]
    narrow_head: tuple[str, ...] = ()
    narrow_lines: list[tuple[str, ...]] = field(default_factory=list)
    narrow_note: str = ""


def tables(all_results: Iterable[Result]) -> list[Table]:
    """A table per model, task, shape and setting; its title names these, of the settings those that differ."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in all_results:
        groups.setdefault(_table_of(result.first), []).append(result)
    differing = differing_settings([group[0].first for group in groups.values()])
    return [_table(group, differing) for group in groups.values()]


def differing_settings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The settings beside model, task, shape and precision, in which `rows` differ."""
    return [name for name in _IN_TITLE_IF_DIFFERENT if len({row[name] for row in rows}) > 1]


def _table(group: list[Result], differing: list[str]) -> Table:
    row = group[0].first
    full = next((r.activation_bytes for r in group if r.first["method"] == "full"), None)
    further = [name for name in FURTHER if any(name in result.further for result in group)]
    head = (HEAD[0], HEAD[1], *(name.removeprefix("score_") for name in further), *HEAD[2:])
    narrow_head = (*head[: -len(HEAD) + 2], "activation\nMiB", "% of\nfull", "time\ns", "tokens\n/s", "rate", "trained")
    seeds = sorted({seed for result in group for seed in result.seeds})
    lines, narrow_lines = [], []
    for result in group:
        activation, source = result.activation_bytes, result.first["activation_peak_bytes_source"]
        trainable = result.first["parameters_trainable"]
        share = f"{activation / full:.0%}" if activation is not None and full else "-"
        lines.append((
            result.method,
            result.said_score() + ("" if result.seeds == seeds else f" (seed {_listed(result.seeds)})"),
            *(result.further[name].said() if name in result.further else "-" for name in further),
            "-" if activation is None else f"{activation / 2**20:,.1f} MiB ({source})",
            share,
            f"{result.time_s.mean:,.1f} s" if result.time_s.values else "-",
            f"{result.tokens_per_s.mean:,.0f}" if result.tokens_per_s.values else "-",
            f"{result.learning_rate:g} of {', '.join(f'{rate:g}' for rate in sorted(result.rates))}",
            "-" if trainable is None else f"{trainable:,}",
        ))  # fmt: skip
        tried = len(result.rates)
        narrow_lines.append((
            result.method,
            (result.score.said() if math.isfinite(result.score.mean) else result.said_score())
            + ("" if result.seeds == seeds and not result.undefined else "*"),
            *lines[-1][2 : -len(HEAD) + 2],
            "-" if activation is None else f"{activation / 2**20:,.1f}",
            share,
            f"{result.time_s.mean:,.1f}" if result.time_s.values else "-",
            lines[-1][-3],
            f"{result.learning_rate:g}{f' of {tried}' if tried > 1 else ''}",
            count(trainable),
        ))  # fmt: skip
    micro = "" if row["micro_batch_size"] == row["batch_size"] else f" (micro-batch {row['micro_batch_size']})"
    shape = f"batch {row['batch_size']}{micro} × {row['sequence_length']} tokens"
    rest = "".join(f", {setting_text(name, row[name])}" for name in differing)
    title = f"{row['task']}: {row['model']}, {shape}, {row['precision']}{rest}"
    over_seeds = f"mean ± standard deviation over seeds {_listed(seeds)}"
    scored = f"Score: {row['scored_by']} on validation, {over_seeds}, measured"
    if len(seeds) == 1:
        scored = f"Score: {row['scored_by']} on validation, seed {seeds[0]} alone, measured"
    notes = [f"{scored}. Validation chose the checkpoint and the learning rate as well: it flatters."]
    if (constant := recorded_constant(group)) is not None:
        notes.append(f"The best answer that is always the same scores {constant:.3f}, counted.")
    if row["cuts"]:
        notes.append(f"Not the published sets: {'; '.join(row['cuts'])}.")
    sources = sorted({result.first["activation_peak_bytes_source"] for result in group if result.activation_bytes})
    narrow_notes = [f"Memory is {' and '.join(sources)}"] if sources else []
    narrow_notes += ["a rate is the best of so many"] if any(len(result.rates) > 1 for result in group) else []
    narrow_notes += [f"*: {r.method} has seed {_listed(r.seeds)} alone" for r in group if r.seeds != seeds]
    narrow_notes += [f"*: {r.method} has no score of seed {_listed([*r.undefined])}" for r in group if r.undefined]
    return Table(
        title, head, lines, notes, narrow_head, narrow_lines, f"{'; '.join(narrow_notes)}." if narrow_notes else ""
    )


def _listed(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds))


# Columns that a narrow terminal leaves out, in this order, with their index from the end.
_OMITTABLE = {"tokens/s": -3, "% of full": -5, "trained": -1, "time": -4, "rate": -2, "activation": -6}


def print_quality(frame: DataFrame, out: Console) -> None:
    """Print the tables of results; nothing where nothing was trained."""
    from rich.table import Table as RichTable

    for table in tables(results(frame)):
        out.print(text_of(table.title, style="bold"))
        roomy = out.width >= ROOMY
        head, lines, notes = table.head, table.lines, table.notes
        method_width, least_width = None, 0  # None: as wide as the labels
        if not roomy:
            head, lines = table.narrow_head, table.narrow_lines
            columns = [[*name.splitlines(), *(line[i] for line in lines)] for i, name in enumerate(head)]
            widths = {i: 1 + max(map(len, column)) for i, column in enumerate(columns)}
            omitted = left_out(widths, {name: index % len(head) for name, index in _OMITTABLE.items()}, out.width)
            shown = [i for i in range(len(head)) if i not in {_OMITTABLE[name] % len(head) for name in omitted}]
            head, lines = tuple(head[i] for i in shown), [tuple(line[i] for i in shown) for line in lines]
            numbers = sum(widths[i] for i in shown[1:])
            method_width = max(NARROWEST, min(widths[0] - 1, out.width - numbers - 1))
            least_width = method_width + 1 + numbers
            omission = [f"No room at this width for {', '.join(omitted)}."] if omitted else []
            notes = [table.narrow_note, *omission, *notes]
        drawn = RichTable(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for place, name in enumerate(head):
            justify: JustifyMethod = "left" if place == 0 else "right"
            width = method_width if place == 0 else None
            drawn.add_column(name, justify=justify, overflow="fold", no_wrap=place > 0, width=width)
        for line in lines:
            drawn.add_row(*map(text_of, line))
        print_table(drawn, out, least_width)
        for note in notes:
            out.print(text_of(note))
