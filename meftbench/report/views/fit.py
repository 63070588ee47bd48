"""What fits which card: a table on the terminal, in Markdown and CSV, and a plot."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meftbench.catalogue.labels import joined, parts_from
from meftbench.report.console import text_of
from meftbench.report.figures.plots import legend_beside, plain_numbers
from meftbench.report.figures.style import colour
from meftbench.report.results import NARROWEST, print_table
from meftbench.units import format_bytes, format_duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

_UNIT = {"batch_size": "samples", "sequence_length": "tokens"}
_LINES = {"": "-", "checkpoint": "--", "chunked_loss": ":", "checkpoint+chunked_loss": "-."}


def as_answer(about: dict[str, Any], methods: list[dict[str, Any]]) -> dict[str, Any]:
    """`about` (what was asked for) with `rows`, one per method, question and card.

    methods: what was found of each, with its label (`method`) and the same as fields (`parts`).
    largest: None where nothing fits.  at_limit: it is the largest size tried, or that the model has positions for.
    """
    rows = [
        {
            "method": entry["method"],
            "parts": entry["parts"],
            "asked": line["axis"],
            "at": line["at"],
            "memory_bytes": card,
            "largest": size or None,
            "at_limit": size == line["limit"],
            "all_positions": size == about["positions"] and line["axis"] == "sequence_length",
        }
        for entry in methods
        for line in entry["lines"]
        for card, size in zip(about["cards"], line["largest"], strict=True)
    ]
    refused = {entry["method"]: entry["refused"] for entry in methods if entry["refused"]}
    cells = sum(entry["traced"] for entry in methods)
    return about | {"source": "predicted", "rows": rows, "refused": refused, "cells": cells}


def largest_text(row: dict[str, Any]) -> str:
    """The number of a row: "-" where nothing fits, "≥ 2,048 (all positions)" where the model has no more positions."""
    if row["largest"] is None:
        return "-"
    number = f"{row['largest']:,}"
    if row["all_positions"]:
        return f"≥ {number} (all positions)"
    return f"≥ {number}" if row["at_limit"] else number


def title(axis: str, at: int) -> str:
    if axis == "batch_size":
        return f"largest batch (samples) at {at:,} tokens"
    return f"longest sequence (tokens) at a batch of {at:,}"


def notes(answer: dict[str, Any]) -> list[str]:
    """Lines that a reader needs to understand the table."""
    default = ", the default" if answer["default_profile"] else ""
    context = format_bytes(answer["context_bytes"])
    lines = [
        f"{answer['model']}, {answer['precision']}; predicted by the rules of {answer['device']} "
        f"(profile {answer['profile']}{default})",
        f"held against the card: what torch reserves, and a context of {context}",
        "every number was predicted to fit, and one more not to; -: nothing fits",
    ]
    lines += [answer["validation"], f"rules of {answer['rules']}"]
    return lines + [f"{method}: {reason}" for method, reason in answer["refused"].items()]


def tables(answer: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of each question's table: a row per method, a column per card."""
    for axis, at in dict.fromkeys((row["asked"], row["at"]) for row in answer["rows"]):
        of_question = [row for row in answer["rows"] if (row["asked"], row["at"]) == (axis, at)]
        body = [
            [method, *(largest_text(row) for row in of_question if row["method"] == method)]
            for method in dict.fromkeys(row["method"] for row in of_question)
        ]
        yield title(axis, at), ["method", *map(format_bytes, answer["cards"])], body


