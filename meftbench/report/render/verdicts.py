"""Verdicts as text, JSON, GitHub annotations, Markdown and JUnit (docs/measuring.md 3), and what comparisons share."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from meftbench.errors import UserError
from meftbench.escapes import json_text, single_line, visible
from meftbench.records.outcome import said
from meftbench.verdicts.judge import STATES, State, Verdict

# GitHub shows 10 annotations of a kind for a step; where there are more, the tenth says how many.
SHOWN = 10
_SUMMARY_ROWS = 200
_CAUSES = 20  # of which Markdown says what the memory above a bound is
# GitHub refuses the whole upload where a step's summary is above 1 MiB.
_SUMMARY_BYTES = 1_000_000


# --- verdicts ---


def verdicts_text(verdicts: Sequence[Verdict]) -> str:
    """One line for each verdict that is neither held nor to be ignored, worst first, then a summary."""
    lines = [
        verdict.text() if verdict.fails else f"{_prefix(verdict)}: {verdict.text()}"
        for verdict in verdicts
        if not verdict.silent
    ]
    return "\n".join([*lines, verdicts_summary(verdicts)])


def verdicts_summary(verdicts: Sequence[Verdict]) -> str:
    """`12 verdicts: 1 over, 11 held; least headroom 3.2 MiB (0.8%, counted) ...`: how close the next failure is."""
    counts = {state: sum(verdict.state == state for verdict in verdicts) for state in STATES}
    counts_text = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    line = f"{len(verdicts)} verdict{'s' * (len(verdicts) != 1)}: {counts_text or 'nothing was judged'}"
    held = [v for v in verdicts if v.state == "held" and v.headroom is not None and v.bound]
    if not held:
        return line
    least = min(held, key=lambda v: (v.headroom or 0) / abs(v.bound or 1))
    room = f"{said(least.headroom or 0, least.unit)} ({(least.headroom or 0) / abs(least.bound or 1):.1%}"
    return f"{line}; least headroom {room}, {least.source}) in {least.metric} of {single_line(least.label)}"


def verdicts_json(verdicts: Sequence[Verdict]) -> str:
    """A list of verdicts, worst first; values in the metric's unit, headroom negative where over."""
    return json_text(json.dumps([_verdict_content(verdict) for verdict in verdicts], indent=2, ensure_ascii=False))


def _verdict_content(verdict: Verdict) -> dict[str, Any]:
    numbers = {"value": verdict.value, "bound": verdict.bound, "headroom": verdict.headroom}
    content = {key: value for key, value in vars(verdict).items() if key not in numbers}
    return (
        content
        | {"file": str(verdict.file), "unit": verdict.unit, "fails": verdict.fails}
        | {key: finite(value) for key, value in numbers.items()}
    )


def finite(value: float | None) -> float | str | None:
    """The value for JSON, which has no infinity and NaN: they become the words that records use."""
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def verdicts_github(verdicts: Sequence[Verdict]) -> str:
    """Workflow commands: the worst errors and warnings, ten of each at most, "and N more", then the summary line."""
    errors = [verdict for verdict in verdicts if verdict.fails]
    warnings = [verdict for verdict in verdicts if not verdict.fails and not verdict.silent]
    lines = []
    for kind, shown in (("error", errors), ("warning", warnings)):
        texts = [annotation(kind, v.file, v.line, _TITLES[v.state], v.text()) for v in shown[:SHOWN]]
        if len(shown) > SHOWN:
            rest = f"and {len(shown) - SHOWN + 1} more, see the summary"
            texts[-1] = annotation(kind, shown[0].file, 1, "budgets", rest)
        lines += texts
    return "\n".join([*lines, verdicts_summary(verdicts)])


_TITLES: dict[State, str] = {
    "over": "over budget",
    "oom": "out of memory",
    "failed": "cell failed",
    "elsewhere": "another environment",
    "unmatched": "matches no cell",
    "missing": "not measured",
    "warned": "near budget",
    "waived": "waived",
    "held": "held",
}


def _prefix(verdict: Verdict) -> str:
    return {"warned": "warning", "waived": "waived"}.get(verdict.state, "warning")


def verdicts_markdown(verdicts: Sequence[Verdict]) -> str:
    """A table of the worst 200 verdicts under the summary line, then what the memory above their bounds is."""
    rows = [
        (
            _TITLES[v.state],
            v.label,
            v.metric,
            "" if v.value is None else f"{said(v.value, v.unit)} ({v.source})",
            "" if v.bound is None else f"{v.limit} {said(v.bound, v.unit)}",
            "" if v.headroom is None else _signed(v.headroom, v.unit),
            f"{v.file}:{v.line}",
        )
        for v in verdicts
    ]
    head = ("verdict", "cell", "metric", "value", "bound", "headroom", "budget")
    parts = [escaped_markdown(verdicts_summary(verdicts)), markdown_table(head, rows)]
    causes = [f"- {escaped_markdown(f'{v.label}: {v.metric}: {v.cause}')}" for v in verdicts if v.cause]
    if len(causes) > _CAUSES:
        causes[_CAUSES:] = [f"- and {len(causes) - _CAUSES} more"]
    if causes:
        parts.append("\n".join(["Where the memory is:", "", *causes]))
    return "\n\n".join(parts)


