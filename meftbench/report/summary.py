"""The comparison table on the terminal: which method costs what, at the same shape and setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from meftbench.catalogue.metrics import METRICS, SHARED_CORES
from meftbench.plan.training import NOT_CHOSEN
from meftbench.records.outcome import as_number, outcomes
from meftbench.records.record import Record
from meftbench.records.store import Run
from meftbench.report.scores import print_quality, untrained
from meftbench.report.tables import (
    NARROWEST,
    Group,
    count,
    detail_of,
    frame_of,
    groups,
    left_out,
    methods_in_order,
    parts_of,
    print_table,
    rows_of,
    share_of_full,
    sources,
    taken,
)
from meftbench.units import GiB, MiB, format_bytes

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console
    from rich.table import Table

_METHOD_WIDTH = 24  # columns of the methods at most; more would push the numbers off the screen
_MARK = {"measured": "m", "counted": "c", "predicted": "p"}


def print_summary(run: Run, console: Console | None = None) -> None:
    """Print the table of a run; then what went wrong in each cell that did not end ok, a line each."""
    from rich.console import Console
    from rich.text import Text

    out = console or Console()
    if not run.records:
        out.print(Text("no cell has finished"))
        return
    whole = frame_of(run)
    print_quality(whole, out)
    frame = untrained(whole)
    shares = share_of_full(frame)
    found = groups(frame)
    for group in found:
        out.print(Text(group.title, style="bold"))
        out.print(Text(caption(group.frame)))
        table, least = _table(group, shares, out.width)
        print_table(table, out, least)
    if len(found) > 1:
        out.print(Text("Between tables more than the method differs: do not rank across them."))
    out.print(Text(ending(run)))
    for line in [*shared_cores(run), *collapses(run), *failures(run)]:
        out.print(Text(line, overflow="fold"))


def caption(frame: DataFrame) -> str:
    """Which columns are counted, measured, predicted, and what is compared with what."""
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


def ending(run: Run) -> str:
    """`12 cells: 10 ok, 1 oom, 1 error`."""
    statuses = [outcome.status for outcome in outcomes(run)]
    counts = ", ".join(
        f"{statuses.count(status)} {status}" for status in dict.fromkeys(sorted(statuses, key=_first_ok))
    )
    beaten = sum(outcome.worst.status_detail.get("type") == NOT_CHOSEN for outcome in outcomes(run))
    why = f" ({beaten} at a learning rate that another beat)" if beaten else ""
    return f"{len(statuses)} cell{'s' * (len(statuses) != 1)}: {counts}{why}"


def _first_ok(status: str) -> int:
    return ("ok", "oom", "timeout", "error", "skipped").index(status)


def failures(run: Run) -> list[str]:
    """A line for each cell that did not end ok or has no score: its label, how it ended, why."""
    bad = [outcome.worst for outcome in outcomes(run) if outcome.status != "ok"]
    # Of learning rates that another beat, the table of scores says which were tried.
    bad = [record for record in bad if record.status_detail.get("type") != NOT_CHOSEN]
    ended = [f"{' '.join(record.label.split())}: {record.status}{_why(record)}" for record in bad]
    done = [outcome for outcome in outcomes(run) if outcome.status == "ok" and outcome.cell.get("training")]
    absent = [(outcome.label, score.absent) for outcome in done if (score := outcome.metric("score"))]
    return ended + [f"{' '.join(label.split())}: no score ({why})" for label, why in absent if why is not None]


def shared_cores(run: Run) -> list[str]:
    """A line where cells were timed while other processes held the cores."""
    waited = [as_number(record.value("cpu_wait_share")) for record in run.records]
    found = [share for share in waited if share is not None and share > SHARED_CORES]
    if not found:
        return []
    what = f"{len(found)} of {len(waited)} cells were timed while other processes held the cores (they waited up to"
    return [f"{what} {max(found):.0%} of the time): rerun them on a quiet machine before comparing times"]


def collapses(run: Run) -> list[str]:
    """A line for each cell whose loss or backward pass broke down, though it ended ok: its label and what happened."""
    found = [(outcome.label, outcome.metric("collapse")) for outcome in outcomes(run) if outcome.status == "ok"]
    return [f"{' '.join(label.split())}: {metric.value}" for label, metric in found if metric and metric.value]


def _why(record: Record) -> str:
    asked = record.status_detail.get("requested_bytes")
    parts = [f"asked for {format_bytes(asked)}"] if isinstance(asked, int) else []
    parts += [detail_of(record)] if detail_of(record) else []
    return f" ({'; '.join(parts)})" if parts else ""


# Columns that a narrow terminal does without, the first one first: at equal batch and length tokens/s is the step time
# again, and a share the activation memory. A number is never cut: its column is there or it is not.
_SPARED = {
    "tokens/s": 5,
    "% of full": 2,
    "peak": 3,
    "trained": 9,
    "of it grads": 1,
    "start loss": 8,
    "step": 4,
    "gradient error": 7,
    "recon. error": 6,
}


def _table(group: Group, shares: dict[str, float], width: int) -> tuple[Table, int]:
    """The table, and the characters that it needs."""
    from rich.table import Table
    from rich.text import Text

    frame = group.frame
    size, unit = unit_of(frame)
    heads = [f"activation\n{unit}", "of it\ngrads", "% of\nfull", f"peak\n{unit}", "step\nms", "tokens\n/s"]
    heads += ["recon.\nerror", "gradient\nerror", "start loss\n(pre-tr.)", "trained"]
    of_metrics = metrics_with_columns()
    spare = {METRICS[name].column or name: len(heads) + place for place, name in enumerate(of_metrics)} | _SPARED
    heads += [_heading(name, unit) for name in of_metrics]
    mixed = {metric for metric in SHOWN if len(sources(frame, metric)) > 1}
    order = methods_in_order(frame)
    rows = list(rows_of(frame))
    texts = {id(row): _cells(row, shares, size, mixed) for row in rows}
    # A column without a single value says nothing and takes the room of those that do.
    shown = [i for i in range(len(heads)) if i == 0 or any(text[i] not in ("-", "") for text in texts.values())]
    widest = max(len(line) for row in rows for line in _in_lines(row["method"]).splitlines())
    methods = min(max(15, widest), _METHOD_WIDTH)
    methods = max(NARROWEST, min(methods, width - 12))  # beside the activation memory, whatever the width
    lines = {i: [*heads[i].splitlines(), *(text[i] for text in texts.values())] for i in shown}
    widths = {i: max(map(len, lines[i])) for i in shown}

    def needed(gap: int) -> int:
        return methods + sum(widths[i] + gap for i in shown)

    gap = 2 if width >= 100 and needed(2) <= width else 1
    spared = left_out({i: widths[i] + gap for i in shown}, spare, width - methods)
    shown = [i for i in shown if i not in {spare[name] for name in spared}]
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("batch × tokens,\nmethod", overflow="fold", min_width=methods)
    for index in shown:
        table.add_column(heads[index], justify="right", no_wrap=True)
    for shape in dict.fromkeys((r["batch_size"], r["micro_batch_size"], r["sequence_length"]) for r in rows):
        here = [r for r in rows if (r["batch_size"], r["micro_batch_size"], r["sequence_length"]) == shape]
        table.add_row(Text(_short(*shape), style="italic"))
        for row in sorted(here, key=lambda r: order.index(r["method"])):
            table.add_row(
                Text(_within(methods, _in_lines(row["method"]))), *(Text(texts[id(row)][index]) for index in shown)
            )
    notes = ["m measured, c counted, p predicted"] if mixed else []
    notes += [f"no room at this width for {', '.join(spared)}"] if spared else []
    table.caption = "; ".join(notes) or None
    return table, needed(gap)


def _short(batch: int, micro_batch: int, length: int) -> str:
    return f"{batch}{f' (mb{micro_batch})' if micro_batch != batch else ''} × {length}"


def _in_lines(method: str) -> str:
    """A method's settings under its name, so that a long label does not push the numbers off the screen."""
    name, settings, levers = parts_of(method)
    beside = levers[:1] if len(" +".join([name, *levers[:1]])) <= _METHOD_WIDTH else []
    lines = ["+".join([name, *beside]), *(f"  +{lever}" for lever in levers[len(beside) :])]
    return "\n".join(f" {line}" for line in [*lines, *(f" {setting}" for setting in settings)])


