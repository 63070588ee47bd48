"""The table of published measurements beside predictions, and how far off they are by source, quantity and rules.

The table is in the repository (reports/published/table.csv); the package carries its statistics
(catalogue/validated.py).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meftbench.errors import UserError, one_line
from meftbench.escapes import single_line

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = [
    "id", "setting", "quantity", "published_bytes", "predicted_bytes", "ratio", "profile", "rules", "source", "notes",
]  # fmt: skip
TABLE = Path("reports") / "published" / "table.csv"
MOST_BYTES = 16 * 2**20  # of a table
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
    """The table that the campaign wrote; control characters in its texts are shown as escapes.

    Raises UserError: there is none, it is another one, or a number in it is none.
    """
    from pandas import read_csv

    cure = "run `python reports/campaigns/published.py reports/published` in meftbench's repository"
    try:
        if not file.is_file():
            raise UserError(str(file), "is no file" if file.exists() else "there is no such file", cure)
        if file.stat().st_size > MOST_BYTES:
            raise UserError(str(file), f"is larger than {MOST_BYTES // 2**20} MiB, and no such table", cure)
        table = read_csv(file, dtype=str, keep_default_na=False)
        if missing := [name for name in COLUMNS if name not in table.columns]:
            raise UserError(str(file), f"has no column {missing[0]}", cure)
        for name in ("published_bytes", "predicted_bytes", "ratio"):
            table[name] = [float(text) if text else math.nan for text in table[name]]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(str(file), f"cannot be read ({one_line(error)[:200]})", cure) from None
    numbers = table[["published_bytes", "predicted_bytes", "ratio"]]
    far = ~(numbers.abs() < 2**63) & numbers.notna()
    if (
        table.published_bytes.isna().any()
        or far.any(axis=None)
        or (table.predicted_bytes.isna() != table.ratio.isna()).any()
    ):
        raise UserError(str(file), "has rows whose numbers are missing or too large", cure)
    for name in set(COLUMNS) - set(numbers):
        table[name] = [single_line(text) for text in table[name]]
    return table
