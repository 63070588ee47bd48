"""`check --update`: sets each `max` of a budgets file to a run's values and leaves the rest of the file as it is."""

from __future__ import annotations

import copy
import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from meftbench.catalogue.metrics import METRICS
from meftbench.errors import UserError
from meftbench.plan.budgets import LARGEST_BOUND, Budgets, Row
from meftbench.records.outcome import Outcome, outcomes
from meftbench.records.store import Run, write_whole
from meftbench.strict_yaml import KeyPath, parse
from meftbench.units import MiB
from meftbench.verdicts.judge import winners

# Where a text of several lines (`|-`, `>-`) ends, what follows it begins, so that it is not replaced.
_SEVERAL_LINES = "is written over several lines: write it on one"
# Why a row stays as it is, where nothing that it matches was run.
NO_CELL = "it judges no cell of the run"


@dataclass(frozen=True)
class Update:
    """A budgets file with new bounds, not yet written.

    kept: for each row whose `max` could not be updated, the text `file:line: kept: reason`.
    """

    file: Path
    before: str
    after: str
    kept: list[str]

    def diff(self) -> str:
        """The change as a unified diff; "" where nothing changes."""
        name = str(self.file)
        lines = difflib.unified_diff(self.before.splitlines(True), self.after.splitlines(True), name, name)
        return "".join(line if line.endswith("\n") else line + "\n" for line in lines)

    def write(self) -> None:
        """Replace the file, in full or not at all. Raises UserError where it cannot be written."""
        if self.after != self.before:
            # Behind a symbolic link the file is replaced, not the link.
            write_whole(self.file.resolve(), self.after)


def updated(run: Run, budgets: Budgets) -> Update:
    """Set each `max` to the largest value of the cells that its row judges, and `updated_from` to the run where the
    file has it. Comments and all else stay as they are.

    A row stays as it is where a cell it judges did not end ok, lacks the metric, or where the row is waived.
    Raises UserError: the text with the new values would not be read as the old one with these values.
    """
    # newline="" keeps the line ends as they are, so that they are counted in offsets.
    with budgets.file.open(encoding="utf-8", newline="") as stream:
        before = stream.read()
    spans = _spans(before)
    judged: dict[int, list[Outcome]] = {}
    for outcome, index in winners(outcomes(run), budgets):
        judged.setdefault(index, []).append(outcome)
    edits: list[tuple[int, int, str]] = []
    kept: list[str] = []
    expected = copy.deepcopy(budgets.document.content)
    for index, row in enumerate(budgets.rows):
        if row.max is None:
            continue
        span = spans.get(("budgets", index, "max"))
        value, why = _largest(row, judged.get(index, []))
        if span is None or list(spans.values()).count(span) > 1:
            value, why = None, "its max stands elsewhere (a YAML anchor)"
        elif "\n" in before[slice(*span)]:
            value, why = None, f"its max {_SEVERAL_LINES}"
        if value is None or span is None:
            kept.append(f"{budgets.file}:{budgets.line(index)}: kept: {why}")
        elif value != row.max:
            number = _yaml_number(value, METRICS[row.metric].unit)
            edits.append((*span, number))
            expected["budgets"][index]["max"] = parse(number)
    if place := spans.get(("updated_from",)):
        # In double quotes JSON is YAML, whatever the path holds.
        folder = os.path.relpath(run.path, budgets.file.parent)
        if "\n" in before[slice(*place)]:
            line = before.count("\n", 0, place[0]) + 1
            kept.append(f"{budgets.file}:{line}: kept: updated_from {_SEVERAL_LINES}")
        elif budgets.updated_from is None or not _same_folder(budgets.updated_from, run.path):
            edits.append((*place, json.dumps(folder, ensure_ascii=False)))
            expected["updated_from"] = folder
    after = before
    for start, end, text in sorted(edits, reverse=True):
        after = after[:start] + text + after[end:]
    confirm(budgets.file, after, expected)
    return Update(budgets.file, before, after, kept)


def confirm(file: Path, text: str, expected: Any) -> None:
    """Raises UserError: `text`, which is to replace `file`, is not read as the value `expected`."""
    try:
        if parse(text) == expected:
            return
    except yaml.YAMLError:
        pass  # said below, as where it is read as something else
    cure = "write each max, and updated_from, as plain text on the line of its key"
    raise UserError(str(file), "cannot be updated without changing more than its bounds", cure)


def _same_folder(first: Path, second: Path) -> bool:
    return first.resolve() == second.resolve()


def _largest(row: Row, cells: list[Outcome]) -> tuple[int | float | None, str]:
    """The largest value of `cells`, the new `max`; or None, and why the row has to stay as it is."""
    if row.expires is not None:
        return None, f"it has a waiver until {row.expires} ({row.reason})"
    if not cells:
        return None, NO_CELL
    values = []
    for outcome in cells:
        figure = outcome.figure(row.metric)
        if figure is None or (row.source and figure.source != row.source):
            return None, f"{outcome.label} ended {outcome.status} or has no {row.metric}"
        if figure.value != figure.value or abs(figure.value) == float("inf"):
            return None, f"{outcome.label} has {figure.value}"
        values.append(figure.value)
    largest = max(values)
    if not -LARGEST_BOUND < largest < LARGEST_BOUND:
        return None, f"{largest} is more than a bound may be"
    if row.warn is not None and row.warn > largest:
        return None, f"its warn would be above the new max {largest}: lower warn first"
    return largest, ""


def _yaml_number(value: int | float, unit: str) -> str:
    """A number as text that YAML reads back exactly: whole MiB with their unit, floats with a point."""
    if isinstance(value, int):
        return f"{value // MiB}MiB" if unit == "byte" and value and value % MiB == 0 else str(value)
    digits, e, exponent = repr(value).partition("e")
    # PyYAML reads 1e-05 as text, and 1.0e-05 as a number.
    return f"{digits if '.' in digits else digits + '.0'}{e}{exponent}"


def _spans(text: str) -> dict[KeyPath, tuple[int, int]]:
    """The start and end of each scalar value in the text, in characters, by the path of its key."""
    spans: dict[KeyPath, tuple[int, int]] = {}

    def walk(node: yaml.Node, path: KeyPath) -> None:
        if isinstance(node, yaml.ScalarNode):
            spans[path] = (node.start_mark.index, node.end_mark.index)
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                walk(value, (*path, str(key.value)))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                walk(value, (*path, index))

    # The loader written in Python, since its marks have offsets in characters.
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        walk(root, ())
    return spans