def _within(width: int, lines: str) -> str:
    """The lines of a label. What is too wide loses its indent, then breaks before its value: no number folds."""
    found: list[str] = []
    for line in lines.splitlines():
        name, equals, value = line.strip().partition("=")
        if len(line) <= width or not equals:
            found.append(line)
        elif len(line.strip()) <= width:
            found.append(line.strip())
        else:
            found += [f"{name}=", f" {value}"]
    return "\n".join(found)


SHOWN = (
    "activation_peak_bytes",
    "peak_allocated_bytes",
    "step_time_s",
    "tokens_per_s",
    "reconstruction_rel_max",
    "gradient_rel_max",
)


def unit_of(frame: DataFrame) -> tuple[int, str]:
    """GiB where the largest peak has ten of them, else MiB: one unit for a whole column, so that it can be compared."""
    largest = frame["peak_allocated_bytes"].astype(float).max()
    return (GiB, "GiB") if largest >= 10 * GiB else (MiB, "MiB")


def _cells(row: dict[str, Any], shares: dict[str, float], size: int, mixed: set[str]) -> Sequence[str]:
    if row["status"] != "ok":
        return [row["status"], *[""] * (9 + len(metrics_with_columns()))]

    def told(metric: str, text: str) -> str:
        return f"{text} {_MARK[row[f'{metric}_source']]}" if metric in mixed and row[metric] is not None else text

    share = shares.get(row["cell_id"])
    return [
        told("activation_peak_bytes", number(row["activation_peak_bytes"], size)),
        number(row.get("activation_gradients_bytes"), size),
        f"{share:.1%}".rstrip("%") if share is not None else "-",
        told("peak_allocated_bytes", number(row["peak_allocated_bytes"], size)),
        told("step_time_s", number(row["step_time_s"], 1e-3)),
        told("tokens_per_s", "-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:,.0f}"),
        told("reconstruction_rel_max", error(row["reconstruction_rel_max"])),
        told("gradient_rel_max", error(row["gradient_rel_max"])),
        start_of(row),
        count(row["parameters_trainable"]),
        *(_value(row.get(name), METRICS[name].unit, size) for name in metrics_with_columns()),
    ]


