"""From the rows that a search predicted to the answer of a plan: what is fastest, what is smallest, what lies between.

The answer is a dictionary that `meftbench plan --json` prints. Everything else (terminal, Markdown, CSV, plots,
commands) is made from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meftbench.catalogue.labels import parts_from
from meftbench.catalogue.profiles import PROFILES
from meftbench.plan.optimizing import IN_BACKWARD
from meftbench.plan.planning import Candidate
from meftbench.plan.prices import Price
from meftbench.plan.ranking import by_time, fastest_first, has_backward, method_of
from meftbench.report.figures.plots import dominated
from meftbench.report.views.savings import form_of

Row = dict[str, Any]


def as_plan(
    about: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
    only_for_pairs: Iterable[Candidate] = (),
    price: Price | None = None,
    needs: bool = False,
) -> dict[str, Any]:
    """`about` (what was asked for) with the answer.

    about: among others `cards` (bytes: the card asked about, then larger ones) and `context_bytes`.
    rows: of the search, one for each candidate and card (`capacity_index`); those of the candidates
        `only_for_pairs` are no answers, and stand beside others that differ in a lever.

    Keys that are added: rows (each with what it means for its card), fastest and smallest (rows; None: nothing fits),
    best (of each method the best row that fits), larger (what each larger card buys), too_large (of each method that
    does not fit, what is missing), levers (what each saves), needs (of each method the smallest card), has_time.
    """
    only_explained = {(candidate.label, candidate.precision, candidate.optimizer) for candidate in only_for_pairs}
    full = [_with_meaning(row, about, price, only_explained) for row in rows]
    own = [row for row in full if row["capacity_index"] == 0]
    fitting = fastest_first([row for row in own if row["fits"] and not row["only_explains"]])
    comparable = [row for row in fitting if has_backward(row)]
    for row, on in zip(comparable, on_frontier(comparable), strict=True):
        row["on_frontier"] = on
    fastest = fitting[0] if fitting else None
    answers = [row for row in own if not row["only_explains"]]
    return dict(about) | {
        "source": "predicted",
        "has_time": by_time(comparable),
        "rows": full,
        "fastest": fastest,
        "smallest": min(
            comparable or fitting, key=lambda row: (row["least_device_bytes"], row["method"]), default=None
        ),
        "best": [of_method[0] for of_method in _by_method(fitting).values()],
        "larger": [_larger(full, fitting, index, about) for index in range(1, len(about["cards"]))],
        "too_large": _too_large(answers, about),
        "levers": lever_pairs(own),
        "needs": _needs(answers) if needs else [],
    }


def _with_meaning(row: Mapping[str, Any], about: Mapping[str, Any], price: Price | None, explained: set[Any]) -> Row:
    """The row with the card's memory, whether it fits, what is left, and its least memory, at micro-batch 1."""
    card = about["cards"][row["capacity_index"]]
    least = row["smallest_reserved_bytes"] + about["context_bytes"]
    fits = bool(row["micro_batch_size"]) and row["process_device_bytes"] <= card and _is_possible(row, about)
    timed = price is not None and row["tokens_per_s"] is not None
    return dict(row) | {
        "memory_bytes": card,
        "fits": fits,
        "headroom_bytes": card - (row["process_device_bytes"] if fits else least),
        "least_device_bytes": least,
        "only_explains": (row["method"], row["precision"], row["optimizer"]) in explained,
        "on_frontier": False,
        "has_backward": has_backward(row),
        "cost_per_million_tokens": price.per_million_tokens(row["tokens_per_s"]) if timed and price else None,
        "currency": price.currency if price else None,
    }


