"""The budgets file (docs/measuring.md 1): each row bounds one metric of the cells whose labels match a glob.

It is checked when a suite that names it is loaded, and again when a run is held against it.
"""

from __future__ import annotations

import datetime
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from meftbench.catalogue.levers import LEVERS
from meftbench.catalogue.methods import METHODS
from meftbench.catalogue.metrics import METRICS, NOT_A_NUMBER
from meftbench.documents import guarded
from meftbench.errors import unknown
from meftbench.plan.cell import Cell
from meftbench.strict_yaml import Document, FaultAtError, read, validated
from meftbench.units import parse_bytes

if TYPE_CHECKING:
    from meftbench.records.outcome import Outcome

SCHEMA = 1
Missing = Literal["error", "warn", "ignore"]


@dataclass(frozen=True)
class Increase:
    """How much a value may grow: by a share of the baseline, or by an amount in the metric's unit."""

    share: float = 0.0
    amount: float = 0.0

    def above(self, baseline: float) -> float:
        """The largest value within the bound, in the unit of `baseline`."""
        # Rounding must not put the bound below the baseline: a count of bytes above 2^53 has no exact float.
        grown = max(baseline, baseline + abs(baseline) * self.share) if self.share else baseline
        return grown + self.amount if self.amount else grown


LARGEST_BOUND = 10**300  # above 10^308 a whole number has no float, in which headroom is said


def _amount(value: Any) -> Any:
    """The bytes of a text such as "412MiB"; any other value unchanged. Raises ValueError: it is not finite."""
    if isinstance(value, str):
        value = parse_bytes(value)
    if isinstance(value, (int, float)) and not -LARGEST_BOUND < value < LARGEST_BOUND:  # nan is not in between, either
        raise ValueError("it is not a finite number, so that it bounds nothing; write 412MiB or a plain number")
    return value


def _share(value: Any) -> Any:
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*", value)
        if not match or not math.isfinite(float(match[1])):
            raise ValueError(f"{value!r} is not a share; write 1% or 0.01")
        return float(match[1]) / 100
    return value


def _increase(value: Any) -> Any:
    if isinstance(value, str) and "%" in value:
        return Increase(share=_share(value))
    amount = _amount(value)
    if isinstance(amount, bool) or not isinstance(amount, (int, float)):
        raise ValueError(f"{value!r} is not an increase; write 1%, 4MiB or a plain number")
    return Increase(amount=amount)


def _baseline(value: Any) -> Any:
    if not isinstance(value, dict):
        return _amount(value)
    amounts = {}
    for label, amount in value.items():
        try:
            amounts[str(label)] = _amount(amount)
        except ValueError as error:
            raise FaultAtError(str(error), label) from None
    return amounts


