"""The comparison table on the terminal: which method costs what, at the same shape and setting."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

from meftbench.catalogue.labels import Part
from meftbench.catalogue.metrics import METRICS
from meftbench.records.store import Run
from meftbench.report.columns import BY_METRIC, COLUMNS, SHOWN, in_unit, start_of, unit_of_bytes
from meftbench.report.console import text_of
from meftbench.report.render.text_tables import TextTable
from meftbench.report.results import (
    NARROWEST,
    Group,
    frame_of,
    groups,
    left_out,
    methods_in_order,
    parts_by_method,
    rows_of,
    share_of_full,
    sources,
    taken,
)
from meftbench.report.views.best import best_levers
from meftbench.report.views.endings import collapses, ending, failures, shared_cores
from meftbench.report.views.scores import print_quality, untrained

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console

_METHOD_WIDTH = 24  # characters of the method column at most; a wider one would push the numbers off the screen
_MARK = {"measured": "m", "counted": "c", "predicted": "p"}


def print_summary(run: Run, console: Console | None = None, frame: DataFrame | None = None) -> None:
    """Print the tables of a run, then a line for each cell in which something went wrong.

    frame: of the run, with at least the metrics of the tables, where the caller has made one.
    """
    from rich.console import Console

    out = console or Console()
    if not run.records:
        out.print(text_of("no cell has finished"))
        return
    whole = frame_of(run, _table_metrics()) if frame is None else frame
    print_quality(whole, out)
    steps = untrained(whole)
    shares = share_of_full(steps)
    table_groups = groups(steps)
    for group in table_groups:
        out.print(text_of(group.title, style="bold"))
        out.print(text_of(caption(group.frame)))
        _table(group, shares, out.width).print(out)
        if best := best_levers(group):
            largest = max(best.comparisons, key=lambda comparison: comparison.tokens)
            for sentence in [largest.sentence(), *best.unequal]:
                out.print(text_of(sentence, overflow="fold"))
    if len(table_groups) > 1:
        out.print(text_of("Between tables more than the method differs: do not rank across them."))
    out.print(text_of(ending(run)))
    for line in [*shared_cores(run), *collapses(run), *failures(run)]:
        out.print(text_of(line, overflow="fold"))


def _table_metrics() -> set[str]:
    """The metrics that the tables here show or that decide what is said of them: those of steps and of trainings."""
    of_training = {name for name, kind in METRICS.items() if kind.unit in _TRAINING_UNITS}
    return {*BY_METRIC, *SHOWN, *metrics_with_columns(), *of_training, "training_time_s", "collapse"}


_TRAINING_UNITS = ("score", "loss", "rows", "step", "token", "token/second")


def caption(frame: DataFrame) -> str:
    """Which columns are counted, measured or predicted, and at what equal settings methods are compared."""
    columns = {
        "memory": ("activation_peak_bytes", "peak_allocated_bytes"),
        "time": ("step_time_s", "tokens_per_s"),
        "errors": ("reconstruction_rel_max", "gradient_rel_max"),
        "loss": ("starting_loss", "pretrained_loss"),
    }
    parts = []
    for name, metrics in columns.items():
        known = sorted({source for metric in metrics if taken(frame, metric) for source in sources(frame, metric)})
        if known:
            parts.append(f"{name} {' and '.join(known)}")
    return f"{', '.join(parts) or 'nothing measured'}; compared at equal batch, micro-batch and length"


_SHARE = "share"  # the column that has the share of `full`, which is no metric
_SHARE_HEAD = "% of\nfull"
_HEADS = {column.metric: column.narrow_head("{bytes}") for column in COLUMNS if "terminal" in column.views}
_HEADS["starting_loss"] = "start loss\n(pre-tr.)"
# The columns in their order: the share beside the memory that it is of, the losses before what is trained.
_PLACES = list(_HEADS)
_PLACES.remove("starting_loss")
_PLACES.insert(_PLACES.index("peak_allocated_bytes"), _SHARE)
_PLACES.insert(_PLACES.index("parameters_trainable"), "starting_loss")
# Columns that a narrow terminal leaves out, in this order: at equal batch and length tokens/s repeats the step time,
# and the share the activation memory. A number is never cut: its column is there or it is not.
_OMITTABLE = {
    "tokens/s": "tokens_per_s",
    "% of full": _SHARE,
    "peak": "peak_allocated_bytes",
    "trained": "parameters_trainable",
    "of it grads": "activation_gradients_bytes",
    "start loss": "starting_loss",
    "step": "step_time_s",
    "gradient error": "gradient_rel_max",
    "recon. error": "reconstruction_rel_max",
}


def _table(group: Group, shares: dict[str, float], width: int) -> TextTable:
    """The cells of a group, by shape and method, for a terminal of `width` characters."""
    frame = group.frame
    size, unit = unit_of(frame)
    heads = [_SHARE_HEAD if name == _SHARE else _HEADS[name].format(bytes=unit) for name in _PLACES]
    of_metrics = metrics_with_columns()
    omittable = {METRICS[name].column or name: len(heads) + place for place, name in enumerate(of_metrics)}
    omittable |= {name: _PLACES.index(metric) for name, metric in _OMITTABLE.items()}
    heads += [_heading(name, unit) for name in of_metrics]
    mixed = {metric for metric in SHOWN if len(sources(frame, metric)) > 1}
    order = methods_in_order(frame)
    in_lines = {method: _in_lines(parts) for method, parts in parts_by_method(frame).items()}
    # Rows are mappings of all columns that there are, so those that are not shown are left out.
    names = [f"{name}{part}" for name in {*BY_METRIC, *of_metrics} for part in ("", "_source")]
    names += ["status", "cell_id", "method", "batch_size", "micro_batch_size", "sequence_length"]
    rows = list(rows_of(frame[[name for name in names if name in frame]]))
    texts = dict(zip(map(id, rows), _texts(rows, shares, size, mixed, of_metrics), strict=True))
    # A column without any value is left out, since it would take the room of the others.
    shown = [i for i in range(len(heads)) if i == 0 or any(text[i] not in ("-", "") for text in texts.values())]
    widest = max(len(line) for lines in in_lines.values() for line in lines.splitlines())
    method_width = min(max(15, widest), _METHOD_WIDTH + 1)  # the longest name of a lever, and its indent
    method_width = max(NARROWEST, min(method_width, width - 12))  # beside the activation memory, whatever the width
    lines = {i: [*heads[i].splitlines(), *(text[i] for text in texts.values())] for i in shown}
    widths = {i: max(map(len, lines[i])) for i in shown}

    def needed(gap: int) -> int:
        return method_width + sum(widths[i] + gap for i in shown)

    gap = 2 if width >= 100 and needed(2) <= width else 1
    omitted = left_out({i: widths[i] + gap for i in shown}, omittable, width - method_width)
    shown = [i for i in shown if i not in {omittable[name] for name in omitted}]
    place = {method: index for index, method in enumerate(order)}
    by_shape: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        shape = row["batch_size"], row["micro_batch_size"], row["sequence_length"]
        by_shape.setdefault(shape, []).append(row)
    lines_of = {method: _within(method_width, lines) for method, lines in in_lines.items()}
    table_rows: list[list[str]] = []
    for shape, of_shape in by_shape.items():
        table_rows.append([_short_shape(*shape)])
        for row in sorted(of_shape, key=lambda row: place[row["method"]]):
            table_rows.append([lines_of[row["method"]], *(texts[id(row)][index] for index in shown)])
    notes = ["m measured, c counted, p predicted"] if mixed else []
    notes += [f"no room at this width for {', '.join(omitted)}"] if omitted else []
    table_heads = ["batch × tokens,\nmethod", *(heads[index] for index in shown)]
    return TextTable(table_heads, table_rows, gap, method_width, needed(gap), "; ".join(notes))


def _short_shape(batch: int, micro_batch: int, length: int) -> str:
    return f"{batch}{f' (mb{micro_batch})' if micro_batch != batch else ''} × {length}"


def _in_lines(parts: Sequence[Part]) -> str:
    """A method's settings under its name, so that a long label does not push the numbers off the screen."""
    method, *levers = parts
    beside = [method.name, *(lever.label for lever in levers[:1])]
    beside = beside if len(" +".join(beside)) <= _METHOD_WIDTH else beside[:1]
    lines = ["+".join(beside)]
    for lever in levers[len(beside) - 1 :]:
        whole = f"  +{lever.label}"
        below = lever.texts() if len(whole) >= _METHOD_WIDTH else []
        lines += [f"  +{lever.name}", *(f"   {setting}" for setting in below)] if below else [whole]
    return "\n".join(f" {line}" for line in [*lines, *(f" {setting}" for setting in method.texts())])


