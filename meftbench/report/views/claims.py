"""The paper's claims beside our numbers, in the paper's unit and in bytes, with reasons for the differences.

No claim is written here: the claims and the reasons, each with its condition, are in plan/claims.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from meftbench.plan.axes import SHAPE
from meftbench.plan.claims import Claim, Reason, among, matches, paper_claims
from meftbench.report.results import SETTING, rows_of, shape_text
from meftbench.report.views.scores import Result, Spread, results
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
# Results of training are compared where they agree in these; of each method the best on validation is taken.
_COMPARED = ("run", "model", "task", "precision", "device")
# Two ratios count as the same below this difference, half of the last digit printed (0.1 %).
_TOLERANCE = 0.0005


@dataclass
class Comparison:
    """A claim and the comparable cells that it speaks of.

    facts: fields of the cell that represents them, and further facts that conditions in claims.yaml ask for.
    apart: the fields in which it may differ from the other comparisons of its claim.  cells: a text that names them.
    number: ours, in the form of the claim; None: `missing` says why.  made_of: lines with the amounts behind it.
    beside: the same number of methods that the claim does not speak of.
    """

    claim: Claim
    facts: dict[str, Any]
    apart: dict[str, Any]
    number: float | None
    cells: str
    made_of: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ClaimRow:
    """Comparable cells of a claim. The fields stand under HEAD; `why` has sentences without their full stops."""

    cells: str
    ours: list[str]
    amounts: list[str]
    why: list[str]

    @property
    def texts(self) -> tuple[str, ...]:
        """The row as text, one string per column."""
        return (self.cells, "; ".join(self.ours), "; ".join(self.amounts), sentences(self.why))


@dataclass(frozen=True)
class ClaimTable:
    """A claim and all cells of the runs that it speaks of.

    title: the claim.  known: its number and source, and what is unknown.  always: reasons that all rows share.
    """

    title: str
    known: str
    rows: list[ClaimRow]
    always: list[str]

    @property
    def notes(self) -> list[str]:
        """The paragraphs between the title and the rows."""
        return [self.known, *([f"In all of them: {sentences(self.always)}"] if self.always else [])]


def sentences(texts: Sequence[str]) -> str:
    """The texts joined, each with a full stop."""
    return " ".join(f"{sentence}." for sentence in texts)


def claim_tables(frame: DataFrame) -> list[ClaimTable]:
    """A table for each claim that a cell speaks of, with a row for each group of comparable cells."""
    tables = []
    for claim in paper_claims():
        comparisons = _score_comparisons(claim, frame) if claim.metric == "score" else _memory_comparisons(claim, frame)
        if comparisons:
            tables.append(_table(claim, comparisons))
    return tables


def _table(claim: Claim, comparisons: list[Comparison]) -> ClaimTable:
    reasons_by_row = [_reasons(comparison, comparisons) for comparison in comparisons]
    of_known_numbers = [
        reasons
        for reasons, comparison in zip(reasons_by_row, comparisons, strict=True)
        if comparison.number is not None
    ]
    always = [
        sentence
        for sentence in (of_known_numbers[0] if len(of_known_numbers) > 1 else [])
        if all(sentence in reasons for reasons in of_known_numbers)
    ]
    rows = [
        ClaimRow(
            comparison.cells,
            _ours(comparison),
            comparison.made_of,
            [reason for reason in reasons if reason not in always],
        )
        for comparison, reasons in zip(comparisons, reasons_by_row, strict=True)
    ]
    # A claim about a gap states no number.
    stated = (
        "" if claim.number == "gap" else f"The paper: {f'{claim.bound} {_number_text(claim, claim.stated)}'.strip()}. "
    )
    return ClaimTable(claim.text, f"{stated}Source: {claim.source}. Unknown: {claim.unknown}.", rows, always)


# --- memory: cells at the same shape and setting ---


def _memory_comparisons(claim: Claim, frame: DataFrame) -> list[Comparison]:
    steps = frame[frame["task"].isna()]
    keys = [*SETTING, *SHAPE]
    comparisons = []
    for values, rows in steps.groupby(keys, dropna=False, sort=False):
        cells = [row for row in rows_of(rows) if matches(claim.of, row)]
        claimed = [cell for cell in cells if among(claim.methods, cell["method"])]
        if claimed:
            comparisons.append(_memory_comparison(claim, cells, claimed, dict(zip(keys, values, strict=True))))
    return comparisons


def _memory_comparison(
    claim: Claim, cells: list[dict[str, Any]], claimed: list[dict[str, Any]], apart: dict[str, Any]
) -> Comparison:
    full = next((cell for cell in cells if cell["method"] == "full"), None)
    facts = dict(full or claimed[0])
    description = f"{facts['model']}, {shape_text(*(facts[name] for name in SHAPE))}, {facts['precision']}"
    description += f", attention {facts['attention_requested']}, {facts['device']}"
    comparison = Comparison(claim, facts, apart, None, description)
    comparison.missing += [f"{cell['method']} ended {cell['status']}" for cell in claimed if _paper_bytes(cell) is None]
    reference = _paper_bytes(full) if full else None
    if reference is None:
        ended = f"ended {full['status']}" if full else "is not in the run at this shape and setting"
        comparison.missing.insert(0, f"full {ended}, nothing to hold the others against")
        return comparison
    shares = {cell["method"]: size / reference for cell in claimed if (size := _paper_bytes(cell)) is not None}
    if not shares:
        return comparison
    smallest = min(shares, key=lambda method: shares[method])
    comparison.number = _saving_or_share(claim, shares[smallest])
    comparison.made_of = [_amount("full", reference)]
    for cell in claimed:
        if (size := _paper_bytes(cell)) is not None:
            comparison.made_of.append(f"{_amount(cell['method'], size)}, {size / reference:.1%} of full")
    for cell in cells:
        if among(claim.beside, cell["method"]) and (size := _paper_bytes(cell)) is not None:
            comparison.beside.append(f"{cell['method']} {_saving_or_share(claim, size / reference):.1%}")
    best_cell = next(cell for cell in claimed if cell["method"] == smallest)
    assert full is not None
    if (ours := best_cell.get(OURS)) is not None and full.get(OURS):
        by_ours = _saving_or_share(claim, ours / full[OURS])
        same = abs(by_ours - comparison.number) < _TOLERANCE
        comparison.beside.insert(0, f"{'the same' if same else f'{by_ours:.1%}'} by {OURS}")
    facts["best"], facts["source"] = smallest, full[f"{OURS}_source"]
    facts["metric"] = "recorded" if full.get(claim.metric) is not None else "derived"
    return comparison


def _paper_bytes(cell: dict[str, Any]) -> float | None:
    """The paper's metric of a cell. Where it was not recorded: peak allocated minus what is allocated between steps."""
    if cell["status"] != "ok":
        return None
    recorded = cell.get("paper_meft_activation_bytes")
    if recorded is not None:
        return float(recorded)
    peak, between = cell.get("peak_allocated_bytes"), cell.get("baseline_allocated_bytes")
    return None if peak is None or between is None else float(peak - between)