def _is_possible(row: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    """Whether the batch that was asked for can be run: gradients that are taken in backward are not summed up."""
    in_backward = any(part["name"] == IN_BACKWARD for part in row["parts"])
    return not in_backward or about["batch_size"] in (None, row["micro_batch_size"])


def on_frontier(rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """For each row whether no other takes no more memory, is no slower, and is better in one of them (`point_of`)."""
    timed = by_time(rows)
    return [not beaten for beaten in dominated([point_of(row, timed) for row in rows])]


def point_of(row: Mapping[str, Any], timed: bool) -> tuple[float, float]:
    """Memory in bytes, and what is the better the larger it is: tokens per second, or less arithmetic a token.

    Memory is that at micro-batch 1, the least with which the lever set runs: at the largest micro-batch that fits,
    every row fills the card, and memory would say nothing.
    """
    return row["least_device_bytes"], row["tokens_per_s"] if timed else -row["relative_cost"]


def _larger(rows: list[Row], fitting: list[Row], index: int, about: Mapping[str, Any]) -> dict[str, Any]:
    """What card `index` buys over the one that was asked about. speedup: None where a time is not known."""
    there = fastest_first([row for row in rows if row["capacity_index"] == index and row["fits"]])
    there = [row for row in there if not row["only_explains"]]
    best = there[0] if there else None
    before = fitting[0] if fitting else None
    timed = best and before and best["tokens_per_s"] and before["tokens_per_s"]
    return {
        "memory_bytes": about["cards"][index],
        "fastest": best,
        "speedup": best["tokens_per_s"] / before["tokens_per_s"] if best and before and timed else None,
        "newly_fits": sorted({method_of(r) for r in there} - {method_of(r) for r in fitting}),
    }


def _by_method(rows: Iterable[Row]) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(method_of(row), []).append(row)
    return grouped


def _smallest_of(rows: Iterable[Row]) -> Row:
    return min(rows, key=lambda row: (row["least_device_bytes"], row["method"]))


def _too_large(rows: list[Row], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each method of which nothing fits, the lever set that misses least; at micro-batch 1."""
    found = []
    for of_method in _by_method(rows).values():
        if not any(row["fits"] for row in of_method):
            least = _smallest_of(of_method)
            missing = max(0, least["least_device_bytes"] - about["cards"][0])
            keys = ("method", "parts", "precision", "optimizer", "least_device_bytes")
            found.append({key: least[key] for key in keys} | {"missing_bytes": missing})
    return found


def _needs(rows: list[Row]) -> list[dict[str, Any]]:
    """Of each method its least memory at micro-batch 1, and the smallest shipped card that has it, by its own context.

    card, memory_bytes: None where no shipped card is large enough.
    """
    cards = sorted(PROFILES.items(), key=lambda item: (item[1].memory_bytes, item[0]))
    found = []
    for of_method in _by_method(rows).values():
        least = _smallest_of(of_method)
        held = least["smallest_reserved_bytes"]
        name = next((name for name, card in cards if held + card.context_bytes <= card.memory_bytes), None)
        keys = ("method", "parts", "precision", "optimizer", "least_device_bytes")
        memory = PROFILES[name].memory_bytes if name else None
        found.append({key: least[key] for key in keys} | {"card": name, "memory_bytes": memory})
    return sorted(found, key=lambda entry: (entry["least_device_bytes"], entry["method"]))


def lever_pairs(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each two rows that differ in one lever alone, what the lever saves; the most saved first.

    Compared at the largest micro-batch for which both have a row that fits, else at micro-batch 1.
    """
    by_choice: dict[Any, dict[int, Row]] = {}
    for row in rows:
        choice = (form_of(parts_from(row["parts"])), row["precision"], row["optimizer"])
        by_choice.setdefault(choice, {})[row["micro_batch_size"] if row["fits"] else 0] = row
    found = []
    for ((method, levers), precision, optimizer), sized in by_choice.items():
        for lever in levers:
            partners = by_choice.get(((method, levers - {lever}), precision, optimizer))
            if partners is not None:
                found.append(_pair(lever, sized, partners))
    return sorted(found, key=lambda pair: (-pair["saves_bytes"], pair["with"], pair["lever"]))


def _pair(lever: str, sized: dict[int, Row], partners: dict[int, Row]) -> dict[str, Any]:
    """What the lever saves. sized, partners: rows with and without it, by their micro-batch (0: does not fit)."""
    micro = max((sized.keys() & partners.keys()) - {0}, default=0)
    row, partner = (rows[micro] if micro else next(iter(rows.values())) for rows in (sized, partners))
    key = "process_device_bytes" if micro else "least_device_bytes"
    return {
        "lever": lever,
        "with": row["method"],
        "parts": row["parts"],
        "without": partner["method"],
        "precision": row["precision"],
        "optimizer": row["optimizer"],
        "micro_batch_size": micro or 1,
        "without_bytes": partner[key],
        "with_bytes": row[key],
        "saves_bytes": partner[key] - row[key],
        "relative_cost_without": partner["relative_cost"],
        "relative_cost_with": row["relative_cost"],
    }