def _signed(value: float, unit: str) -> str:
    return f"{'-' if value < 0 else ''}{said(abs(value), unit)}"


def verdicts_junit(verdicts: Sequence[Verdict], suite: str) -> str:
    """JUnit XML: a test case for each verdict; over is a failure, a failed cell an error, a missing number skipped."""
    cases = []
    for verdict in verdicts:
        properties = {name: str(value) for name in _PROPERTIES if (value := getattr(verdict, name)) is not None}
        name = f"{verdict.label}::{verdict.metric}"
        place = {"file": str(verdict.file), "line": str(verdict.line)}
        message = verdict.text()
        cases.append(Case(name, verdict.wall_s, properties, _junit_tag(verdict), message, verdict.state, place))
    return junit(suite, cases)


_PROPERTIES = ("value", "bound", "headroom", "source", "unit")


def _junit_tag(verdict: Verdict) -> str | None:
    if verdict.fails:
        return "failure" if verdict.state in ("over", "oom") else "error"
    return "skipped" if verdict.state in ("waived", "elsewhere", "unmatched", "missing") else None


@dataclass(frozen=True)
class Case:
    """A test case of JUnit. tag: "failure", "error", "skipped"; None: passed.  place: `file` and `line`, if any."""

    name: str
    seconds: float
    properties: dict[str, str]
    tag: str | None
    message: str
    kind: str
    place: dict[str, str] = field(default_factory=dict)


def junit(suite: str, cases: Sequence[Case]) -> str:
    """The cases as JUnit XML, with the numbers of failures, errors and skipped ones."""
    root = ElementTree.Element("testsuite", name=visible(suite), tests=str(len(cases)))
    tally = {"failure": 0, "error": 0, "skipped": 0}
    for case in cases:
        where = {key: visible(value) for key, value in case.place.items()}
        attributes = {
            "classname": visible(suite),
            "name": visible(case.name),
            "time": f"{case.seconds:.3f}",
        } | where
        element = ElementTree.SubElement(root, "testcase", attributes)
        properties = ElementTree.SubElement(element, "properties")
        for name, value in case.properties.items():
            ElementTree.SubElement(properties, "property", name=name, value=visible(value))
        if case.tag:
            ElementTree.SubElement(element, case.tag, message=visible(case.message), type=case.kind)
            tally[case.tag] += 1
    root.attrib.update(failures=str(tally["failure"]), errors=str(tally["error"]), skipped=str(tally["skipped"]))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode")


VERDICT_FORMATS: dict[str, Callable[[Sequence[Verdict]], str]] = {
    "text": verdicts_text,
    "json": verdicts_json,
    "github": verdicts_github,
    "markdown": verdicts_markdown,
}


def render_verdicts(verdicts: Sequence[Verdict], format_: str, suite: str) -> str:
    """The verdicts in one of text, json, github, junit, markdown."""
    return verdicts_junit(verdicts, suite) if format_ == "junit" else VERDICT_FORMATS[format_](verdicts)


# --- shared ---


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of at most 200 rows; texts in `rows` are escaped, so that none ends its cell or is markup."""
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    lines += [f"| {' | '.join(escaped_markdown(value) for value in row)} |" for row in rows[:_SUMMARY_ROWS]]
    if len(rows) > _SUMMARY_ROWS:
        lines.append(f"\nand {len(rows) - _SUMMARY_ROWS} more")
    return "\n".join(lines)


def escaped_markdown(text: str) -> str:
    """The text on one line, of which nothing is markup: neither Markdown nor HTML, nor the end of a table's cell."""
    escaped = single_line(text)
    for char in "\\`*_|[]~$":
        escaped = escaped.replace(char, "\\" + char)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def annotation(kind: str, file: Path | None, line: int | None, title: str, message: str) -> str:
    where = "" if file is None else f"file={_escaped_property(str(file))},line={line},"
    return f"::{kind} {where}title={_escaped_property(title)}::{_escaped_data(message)}"


def _escaped_data(text: str) -> str:
    return visible(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escaped_property(text: str) -> str:
    return _escaped_data(text).replace(":", "%3A").replace(",", "%2C")


def append_step_summary(markdown: str, title: str) -> None:
    """Add to the file that $GITHUB_STEP_SUMMARY names, if it is set; cut at whole lines below GitHub's limit.

    Raises UserError: the file cannot be written.
    """
    name = os.environ.get("GITHUB_STEP_SUMMARY")
    if not name:
        return
    file = Path(name)
    try:
        room = _SUMMARY_BYTES - (file.stat().st_size if file.exists() else 0)
        text = _cut(f"## {escaped_markdown(title)}\n\n{markdown}\n\n".splitlines(keepends=True), room)
        if text:
            with file.open("a", encoding="utf-8") as stream:
                stream.write(text)
    except OSError as error:
        what = f"the step summary {name} cannot be written ({error.strerror or error})"
        raise UserError("GITHUB_STEP_SUMMARY", what, "unset the variable, or name a file that can be") from None


def _cut(lines: Iterable[str], room: int) -> str:
    kept: list[str] = []
    for line in lines:
        room -= len(line.encode())
        if room < 0:
            break
        kept.append(line)
    return "".join(kept)
