"""One self-contained HTML page of a run or several, with the plots and the table as files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meftbench.catalogue.metrics import METRICS
from meftbench.records.outcome import outcomes
from meftbench.records.store import Run, unwritable, write_whole
from meftbench.report.columns import SHOWN, count, error, loss, number
from meftbench.report.figures.pictures import Picture, pictures
from meftbench.report.render.terminal import ending, failures
from meftbench.report.render.verdicts import markdown_table
from meftbench.report.results import (
    SETTING,
    WRONG_GRADIENT,
    frame_of,
    groups,
    parts_of,
    rows_of,
    run_names,
    share_of_full,
    sources,
    taken,
    write_csv,
)
from meftbench.report.views import claims
from meftbench.report.views.best import BEST_HEAD, all_best_levers
from meftbench.report.views.detail import NOISE, command, headline, sections, warnings
from meftbench.report.views.scores import Table as ScoreTable
from meftbench.report.views.scores import results, untrained
from meftbench.report.views.scores import tables as score_tables
from meftbench.report.views.validation import validation_pictures, validation_text
from meftbench.units import MiB
from meftbench.verdicts.environment import checkout, machines
from meftbench.verdicts.validation import predicted_for, saved

if TYPE_CHECKING:
    from pandas import DataFrame

PAGE, TABLE, MARKDOWN, PLOTS = "report.html", "table.csv", "table.md", "plots"
_SOURCES = {
    "measured": "a clock, a CUDA allocator or the answers to a task said so",
    "counted": "bytes of live tensors, counted on CPU under real arithmetic",
    "predicted": "simulated for a named device",
}
_SETTING = tuple(name for name in SETTING if name not in ("run", "model"))
# Metrics that are explained under the table; the others are explained in each cell's detail.
_EXPLAINED = (
    *SHOWN,
    "starting_point_shift",
    "parameters_trainable",
    "activation_gradients_bytes",
    "starting_loss",
    "pretrained_loss",
    "score",
    "training_time_s",
)
# Columns that the table has only where some cell has a value: classifiers have no loss before training, and runs of
# older versions do not record how much of their activation memory is gradients.
_OPTIONAL = ("activation_gradients_bytes", "starting_loss", "pretrained_loss")


def write_report(runs: Sequence[Run], folder: Path, kinds: AbstractSet[str]) -> list[Path]:
    """Write the `kinds` ("html", "md", "csv") of report on `runs` into `folder`; return the files, the page first.

    Raises UserError where the folder cannot be written.
    """
    frame = frame_of(runs)
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if "html" in kinds:
            drawn = [*pictures(frame), *validation_pictures(runs, run_names(runs))]
            (folder / PLOTS).mkdir(exist_ok=True)
            for picture in drawn:
                picture.write(folder / PLOTS)
            write_whole(folder / PAGE, page(runs, frame, drawn) + "\n")
            written.append(folder / PAGE)
            written += [folder / PLOTS / f"{picture.name}.{kind}" for picture in drawn for kind in ("png", "svg")]
        if "csv" in kinds:
            write_csv(frame, folder / TABLE)
            written.append(folder / TABLE)
        if "md" in kinds:
            write_whole(folder / MARKDOWN, markdown(runs, frame))
            written.append(folder / MARKDOWN)
    except OSError as fault:
        raise unwritable(folder, fault) from None
    return written


def page(runs: Sequence[Run], frame: DataFrame, drawn: Sequence[Picture]) -> str:
    """The page as HTML text. The template escapes all that comes from records."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("meftbench.report.render", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    names = run_names(runs)
    return environment.get_template("page.html.j2").render(
        title=" and ".join(dict.fromkeys(names)),
        runs=[_headline(name, run) for name, run in zip(names, runs, strict=True)],
        sources={source: text for source, text in _SOURCES.items() if source in _occurring(frame)},
        metrics_by_source=_by_source(frame),
        groups=[group.title for group in groups(untrained(frame))] if len(frame) else [],
        shared=_shared(untrained(frame)),
        differing=_differing(untrained(frame)),
        pictures=[{"name": p.name, "title": p.title, "alt": p.alt, "svg": Markup(p.inline())} for p in drawn],
        quality=score_tables(results(frame)),
        claims=claims.claim_tables(frame),
        claims_head=claims.HEAD,
        claims_said=claims.SAID,
        validations=_validations(runs, names),
        rows=table_rows(untrained(frame)),
        best=all_best_levers(untrained(frame)),
        best_head=BEST_HEAD,
        optional=_optional(untrained(frame)),
        several_models=frame["model"].nunique() > 1 if len(frame) else False,
        several_runs=len(runs) > 1,
        failures=[line for run in runs for line in failures(run)],
        warnings=_warnings(runs),
        noise=NOISE,
        wrong_gradient=f"{WRONG_GRADIENT * 100:.0f} %",
        details=[_detail(name, run, record) for name, run in zip(names, runs, strict=True) for record in run.records],
        meanings={
            name: METRICS[name]
            for name in _EXPLAINED
            if name in SHOWN or (taken(frame, name) if name in _OPTIONAL else name in frame)
        },
    )


