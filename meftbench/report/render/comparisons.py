"""Comparisons of runs as text, JSON, GitHub annotations and Markdown: of two runs, or of several against the first.

Whatever the format, what differs between the runs beside their numbers comes first, then what grew, then the numbers.
Changes of one cell and cause are told as one (verdicts/causes.py), JSON has each of them. With `unchanged` the numbers
that did not change are there, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from meftbench.escapes import json_text, single_line
from meftbench.report.render.verdicts import SHOWN, annotation, escaped_markdown, finite, markdown_table
from meftbench.verdicts.causes import Told, told
from meftbench.verdicts.change import UNMOVED, Change
from meftbench.verdicts.compare import Comparison
from meftbench.verdicts.growth import Growth, Part

_CELLS_SHOWN = 20  # of which text says what grew


def comparisons(format_: str, results: Sequence[Comparison], unchanged: bool = False) -> str:
    """One comparison, or several that have the first run in common, in one of text, json, github, markdown."""
    if len(results) == 1:
        return COMPARISON_FORMATS[format_](results[0], unchanged)
    if format_ == "json":
        return _json({"comparisons": [_content(result, unchanged) for result in results]})
    if format_ == "github":
        return "\n".join(comparison_github(result, unchanged) for result in results)
    model, shortened = _without_model(results, unchanged)
    return (_side_by_side_markdown if format_ == "markdown" else _side_by_side_text)(model, shortened, unchanged)


def _without_model(results: Sequence[Comparison], unchanged: bool) -> tuple[str, list[Comparison]]:
    """The model that all labels begin with, and the comparisons with labels that lack it.

    "" and the comparisons as they are, where there are several models, or a single cell. Without `unchanged`, cells in
    which nothing changed keep their labels, which are not printed: that saves time, since most cells are such.
    """
    models = {result.model for result in results}
    labels = {label for result in results for label in _labels(result)}
    model = models.pop() if len(models) == 1 else ""
    if not model or len(labels) < 2:
        return "", [*results]
    moved = {c.cell_id for result in results for c in result.changes if unchanged or c.judgement not in UNMOVED}

    def short(label: str) -> str:
        return label.removeprefix(f"{model}/")

    return model, [
        replace(
            result,
            changes=[c._replace(label=short(c.label)) if c.cell_id in moved else c for c in result.changes],
            grown=[replace(cell, label=short(cell.label)) for cell in result.grown],
            only_first=[short(label) for label in result.only_first],
            only_second=[short(label) for label in result.only_second],
        )
        for result in results
    ]


def _labels(result: Comparison) -> set[str]:
    return {*(change.label for change in result.changes), *result.only_first, *result.only_second}


# --- two runs ---


def comparison_text(comparison: Comparison, unchanged: bool = False) -> str:
    """The model, notes, one line per change with the worst first, the cells that only one run has, and a summary."""
    model, (comparison,) = _without_model([comparison], unchanged)
    lines = [f"model: {single_line(model)}"] if model else []
    lines += _header(comparison)
    lines += [item.text() for item in told(comparison.changes)]
    if unchanged:
        lines += [change.text() for change in comparison.changes if change.judgement in UNMOVED]
    lines += _grown_lines(comparison.grown)
    lines += [f"only in the first: {single_line(label)}" for label in comparison.only_first]
    lines += [f"only in the second: {single_line(label)}" for label in comparison.only_second]
    return "\n".join([*lines, *_left_out([comparison], unchanged), comparison.summary()])


def _left_out(results: Sequence[Comparison], unchanged: bool) -> list[str]:
    """A line that says how many numbers are not printed, since they did not change; none where there are none."""
    counts = [result.counts() for result in results]
    number = sum(of_run[judgement] for of_run in counts for judgement in UNMOVED)
    if unchanged or not number:
        return []
    verb = "number is the same or within its noise" if number == 1 else "numbers are the same or within their noise"
    return [f"{number:,} {verb} (--all prints {'it' if number == 1 else 'them'})"]


def _header(comparison: Comparison) -> list[str]:
    """Lines that come before all numbers: what was left out, and in what the runs differ beside their numbers."""
    notes = [f"note: {single_line(note)}" for note in comparison.notes]
    return notes + [f"differs: {single_line(text)}" for text in comparison.differs]


def _grown_lines(grown: Sequence[Growth]) -> list[str]:
    lines: list[str] = []
    for cell in grown[:_CELLS_SHOWN]:
        first, *rest = cell.lines()
        lines += [f"grew: {single_line(first)}", *(f"  {single_line(line)}" for line in rest)]
    if len(grown) > _CELLS_SHOWN:
        lines.append(f"and {len(grown) - _CELLS_SHOWN} more cells of which a peak grew (--json lists them)")
    return lines


def comparison_json(comparison: Comparison, unchanged: bool = False) -> str:
    """The comparison as one JSON object; the worst changes first, values in the metric's unit."""
    return _json(_content(comparison, unchanged))


