"""Memory budgets in tests of one's own: what a test measured, held against its budgets (meftbench/pytest_plugin.py).

A measurement is kept as a record, like that of a cell, with the test's name as its label. So the rows of budgets files,
their verdicts and the messages are those of `meftbench check`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from meftbench.catalogue.metrics import METRICS, NOT_A_NUMBER
from meftbench.errors import UserError, unknown
from meftbench.plan.budgets import Budgets, Default, Row, load_budgets
from meftbench.records.outcome import as_number, outcomes, said
from meftbench.records.record import Metric, Record
from meftbench.records.store import Run
from meftbench.report.views.detail import peak_sections
from meftbench.strict_yaml import Document, KeyPath, parse, settings_of
from meftbench.verdicts.judge import Verdict, judge, winners
from meftbench.verdicts.update import NO_CELL, Update, confirm, updated

# The metric of a bound that names none: `@pytest.mark.memory_budget("512MiB")`.
UNNAMED = "peak_allocated_bytes"
# Units of metrics without a number, which a budget cannot bound.
_NO_NUMBER = ("buffers", "text")
# Metrics that get a row where a test without a budget is written into the budgets file, and that reports always have.
REPORTED = ("peak_allocated_bytes", "activation_peak_bytes")
_HEAD = """\
# Memory budgets of tests: a row bounds a metric of the tests whose names match. `pytest --memory-budgets-update` writes
# what the tests take now, and shows the difference.
schema: 1
budgets:
"""
KEPT = "baseline_allocated_bytes"  # what is kept between steps
# What a step neither makes nor frees, so that it is before the step what it is at the peak.
_KEPT_CATEGORIES = {
    "parameters_bytes": "parameters",
    "buffers_bytes": "buffers of the model",
    "optimizer_bytes": "optimizer state",
    "inputs_bytes": "the batch",
}
_SHOWN = 12  # buffers in the message of a failure


def metric_named(where: str, name: str) -> str:
    """The metric that `name` means, whose ending `_bytes` may be left out. Raises UserError: no metric with a single
    number has this name."""
    numbers = [metric for metric in METRICS if metric not in NOT_A_NUMBER and METRICS[metric].unit not in _NO_NUMBER]
    for metric in (name, f"{name}_bytes"):
        if metric in numbers:
            return metric
    if get_close_matches(name, numbers, n=1):
        raise unknown(where, "metric", name, numbers)
    examples = ", ".join(["peak_allocated", "activation_peak", "peak_reserved", "drift_bytes_per_step"])
    raise UserError(where, f"unknown metric {name!r}", f"write such as {examples}; `meftbench list metrics` has all")


def budgets_in_code(file: Path, line: int, bounds: Mapping[str, Any]) -> Budgets:
    """The bounds that a test gives, by metric, as a budgets file would have them; without any tolerance.

    file, line: where they are given, for messages.  bounds: bytes as text such as "512MiB", or numbers in the metric's
        unit. They are upper bounds; lower ones of metrics of which more is better, such as tokens_per_s.
    Raises UserError: a value is not an amount.
    """
    rows = []
    for metric, bound in bounds.items():
        if not isinstance(bound, str | int | float) or isinstance(bound, bool) or (bound != bound):
            example = '"512MiB" or a number of bytes' if METRICS[metric].unit == "byte" else "a number"
            raise UserError(f"{file}:{line}: {metric}", f"{bound!r} is not an amount", f"write {example}")
        side = "min" if METRICS[metric].better == "higher" else "max"
        content = {"match": "*", "metric": metric, side: bound, "tolerance": 0.0}
        rows.append(settings_of(f"{file}:{line}: {metric}", Row, content))
    lines: dict[KeyPath, int] = {("budgets", index): line for index in range(len(rows))}
    return Budgets(Document(file, {}, lines), Default(), rows)


def record_of(label: str, metrics: Mapping[str, Metric]) -> Record:
    """What a test measured, as a record. The facts of a run that a test does not have are empty."""
    device = "cuda" if metrics["peak_allocated_bytes"].source == "measured" else "counted"
    return Record(
        record_id=label,
        run_id="pytest",
        cell_id=label,
        repeat=0,
        protocol_id="",
        environment_id="",
        meftbench_version="",
        code_digest="",
        started_at="",
        finished_at="",
        host="",
        worker_pid=None,
        cell={"label": label, "device": device},
        status="ok",
        metrics=dict(metrics),
    )


def run_of(records: Iterable[Record], environment: Mapping[str, Any]) -> Run:
    """Records of tests as a run, which is not on disk. environment: with `gpus` and `torch`, as environment.json."""
    return Run(Path(), {"name": "pytest", "run_id": "pytest"}, dict(environment), list(records))


def verdicts_on(run: Run, budgets: Budgets) -> list[Verdict]:
    """The verdicts of the rows that apply to tests of the run, worst first."""
    return [verdict for verdict in judge(run, budgets) if verdict.state != "unmatched"]


def failure_text(record: Record, verdicts: Iterable[Verdict], cure: str) -> str:
    """What is over its budget and by how much, what the memory consists of at its peak, and what to do."""
    failing = [verdict for verdict in verdicts if verdict.fails]
    lines = [verdict.text() for verdict in failing]
    if any(verdict.metric == KEPT for verdict in failing):
        lines += ["", *_kept_between_steps(record)]
    for section in peak_sections(record):
        lines += ["", f"{section.title}:"]
        lines += [f"  {value}: {name}, {meaning}" for name, value, meaning in section.rows[:_SHOWN]]
        if len(section.rows) > _SHOWN:
            lines.append(f"  and {len(section.rows) - _SHOWN} more")
    return "\n".join([*lines, "", cure])


def _kept_between_steps(record: Record) -> list[str]:
    """What is alive before the step, by category, and what it is beside those."""
    sizes = {name: size for name in _KEPT_CATEGORIES if (size := as_number(record.value(name)))}
    note = "The lists below are of the peak, which is later in the step."
    if not sizes:
        return [f"What is alive before the step is not known by category. {note}"]
    rest = (as_number(record.value(KEPT)) or 0) - sum(sizes.values())
    lines = [
        f"  {said(size, 'byte')} ({record.metrics[name].source}): {_KEPT_CATEGORIES[name]}"
        for name, size in sizes.items()
    ]
    if rest > 0:
        what = "none of these: gradients, outputs or other tensors that are kept"
        lines.append(f"  {said(rest, 'byte')} ({record.metrics[KEPT].source}): {what}")
    return ["What is alive before the step:", *lines, note]


# --- the budgets file ---


def updated_file(file: Path, run: Run) -> Update:
    """The budgets file with each `max` as the tests of the run measured it, and rows for tests that had none.

    The file need not exist. Raises UserError: it is not valid, or its rows are in brackets and none can be added.
    """
    if not file.is_file():
        return Update(file, "", _HEAD + "".join(f"  - {row}\n" for row in _new_rows(run, set())), [])
    budgets = load_budgets(file)
    update = updated(run, budgets)
    budgeted = {outcome.cell_id for outcome, _ in winners(outcomes(run), budgets)}
    # A row of a test that did not run this time is no news.
    kept = [line for line in update.kept if not line.endswith(NO_CELL)]
    rows = _new_rows(run, budgeted)
    after = _with_rows(file, update.after, rows)
    expected = parse(update.after)
    expected["budgets"] += [parse(row) for row in rows]
    confirm(file, after, expected)
    return Update(file, update.before, after, kept)


def _new_rows(run: Run, budgeted: set[str]) -> list[str]:
    """A row for each reported metric of each test that is not among `budgeted`, as YAML on one line."""
    rows = []
    for outcome in outcomes(run):
        for metric in REPORTED if outcome.cell_id not in budgeted else ():
            figure = outcome.figure(metric)
            if figure is not None:
                match = json.dumps(outcome.label, ensure_ascii=False)
                rows.append(f"{{match: {match}, metric: {metric}, source: {figure.source}, max: {figure.value}}}")
    return rows


def _with_rows(file: Path, text: str, rows: list[str]) -> str:
    """The text of a budgets file with `rows` after its last row, indented like it."""
    if not rows:
        return text
    # The loader written in Python, since its marks have offsets in characters.
    root: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    budgets = next(value for key, value in root.value if key.value == "budgets")
    if budgets.flow_style:
        raise UserError(
            str(file), "its rows are in brackets, so that none can be added", "write each in a line: - {...}"
        )
    end_of_line = text.find("\n", _end(budgets.value[-1]))
    before, after = (text, "") if end_of_line < 0 else (text[: end_of_line + 1], text[end_of_line + 1 :])
    break_ = "\r\n" if "\r\n" in text else "\n"
    indent = " " * budgets.start_mark.column
    added = "".join(f"{indent}- {row}{break_}" for row in rows)
    return before + ("" if before.endswith("\n") else break_) + added + after


def _end(node: yaml.Node) -> int:
    """Where the text of a node ends. The end mark of a mapping or list in lines is that of what follows it."""
    if isinstance(node, yaml.ScalarNode) or getattr(node, "flow_style", False):
        return int(node.end_mark.index)
    last = node.value[-1]
    return _end(last[1] if isinstance(node, yaml.MappingNode) else last)
