"""One self-contained HTML page of a run or several.

Styles, scripts, pictures and data stand in it; it requests nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from meftbench.catalogue.methods import METHODS
from meftbench.catalogue.metrics import METRICS
from meftbench.records.outcome import outcomes
from meftbench.records.store import Run
from meftbench.report.columns import COLUMNS
from meftbench.report.figures.picture import Picture
from meftbench.report.render.payload import anchor, payload
from meftbench.report.results import WRONG_GRADIENT, run_names, sources, taken
from meftbench.report.views import answer, claims
from meftbench.report.views.best import BEST_HEAD, all_best_levers
from meftbench.report.views.detail import NOISE, warnings
from meftbench.report.views.endings import failures
from meftbench.report.views.heads import heads_of
from meftbench.report.views.not_run import cells_not_run
from meftbench.report.views.scores import results, untrained
from meftbench.report.views.scores import tables as score_tables
from meftbench.report.views.side_by_side import side_by_side
from meftbench.report.views.steps import SHARE, setting_name
from meftbench.report.views.validation import validation_text
from meftbench.verdicts.validation import saved

if TYPE_CHECKING:
    from pandas import DataFrame

SOURCES = {
    "measured": "a clock, a CUDA allocator or the answers to a task said so",
    "counted": "bytes of live tensors, counted on CPU under real arithmetic",
    "predicted": "simulated for a named device",
}
STATIC_ROWS = 100  # of a table, where no script runs; the CSV beside the page has all
_MOST_LINES = 200  # of failures and of warnings; a cell's own are in its detail
_SCRIPTS = ("data.js", "detail.js", "table.js", "chart.js", "peak.js", "main.js")


@cache
def _text_of(name: str) -> str:
    return files("meftbench.report.render").joinpath(name).read_text(encoding="utf-8")


def page(runs: Sequence[Run], frame: DataFrame, drawn: Callable[[], Sequence[Picture]]) -> str:
    """The page as HTML text. The template escapes all that comes from records. drawn: gives the pictures, which
    charts replace where scripts run; it is called when all else is there."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("meftbench.report.render", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = run_names(runs)
    steps, found = untrained(frame), answer.answers(frame)
    left = cells_not_run(*runs)
    held = payload(runs, frame)
    warned = _warnings(runs, names)
    failed = [line for run in runs for line in failures(run)]
    return environment.get_template("page.html.j2").render(
        title=" and ".join(dict.fromkeys(names)),
        style=Markup(_text_of("vendor/uPlot.min.css") + _text_of("page.css")),
        script=Markup("\n".join(map(_text_of, ("vendor/uPlot.iife.min.js", *(f"js/{name}" for name in _SCRIPTS))))),
        held=held,
        answered=[_sentence(text) for text in answer.headline(frame, found, left)],
        answers=found,
        sentence=_sentence,
        runs=heads_of(runs, names),
        differences=side_by_side(runs, names),
        sources=[(source, text) for source, text in SOURCES.items() if _has(frame, source)],
        quality=score_tables(results(frame)),
        claims=claims.claim_tables(frame),
        claims_head=claims.HEAD,
        claims_said=claims.SAID,
        validations=_validations(runs, names),
        static_rows=STATIC_ROWS,
        share=SHARE,
        anchor=anchor,
        setting_name=setting_name,
        best=all_best_levers(steps),
        best_head=BEST_HEAD,
        several_runs=len(runs) > 1,
        failures=failed[:_MOST_LINES],
        failures_more=max(0, len(failed) - _MOST_LINES),
        warnings=warned[:_MOST_LINES],
        warnings_all=len(warned),
        noise=NOISE,
        wrong_gradient=f"{WRONG_GRADIENT * 100:.0f} %",
        meanings={column.metric: METRICS[column.metric] for column in COLUMNS if taken(frame, column.metric)},
        # Last, as they may still be drawn by another process.
        pictures=[
            {"name": p.name, "title": p.title, "alt": p.alt, "png": base64.b64encode(p.png).decode()} for p in drawn()
        ],
    )


def _sentence(text: str) -> str:
    """With a capital and a full stop; the name of a method at the beginning stays as it is."""
    first, _, rest = text.partition(" ")
    is_word = first.isalpha() and first.islower() and first not in METHODS
    return f"{first.capitalize() if is_word else first}{' ' if rest else ''}{rest}."


def _has(frame: DataFrame, source: str) -> bool:
    return any(source in sources(frame, column.metric) for column in COLUMNS)


def _validations(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, str]]:
    """(name of the run and the rules, the text that `meftbench validate` prints) of runs with saved errors."""
    saved_validations = ((name, saved(run)) for name, run in zip(names, runs, strict=True))
    return [
        (f"{name}, by the rules of {validation.profile}", validation_text(validation))
        for name, validation in saved_validations
        if validation and validation.errors
    ]


def _warnings(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, Any]]:
    """The warnings, each sentence once per cell, with the id of the cell's row."""
    entries: dict[tuple[str, str], dict[str, str]] = {}
    for name, run in zip(names, runs, strict=True):
        for outcome in outcomes(run):
            for record in outcome.records:
                for sentence in warnings(record):
                    entry = {"label": outcome.label, "anchor": anchor(name, outcome.cell_id), "sentence": sentence}
                    entries.setdefault((entry["anchor"], sentence), entry)
    return list(entries.values())