def _json(content: dict[str, Any]) -> str:
    return json_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


def _content(comparison: Comparison, unchanged: bool) -> dict[str, Any]:
    first = {key: getattr(comparison, key) for key in ("first", "second", "differs", "notes")}
    rest = {key: getattr(comparison, key) for key in ("cells", "only_first", "only_second")}
    return {
        **first,
        "counts": comparison.counts(),
        **rest,
        "grown": [_growth_content(cell) for cell in comparison.grown],
        "changes": [_change_content(change) for change in comparison.shown(only_changed=not unchanged)],
    }


def _change_content(change: Change) -> dict[str, Any]:
    numbers = {"before": change.before, "after": change.after, "delta": change.delta, "share": change.share}
    evidence = {key: finite(value) if isinstance(value, float) else value for key, value in _facts(change).items()}
    content = {key: value for key, value in change._asdict().items() if key != "missing"}
    return content | {key: finite(value) for key, value in numbers.items()} | {"evidence": evidence or None}


def _facts(change: Change) -> dict[str, Any]:
    return asdict(change.evidence) if change.evidence else {}


def _growth_content(cell: Growth) -> dict[str, Any]:
    parts = {"categories": cell.categories, "buffers": cell.buffers}
    return {"label": cell.label, "cell_id": cell.cell_id, "peaks": cell.peaks} | {
        name: None if listed is None else [_part_content(part) for part in listed] for name, listed in parts.items()
    }


def _part_content(part: Part) -> dict[str, Any]:
    return asdict(part) | {"delta": part.delta, "kind": part.kind}


def comparison_github(comparison: Comparison, unchanged: bool = False) -> str:
    """Workflow commands: a notice of what differs beside the numbers, the worst regressions as errors, ten at most,
    "and N more", then the summary line."""
    header = "; ".join([*comparison.notes, *comparison.differs])
    notices = [annotation("notice", None, None, "the runs differ", single_line(header))] if header else []
    worse = [item for item in told(comparison.changes) if item.change.judgement == "worse"]
    grown = {cell.cell_id: cell for cell in comparison.grown}
    lines = [annotation("error", None, None, "regressed", _with_largest(item, grown)) for item in worse[:SHOWN]]
    if len(worse) > SHOWN:
        rest = f"and {len(worse) - SHOWN + 1} more, see the summary"
        lines[-1] = annotation("error", None, None, "regressed", rest)
    return "\n".join([*notices, *lines, comparison.summary()])


def _with_largest(item: Told, grown: dict[str, Growth]) -> str:
    """The change, and of a peak the buffer that grew most."""
    cell = grown.get(item.change.cell_id)
    if cell is None or item.change.metric not in cell.peaks or not cell.buffers or cell.buffers[0].delta <= 0:
        return item.text()
    return f"{item.text()}; {single_line(cell.buffers[0].text())}"


def comparison_markdown(comparison: Comparison, unchanged: bool = False) -> str:
    """The summary line, the model, what differs, what grew, and a table of the worst 200 changes."""
    model, (comparison,) = _without_model([comparison], unchanged)
    of_model = [f"Model: {escaped_markdown(model)}"] if model else []
    shown = told(comparison.changes)
    if unchanged:
        shown += [Told(change) for change in comparison.changes if change.judgement in UNMOVED]
    rows = [(item.change.judgement, item.change.label, item.change.metric, item.numbers()) for item in shown]
    table = [markdown_table(("", "cell", "metric", "before -> after"), rows)] if rows else []
    left_out = [escaped_markdown(line) for line in _left_out([comparison], unchanged)]
    summary = escaped_markdown(comparison.summary())
    return "\n\n".join([summary, *of_model, *_markdown_header(comparison), *table, *left_out])


