"""The paper's claims beside our numbers: in its own unit and in bytes, and why they differ, as far as records tell.

Nothing of the paper is written here: its claims and the reasons, each with its condition, are plan/claims.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from meftbench.plan.claims import Claim, Reason, among, matches, paper_claims
from meftbench.report.scores import Result, Spread, results
from meftbench.report.tables import SETTING, SHAPE, rows_of, shape_text
from meftbench.units import MiB

if TYPE_CHECKING:
    from pandas import DataFrame

HEAD = ("cells", "ours", "in the paper's GB, and in bytes", "why they differ")
SAID = (
    "Claims of the MEFT paper (NeurIPS 2023) that cells of this run speak of, beside our numbers. A GB is that of the "
    "paper's code, a thousand MiB: 1,048,576,000 bytes. The reasons are those that the records support, and what is "
    "not known."
)
OURS = "activation_peak_bytes"
# Trainings of one claim may differ in these: the best on validation is taken.
_TRAINED_ALIKE = ("run", "model", "task", "precision", "device")
# Two numbers are the same if they are printed alike.
_ALIKE = 0.0005


@dataclass
class Comparison:
    """A claim and cells that speak of it.

    facts: of the cell that stands for it.  apart: by which it differs from the others of its claim.
    number: ours, as the claim has it; None: `missing` says why.  made_of: lines that say what it is made of.
    beside: the same number of methods that the claim does not speak of.
    """

    claim: Claim
    facts: dict[str, Any]
    apart: dict[str, Any]
    number: float | None
    said: str
    made_of: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ClaimRow:
    """Cells that speak of a claim: under each of HEAD several lines, in `why` sentences."""

    cells: str
    ours: list[str]
    amounts: list[str]
    why: list[str]

    @property
    def texts(self) -> tuple[str, ...]:
        """The row as text, a cell each."""
        return (self.cells, "; ".join(self.ours), "; ".join(self.amounts), sentences(self.why))


@dataclass(frozen=True)
class ClaimTable:
    """A claim and all cells of the runs that speak of it. title: the claim.  known: where it is from, what is unknown.

    always: the reasons that all rows have.
    """

    title: str
    known: str
    rows: list[ClaimRow]
    always: list[str]

    @property
    def notes(self) -> list[str]:
        """What stands between the title and the rows."""
        return [self.known, *([f"In all of them: {sentences(self.always)}"] if self.always else [])]


def sentences(said: Sequence[str]) -> str:
    """Each with its full stop."""
    return " ".join(f"{sentence}." for sentence in said)


def claim_tables(frame: DataFrame) -> list[ClaimTable]:
    """A table for each claim that a cell speaks of, a row for each group of comparable cells."""
    tables = []
    for claim in paper_claims():
        found = _of_scores(claim, frame) if claim.metric == "score" else _of_memory(claim, frame)
        if found:
            tables.append(_table(claim, found))
    return tables


def _table(claim: Claim, found: list[Comparison]) -> ClaimTable:
    why = [_reasons(comparison, found) for comparison in found]
    told = [said for said, comparison in zip(why, found, strict=True) if comparison.number is not None]
    always = [sentence for sentence in (told[0] if len(told) > 1 else []) if all(sentence in said for said in told)]
    rows = [
        ClaimRow(comparison.said, _ours(comparison), comparison.made_of, [s for s in said if s not in always])
        for comparison, said in zip(found, why, strict=True)
    ]
    # Of a gap no number is stated.
    stated = "" if claim.number == "gap" else f"The paper: {f'{claim.bound} {_written(claim, claim.stated)}'.strip()}. "
    return ClaimTable(claim.text, f"{stated}Source: {claim.source}. Unknown: {claim.unknown}.", rows, always)


# --- memory: cells at the same shape and setting ---


def _of_memory(claim: Claim, frame: DataFrame) -> list[Comparison]:
    steps = frame[frame["task"].isna()]
    keys = [*SETTING, *SHAPE]
    found = []
    for values, rows in steps.groupby(keys, dropna=False, sort=False):
        cells = [row for row in rows_of(rows) if matches(claim.of, row)]
        mine = [cell for cell in cells if among(claim.methods, cell["method"])]
        if mine:
            found.append(_memory(claim, cells, mine, dict(zip(keys, values, strict=True))))
    return found


def _memory(claim: Claim, cells: list[dict[str, Any]], mine: list[dict[str, Any]], apart: dict[str, Any]) -> Comparison:
    full = next((cell for cell in cells if cell["method"] == "full"), None)
    facts = dict(full or mine[0])
    said = f"{facts['model']}, {shape_text(*(facts[name] for name in SHAPE))}, {facts['precision']}"
    said += f", attention {facts['attention_requested']}, {facts['device']}"
    comparison = Comparison(claim, facts, apart, None, said)
    comparison.missing += [f"{cell['method']} ended {cell['status']}" for cell in mine if _paper_bytes(cell) is None]
    reference = _paper_bytes(full) if full else None
    if reference is None:
        ended = f"ended {full['status']}" if full else "is not in the run at this shape and setting"
        comparison.missing.insert(0, f"full {ended}, nothing to hold the others against")
        return comparison
    shares = {cell["method"]: held / reference for cell in mine if (held := _paper_bytes(cell)) is not None}
    if not shares:
        return comparison
    least = min(shares, key=lambda method: shares[method])
    comparison.number = _of_share(claim, shares[least])
    comparison.made_of = [_amount("full", reference)]
    for cell in mine:
        if (held := _paper_bytes(cell)) is not None:
            comparison.made_of.append(f"{_amount(cell['method'], held)}, {held / reference:.1%} of full")
    for cell in cells:
        if among(claim.beside, cell["method"]) and (held := _paper_bytes(cell)) is not None:
            comparison.beside.append(f"{cell['method']} {_of_share(claim, held / reference):.1%}")
    best = next(cell for cell in mine if cell["method"] == least)
    assert full is not None
    if (ours := best.get(OURS)) is not None and full.get(OURS):
        by_ours = _of_share(claim, ours / full[OURS])
        same = abs(by_ours - comparison.number) < _ALIKE
        comparison.beside.insert(0, f"{'the same' if same else f'{by_ours:.1%}'} by {OURS}")
    facts["best"], facts["source"] = least, full[f"{OURS}_source"]
    facts["metric"] = "recorded" if full.get(claim.metric) is not None else "derived"
    return comparison


def _paper_bytes(cell: dict[str, Any]) -> float | None:
    """The paper's metric of a cell; where it was not recorded, what it comes to if no bytes are left over by a step."""
    if cell["status"] != "ok":
        return None
    recorded = cell.get("paper_meft_activation_bytes")
    if recorded is not None:
        return float(recorded)
    peak, between = cell.get("peak_allocated_bytes"), cell.get("baseline_allocated_bytes")
    return None if peak is None or between is None else float(peak - between)