def _date(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError(f"{value!r} is not a date; write 2026-12-31")
    return value


Amount = Annotated[int | float, BeforeValidator(_amount)]
Share = Annotated[float, BeforeValidator(_share), Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


class Default(_Strict):
    """Values for the rows that do not set these keys themselves.

    tolerance: for counted and predicted values, which repeat exactly.  measured_tolerance: for measured values.
    missing: whether a row that cannot be judged fails the check, is reported, or is ignored.
    """

    tolerance: Share = 0.0
    measured_tolerance: Share = 0.01
    missing: Missing = "error"


class Row(_Strict):
    """One row of the budgets file: bounds on one metric of the cells that it matches.

    match: glob on the label MODEL/METHOD/bBATCH/sLENGTH...; only `*` and `?` are special, since labels contain
        brackets.  when: values that the cell's fields, memory optimisations (levers) or method settings must have.
    max, min, warn: in the metric's unit; bytes also as text such as 412MiB.  A value above `warn` is reported and
        does not fail the check.
    baseline: the value that `max_increase` is added to: one for all cells, one for each label, or (true) the value
        of the baseline run.
    environment: glob on the names of the environment (`environment_names`); in any other the row is not judged.
    expires, reason: up to this date a violation is waived, and the verdict gives the reason.
    """

    match: str = Field(min_length=1)
    metric: str
    source: Literal["measured", "counted", "predicted"] | None = None
    max: Amount | None = None
    min: Amount | None = None
    warn: Amount | None = None
    max_increase: Annotated[Increase | None, BeforeValidator(_increase)] = None
    baseline: Annotated[int | float | dict[str, int | float] | Literal[True] | None, BeforeValidator(_baseline)] = None
    tolerance: Share | None = None
    missing: Missing | None = None
    when: dict[str, Any] = {}
    environment: str | None = None
    expires: Annotated[datetime.date | None, BeforeValidator(_date)] = None
    reason: Annotated[str, Field(pattern=r"\S")] | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> Row:
        if self.max is None and self.min is None and self.max_increase is None and self.warn is None:
            raise ValueError("the row has no bound: give max, min, max_increase or warn")
        if (self.max_increase is None) != (self.baseline is None):
            key = "max_increase" if self.baseline is None else "baseline"
            raise FaultAtError("max_increase and baseline go together", key)
        if (self.expires is None) != (self.reason is None):
            key = "expires" if self.reason is None else "reason"
            raise FaultAtError("expires and reason go together: a waived row says until when and why", key)
        if self.max is not None and self.warn is not None and self.warn > self.max:
            raise FaultAtError("warn is above max and would never be seen", "warn")
        return self

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return glob(self.match)

    def matches(self, outcome: Outcome) -> bool:
        """Whether the row applies to this cell, however the cell ended."""
        if not self._pattern.fullmatch(outcome.label) or not _fits_device(self.source, outcome.cell):
            return False
        return all(_field(outcome.cell, name) == expected for name, expected in self.when.items())


class BudgetsFile(_Strict):
    """The keys of a budgets file.

    updated_from: the run that the bounds are from, relative to the file. `check --update` sets it where the file has
        it; `check` then says what grew since that run where a bound is exceeded.
    """

    schema_: Literal[1] = Field(alias="schema")
    default: Default = Default()
    budgets: list[Row] = Field(min_length=1)
    updated_from: str | None = None


@dataclass(frozen=True)
class Budgets:
    """A budgets file that was read and checked: its rows in order, and the line of each.

    updated_from: as in the file, the folder of the run that the bounds are from; None where the file does not say.
    """

    document: Document
    default: Default
    rows: list[Row]
    updated_from: Path | None = None

    @property
    def file(self) -> Path:
        return self.document.file

    def line(self, index: int) -> int:
        """The row's line in the file, counted from 1."""
        return self.document.lines.get(("budgets", index), 1)

    def tolerance(self, row: Row, source: str) -> float:
        """The share of the bound by which a value from `source` may be beyond it."""
        if row.tolerance is not None:
            return row.tolerance
        return self.default.measured_tolerance if source == "measured" else self.default.tolerance


def load_budgets(file: Path | str) -> Budgets:
    """Read and check a budgets file. Raises UserError, with file, line and key path: the file is not valid."""
    document = read(Path(file))
    with guarded(str(file)):
        return _checked(document)


def _checked(document: Document) -> Budgets:
    schema = document.content.get("schema")
    if isinstance(schema, int) and not isinstance(schema, bool) and schema > SCHEMA:
        raise document.error(("schema",), f"schema {schema} is newer than this program ({SCHEMA})", "update meftbench")
    parsed = validated(document, BudgetsFile)
    for index, row in enumerate(parsed.budgets):
        path = ("budgets", index)
        if row.metric not in METRICS:
            raise unknown(document.where((*path, "metric")), "metric", row.metric, METRICS)
        if row.metric in NOT_A_NUMBER:
            cure = "name a metric with one number, such as reconstruction_rel_max"
            raise document.error((*path, "metric"), f"{row.metric} is not one number", cure)
        for name in row.when:
            if name not in _FIELDS:
                raise unknown(document.where((*path, "when", name), key=True), "cell field", name, _FIELDS)
    updated_from = document.file.parent / parsed.updated_from if parsed.updated_from else None
    return Budgets(document, parsed.default, parsed.budgets, updated_from)


def glob(pattern: str) -> re.Pattern[str]:
    """A pattern in which only `*` (any text, also across `/`) and `?` (one character) are special.

    What stands between two stars is taken where it first occurs and never sought again further on, which changes no
    answer: otherwise the time to refuse a label would grow exponentially with the number of stars.
    """
    first, *others = ("".join("." if sign == "?" else re.escape(sign) for sign in part) for part in pattern.split("*"))
    if not others:
        return re.compile(first, re.DOTALL)
    between = "".join(f"(?>.*?{part})" for part in others[:-1] if part)
    return re.compile(f"{first}{between}.*{others[-1]}", re.DOTALL)


def _settings_names() -> set[str]:
    return {f.alias or name for method in METHODS.values() for name, f in method.settings.model_fields.items()}


_FIELDS = (
    (set(Cell.model_fields) - {"model_config_overrides", "method_params", "levers", "lever_params"})
    | {"weights", "model_revision", "attention_used", "label"}
    | set(LEVERS)
    | _settings_names()
)
_UNSET = object()


def _field(cell: dict[str, Any], name: str) -> Any:
    for fields in (cell, cell.get("levers") or {}, cell.get("method_params") or {}):
        if name in fields:
            return fields[name]
    return _UNSET


def _fits_device(source: str | None, cell: dict[str, Any]) -> bool:
    """Whether a row on values from `source` applies to the cell's device; "counted" does not apply to CUDA.

    "measured" applies to every device, since times are measured on the CPU too.
    """
    device = str(cell.get("device", "counted"))
    return source in (None, "measured") or device.partition(":")[0] == source
