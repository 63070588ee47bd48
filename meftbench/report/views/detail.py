"""One record as text for people: its memory metrics, what the peak consists of, phases, errors, how to rerun it."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meftbench.catalogue.metrics import BREAKDOWN, METRICS, SHARED_CORES
from meftbench.escapes import visible
from meftbench.plan.axes import IN_LABEL
from meftbench.plan.factories import OWN_ATTENTION
from meftbench.records.outcome import as_number, said
from meftbench.records.record import Metric, Record
from meftbench.records.store import Run
from meftbench.report.console import text_of, wrapped
from meftbench.report.frame_columns import with_used
from meftbench.verdicts.growth import module_name, names_modules

if TYPE_CHECKING:
    from rich.console import Console

# Smallest first: each includes the one before it. The text says what it is good for.
LADDER = {
    "peak_requested_bytes": "what the tensors need; for comparing with theory",
    "peak_active_bytes": "with blocks that wait for another stream",
    "peak_allocated_bytes": "with rounding to blocks; for comparing methods",
    "peak_reserved_bytes": "with the allocator's cache; what must fit beside the context",
    "process_device_bytes": "with context and kernels; what the GPU must have free",
    "device_used_bytes": "with other processes; for spotting neighbours",
}
_STEP = (
    "activation_peak_bytes",
    "activation_gradients_bytes",
    "baseline_allocated_bytes",
    "saved_bytes",
    "peak_phase",
    "optimizer_peak_bytes",
    "first_step_peak_allocated_bytes",
    "drift_bytes_per_step",
    "paper_meft_activation_bytes",
)
_TRAINING = (
    *("score", "score_test", "score_mismatched", "accuracy", "f1", "matthews", "pearson", "spearman"),
    *("validation_loss", "training_loss", "best_step", "training_steps", "training_tokens", "training_time_s"),
    "training_tokens_per_s",
)
_START = ("starting_loss", "pretrained_loss", "starting_point_shift")
NARROW = 80  # below this many columns of the terminal a record is printed without tables
_MOST_EVALUATIONS = 12
MODULES_SHOWN = 8  # of the modules that hold most at the peak
# Above this relative error the recomputed activations are not those of the forward pass.
NOISE = 1e-3
# A starting loss above this multiple of the pre-trained model's gets a warning.
FAR_START = 1.1


@dataclass(frozen=True)
class Section:
    """A titled part of a record. rows: name, value with unit and source, meaning."""

    title: str
    rows: list[tuple[str, str, str]]


def sections(record: Record) -> list[Section]:
    """The record as sections; those without rows are left out."""
    ladder = [(n, value_text(n, record.metrics[n]), why) for n, why in LADDER.items() if n in record.metrics]
    used = {*_STEP, *LADDER, *BREAKDOWN, *_TRAINING, *_START, "peak_buffers", "learning_curve", "timeline"}
    all_sections = [
        Section("The training", list(_rows(record, _TRAINING))),
        Section("Validation during the training", list(_curve(record))),
        Section("Peaks, each with what the one before leaves out", ladder),
        Section("A step", list(_rows(record, _STEP))),
        *peak_sections(record),
        Section("Peak in each phase", list(_phases(record))),
        Section("The starting point, before any training", list(_rows(record, _START))),
        Section("Reconstruction error of each layer", list(_layers(record))),
        Section("Everything else", list(_rows(record, tuple(name for name in METRICS if name not in used)))),
    ]
    return [section for section in all_sections if section.rows]


def peak_sections(record: Record) -> list[Section]:
    """What the memory consists of at the peak: by category, buffer by buffer, and by module of the model; those without
    rows are left out."""
    found = [
        Section("What the peak consists of", list(_breakdown(record))),
        Section("What is alive at the peak of forward and backward", list(_buffers(record))),
        Section("Of that, the modules of the model that hold most", list(_modules(record))),
    ]
    return [section for section in found if section.rows]


def _buffers(record: Record) -> Iterator[tuple[str, str, str]]:
    """A row per buffer, the largest first: its operation, its bytes, and its category, shape, module and place in the
    code."""
    for row in _listed(record):
        times = f"{row['count']} of them, " if row["count"] > 1 else ""
        shape = " × ".join(f"{size:,}" for size in row["shape"]) or "one"
        module = row.get("module")
        of = "" if module is None else f", of {module_name(module)}"
        meaning = f"{row['category']}: {times}{shape} {row['dtype']}{of}, in {row['place']}"
        yield row["op"], f"{said(row['bytes'], 'byte')} ({record.metrics['peak_buffers'].source})", meaning


def _modules(record: Record) -> Iterator[tuple[str, str, str]]:
    """A row for each of the modules whose buffers are largest, with its part of what is listed, by category."""
    rows = _listed(record)
    if not names_modules(rows):
        return
    whole = sum(row["bytes"] for row in rows)
    by_module: dict[str | None, Counter[str]] = defaultdict(Counter)
    for row in rows:
        by_module[row.get("module")][row["category"]] += row["bytes"]
    largest = sorted(by_module.items(), key=lambda item: (-item[1].total(), item[0] or ""))
    for module, categories in largest[:MODULES_SHOWN]:
        size = categories.total()
        name = "no module" if module is None else module_name(module)
        parts = ", ".join(f"{category} {said(part, 'byte')}" for category, part in categories.most_common())
        value = f"{said(size, 'byte')} ({record.metrics['peak_buffers'].source})"
        yield name, value, f"{size / whole:.0%} of these buffers: {parts}"


def _listed(record: Record) -> list[dict[str, Any]]:
    """The rows of `peak_buffers`; none where the record has no such list."""
    value = record.value("peak_buffers")
    return value if isinstance(value, list) else []


def value_text(name: str, metric: Metric) -> str:
    """A value with unit and source, `412.0 MiB (counted)`, or `absent: no driver`."""
    if metric.absent is not None:
        return f"absent: {metric.absent}"
    value = as_number(metric.value)
    if value is None:
        text = _list_text(name, metric.value) if isinstance(metric.value, list) else str(metric.value)
        return f"{text} ({metric.source})"
    unit = METRICS[name].unit
    spread = ""
    if metric.min is not None and metric.max is not None and metric.min != metric.max:
        spread = f", {said(metric.min, unit)} to {said(metric.max, unit)}"
    unit_suffix = f" {unit}" if unit in ("ratio", "celsius", "watt", "megahertz", "cosine") else ""
    return f"{said(value, unit)}{unit_suffix} ({metric.source}{spread})"


def _list_text(name: str, values: list[Any]) -> str:
    """A list as a row has it: the bytes of each rank, words, or how many entries there are."""
    if name == "peak_memory_by_rank" and values and all(type(value) in (int, float) for value in values):
        return ", ".join(f"rank {rank} {said(nbytes, 'byte')}" for rank, nbytes in enumerate(values))
    if values and all(isinstance(value, str) for value in values):
        return ", ".join(values)
    one, several = _ENTRIES.get(name, ("entry", "entries"))
    return f"{len(values)} {one if len(values) == 1 else several}"


_ENTRIES = {"learning_curve": ("evaluation", "evaluations"), "reconstruction_rel": ("layer", "layers")}


def warnings(record: Record) -> list[str]:
    """What a reader must know before trusting the numbers of a record, as sentences."""
    sentences: list[str] = []

    def number(name: str) -> float | None:
        return as_number(record.value(name))

    if number("device_shared"):
        sentences.append("another process used the device: memory outside torch and time are not this cell's alone")
    waited = number("cpu_wait_share")
    if waited is not None and waited > SHARED_CORES:
        sentences.append(
            f"its threads waited for a core {waited:.0%} of the time while others held them: the time is too long"
        )
    reasons = record.value("throttle_reasons")
    if reasons and reasons != "none":
        sentences.append(f"the clocks were held down while timing ({_words(reasons)}): the time is too long")
    if number("alloc_retries"):
        sentences.append("the allocator had to free its cache and try again: at the edge of memory, time is distorted")
    if record.status_detail.get("type") == "lever-not-engaged":
        sentences.append(f"lever not engaged: {record.status_detail.get('message', 'it was asked for, not observed')}")
    used, requested = record.cell.get("attention_used"), record.cell.get("attention_requested")
    if (
        used
        and requested not in (None, OWN_ATTENTION)
        and used != requested
        and not str(used).startswith(f"{requested}")
    ):
        sentences.append(f"attention {requested} was asked for, {used} was used")
    error = number("reconstruction_rel_max")
    if error is not None and not error <= NOISE:
        sentences.append(
            f"reconstruction error {said(error, 'ratio')}: what is recomputed is not what was computed, "
            "and the gradients of the lower adapters are noise"
        )
    start, pretrained = number("starting_loss"), number("pretrained_loss")
    if start is not None and pretrained is not None and not start <= FAR_START * pretrained:
        sentences.append(
            f"start loss {start:.2f} ({pretrained:.2f}): before any training the model with the method is far from "
            "the pre-trained one in brackets, whose knowledge is lost at the start"
        )
    drift = number("drift_bytes_per_step")
    if drift:
        sentences.append(f"memory grows by {said(drift, 'byte')} each step: something is not freed")
    if number("overflow_events"):
        sentences.append("NaN or infinite values occurred in streams or gradients")
    return sentences


def command(run: Run, record: Record) -> str:
    """The command line that runs this cell again."""
    suite = run.suite.get("source") or run.name
    device = record.cell.get("device", "counted")
    if command_line := run.suite.get("command"):
        learning_rate = (record.cell.get("training") or {}).get("learning_rate")
        return f"meftbench {command_line} --learning-rate {learning_rate} --seed {record.cell.get('seed', 0)}"
    allowed = " --allow-code" if record.cell.get("own_code") else ""
    selection = f"--where cell_id={record.cell_id} --device {shlex.quote(device)}"
    return f"meftbench run {shlex.quote(str(suite))} {selection}{allowed}"


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _rows(record: Record, names: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    for name in names:
        if name in record.metrics:
            yield name, value_text(name, record.metrics[name]), METRICS[name].meaning


def _breakdown(record: Record) -> Iterator[tuple[str, str, str]]:
    total = as_number(record.value("peak_allocated_bytes"))
    for name in BREAKDOWN:
        value = as_number(record.value(name))
        if value:
            share = f", {value / total:.1%} of the peak" if total else ""
            yield name, f"{value_text(name, record.metrics[name])}{share}", METRICS[name].meaning


def _phases(record: Record) -> Iterator[tuple[str, str, str]]:
    metric = record.metrics.get("peak_allocated_bytes")
    for phase, peak in (metric.phases or {}).items() if metric else ():
        yield phase, f"{said(peak, 'byte')} ({metric.source if metric else ''})", "peak allocated in this phase"


def _curve(record: Record) -> Iterator[tuple[str, str, str]]:
    """A row per evaluation; of a long curve about _MOST_EVALUATIONS, the first and the last among them."""
    metric = record.metrics.get("learning_curve")
    curve = metric.value if metric is not None and isinstance(metric.value, list) else []
    stride = max(1, -(-(len(curve) - 1) // _MOST_EVALUATIONS))
    for index, (step, loss, score) in enumerate(curve):
        if (len(curve) - 1 - index) % stride == 0 or index == 0:
            shown = "undefined" if score is None else f"{score:.4g}"
            yield f"step {step}", f"{shown} ({metric.source if metric else ''})", f"score; loss {loss:.4g}"


def _layers(record: Record) -> Iterator[tuple[str, str, str]]:
    metric = record.metrics.get("reconstruction_rel")
    if metric is None or not isinstance(metric.value, list):
        return
    for layer, streams in enumerate(metric.value):
        errors = ", ".join("0 (bit-identical)" if error == 0 else f"{error:.2g}" for error in streams)
        yield f"layer {layer}", f"{errors} ({metric.source})", "first stream, second stream"


def print_records(run: Run, records: list[Record], traceback: bool = False, console: Console | None = None) -> None:
    """Print records for people. traceback: print the recorded traceback of each as well, or that there is none."""
    from rich.console import Console

    out = console or Console()
    for record in records:
        out.print(text_of(record.label, style="bold"), text_of(f"cell {record.cell_id}, repeat {record.repeat}"))
        for line in headline(record):
            out.print(text_of(line))
        for sentence in warnings(record):
            out.print(text_of(f"warning: {sentence}", style="yellow"))
        for section in sections(record):
            _print_section(section, out)
        if traceback:
            out.print(text_of(str(record.status_detail.get("traceback") or "no traceback was recorded")))
        out.print(text_of(f"again: {command(run, record)}"), soft_wrap=True)


def _print_section(section: Section, out: Console) -> None:
    """Print a table; on a narrow terminal name, value and meaning of a row stand on lines of their own, uncut."""
    from rich.padding import Padding
    from rich.table import Table

    if out.width < NARROW:
        out.print(text_of(section.title, style="italic"))
        for name, value, meaning in section.rows:
            room = max(1, out.width - 3)
            out.print(Padding(text_of(wrapped(visible(name), room)), (0, 0, 0, 1)))
            for text, style in ((value, ""), (meaning, "dim")):
                out.print(Padding(text_of(wrapped(visible(text), room), style=style), (0, 0, 0, 3)))
        return
    table = Table(title=section.title, title_justify="left", title_style="italic", box=None, show_header=False)
    widths = _widths(section, out.width)
    for width, style in zip(widths, ("", "", "dim"), strict=True):
        table.add_column(overflow="fold", width=width, style=style)
    for row in section.rows:
        table.add_row(*(text_of(wrapped(visible(text), width)) for text, width in zip(row, widths, strict=True)))
    out.print(table)


_NAME_WIDTH, _VALUE_WIDTH = 31, 24  # at least, where a name or value needs it: the longest name of a metric in one line
_GAPS = 6  # a space before and behind each of three columns


def _widths(section: Section, room: int) -> tuple[int, int, int]:
    """Characters of the columns name, value and meaning: what they need, in a table of at most `room` characters."""
    names, values, meanings = (max(map(len, column)) for column in zip(*section.rows, strict=True))
    name = min(names, max(_NAME_WIDTH, room // 4))
    value = min(values, max(_VALUE_WIDTH, (room - _GAPS - name) // 2))
    return name, value, min(max(1, meanings), room - _GAPS - name - value)


def headline(record: Record) -> list[str]:
    """Lines that say how the cell ended and with what settings it ran."""
    detail = {k: v for k, v in record.status_detail.items() if k not in ("traceback", "message") and v is not None}
    facts = ", ".join(f"{key} {said(v, 'byte') if key.endswith('_bytes') else v}" for key, v in detail.items())
    message = " ".join(str(record.status_detail.get("message", "")).split())
    ended = ": ".join(part for part in (record.status, message) if part) + (f" ({facts})" if facts else "")
    cell = record.cell
    names = (*with_used(IN_LABEL), "device", "weights")
    settings = ", ".join(
        f"{name} {cell[name]}" for name in names if not (cell.get(name) is None or cell[name] is False)
    )
    params = ", ".join(f"{k}={v}" for k, v in (cell.get("method_params") or {}).items() if v is not None)
    return [
        f"{ended}; {record.wall_s:.1f} s on {record.host} at {record.started_at}",
        settings,
        *([f"method settings: {params}"] if params else []),
    ]