def _of_share(claim: Claim, share: float) -> float:
    return 1 - share if claim.number == "saving" else share


def _amount(name: str, held: float) -> str:
    """`full: 10.093 GB, 10,583,039,488 B`: a GB of the paper's code is a thousand MiB."""
    return f"{name}: {held / MiB / 1000:.3f} GB, {held:,.0f} B"


# --- scores: the best training of each method ---


def _of_scores(claim: Claim, frame: DataFrame) -> list[Comparison]:
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results(frame):
        ordinary = "ordinary" in str(result.first["training"]).split(", ")
        if matches(claim.of, result.first) and not ordinary and math.isfinite(result.score.mean):
            groups.setdefault(tuple(result.first[name] for name in _TRAINED_ALIKE), []).append(result)
    found = []
    for values, mine in groups.items():
        if any(among(claim.methods, result.first["method"]) for result in mine):
            found.append(_score(claim, mine, dict(zip(_TRAINED_ALIKE, values, strict=True))))
    return found


def _score(claim: Claim, mine: list[Result], apart: dict[str, Any]) -> Comparison:
    """Of each method the training that is best on validation; its test score where it has one."""
    best: dict[str, Result] = {}
    for result in mine:
        known = best.get(result.first["method"])
        if known is None or result.score.mean > known.score.mean:
            best[result.first["method"]] = result
    ours = max((r for m, r in best.items() if among(claim.methods, m)), key=lambda result: result.score.mean)
    row = ours.first
    said = f"{row['task']}: {row['model']}, {row['precision']}, {row['method']}, rate {ours.learning_rate:g}"
    facts = dict(row) | {
        "source": row["score_source"],
        "seeds": len(ours.seeds),
        "cut": "yes" if row["cuts"] else "no",
        "cuts": "; ".join(row["cuts"]),
        "test": "yes" if "score_test" in ours.further else "no",
        "exact": _exact(best, ours),
    }
    comparison = Comparison(claim, facts, apart, None, f"{said}, batch {row['batch_size']}")
    full = best.get("full")
    if claim.number == "gap" and full is None:
        comparison.missing.append(f"full is not in the run on {row['task']}, nothing to hold the others against")
        return comparison
    reference = _mean(full) if claim.number == "gap" and full is not None else 0.0
    comparison.number = _mean(ours) - reference
    spreads = [dev for r in (ours, full) if r is not None and (dev := _taken(r).deviation) is not None]
    facts["within"] = "yes" if spreads and abs(comparison.number) <= max(spreads) else "no"
    shown = [full] * (claim.number == "gap" and full is not None) + [ours]
    comparison.made_of = [f"{r.first['method']} {_spread(r)}{_held(r)}" for r in shown if r is not None]
    comparison.beside = [f"{method} {_spread(r)}" for method, r in best.items() if among(claim.beside, method)]
    return comparison


