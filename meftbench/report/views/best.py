"""Each method with its best levers: of the cells of one shape and setting, the one of each method that peaks lowest.

A method in its plain form beside another with every lever is no comparison. So a report names each method's best set of
levers and settings, and says which levers were open to some methods only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meftbench.catalogue.combinations import check_together
from meftbench.catalogue.levers import LEVERS
from meftbench.catalogue.methods import METHODS, Reversible
from meftbench.errors import UserError
from meftbench.report.columns import count
from meftbench.report.results import Group, groups, rows_of, shape_text, wrong_gradient
from meftbench.units import format_bytes

if TYPE_CHECKING:
    from pandas import DataFrame

PEAK, ACTIVATION, STEP = "peak_allocated_bytes", "activation_peak_bytes", "step_time_s"
BEST_HEAD = ("at", "method", "peak", "beside the smallest", "activation", "step", "sets of levers and settings tried")


@dataclass(frozen=True)
class Best:
    """The cell of a method that peaks lowest at one shape.

    label: with the method's levers and settings, and a word where its gradients are wrong.
    peak, activation: bytes.  step: seconds; None: not taken.
    tried: how many sets of levers and settings of this method ended ok at this shape.
    """

    method: str
    label: str
    peak: float
    activation: float | None
    step: float | None
    source: str
    tried: int


@dataclass(frozen=True)
class Comparison:
    """The methods of one shape, the one that peaks lowest first. title: the shape.  tokens: of a step."""

    title: str
    tokens: int
    rows: tuple[Best, ...]

    def sentence(self) -> str:
        """Each method with what it takes beside the smallest."""
        first, *others = self.texts()
        rest = "".join(f"; {text[1]} {text[3]}" for text in others)
        return f"least peak at {self.title}: {first[1]} {first[2]}{rest}"

    def texts(self) -> list[tuple[str, ...]]:
        """The rows as BEST_HEAD names their columns."""
        smallest = self.rows[0].peak
        return [
            (
                self.title if index == 0 else "",
                row.label,
                f"{format_bytes(row.peak)} ({row.source})",
                "smallest" if row.peak == smallest else f"+{row.peak / smallest - 1:.1%}",
                "-" if row.activation is None else format_bytes(row.activation),
                "-" if row.step is None else f"{row.step * 1e3:,.1f} ms",
                count(row.tried),
            )
            for index, row in enumerate(self.rows)
        ]


@dataclass(frozen=True)
class Fairness:
    """The comparisons of one group of cells. title: what these cells share.

    unequal: sentences that say which lever was run with some of the methods only.
    """

    title: str
    comparisons: tuple[Comparison, ...]
    unequal: tuple[str, ...]


def best_levers(group: Group) -> Fairness | None:
    """A comparison for each shape of the group at which several methods ended ok, and one of them in several sets of
    levers and settings; None: there is no such shape."""
    found, compared = [], []
    for title, tokens, rows in _by_shape(group.frame):
        best = [_best(method, cells) for method, cells in _by_method(rows)]
        if len(best) > 1 and any(row.tried > 1 for row in best):
            found.append(Comparison(title, tokens, tuple(sorted(best, key=lambda row: row.peak))))
            compared += rows
    return Fairness(group.title, tuple(found), tuple(_unequal(compared))) if found else None


def all_best_levers(frame: DataFrame) -> list[Fairness]:
    """Those of each group of a frame that has any."""
    return [found for group in groups(frame) if (found := best_levers(group))]


def _by_shape(frame: DataFrame) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
    shape = ("batch_size", "micro_batch_size", "sequence_length")
    # Of a frame's hundreds of columns few are needed, and rows are mappings of all columns that there are.
    needed = [*shape, "status", "method", "method_name", "parts", *_METRICS, *(f"{name}_source" for name in _METRICS)]
    by_shape: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for row in rows_of(frame[[name for name in needed if name in frame]]):
        by_shape.setdefault(tuple(row[name] for name in shape), []).append(row)
    for (batch, micro, length), rows in by_shape.items():
        cells = [row for row in rows if row["status"] == "ok" and _known(row[PEAK])]
        # A measured peak is not ranked beside a predicted one.
        if cells and len({row[f"{PEAK}_source"] for row in rows if row[PEAK] is not None}) == 1:
            yield shape_text(batch, micro, length), batch * length, cells


_METRICS = (PEAK, ACTIVATION, STEP, "gradient_rel_max", "reconstruction_rel_max")


def _by_method(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for method in dict.fromkeys(row["method_name"] for row in rows):
        yield method, [row for row in rows if row["method_name"] == method]


def _best(method: str, cells: list[dict[str, Any]]) -> Best:
    cell = min(cells, key=lambda row: row[PEAK])
    activation, step = (cell[name] if _known(cell[name]) else None for name in (ACTIVATION, STEP))
    tried = len({row["method"] for row in cells})
    label = cell["method"] + (" (its gradients are wrong)" if wrong_gradient(cell) else "")
    return Best(method, label, cell[PEAK], activation, step, cell[f"{PEAK}_source"], tried)


def _unequal(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    run_with: dict[str, set[str]] = {}
    for row in rows:
        for lever in row["parts"][1:]:
            run_with.setdefault(_part_of(lever.name), set()).add(row["method_name"])
    for lever, having in run_with.items():
        methods = dict.fromkeys(row["method_name"] for row in rows)
        if lacking := [method for method in methods if method not in having and _open(lever, method)]:
            yield f"{lever} was not tried with {', '.join(lacking)}"


def _part_of(lever: str) -> str:
    """What a lever is said to be: of levers that replace the same part of the model, that part."""
    replaced = LEVERS[lever].replaces if lever in LEVERS else None
    return f"+{lever}" if replaced is None else f"a lever for {replaced}"


def _open(lever: str, method: str) -> bool:
    """Whether a method can take the lever, and may gain by it."""
    name = lever.removeprefix("+")
    if method not in METHODS or name not in LEVERS:
        return True
    try:
        check_together("", method, {name: {}})
    except UserError:
        return False
    return LEVERS[name].adds_to_reversal or not issubclass(METHODS[method].settings, Reversible)


def _known(value: Any) -> bool:
    return value is not None and value == value
