"""What predictions were held against that others measured and published, as lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING

from meftbench.catalogue.validated import Group, Validated
from meftbench.units import format_bytes

if TYPE_CHECKING:
    from pandas import DataFrame

_QUANTITIES = {
    "peak_allocated": "peak allocated",
    "operator_peak": "peak allocated of one operator",
    "loss_peak": "peak allocated of a loss over a vocabulary",
    "allocated_after_step": "allocated between steps",
    "reserved": "peak reserved",
    "device_used": "memory of the process",
    "held_after_forward": "held after forward",
    "growth": "memory a sample more takes",
}


def published_lines(content: Validated) -> list[str]:
    """For each quantity, with complete settings and then with others: how many figures by source and rules, and how far
    off predictions are; then the allocator's addresses."""
    lines: list[str] = []
    for setting, about in (("complete", "complete settings"), ("partial", "settings that are not stated whole")):
        for quantity, name in _QUANTITIES.items():
            groups = [g for g in content.groups if (g.setting, g.quantity) == (setting, quantity)]
            if groups:
                lines += [f"{name}, {about}", f"  {'':<20}{'figures':>8}{'median':>9}{'worst':>9}"]
                lines += _rows(groups)
    same = content.equal_addresses / content.allocations
    lines += [
        f"allocator: {content.equal_addresses:,} of {content.allocations:,} allocations of {content.traces} real "
        f"traces at the address that torch chose ({same:.0%})",
        f"predicted with torch {content.torch}, transformers {content.transformers}; measured by the sources",
    ]
    return lines


def _rows(groups: list[Group]) -> Iterator[str]:
    groups = sorted(groups, key=lambda group: (group.source, group.rules))
    for (source, rules), of_source in groupby(groups, key=lambda group: (group.source, group.rules)):
        errors = [error for group in of_source for error in group.errors]
        yield _row(source, errors)
        yield f"    rules of {rules.partition(' where ')[0]}"
    if len({(group.source, group.rules) for group in groups}) > 1:
        yield _row("all", [error for group in groups for error in group.errors])


def _row(name: str, errors: list[float]) -> str:
    sizes = [abs(error) for error in errors]
    return f"  {name:<20}{len(sizes):>8}{median(sizes):>9.3%}{max(sizes):>9.3%}"


def figure_lines(table: DataFrame) -> list[str]:
    """Every figure: its name, what was measured and predicted, and the error."""
    lines = ["measured by others, predicted by meftbench"]
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    for setting, of_setting in groupby(rows, key=lambda row: row["setting"]):
        lines.append(f"{setting} settings")
        for row in of_setting:
            predicted, measured = row["predicted_bytes"], format_bytes(int(row["published_bytes"]))
            lines.append(f"  {row['id']}, {_QUANTITIES.get(row['quantity'], row['quantity'])}")
            if predicted is None:
                lines.append(f"    measured {measured}, not predicted")
            else:
                error = f"error {row['ratio'] - 1:+.3%}"
                lines.append(f"    measured {measured}, predicted {format_bytes(int(predicted))}, {error}")
    return lines