def table_rows(frame: DataFrame) -> list[dict[str, Any]]:
    """The rows of the page's table, by column; a cell that is a mapping has `text` to show and `key` for sorting."""
    shares = share_of_full(frame) if len(frame) else {}
    optional = _optional(frame)
    return [_table_row(row, shares, optional) for row in rows_of(frame)]


def _optional(frame: DataFrame) -> list[str]:
    return [metric for metric in _OPTIONAL if taken(frame, metric)]


def _table_row(row: dict[str, Any], shares: dict[str, float], optional: Sequence[str]) -> dict[str, Any]:
    def cell(metric: str, text: str) -> dict[str, Any]:
        value = row[metric]
        source = row[f"{metric}_source"] if value is not None else ""
        return {"text": text, "key": "" if value is None else value, "source": source}

    share = shares.get(row["cell_id"])
    name, settings, levers = parts_of(row["method"])
    micro = f" (mb {row['micro_batch_size']})" if row["micro_batch_size"] != row["batch_size"] else ""
    return {
        "run": row["run"],
        "anchor": anchor(row["run"], row["cell_id"]),
        "label": row["label"],
        "model": row["model"],
        "method": row["method"],
        "name": "+".join([name, *levers]),
        "settings": settings,
        "batch": {"text": f"{row['batch_size']}{micro}", "key": row["batch_size"]},
        "length": row["sequence_length"],
        "setting": {name: "default" if row[name] is None else row[name] for name in _SETTING},
        "status": row["status"],
        "detail": row["detail"],
        "share": {"text": "" if share is None else f"{share:.1%}", "key": "" if share is None else share},
        "numbers": [
            cell("activation_peak_bytes", number(row["activation_peak_bytes"], MiB)),
            *(cell(name, number(row[name], MiB)) for name in optional if name == "activation_gradients_bytes"),
            cell("peak_allocated_bytes", number(row["peak_allocated_bytes"], MiB)),
            cell("step_time_s", number(row["step_time_s"], 1e-3)),
            cell("tokens_per_s", "-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:,.0f}"),
            cell("reconstruction_rel_max", error(row["reconstruction_rel_max"])),
            cell("gradient_rel_max", error(row["gradient_rel_max"])),
            cell("starting_point_shift", "-" if (shift := row["starting_point_shift"]) is None else f"{shift:.3g}"),
            *(cell(name, loss(row[name])) for name in optional if name != "activation_gradients_bytes"),
            cell("parameters_trainable", count(row["parameters_trainable"])),
        ],
    }


def _differing(frame: DataFrame) -> list[str]:
    """The settings in which the cells differ: columns of the table."""
    return [name for name in _SETTING if frame[name].nunique(dropna=False) > 1] if len(frame) else []


def _shared(frame: DataFrame) -> str:
    """The settings that all cells have in common, stated once instead of in every row."""
    if not len(frame):
        return ""
    first, differing = next(rows_of(frame)), _differing(frame)
    parts = [str(first["model"])] if frame["model"].nunique() == 1 else []
    parts += [
        f"{_setting_name(name)} {first[name]}"
        for name in _SETTING
        if name not in differing and not (first[name] is None or first[name] is False)
    ]
    return ", ".join(parts)


def _setting_name(name: str) -> str:
    return name.removesuffix("_requested").replace("_", " ")


def anchor(run: str, cell_id: str) -> str:
    """The id of a cell's detail in the page."""
    return "cell-" + "".join(char if char.isalnum() else "-" for char in f"{run}-{cell_id}")


def markdown(runs: Sequence[Run], frame: DataFrame) -> str:
    """The tables as Markdown, below a line per run with its machine, date and commit."""
    heads = [_headline(name, run) for name, run in zip(run_names(runs), runs, strict=True)]
    headlines = "\n".join(
        f"- {head['name']}: {head['machine']}, {head['date']}, {head['checkout']}; {head['cells']}"
        + (f"; predicted: {head['validation']}" if head["validation"] else "")
        for head in heads
    )
    parts = [headlines, *(_scores_markdown(table) for table in score_tables(results(frame)))]
    steps = untrained(frame)
    if len(steps) or len(parts) == 1:
        parts.append(_steps_markdown(steps, len(runs) > 1))
    for best in all_best_levers(steps):
        lines = [texts for comparison in best.comparisons for texts in comparison.texts()]
        notes = [f"{note}." for note in best.unequal]
        parts += [f"## Each method with its best levers: {best.title}", markdown_table(BEST_HEAD, lines), *notes]
    if claim_tables := claims.claim_tables(frame):
        parts.append(f"## The paper's claims\n\n{claims.SAID}")
    parts += [_claim_markdown(table) for table in claim_tables]
    return "\n\n".join(parts) + "\n"