def _within(width: int, lines: str) -> str:
    """The lines of a label within `width`. A line that is too wide loses its indent, or breaks before its value."""
    fitted: list[str] = []
    for line in lines.splitlines():
        name, equals, value = line.strip().partition("=")
        if len(line) <= width or not equals:
            fitted.append(line)
        elif len(line.strip()) <= width:
            fitted.append(line.strip())
        else:
            fitted += [f"{name}=", f" {value}"]
    return "\n".join(fitted)


def unit_of(frame: DataFrame) -> tuple[int, str]:
    """GiB where the largest peak is 10 GiB or more, else MiB: one unit for a whole column, so that it compares."""
    return unit_of_bytes(frame["peak_allocated_bytes"].astype(float).max())


def _texts(
    rows: Sequence[dict[str, Any]], shares: dict[str, float], size: int, mixed: set[str], of_metrics: Sequence[str]
) -> list[tuple[str, ...]]:
    """The texts of each row, but for its method; of_metrics: the metrics that have a column of their own."""
    columns: list[list[str]] = []
    for name in _PLACES:
        if name == _SHARE:
            known = [shares.get(row["cell_id"]) for row in rows]
            columns.append(["-" if share is None else f"{share:.1%}".rstrip("%") for share in known])
        elif name == "starting_loss":
            columns.append([start_of(row) for row in rows])
        else:
            text = BY_METRIC[name].text
            texts = [text(row.get(name), size) for row in rows]
            columns.append([*map(_marked, texts, rows, repeat(name))] if name in mixed else texts)
    columns += [[in_unit(row.get(name), METRICS[name].unit, size) for row in rows] for name in of_metrics]
    blanks = [""] * (len(columns) - 1)
    return [
        texts if row["status"] == "ok" else (row["status"], *blanks)
        for row, texts in zip(rows, zip(*columns, strict=True), strict=True)
    ]


def _marked(text: str, row: dict[str, Any], metric: str) -> str:
    """The text with the mark of the source, in a column of several sources."""
    return text if row[metric] is None else f"{text} {_MARK[row[f'{metric}_source']]}"


def metrics_with_columns() -> list[str]:
    """Metrics that have a column of their own, as their `Kind.column` says."""
    return [name for name, kind in METRICS.items() if kind.column]


def _heading(metric: str, unit: str) -> str:
    """A heading on two lines, like the others: the words, and the unit of a size or time."""
    column, units = METRICS[metric].column or metric, {"byte": unit, "second": "ms"}
    unit_text = units.get(METRICS[metric].unit)
    return f"{column}\n{unit_text}" if unit_text else column.replace(" ", "\n", 1)