def _markdown_header(comparison: Comparison) -> Iterator[str]:
    """Notes and differences as paragraphs, then a list of what grew."""
    yield from (escaped_markdown(note) for note in comparison.notes)
    if comparison.differs:
        yield "\n".join(["The runs differ in:", "", *(f"- {escaped_markdown(text)}" for text in comparison.differs)])
    items: list[str] = []
    for cell in comparison.grown[:_CELLS_SHOWN]:
        first, *rest = cell.lines()
        items += [f"- {escaped_markdown(first)}", *(f"  - {escaped_markdown(line)}" for line in rest)]
    if len(comparison.grown) > _CELLS_SHOWN:
        items.append(f"- and {len(comparison.grown) - _CELLS_SHOWN} more cells")
    if items:
        yield "\n".join(["What grew:", "", *items])


# --- several runs against the first ---


def _side_by_side_text(model: str, results: Sequence[Comparison], unchanged: bool) -> str:
    """The name of each run, then a line per cell and metric with a column per run, then a summary per run."""
    lines = [f"model: {single_line(model)}"] if model else []
    lines.append(f"first: {single_line(results[0].first)}")
    for number, result in enumerate(results, start=2):
        lines += [f"run {number}: {single_line(result.second)}", *(f"  {line}" for line in _header(result))]
    for head, columns in _table(results, unchanged):
        texts = [f"run {number} {text}" for number, text in enumerate(columns, start=2) if text]
        lines.append(single_line(f"{head[0]}: {head[1]}: {' | '.join(texts)}"))
    for number, result in enumerate(results, start=2):
        lines += [f"run {number}: {line}" for line in _grown_lines(result.grown)]
        lines.append(f"run {number}: {result.summary()}")
    return "\n".join([*lines, *_left_out(results, unchanged)])


def _side_by_side_markdown(model: str, results: Sequence[Comparison], unchanged: bool) -> str:
    """The model, a summary and what differs for each run, then a table with a column per run."""
    parts = [f"Model: {escaped_markdown(model)}"] if model else []
    for result in results:
        parts += [escaped_markdown(f"{result.first} -> {result.second}: {result.summary()}"), *_markdown_header(result)]
    head = ("cell", "metric", *(escaped_markdown(result.second) for result in results))
    rows = [(*row, *columns) for row, columns in _table(results, unchanged)]
    left_out = [escaped_markdown(line) for line in _left_out(results, unchanged)]
    return "\n\n".join([*parts, *([markdown_table(head, rows)] if rows else []), *left_out])


def _table(results: Sequence[Comparison], unchanged: bool) -> Iterator[tuple[tuple[str, str], list[str]]]:
    """For each cell and metric its label and metric, and a text for each run; "" where a run lacks it.

    The order is that in which the changes are first met, the worst of the first comparison before all others. Without
    `unchanged` a row is left out where no run changed; always where each change is told with another metric's.
    """
    by_place = [{(c.cell_id, c.metric): c for c in result.changes} for result in results]
    leading = [{(i.change.cell_id, i.change.metric): i for i in told(result.changes)} for result in results]
    for place in dict.fromkeys(place for found in by_place for place in found):
        changes = [found.get(place) for found in by_place]
        known = [change for change in changes if change is not None]
        moved = any(change.judgement not in UNMOVED for change in known)
        if not any(place in items for items in leading) if moved else not unchanged:
            continue
        items = [
            of_run.get(place) or (change and Told(change)) for of_run, change in zip(leading, changes, strict=True)
        ]
        texts = [f"{item.change.judgement}: {item.numbers()}" if item else "" for item in items]
        yield (known[0].label, known[0].metric), texts


COMPARISON_FORMATS: dict[str, Callable[[Comparison, bool], str]] = {
    "text": comparison_text,
    "json": comparison_json,
    "github": comparison_github,
    "markdown": comparison_markdown,
}
