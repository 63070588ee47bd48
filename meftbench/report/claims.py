"""The paper's claims beside our numbers: in its own unit and in bytes, and why they differ, as far as records tell.

Nothing of the paper is written here: its claims and the reasons, each with its condition, are plan/claims.yaml.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from meftbench.plan.claims import Claim, Reason, among, matches, paper_claims
from meftbench.report.quality import Result, results
from meftbench.report.tables import SETTING, SHAPE, rows_of, shape_text
from meftbench.units import MiB

if TYPE_CHECKING:
    from pandas import DataFrame

HEAD = ("claim", "cells", "paper", "ours", "in the paper's GB, and in bytes", "why they differ")
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
    """A row of the section: texts under HEAD, each of several sentences or lines."""

    claim: list[str]
    cells: list[str]
    paper: str
    ours: list[str]
    amounts: list[str]
    why: list[str]

    @property
    def texts(self) -> tuple[str, ...]:
        """The row as text, a cell each."""
        parts = (self.claim, self.cells, [self.paper], self.ours, self.amounts, self.why)
        return tuple("; ".join(part) if part is not self.why else _sentences(part) for part in parts)


def _sentences(said: Sequence[str]) -> str:
    return " ".join(f"{sentence}." for sentence in said)


def claim_rows(frame: DataFrame) -> list[ClaimRow]:
    """A row for each claim and each group of comparable cells that speaks of it; none where no cell does."""
    rows: list[ClaimRow] = []
    for claim in paper_claims():
        found = _of_scores(claim, frame) if claim.metric == "score" else _of_memory(claim, frame)
        rows += [_row(comparison, found) for comparison in found]
    return rows


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
    """`full 10.093 GB, 10,583,039,488 B`: a GB of the paper's code is a thousand MiB."""
    return f"{name} {held / MiB / 1000:.3f} GB, {held:,.0f} B"


# --- scores: the best training of each method ---


def _of_scores(claim: Claim, frame: DataFrame) -> list[Comparison]:
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results(frame):
        ordinary = "ordinary" in str(result.first["training"]).split(", ")
        if matches(claim.of, result.first) and not ordinary:
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
    }
    comparison = Comparison(claim, facts, apart, None, f"{said}, batch {row['batch_size']}")
    full = best.get("full")
    if claim.number == "gap" and full is None:
        comparison.missing.append(f"full is not in the run on {row['task']}, nothing to hold the others against")
        return comparison
    reference = _mean(full) if claim.number == "gap" and full is not None else 0.0
    comparison.number = _mean(ours) - reference
    shown = [full] * (claim.number == "gap" and full is not None) + [ours]
    comparison.made_of = [f"{r.first['method']} {_spread(r)}{_held(r)}" for r in shown if r is not None]
    comparison.beside = [f"{method} {_spread(r)}" for method, r in best.items() if among(claim.beside, method)]
    return comparison


def _mean(result: Result) -> float:
    return (result.further.get("score_test") or result.score).mean


def _spread(result: Result) -> str:
    return (result.further.get("score_test") or result.score).said()


def _held(result: Result) -> str:
    held = result.activation_bytes
    return "" if held is None else f" with {_amount('', held).strip()} of activations"


# --- a row ---


def _row(comparison: Comparison, found: list[Comparison]) -> ClaimRow:
    claim, number = comparison.claim, comparison.number
    ours = [f"unknown: {what}" for what in comparison.missing]
    if number is not None:
        best = f" by {comparison.facts['best']}" if "best" in comparison.facts else ""
        ours = [f"{_written(claim, number)}{best} ({comparison.facts['source']})", *comparison.beside]
        ours += [f"without {what}" for what in comparison.missing]
    return ClaimRow(
        claim=[claim.text, f"source: {claim.source}", f"unknown: {claim.unknown}"],
        cells=[comparison.said],
        paper=" ".join(part for part in (claim.bound, _written(claim, claim.stated)) if part),
        ours=ours,
        amounts=comparison.made_of,
        why=_reasons(comparison, found) if number is not None else [],
    )


def _written(claim: Claim, number: float) -> str:
    return f"{100 * number:+.1f} points" if claim.number == "gap" else f"{number:.1%}"


def _reasons(comparison: Comparison, found: list[Comparison]) -> list[str]:
    assert comparison.number is not None
    above = comparison.number - comparison.claim.stated
    differs = "same" if abs(above) < _ALIKE else "more" if above > 0 else "less"
    facts = comparison.facts | {"differs": differs}
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