def metrics_with_columns() -> list[str]:
    """Metrics whose entry asks for a column of its own (`Kind.column`)."""
    return [name for name, kind in METRICS.items() if kind.column]


def _heading(metric: str, unit: str) -> str:
    """On two lines, as the others: the words, and the unit of what is a size or a time."""
    column, units = METRICS[metric].column or metric, {"byte": unit, "second": "ms"}
    shown = units.get(METRICS[metric].unit)
    return f"{column}\n{shown}" if shown else column.replace(" ", "\n", 1)


def _value(value: Any, unit: str, size: int) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if unit in ("byte", "second"):
        return number(value, size if unit == "byte" else 1e-3)
    return f"{value:,}" if isinstance(value, int) else error(value)


def number(value: float | None, size: float) -> str:
    """A value in units of `size`, with as many digits as it needs; "-" where there is none."""
    if value is None:
        return "-"
    scaled = value / size
    if scaled >= 1000:
        return f"{scaled:,.0f}"
    return f"{scaled:,.1f}" if scaled >= 10 else f"{scaled:.2f}"


def loss(value: float | None) -> str:
    """A loss to two decimals; "-" not taken."""
    return f"{value:.2f}" if value is not None and math.isfinite(value) else error(value)


def start_of(row: dict[str, Any]) -> str:
    """`15.26 (3.08)`: the loss before training, and in brackets that of the pre-trained model; "-" not taken."""
    if row.get("starting_loss") is None:
        return "-"
    return f"{loss(row['starting_loss'])} ({loss(row.get('pretrained_loss'))})"


def error(value: float | None) -> str:
    """A relative error: "0" means exactly zero, "-" not taken; what is not finite is a result: "∞" and "NaN"."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    return (
        f"{value:.3g}"
        if 0.01 <= value < 1000
        else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    )