def _saving_or_share(claim: Claim, share: float) -> float:
    return 1 - share if claim.number == "saving" else share


def _amount(name: str, size: float) -> str:
    """`full: 10.093 GB, 10,583,039,488 B`; a GB of the paper's code is a thousand MiB."""
    return f"{name}: {size / MiB / 1000:.3f} GB, {size:,.0f} B"


# --- scores: the best result of each method ---


def _score_comparisons(claim: Claim, frame: DataFrame) -> list[Comparison]:
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results(frame):
        ordinary = "ordinary" in str(result.first["training"]).split(", ")
        if matches(claim.of, result.first) and not ordinary and math.isfinite(result.score.mean):
            groups.setdefault(tuple(result.first[name] for name in _COMPARED), []).append(result)
    comparisons = []
    for values, group in groups.items():
        if any(among(claim.methods, result.first["method"]) for result in group):
            comparisons.append(_score_comparison(claim, group, dict(zip(_COMPARED, values, strict=True))))
    return comparisons


def _score_comparison(claim: Claim, candidates: list[Result], apart: dict[str, Any]) -> Comparison:
    """The comparison of each method's result that is best on validation, by its test score where it has one."""
    best: dict[str, Result] = {}
    for result in candidates:
        previous = best.get(result.first["method"])
        if previous is None or result.score.mean > previous.score.mean:
            best[result.first["method"]] = result
    ours = max((r for m, r in best.items() if among(claim.methods, m)), key=lambda result: result.score.mean)
    row = ours.first
    description = f"{row['task']}: {row['model']}, {row['precision']}, {row['method']}, rate {ours.learning_rate:g}"
    facts = dict(row) | {
        "source": row["score_source"],
        "seeds": len(ours.seeds),
        "cut": "yes" if row["cuts"] else "no",
        "cuts": "; ".join(row["cuts"]),
        "test": "yes" if "score_test" in ours.further else "no",
        "exact": _exact(best, ours),
    }
    comparison = Comparison(claim, facts, apart, None, f"{description}, batch {row['batch_size']}")
    full = best.get("full")
    if claim.number == "gap" and full is None:
        comparison.missing.append(f"full is not in the run on {row['task']}, nothing to hold the others against")
        return comparison
    reference = _mean_score(full) if claim.number == "gap" and full is not None else 0.0
    comparison.number = _mean_score(ours) - reference
    spreads = [dev for r in (ours, full) if r is not None and (dev := _claim_score(r).deviation) is not None]
    facts["within"] = "yes" if spreads and abs(comparison.number) <= max(spreads) else "no"
    shown = [full] * (claim.number == "gap" and full is not None) + [ours]
    comparison.made_of = [f"{r.first['method']} {_spread_text(r)}{_activation_text(r)}" for r in shown if r is not None]
    comparison.beside = [f"{method} {_spread_text(r)}" for method, r in best.items() if among(claim.beside, method)]
    return comparison


