"""The numbers that tables of steps show, each declared once: its heading, its unit, how it is written, and where.

A metric that is not here has a column where `Kind.column` of the catalogue names one (`columns_of`). All of them are in
the detail of a cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from meftbench.catalogue.metrics import METRICS
from meftbench.units import GiB, MiB

View = Literal["page", "markdown", "terminal", "training"]


def number(value: float | None, size: float) -> str:
    """A value in units of `size`, with as many digits as it needs; "-" where there is none."""
    if value is None:
        return "-"
    scaled = value / size
    if scaled >= 1000:
        return f"{scaled:,.0f}"
    return f"{scaled:,.1f}" if scaled >= 10 else f"{scaled:.2f}"


def loss(value: float | None) -> str:
    """A loss to two decimals; "-" where it was not taken."""
    return f"{value:.2f}" if value is not None and math.isfinite(value) else error(value)


def error(value: float | None) -> str:
    """A relative error: "0" is exactly zero, "-" not taken; values that are not finite are shown as "∞" and "NaN"."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    return (
        f"{value:.3g}"
        if 0.01 <= value < 1000
        else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    )


def count(value: float | None) -> str:
    """A count for a narrow column: 1,234 or 12.3k or 109.5M."""
    if value is None:
        return "-"
    for limit, size, letter in ((10**9, 10**9, "G"), (10**6, 10**6, "M"), (10**4, 10**3, "k")):
        if value >= limit:
            return f"{value / size:,.1f}{letter}"
    return f"{value:,.0f}"


def start_of(row: Mapping[str, Any]) -> str:
    """`15.26 (3.08)`: the loss before training, and in brackets that of the pre-trained model; "-" where not taken."""
    if row.get("starting_loss") is None:
        return "-"
    return f"{loss(row['starting_loss'])} ({loss(row.get('pretrained_loss'))})"


def _size(value: float | None, size: float) -> str:
    return number(value, size)


def _milliseconds(value: float | None, _: float) -> str:
    return number(value, 1e-3)


def _seconds(value: float | None, _: float) -> str:
    return number(value, 1)


def _speed(value: float | None, _: float) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _error(value: float | None, _: float) -> str:
    return error(value)


def _shift(value: float | None, _: float) -> str:
    return "-" if value is None else f"{value:.3g}"


def _loss(value: float | None, _: float) -> str:
    return loss(value)


def _count(value: float | None, _: float) -> str:
    return count(value)


@dataclass(frozen=True)
class Column:
    """A number's place in tables.

    heading: its words.  unit: how the values are written; "" where they have none, "bytes" where the table chooses MiB
    or GiB.  text: a value as text; the second argument is the table's unit of bytes.  views: the tables that show it,
    in their order.  narrow: the heading on the terminal, on two lines; None: as in other views.  optional: it is shown
    only where some cell has a value.  alone: the heading where no other columns stand beside it, as at the axis of a
    chart; None: the same.
    """

    metric: str
    heading: str
    unit: str
    text: Callable[[Any, float], str]
    views: frozenset[View]
    narrow: str | None = None
    optional: bool = False
    alone: str | None = None

    @property
    def meaning(self) -> str:
        return METRICS[self.metric].meaning

    def head(self, unit_of_bytes: str) -> str:
        """The heading with its unit, as in `activation MiB`."""
        return f"{self.heading} {unit_of_bytes if self.unit == 'bytes' else self.unit}".rstrip()

    def narrow_head(self, unit_of_bytes: str) -> str:
        """The heading on two lines of the terminal."""
        return (self.narrow or self.heading.replace(" ", "\n", 1)).format(bytes=unit_of_bytes)


_ALL: frozenset[View] = frozenset(("page", "markdown", "terminal"))
_WRITTEN: frozenset[View] = frozenset(("page", "markdown"))
_TRAINING: frozenset[View] = frozenset(("training",))

COLUMNS = (
    Column("activation_peak_bytes", "activation", "bytes", _size, _ALL | _TRAINING, "activation\n{bytes}"),
    Column(
        "activation_gradients_bytes",
        "of it gradients",
        "bytes",
        _size,
        _ALL,
        "of it\ngrads",
        optional=True,
        alone="gradients in activation",
    ),
    Column("peak_allocated_bytes", "peak", "bytes", _size, _ALL | _TRAINING, "peak\n{bytes}"),
    Column("step_time_s", "step", "ms", _milliseconds, _ALL, "step\nms", alone="step time"),
    Column("tokens_per_s", "tokens/s", "", _speed, _ALL, "tokens\n/s"),
    Column("reconstruction_rel_max", "recon. error", "", _error, _ALL, alone="reconstruction error"),
    Column("gradient_rel_max", "gradient error", "", _error, _ALL),
    Column("starting_point_shift", "start shift", "", _shift, _WRITTEN),
    Column("starting_loss", "start loss", "", _loss, _WRITTEN, optional=True),
    Column("pretrained_loss", "pre-trained", "", _loss, _WRITTEN, optional=True, alone="pre-trained loss"),
    Column("score", "score", "", _shift, _TRAINING, optional=True),
    Column("validation_loss", "validation loss", "", _loss, _TRAINING, optional=True),
    Column("training_time_s", "time", "s", _seconds, _TRAINING, optional=True, alone="training time"),
    Column("parameters_trainable", "trained", "", _count, _ALL | _TRAINING, alone="trained parameters"),
)


