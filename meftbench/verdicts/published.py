"""The table of published measurements beside predictions, and how far off they are by source, quantity and rules.

The table is in the repository (reports/published/table.csv); the package carries its statistics
(catalogue/validated.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from meftbench.errors import UserError

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = [
    "id", "setting", "quantity", "published_bytes", "predicted_bytes", "ratio", "profile", "rules", "source", "notes",
]  # fmt: skip
TABLE = Path("reports") / "published" / "table.csv"
BY = ["source", "quantity", "setting", "rules"]


def statistics(table: DataFrame) -> DataFrame:
    """A row for each source, quantity, setting and rule set: how many figures, how many of them predicted, the median
    and the worst error (shares, without signs), and the median with its sign."""
    from pandas import DataFrame

    rows: list[dict[str, Any]] = []
    for names, group in table.groupby(BY, sort=True):
        errors = (group.ratio - 1).dropna()
        rows.append(
            dict(zip(BY, names, strict=True))
            | {
                "figures": len(group),
                "predicted": len(errors),
                "median": errors.abs().median(),
                "worst": errors.abs().max(),
                "signed": errors.median(),
            }
        )
    return DataFrame(rows)


def read_table(file: Path) -> DataFrame:
    """The table that the campaign wrote. Raises UserError: there is none, or it is another."""
    from pandas import read_csv

    cure = "run `python reports/campaigns/published.py reports/published` in the repository"
    try:
        table = read_csv(file)
    except (OSError, ValueError) as error:
        raise UserError(str(file), f"cannot be read ({error})", cure) from None
    if missing := [name for name in COLUMNS if name not in table.columns]:
        raise UserError(str(file), f"has no column {missing[0]}", cure)
    return table
