"""The answer of `meftbench plan` for a reader: on the terminal, and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from meftbench.plan.ranking import method_of
from meftbench.report.console import text_of
from meftbench.report.results import print_table
from meftbench.report.views.commands import elsewhere, estimate_command, snippet
from meftbench.units import format_bytes, format_duration

if TYPE_CHECKING:
    from rich.console import Console

Row = Mapping[str, Any]
LABELS = ("method", "lever", "smallest card")  # columns of texts, which may take several lines
NARROWEST = 16  # characters of such a column
Table = tuple[str, list[str], list[list[str]]]


def name_of(row: Row, answer: Row) -> str:
    """The label of a row, with its precision where there are several, and its optimizer where it is not the one asked
    for."""
    rest = [row["precision"]] if len(answer["precisions"]) > 1 else []
    rest += [row["optimizer"]] if row["optimizer"] != answer["optimizer"] else []
    return ", ".join([row["method"], *rest])


def speed_of(row: Row, answer: Row) -> str:
    """The row's speed as text with unit and source: tokens per second, or its arithmetic where no time is known."""
    if row["tokens_per_s"] is not None:
        return f"{row['tokens_per_s']:,.0f} tokens/s predicted"
    return f"{row['relative_cost']:.2f} × the least arithmetic a token, counted"


def shape_of(row: Row, answer: Row) -> str:
    micro = f"{row['micro_batch_size'] or 1:,} × {row['sequence_length']:,} tokens"
    return f"micro-batch {micro}" + (f" of a batch of {answer['batch_size']:,}" if answer["batch_size"] else "")


def answer_lines(answer: Row) -> list[str]:
    """The answer in a sentence, and what to type for it; then the smallest."""
    card = f"{answer['device']}, {format_bytes(answer['cards'][0])}"
    best, smallest = answer["fastest"], answer["smallest"]
    if best is None:
        if not answer["too_large"]:
            return [f"nothing fits {card}"]
        least = min(answer["too_large"], key=lambda entry: entry["missing_bytes"])
        needed, missing = format_bytes(least["least_device_bytes"]), format_bytes(least["missing_bytes"])
        what = f"{name_of(least, answer)} needs least: {needed} at micro-batch 1, {missing} too much, predicted"
        return [f"nothing fits {card}, at {answer['sequence_length']:,} tokens; {what}"]
    how = "is the fastest that fits" if answer["has_time"] else "takes the least arithmetic of all that fit"
    if not best["has_backward"]:
        how = "is all that fits, and needs many more steps than methods with a backward pass"
    memory = f"{format_bytes(best['process_device_bytes'])} of {format_bytes(best['memory_bytes'])} predicted"
    lines = [
        f"{name_of(best, answer)} {how} {card}: {shape_of(best, answer)}, {memory} "
        f"(headroom {format_bytes(best['headroom_bytes'])}), {speed_of(best, answer)}" + _cost(best),
        f"  type: {estimate_command(best, answer)}",
        f"smallest: {name_of(smallest, answer)}: {format_bytes(smallest['least_device_bytes'])} at micro-batch 1 × "
        f"{smallest['sequence_length']:,} tokens, predicted; at {shape_of(smallest, answer)} "
        f"{format_bytes(smallest['process_device_bytes'])}, {speed_of(smallest, answer)}",
    ]
    if not _same(smallest, best):
        lines.append(f"  type: {estimate_command(smallest, answer)}")
    return lines


def _same(one: Row, other: Row) -> bool:
    return all(one[key] == other[key] for key in ("method", "precision", "optimizer"))


def _cost(row: Row) -> str:
    cost = row["cost_per_million_tokens"]
    return "" if cost is None else f", {cost:,.3f} {row['currency']} a million tokens predicted"


def tables(answer: Row) -> Iterator[Table]:
    """Title, head and rows of each table; every title names the source of its numbers."""
    if answer["best"]:
        yield "best lever set of each method, memory predicted", *_rows(answer["best"], answer)
    frontier = sorted((row for row in answer["rows"] if row["on_frontier"]), key=_smallest_first)
    if frontier:
        against = "predicted tokens/s" if answer["has_time"] else "counted arithmetic"
        title = f"Pareto set (no other is smaller and no slower): memory at micro-batch 1, predicted, against {against}"
        yield title, *_rows(frontier, answer)
    if answer["explained"]:
        yield _explained(answer)
    if answer["needs"]:
        head = ["method", "least GiB", "smallest card", "its GiB"]
        body = [
            [name_of(entry, answer), _gib(entry["least_device_bytes"]), entry["card"] or "none is large enough",
             _gib(entry["memory_bytes"])]
            for entry in answer["needs"]
        ]  # fmt: skip
        yield "smallest shipped card for micro-batch 1, memory predicted", head, body
    if answer["map"]:
        yield _map(answer)


def _smallest_first(row: Row) -> Any:
    return row["least_device_bytes"], row["method"]


def _gib(size: float | None) -> str:
    return "-" if size is None else f"{size / 2**30:,.1f}"


