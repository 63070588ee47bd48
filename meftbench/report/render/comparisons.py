"""Comparisons of runs as text, JSON, GitHub annotations and Markdown: of two runs, or of several against the first.

Whatever the format, what differs between the runs beside their numbers comes first, then what grew, then the numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from meftbench.escapes import json_text, single_line
from meftbench.report.render.verdicts import SHOWN, annotation, escaped_markdown, finite, markdown_table
from meftbench.verdicts.compare import Change, Comparison
from meftbench.verdicts.growth import Growth, Part

# Of numbers that did not change, text lists so many, since a large run has hundreds of thousands.
_UNCHANGED_SHOWN = 1000
_CELLS_SHOWN = 20  # of which text says what grew


def comparisons(format_: str, results: Sequence[Comparison], only_changed: bool = False) -> str:
    """One comparison, or several that have the first run in common, in one of text, json, github, markdown."""
    if len(results) == 1:
        return COMPARISON_FORMATS[format_](results[0], only_changed)
    if format_ == "json":
        return _json({"comparisons": [_content(result, only_changed) for result in results]})
    if format_ == "github":
        return "\n".join(comparison_github(result, only_changed) for result in results)
    return (_side_by_side_markdown if format_ == "markdown" else _side_by_side_text)(results, only_changed)


# --- two runs ---


def comparison_text(comparison: Comparison, only_changed: bool = False) -> str:
    """Notes, one line per change with the worst first, the cells that only one run has, and a summary."""
    lines = _header(comparison)
    changes = comparison.shown(only_changed)
    moved = [change for change in changes if change.judgement not in ("same", "noise")]
    lines += [change.text() for change in moved]
    unchanged = [change for change in changes if change.judgement in ("same", "noise")]
    lines += [change.text() for change in unchanged[:_UNCHANGED_SHOWN]]
    if len(unchanged) > _UNCHANGED_SHOWN:
        lines.append(f"and {len(unchanged) - _UNCHANGED_SHOWN:,} more that did not change (--json lists them)")
    lines += _grown_lines(comparison.grown)
    lines += [f"only in the first: {single_line(label)}" for label in comparison.only_first]
    lines += [f"only in the second: {single_line(label)}" for label in comparison.only_second]
    return "\n".join([*lines, comparison.summary()])


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


def comparison_json(comparison: Comparison, only_changed: bool = False) -> str:
    """The comparison as one JSON object; the worst changes first, values in the metric's unit."""
    return _json(_content(comparison, only_changed))


def _json(content: dict[str, Any]) -> str:
    return json_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


def _content(comparison: Comparison, only_changed: bool) -> dict[str, Any]:
    first = {key: getattr(comparison, key) for key in ("first", "second", "differs", "notes")}
    rest = {key: getattr(comparison, key) for key in ("cells", "only_first", "only_second")}
    return {
        **first,
        "counts": comparison.counts(),
        **rest,
        "grown": [_growth_content(cell) for cell in comparison.grown],
        "changes": [_change_content(change) for change in comparison.shown(only_changed)],
    }


def _change_content(change: Change) -> dict[str, Any]:
    numbers = {"before": change.before, "after": change.after, "delta": change.delta, "share": change.share}
    evidence = {key: finite(value) if isinstance(value, float) else value for key, value in _facts(change).items()}
    return change._asdict() | {key: finite(value) for key, value in numbers.items()} | {"evidence": evidence or None}


def _facts(change: Change) -> dict[str, Any]:
    return asdict(change.evidence) if change.evidence else {}


def _growth_content(cell: Growth) -> dict[str, Any]:
    parts = {"categories": cell.categories, "buffers": cell.buffers}
    return {"label": cell.label, "cell_id": cell.cell_id, "peaks": cell.peaks} | {
        name: None if listed is None else [_part_content(part) for part in listed] for name, listed in parts.items()
    }


def _part_content(part: Part) -> dict[str, Any]:
    return asdict(part) | {"delta": part.delta, "kind": part.kind}


