"""The tables of a run or several as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from meftbench.records.store import Run
from meftbench.report.render.verdicts import escaped_markdown, markdown_table
from meftbench.report.results import run_names
from meftbench.report.views import answer, claims
from meftbench.report.views.best import BEST_HEAD, all_best_levers
from meftbench.report.views.endings import shared_cores
from meftbench.report.views.heads import heads_of
from meftbench.report.views.not_run import cells_not_run
from meftbench.report.views.scores import Table as ScoreTable
from meftbench.report.views.scores import results, untrained
from meftbench.report.views.scores import tables as score_tables
from meftbench.report.views.steps import SHARE, StepRow, StepTable, setting_name, step_table

if TYPE_CHECKING:
    from pandas import DataFrame


def markdown(runs: Sequence[Run], frame: DataFrame) -> str:
    """The answer, a line per run with its machine, date and commit, and the tables."""
    names = run_names(runs)
    named = zip([f"{name}: " for name in names] if len(runs) > 1 else [""], runs, strict=True)
    left = cells_not_run(*runs)
    heads = "\n".join(
        "- "
        + _paragraph(
            f"{head.name}: {head.machine}, {head.date}, {head.checkout}; {head.cells}"
            + (f"; predicted: {head.validation}" if head.validation else "")
        )
        for head in heads_of(runs, names)
    )
    answered = "\n".join(f"- {_paragraph(sentence)}" for sentence in answer.headline(frame, not_run=left))
    waited = [_paragraph(f"{name}{line}.") for name, run in named for line in shared_cores(run)]
    parts = [*filter(None, [answered]), heads, *waited, *(_scores(table) for table in score_tables(results(frame)))]
    steps = untrained(frame)
    if len(steps) or not len(frame):
        parts.append(_steps(step_table(steps, "markdown"), len(runs) > 1))
    for best in all_best_levers(steps):
        lines = [texts for comparison in best.comparisons for texts in comparison.texts()]
        notes = [_paragraph(f"{note}.") for note in best.unequal]
        parts += [
            f"## Each method with its best levers: {escaped_markdown(best.title)}",
            markdown_table(BEST_HEAD, lines),
            *notes,
        ]
    if claim_tables := claims.claim_tables(frame):
        parts.append(f"## The paper's claims\n\n{claims.SAID}")
    parts += [_claim(table) for table in claim_tables]
    return "\n\n".join(parts) + "\n"


def _paragraph(text: str) -> str:
    """A text that may hold anybody's words as a paragraph or an item of a list: no markup, nor the start of a heading
    or a list."""
    return _BLOCK.sub(r"\1\\\2", escaped_markdown(text))


_BLOCK = re.compile(r"^(\s*[0-9]*)([-+.)](?=\s|$)|[#=]|-(?=-))")


def _scores(table: ScoreTable) -> str:
    notes = _paragraph(" ".join(table.notes))
    return f"## {escaped_markdown(table.title)}\n\n{notes}\n\n{markdown_table(table.head, table.lines)}"


def _claim(table: claims.ClaimTable) -> str:
    rows = markdown_table(claims.HEAD, [row.texts for row in table.rows])
    return "\n\n".join([f"### {escaped_markdown(table.title)}", *map(_paragraph, table.notes), rows])


def _steps(table: StepTable, several_runs: bool) -> str:
    # A run or model that all rows share has no column.
    leading = ["run"] * several_runs + ["model"] * table.several_models
    order = [column.metric for column in table.columns]
    order.insert(1, SHARE)
    heads = {column.metric: column.head("MiB") for column in table.columns} | {SHARE: "% of full"}
    head = (*leading, "method", "batch", "tokens", *map(setting_name, table.differing), "status",
            *(heads[name] for name in order))  # fmt: skip
    lines = [
        (
            *(str(row.cell[name]) for name in leading),
            row.cell["method"],
            row.batch,
            str(row.cell["sequence_length"]),
            *(row.settings[name] for name in table.differing),
            row.cell["status"],
            *(_text(row, name) for name in order),
        )
        for row in table.rows
    ]
    shared = f" All cells: {escaped_markdown(table.shared)}." if table.shared else ""
    several = len(table.groups) > 1
    apart = " The cells differ in more than method and shape: do not rank across those settings." if several else ""
    return f"Compared at equal batch, micro-batch and length.{shared}{apart}\n\n{markdown_table(head, lines)}"


def _text(row: StepRow, name: str) -> str:
    number = row.numbers[name]
    return f"{number.text} ({number.source})" if number.source else number.text