def _rows(rows: Sequence[Row], answer: Row) -> tuple[list[str], list[list[str]]]:
    """A row for each of `rows`, with the columns for which there are numbers."""
    columns: dict[str, Any] = {
        "micro-batch": lambda row: f"{row['micro_batch_size']:,}",
        "GiB": lambda row: _gib(row["process_device_bytes"]),
        "GiB at 1": lambda row: _gib(row["least_device_bytes"]),
    }
    if answer["has_time"]:
        columns["tokens/s"] = lambda row: "-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:,.0f}"
    columns["arithmetic"] = lambda row: f"{row['relative_cost']:.2f}"
    columns["run again"] = lambda row: f"{row['recomputed_flops_share']:.0%}"
    if any(row["host_transfer_bytes"] for row in rows):
        columns["to host GiB"] = lambda row: _gib(row["host_transfer_bytes"])
    if any(row["cost_per_million_tokens"] is not None for row in rows):
        columns[f"{rows[0]['currency']}/M tokens"] = lambda row: (
            "-" if row["cost_per_million_tokens"] is None else f"{row['cost_per_million_tokens']:,.3f}"
        )
    body = [[name_of(row, answer) + _mark(row), *(show(row) for show in columns.values())] for row in rows]
    return ["method", *columns], body


def _mark(row: Row) -> str:
    return "" if row["has_backward"] else " (many more steps)"


def _explained(answer: Row) -> Table:
    """For each lever one pair of rows: of the answer's method where there is one, else the pair that saves most."""
    best = answer["fastest"] or answer["smallest"]
    chosen: dict[str, Row] = {}
    for pair in answer["levers"]:  # the most saved first
        present = chosen.get(pair["lever"])
        if present is None or _closeness(pair, best) > _closeness(present, best):
            chosen[pair["lever"]] = pair
    head = ["method", "lever", "micro-batch", "without", "with", "saves", "arithmetic"]
    body = [
        [
            name_of({**pair, "method": pair["without"]}, answer),
            f"+{pair['lever']}",
            f"{pair['micro_batch_size']:,}",
            _gib(pair["without_bytes"]),
            _gib(pair["with_bytes"]),
            f"{pair['saves_bytes'] / 2**30:,.2f}",
            f"{pair['relative_cost_without']:.2f} → {pair['relative_cost_with']:.2f}",
        ]
        for pair in sorted(chosen.values(), key=lambda pair: -pair["saves_bytes"])
    ]
    return "what each lever saves here: GiB at equal micro-batch, predicted, and arithmetic, counted", head, body


def _closeness(pair: Row, best: Row | None) -> int:
    """How much a pair says of the answer: its own lever set, that with one lever more, its method, or another."""
    if best is None:
        return 0
    if pair["with"] == best["method"]:
        return 3
    return 2 if pair["without"] == best["method"] else int(method_of(pair) == method_of(best))


def _map(answer: Row) -> Table:
    """Memory by batch (down) and length (across)."""
    grid = answer["map"]
    head = ["batch", *(f"{length:,}" for length in grid["lengths"])]
    sizes = zip(grid["batch_sizes"], grid["process_device_bytes"], strict=True)
    body = [[f"{batch:,}", *map(_gib, row)] for batch, row in sizes]
    return f"GiB of {map_label(answer)} by batch (samples) and length (tokens), predicted", head, body


def map_label(answer: Row) -> str:
    best = answer["fastest"]
    return str(answer["map"].get("method") or (best["method"] if best else "the first answer"))


def larger_lines(answer: Row) -> list[str]:
    """What each larger card buys, and what is missing where a method does not fit."""
    lines = []
    for card in answer["larger"]:
        best, size = card["fastest"], format_bytes(card["memory_bytes"])
        if best is None:
            lines.append(f"a card of {size} buys nothing: nothing fits there either")
            continue
        gain = "" if card["speedup"] is None else f" ({card['speedup']:.2f} times the speed)"
        line = f"a card of {size}: {name_of(best, answer)}, {shape_of(best, answer)}, {speed_of(best, answer)}{gain}"
        new = card["newly_fits"]
        lines.append(line + (f"; {', '.join(new)}, too large here, fit there" if new else ""))
    for entry in answer["too_large"] if answer["fastest"] else []:
        needed, missing = format_bytes(entry["least_device_bytes"]), format_bytes(entry["missing_bytes"])
        needs = f"needs {needed} at micro-batch 1, {missing} too much, predicted"
        lines.append(f"does not fit: {method_of(entry)}; its smallest, {name_of(entry, answer)}, {needs}")
    return lines