def comparison_github(comparison: Comparison, only_changed: bool = False) -> str:
    """Workflow commands: a notice of what differs beside the numbers, the worst regressions as errors, ten at most,
    "and N more", then the summary line."""
    header = "; ".join([*comparison.notes, *comparison.differs])
    notices = [annotation("notice", None, None, "the runs differ", single_line(header))] if header else []
    worse = [change for change in comparison.changes if change.judgement == "worse"]
    grown = {cell.cell_id: cell for cell in comparison.grown}
    lines = [annotation("error", None, None, "regressed", _with_largest(change, grown)) for change in worse[:SHOWN]]
    if len(worse) > SHOWN:
        rest = f"and {len(worse) - SHOWN + 1} more, see the summary"
        lines[-1] = annotation("error", None, None, "regressed", rest)
    return "\n".join([*notices, *lines, comparison.summary()])


def _with_largest(change: Change, grown: dict[str, Growth]) -> str:
    """The change, and of a peak the buffer that grew most."""
    cell = grown.get(change.cell_id)
    if cell is None or change.metric not in cell.peaks or not cell.buffers or cell.buffers[0].delta <= 0:
        return change.text()
    return f"{change.text()}; {single_line(cell.buffers[0].text())}"


def comparison_markdown(comparison: Comparison, only_changed: bool = False) -> str:
    """The summary line, what differs, what grew, and a table of the worst 200 changes."""
    rows = [(c.judgement, c.label, c.metric, _numbers(c)) for c in comparison.shown(only_changed)]
    table = markdown_table(("", "cell", "metric", "before -> after"), rows)
    return "\n\n".join([escaped_markdown(comparison.summary()), *_markdown_header(comparison), table])


def _numbers(change: Change) -> str:
    return f"{change.numbers()}; {change.evidence.text()}" if change.evidence else change.numbers()


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


def _side_by_side_text(results: Sequence[Comparison], only_changed: bool) -> str:
    """The name of each run, then a line per cell and metric with a column per run, then a summary per run."""
    lines = [f"first: {single_line(results[0].first)}"]
    for number, result in enumerate(results, start=2):
        lines += [f"run {number}: {single_line(result.second)}", *(f"  {line}" for line in _header(result))]
    for head, columns in _table(results, only_changed):
        texts = [f"run {number} {text}" for number, text in enumerate(columns, start=2) if text]
        lines.append(single_line(f"{head[0]}: {head[1]}: {' | '.join(texts)}"))
    for number, result in enumerate(results, start=2):
        lines += [f"run {number}: {line}" for line in _grown_lines(result.grown)]
        lines.append(f"run {number}: {result.summary()}")
    return "\n".join(lines)


def _side_by_side_markdown(results: Sequence[Comparison], only_changed: bool) -> str:
    """A summary and what differs for each run, then a table with a column per run."""
    parts: list[str] = []
    for result in results:
        parts += [escaped_markdown(f"{result.first} -> {result.second}: {result.summary()}"), *_markdown_header(result)]
    head = ("cell", "metric", *(escaped_markdown(result.second) for result in results))
    return "\n\n".join(
        [*parts, markdown_table(head, [(*row, *columns) for row, columns in _table(results, only_changed)])]
    )


def _table(results: Sequence[Comparison], only_changed: bool) -> Iterator[tuple[tuple[str, str], list[str]]]:
    """For each cell and metric its label and metric, and a text for each run; "" where a run lacks it.

    The order is that in which the changes are first met, the worst of the first comparison before all others. With
    `only_changed` a row is left out where no run changed.
    """
    by_place = [{(c.cell_id, c.metric): c for c in result.changes} for result in results]
    for place in dict.fromkeys(place for found in by_place for place in found):
        changes = [found.get(place) for found in by_place]
        known = [change for change in changes if change is not None]
        if only_changed and all(change.judgement in ("same", "noise") for change in known):
            continue
        texts = [f"{change.judgement}: {_numbers(change)}" if change else "" for change in changes]
        yield (known[0].label, known[0].metric), texts


COMPARISON_FORMATS: dict[str, Callable[[Comparison, bool], str]] = {
    "text": comparison_text,
    "json": comparison_json,
    "github": comparison_github,
    "markdown": comparison_markdown,
}