def columns_of(view: View) -> list[Column]:
    """The columns of a view in their order, those of metrics that name a column themselves at the end."""
    declared = [column for column in COLUMNS if view in column.views]
    units = {"byte": "bytes", "second": "ms"}
    return declared + [
        Column(name, kind.column, units.get(kind.unit, ""), partial(_in_unit_of, kind.unit), _WRITTEN, optional=True)
        for name, kind in METRICS.items()
        if kind.column and name not in BY_METRIC and view in _WRITTEN
    ]


def in_unit(value: Any, unit: str, size: float) -> str:
    """A value of any metric: bytes in units of `size`, times in milliseconds, counts whole; "-" where it is None."""
    if value is None or isinstance(value, str):
        return value or "-"
    if unit in ("byte", "second"):
        return number(value, size if unit == "byte" else 1e-3)
    return f"{value:,}" if isinstance(value, int) else error(value)


def _in_unit_of(unit: str, value: Any, size: float) -> str:
    return in_unit(value, unit, size)


BY_METRIC = {column.metric: column for column in COLUMNS}
SHOWN = tuple(column.metric for column in COLUMNS if "terminal" in column.views and not column.optional)[:-1]


# --- numbers that stand alone, such as those that the axes of a chart may show ---

# Groups in which numbers are offered, and what is in each beside what its unit says.
_GROUPS: dict[str, tuple[str, ...]] = {
    "shape": ("batch_size", "sequence_length", "micro_batch_size"),
    "memory": ("share_of_full", "fragmentation_ratio", "alloc_retries", "ooms", "device_allocs"),
    "speed": (),
    "exactness": (
        *("reconstruction_rel_max", "mismatched_elements", "gradient_rel_max", "loss_abs_diff", "zero_grad_tensors"),
        *("overflow_events", "range_widenings", "starting_point_shift"),
    ),
    "scores": (),
    "other": ("build_s", "passes_s"),
}
_GROUP_OF_UNIT = {
    **dict.fromkeys(("second", "token/second", "sample/second"), "speed"),
    **dict.fromkeys(("absolute", "cosine"), "exactness"),
    **dict.fromkeys(("score", "loss"), "scores"),
    "byte": "memory",
}
_ALONE = {
    "batch_size": "batch size (samples)",
    "sequence_length": "sequence length (tokens)",
    "share_of_full": "activation, share of full",
    "optimizer_bytes": "optimizer state",
}
# Parts of names that say the unit, which stands beside the heading.
_UNITS_IN_NAMES = {"_per_s": " per second", "_bytes": "", "_s": "", "_mhz": "", "_c": "", "_w": ""}


def heading_of(name: str) -> str:
    """What a number is called where it stands alone: a column's heading, or the metric's name in words."""
    column, kind = BY_METRIC.get(name), METRICS.get(name)
    if name in _ALONE:
        return _ALONE[name]
    if column is not None:
        return column.alone or column.heading
    if kind is not None and kind.column:
        return kind.column
    for unit, words in _UNITS_IN_NAMES.items():
        if name.endswith(unit):
            name = name.removesuffix(unit) + words
            break
    return name.replace("_bytes_", " ").replace("_", " ")


def in_groups(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Numbers by group: shape of the batch, memory, speed, exactness, scores, other. In each, those that are columns of
    tables come first, in their order; groups without any are left out."""
    members: dict[str, list[str]] = {group: [] for group in _GROUPS}
    order = list(BY_METRIC)
    for name in sorted(names, key=lambda name: order.index(name) if name in order else len(order)):
        members[_group_of(name)].append(name)
    return [(group, found) for group, found in members.items() if found]


def _group_of(name: str) -> str:
    declared = next((group for group, names in _GROUPS.items() if name in names), None)
    unit = METRICS[name].unit if name in METRICS else ""
    return declared or _GROUP_OF_UNIT.get(unit, "other")


def unit_of_bytes(largest: float) -> tuple[int, str]:
    """GiB where the largest is 10 GiB or more, else MiB: one unit for a whole column, so that it compares."""
    return (GiB, "GiB") if largest >= 10 * GiB else (MiB, "MiB")