def notes(answer: Row) -> list[str]:
    """Lines that a reader needs to understand the numbers."""
    default = ", the default" if answer["default_profile"] else ""
    lines = [
        f"{answer['model']}, {', '.join(answer['precisions'])}; predicted by the rules of {answer['device']} "
        f"(profile {answer['profile']}{default})",
        f"held against the card: what torch reserves, and a context of {format_bytes(answer['context_bytes'])}; "
        "GiB at 1: at micro-batch 1",
        "arithmetic: operations a token over the least of all candidates, counted; run again: their share that is "
        "recomputed in backward, counted",
        "memory and speed only: how well methods train is another question (docs/scores.md)",
    ]
    if not answer["has_time"] and answer["fastest"]:
        lines.append("no time is predicted: the profile says nothing of the device's speed")
    lines += [answer["validation"], f"rules of {answer['rules']}"]
    return lines + [f"not looked at: {label}: {reason}" for label, reason in answer["refused"].items()]


def last_line(answer: Row) -> str:
    candidates, shapes = (
        f"{answer[key]:,} {word}{'s' * (answer[key] != 1)}"
        for key, word in (("candidates", "candidate"), ("traced", "shape"))
    )
    return f"{candidates}, {shapes} traced, in {format_duration(answer['predict_s'])}, measured"


def print_plan(answer: Row, console: Console | None = None) -> None:
    """Print the answer first, then tables, what larger cards buy, what to type, and notes."""
    from rich.console import Console
    from rich.table import Table

    out = console or Console()
    for line in answer_lines(answer):
        out.print(text_of(line, overflow="fold"))
    for title, head, body in tables(answer):
        out.print(text_of(f"\n{title}", style="bold"))
        widths = _columns_in(head, body, out.width)
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
        names = [_stacked(name) for name in head]
        most = max(name.count("\n") for name in names)
        for index, (name, width) in enumerate(zip(names, widths, strict=True)):
            lowered = "\n" * (most - name.count("\n")) + name
            table.add_column(lowered, justify="left" if index == 0 else "right", overflow="fold", width=width)
        for row in body:
            table.add_row(*(text_of(broken(cell, width)) for cell, width in zip(row, widths, strict=True)))
        print_table(table, out, sum(2 + width for width in widths))
    for line in ["", *larger_lines(answer)]:
        out.print(text_of(line, overflow="fold"))
    if answer["fastest"]:
        out.print(text_of("\nin Python", style="bold"))
        out.print(text_of(snippet(answer["fastest"], answer)), soft_wrap=True)
        for library, text in elsewhere(answer["fastest"], answer).items():
            out.print(text_of(f"\nin {library}", style="bold"))
            out.print(text_of(text), soft_wrap=True)
    for line in ["", *notes(answer), last_line(answer)]:
        out.print(text_of(line, overflow="fold"))


def _columns_in(head: list[str], body: list[list[str]], room: int) -> list[int]:
    """The width of each column, such that all stand in `room` characters where they can: labels are broken, numbers
    never."""
    widths = [
        max(len(text) for cell in [_stacked(name), *(row[index] for row in body)] for text in cell.split("\n"))
        for index, name in enumerate(head)
    ]
    labels = [index for index, name in enumerate(head) if name in LABELS]
    over = sum(2 + width for width in widths) - 2 - room
    for index in labels:  # the method first, which is broken most easily
        shrunk = max(min(NARROWEST, widths[index]), widths[index] - max(over, 0))
        over -= widths[index] - shrunk
        widths[index] = shrunk
    return widths


def _stacked(name: str) -> str:
    """The name of a column in two lines, where it has two words."""
    return re.sub(r"(?<=-)|\s", "\n", name, count=1)


def broken(label: str, width: int) -> str:
    """A label in lines of at most `width` characters, broken before `+` or a bracket where there is one."""
    lines = [""]
    for piece in re.split(r"(?=[+(])|(?<=[ ,])", label):
        if lines[-1] and len(lines[-1] + piece) > width:
            lines.append(" ")
        lines[-1] += piece
    return "\n".join(lines)


def markdown(answer: Row) -> str:
    """The answer as plan.md: as on the terminal, and what to type for the best of every method."""
    parts = [f"# {answer['model']} on {answer['device']}", "\n".join(_listed(answer_lines(answer)))]
    for title, head, body in tables(answer):
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
        parts.append(f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    if larger := larger_lines(answer):
        parts.append("## Larger cards, and what does not fit\n\n" + "\n".join(_listed(larger)))
    if answer["best"]:
        parts.append("## What to type")
    for row in answer["best"]:
        parts.append(f"### {name_of(row, answer)}\n\n```bash\n{estimate_command(row, answer)}\n```")
        parts.append(f"```python\n{snippet(row, answer)}\n```")
        for library, text in elsewhere(row, answer).items():
            language = "yaml" if library == "axolotl" else "python"
            told = text if text.startswith("not offered") else f"\n\n```{language}\n{text}\n```"
            parts.append(f"{library}: {told}")
    parts.append("## How to read this\n\n" + "\n".join(_listed([*notes(answer), last_line(answer)])))
    return "\n\n".join(parts) + "\n"


def _listed(lines: Sequence[str]) -> list[str]:
    return [f"  - {line.strip()}" if line.startswith(" ") else f"- {line}" for line in lines]