def _exact(best: dict[str, Result], ours: Result) -> str:
    """Whether the best of the exact methods scores "higher" than ours or "not higher"; "absent" without any."""
    exact = [_mean_score(result) for result in best.values() if result.first["arithmetic"] == "exact"]
    return "absent" if not exact else "higher" if max(exact) > _mean_score(ours) else "not higher"


def _claim_score(result: Result) -> Spread:
    """The score that is compared with a claim: that of test rows where there is one."""
    return result.further.get("score_test") or result.score


def _mean_score(result: Result) -> float:
    return _claim_score(result).mean


def _spread_text(result: Result) -> str:
    return _claim_score(result).said()


def _activation_text(result: Result) -> str:
    size = result.activation_bytes
    return "" if size is None else f" with {size / MiB / 1000:.3f} GB, {size:,.0f} B of activations"


# --- a table ---


def _ours(comparison: Comparison) -> list[str]:
    """Our number first, then what stands beside it, and what is missing."""
    if comparison.number is None:
        return [f"unknown: {what}" for what in comparison.missing]
    best = f"by {comparison.facts['best']}, " if "best" in comparison.facts else ""
    ours = [f"{_number_text(comparison.claim, comparison.number)} ({best}{comparison.facts['source']})"]
    return [*ours, *comparison.beside, *(f"without {what}" for what in comparison.missing)]


def _number_text(claim: Claim, number: float) -> str:
    return f"{100 * number:+.1f} points" if claim.number == "gap" else f"{number:.1%}"


def _reasons(comparison: Comparison, comparisons: list[Comparison]) -> list[str]:
    if comparison.number is None:
        return []
    difference = comparison.number - comparison.claim.stated
    differs = "same" if abs(difference) < _TOLERANCE else "more" if difference > 0 else "less"
    facts = comparison.facts | {"differs": differs, "number": comparison.claim.number}
    texts = []
    for reason in comparison.claim.reasons:
        if matches(reason.when, facts):
            contrast = _contrasting_number(reason, comparison, comparisons) if reason.against else ""
            if contrast is not None:
                texts.append(reason.says.format_map(facts | {"other": contrast}))
    return texts


def _contrasting_number(reason: Reason, comparison: Comparison, comparisons: list[Comparison]) -> str | None:
    """The number of the comparison that differs from this one only in what `against` says; None: there is none."""
    expected = comparison.apart | (reason.against or {})
    for candidate in comparisons:
        # Compared as text, since a field that is missing in both is nan, which does not equal itself.
        if candidate.number is not None and {k: str(v) for k, v in candidate.apart.items()} == {
            k: str(v) for k, v in expected.items()
        }:
            return _number_text(candidate.claim, candidate.number)
    return None
