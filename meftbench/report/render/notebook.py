"""Runs and records as a notebook shows them: HTML in which text of records stays text."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from meftbench.records.record import Record
from meftbench.records.store import Run
from meftbench.report.results import frame_of
from meftbench.report.views.answer import headline as answered
from meftbench.report.views.detail import headline, sections, warnings
from meftbench.report.views.endings import ending
from meftbench.report.views.not_run import cells_not_run
from meftbench.report.views.scores import results, tables, untrained
from meftbench.report.views.steps import SHARE, Number, step_table

_MOST_ROWS = 60  # of a table; `to_frame` has all


def run_html(run: Run) -> str:
    """The answer, how the cells ended, and the tables of a run."""
    frame = frame_of(run)
    parts = [
        f"<p><strong>{escape(run.name)}</strong>: {escape(ending(run)) if run.records else 'no cell has finished'}</p>"
    ]
    parts += [f"<p>{escape(sentence)}</p>" for sentence in answered(frame, not_run=cells_not_run(run))]
    for scores in tables(results(frame)):
        parts += [f"<p>{escape(scores.title)}</p>", _table(scores.head, scores.lines)]
    steps = step_table(untrained(frame), "page")
    if steps.rows:
        order = [column.metric for column in steps.columns]
        heads = {column.metric: column.head("MiB") for column in steps.columns} | {SHARE: "% of full"}
        order.insert(1, SHARE)
        lines = [
            [
                row.cell["label"],
                row.cell["status"],
                *(_said(row.numbers[name]) for name in order),
            ]
            for row in steps.rows[:_MOST_ROWS]
        ]
        parts.append(_table(["cell", "status", *(heads[name] for name in order)], lines))
        if len(steps.rows) > _MOST_ROWS:
            parts.append(f"<p>{len(steps.rows) - _MOST_ROWS} rows more: <code>run.to_frame()</code></p>")
    return "\n".join(parts)


def record_html(record: Record) -> str:
    """How the cell ended, and every number of the record."""
    parts = [f"<p><strong>{escape(record.label)}</strong></p>"]
    parts += [f"<p>{escape(line)}</p>" for line in headline(record) if line]
    parts += [f"<p>Warning: {escape(sentence)}.</p>" for sentence in warnings(record)]
    for section in sections(record):
        parts += [f"<p><em>{escape(section.title)}</em></p>", _table((), section.rows)]
    return "\n".join(parts)


def _said(number: Number) -> str:
    return f"{number.text} ({number.source})" if number.source else number.text


def _table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    heads = "".join(f"<th>{escape(text)}</th>" for text in head)
    rows = "".join("<tr>" + "".join(f"<td>{escape(str(text))}</td>" for text in line) + "</tr>" for line in lines)
    return f"<table>{f'<thead><tr>{heads}</tr></thead>' if heads else ''}<tbody>{rows}</tbody></table>"