def _exact(best: dict[str, Result], ours: Result) -> str:
    """How the best of the exact methods scores beside ours."""
    exact = [_mean(result) for result in best.values() if result.first["arithmetic"] == "exact"]
    return "absent" if not exact else "higher" if max(exact) > _mean(ours) else "not higher"


def _taken(result: Result) -> Spread:
    """The score that is held against a claim: of test rows where there is one."""
    return result.further.get("score_test") or result.score


def _mean(result: Result) -> float:
    return _taken(result).mean


def _spread(result: Result) -> str:
    return _taken(result).said()


def _held(result: Result) -> str:
    held = result.activation_bytes
    return "" if held is None else f" with {held / MiB / 1000:.3f} GB, {held:,.0f} B of activations"


# --- a table ---


def _ours(comparison: Comparison) -> list[str]:
    """Our number first, then what stands beside it, and what is missing."""
    if comparison.number is None:
        return [f"unknown: {what}" for what in comparison.missing]
    best = f"by {comparison.facts['best']}, " if "best" in comparison.facts else ""
    ours = [f"{_written(comparison.claim, comparison.number)} ({best}{comparison.facts['source']})"]
    return [*ours, *comparison.beside, *(f"without {what}" for what in comparison.missing)]


def _written(claim: Claim, number: float) -> str:
    return f"{100 * number:+.1f} points" if claim.number == "gap" else f"{number:.1%}"


def _reasons(comparison: Comparison, found: list[Comparison]) -> list[str]:
    if comparison.number is None:
        return []
    above = comparison.number - comparison.claim.stated
    differs = "same" if abs(above) < _ALIKE else "more" if above > 0 else "less"
    facts = comparison.facts | {"differs": differs, "number": comparison.claim.number}
    said = []
    for reason in comparison.claim.reasons:
        if matches(reason.when, facts):
            other = _other(reason, comparison, found) if reason.against else ""
            if other is not None:
                said.append(reason.says.format_map(facts | {"other": other}))
    return said


def _other(reason: Reason, comparison: Comparison, found: list[Comparison]) -> str | None:
    """The number of the comparison that differs from this one in what `against` says alone."""
    wanted = comparison.apart | (reason.against or {})
    for other in found:
        # As text: what is missing in both is nan, which equals nothing.
        if other.number is not None and {k: str(v) for k, v in other.apart.items()} == {
            k: str(v) for k, v in wanted.items()
        }:
            return _written(other.claim, other.number)
    return None