def print_fit(answer: dict[str, Any], console: Console | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    out = console or Console()
    for heading, head, body in tables(answer):
        out.print(text_of(f"{heading}, predicted", style="bold"))
        for method_width, columns, widths in _column_groups(head, body, out.width):
            table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
            table.add_column(head[0], overflow="fold", width=method_width)
            for index in columns:
                table.add_column(head[index], justify="right", overflow="fold", width=widths[index])
            for row in body:
                table.add_row(text_of(row[0]), *(text_of(row[index]) for index in columns))
            print_table(table, out, method_width + sum(2 + widths[index] for index in columns))
    for note in notes(answer):
        out.print(text_of(note, overflow="fold"))
    out.print(text_of(f"{answer['cells']:,} cells predicted in {format_duration(answer['predict_s'])}, measured"))


def _column_groups(
    head: list[str], body: list[list[str]], room: int
) -> Iterator[tuple[int, list[int], dict[int, int]]]:
    """Groups of the cards' columns, at least one in each, that fit beside the methods' column in `room` characters.

    Yields the width of the methods' column, the indices of the group, and the width of every column.
    """
    cells = {index: [head[index], *(row[index] for row in body)] for index in range(1, len(head))}
    longest = max(len(row[0]) for row in [head, *body])
    widths = {index: max(map(len, texts)) for index, texts in cells.items()}
    if longest + max(widths.values()) + 2 > room:  # then each word takes a line of its own; none is cut
        widths = {index: max(len(word) for text in texts for word in text.split()) for index, texts in cells.items()}
    method_width = max(NARROWEST, min(longest, room - max(widths.values()) - 2))
    columns: list[int] = []
    for index in cells:
        if columns and method_width + sum(2 + widths[i] for i in [*columns, index]) > room:
            yield method_width, columns, widths
            columns = []
        columns.append(index)
    yield method_width, columns, widths


def markdown(answer: dict[str, Any]) -> str:
    parts = []
    for heading, head, body in tables(answer):
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
        parts.append(f"### {heading}, predicted\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes(answer))]) + "\n"


def write_fit(answer: dict[str, Any], folder: Path) -> None:
    """Write fit.csv, fit.md, fit.png and fit.svg. Raises UserError where `folder` cannot be written."""
    import pandas as pd

    from meftbench.errors import UserError
    from meftbench.records.store import replace_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
        frame = pd.DataFrame(answer["rows"]).drop(columns="parts").astype({"largest": "Int64"})
        replace_file(folder / "fit.csv", frame.assign(source="predicted").to_csv(index=False).encode())
        replace_file(folder / "fit.md", markdown(answer).encode())
        for kind in ("png", "svg"):
            replace_file(folder / f"fit.{kind}", picture(answer, kind))
    except OSError as error:
        raise UserError(str(folder), f"cannot be written ({error.strerror})", "choose another --out") from None


def picture(answer: dict[str, Any], kind: str) -> bytes:
    """The figure as PNG or SVG, with a panel per question."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    questions = list(dict.fromkeys((row["asked"], row["at"]) for row in answer["rows"]))
    columns = min(2, len(questions))
    lines = -(-len(questions) // columns)
    stream = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with rc_context({"svg.hashsalt": "fit", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(6.8 * columns, 3.4 * lines + 0.4), layout="constrained")
        for index, (axis, at) in enumerate(questions):
            ax = figure.add_subplot(lines, columns, index + 1)
            plot_fit([row for row in answer["rows"] if (row["asked"], row["at"]) == (axis, at)], ax)
            ax.set_title(title(axis, at), loc="left")
        heading = f"What fits, predicted: {answer['model']}, {answer['precision']}, by the rules of {answer['device']}"
        figure.suptitle(heading, x=0.01, ha="left", fontsize=11, fontweight="bold")
        if any(row["at_limit"] for row in answer["rows"]):
            note = "A ring: the model has no more positions, or more was not looked at."
            figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color="#555555")
        figure.savefig(stream, format=kind, dpi=130, metadata=metadata)
    return stream.getvalue()


def plot_fit(rows: list[dict[str, Any]], ax: Axes) -> None:
    """The largest size against the card's memory (GiB), log-log, a line per method.

    rows: of one question. Colours stand for methods, strokes for memory optimisations (levers). A ring: the model has
    no more positions, or larger sizes were not tried.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    sizes = {method: [row["largest"] for row in rows if row["method"] == method] for method in methods}
    for index, method in enumerate(methods):
        fitting = [row for row in rows if row["method"] == method and row["largest"]]
        # Lines drawn later at the same places would hide this one, so it is drawn wider.
        hidden = sum(sizes[later] == sizes[method] for later in methods[index + 1 :])
        parts = parts_from(next(row["parts"] for row in rows if row["method"] == method))
        levers, shade = joined(parts[1:]), colour(parts[0].name)
        xs, ys = [row["memory_bytes"] / 2**30 for row in fitting], [row["largest"] for row in fitting]
        label = method if fitting else f"{method}: nothing fits"
        ax.plot(xs, ys, _LINES.get(levers, "-"), color=shade, marker="o", label=label,
                linewidth=1.5 + 1.8 * hidden, markersize=4 + 1.8 * hidden)  # fmt: skip
        ends = [(x, y) for x, y, row in zip(xs, ys, fitting, strict=True) if row["at_limit"]]
        ax.plot([x for x, _ in ends], [y for _, y in ends], "o", color=shade, fillstyle="none",
                markersize=9 + 1.8 * hidden, label="_limit")  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="memory of the card (GiB)", ylabel=_UNIT[rows[0]["asked"]])
    places = sorted({row["memory_bytes"] / 2**30 for row in rows})
    ax.set_xticks(places, [f"{place:.3g}" for place in places])
    ax.minorticks_off()
    plain_numbers(ax)
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    legend_beside(ax)