def _scores_markdown(table: ScoreTable) -> str:
    return f"## {table.title}\n\n{' '.join(table.notes)}\n\n{markdown_table(table.head, table.lines)}"


def _claim_markdown(table: claims.ClaimTable) -> str:
    rows = markdown_table(claims.HEAD, [row.texts for row in table.rows])
    return "\n\n".join([f"### {table.title}", *table.notes, rows])


def _steps_markdown(frame: DataFrame, several_runs: bool) -> str:
    differing = _differing(frame)
    # A run or model that all rows share has no column.
    leading_columns = ["run"] * several_runs + ["model"] * (frame["model"].nunique() > 1)
    optional = _optional(frame)
    gradients = ["of it gradients MiB"] if "activation_gradients_bytes" in optional else []
    losses = [heading for name, heading in _LOSS_HEADS.items() if name in optional]
    head = (*leading_columns, "method", "batch", "tokens", *map(_setting_name, differing), "status",
            "activation MiB", "% of full", *gradients, "peak MiB", "step ms", "tokens/s", "recon. error",
            "gradient error", "start shift", *losses, "trained")  # fmt: skip
    lines = []
    for row in table_rows(frame):
        first = (*(row[name] for name in leading_columns), row["method"], row["batch"]["text"], str(row["length"]))
        setting = (str(row["setting"][name]) for name in differing)
        texts = [
            number_cell["text"] + (f" ({number_cell['source']})" if number_cell["source"] else "")
            for number_cell in row["numbers"]
        ]
        lines.append((*first, *setting, row["status"], texts[0], row["share"]["text"], *texts[1:]))
    shared = f" All cells: {_shared(frame)}." if _shared(frame) else ""
    return f"Compared at equal batch, micro-batch and length.{shared}\n\n{markdown_table(head, lines)}"


_LOSS_HEADS = {"starting_loss": "start loss", "pretrained_loss": "pre-trained"}


def _headline(name: str, run: Run) -> dict[str, str]:
    started = run.records[0].started_at if run.records else str(run.environment.get("taken_at", "unknown date"))
    return {
        "name": name,
        "machine": machines(run),
        "date": started,
        "checkout": checkout(run.environment),
        "cells": ending(run) if run.records else "no cell has finished",
        "description": str(run.suite.get("description") or ""),
        "path": run.path.name if run.path.is_absolute() else str(run.path),  # without folders of this machine
        "validation": "; ".join(f"{name}: {about}" for name, about in predicted_for(run).items()),
        "protocol": ", ".join(_protocol_texts(run.suite.get("protocol") or {})),
    }


def _protocol_texts(protocol: dict[str, Any]) -> list[str]:
    """Settings of a protocol as words; those that are None, and so left to their default, are omitted."""
    return [
        f"{key} {' + '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in protocol.items()
        if value is not None
    ]


def _validations(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, str]]:
    """(name of the run and the rules, the text that `meftbench validate` prints) of runs with saved errors."""
    saved_validations = ((name, saved(run)) for name, run in zip(names, runs, strict=True))
    return [
        (f"{name}, by the rules of {validation.profile}", validation_text(validation))
        for name, validation in saved_validations
        if validation and validation.errors
    ]


def _occurring(frame: DataFrame) -> set[str]:
    return {source for source, _ in _by_source(frame)}


def _by_source(frame: DataFrame) -> list[tuple[str, str]]:
    """(source, the metrics it is the source of), of those that the table shows."""
    names_by_source: dict[str, list[str]] = {}
    for name in _EXPLAINED:
        if name in frame:
            for source in sources(frame, name):
                names_by_source.setdefault(source, []).append(name)
    return [(source, ", ".join(names_by_source[source])) for source in _SOURCES if source in names_by_source]


def _warnings(runs: Sequence[Run]) -> list[dict[str, str]]:
    """The warnings, each sentence once per cell, with the anchor of the cell's detail."""
    names = run_names(runs)
    entries: dict[tuple[str, str], dict[str, str]] = {}
    for name, run in zip(names, runs, strict=True):
        for outcome in outcomes(run):
            for record in outcome.records:
                for sentence in warnings(record):
                    entry = {"label": outcome.label, "anchor": anchor(name, outcome.cell_id), "sentence": sentence}
                    entries.setdefault((entry["anchor"], sentence), entry)
    return list(entries.values())


def _detail(name: str, run: Run, record: Any) -> dict[str, Any]:
    return {
        "anchor": anchor(name, record.cell_id) + (f"-{record.repeat}" if record.repeat else ""),
        "label": record.label + (f", repeat {record.repeat}" if record.repeat else ""),
        "cell_id": record.cell_id,
        "status": record.status,
        "headline": headline(record),
        "sections": sections(record),
        "warnings": warnings(record),
        "traceback": str(record.status_detail.get("traceback") or ""),
        "command": command(run, record),
    }
