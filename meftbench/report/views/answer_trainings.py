"""The answer of trainings in sentences: which methods score best, beyond what seeds differ by, and what they hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from meftbench.plan.axes import SHAPE
from meftbench.report.results import setting_text, shape_text, wrong_gradient
from meftbench.report.views.savings import is_number
from meftbench.report.views.scores import Result, learnt_nothing
from meftbench.report.views.sentences import ACTIVATION, NAMED, Answer, by_source, listed, percent, shape_of, verb
from meftbench.units import format_bytes


def over_tasks(tasks: Sequence[Answer]) -> list[str]:
    """On how many tasks each method scores best or within the spread of seeds, the activation memory of those that do
    most often, and which tasks are left out of the count, because most methods learnt nothing of them."""
    counted = [answer for answer in tasks if answer.facts.get("learnt", True)]
    empty = [str(answer.facts["task"]) for answer in tasks if answer not in counted]
    why = "on which most methods score as an answer that is always the same: nothing was learnt there"
    often: dict[str, int] = {}
    for answer in counted:
        for method in [answer.facts["best"], *answer.facts["within_noise"]] if "best" in answer.facts else []:
            often[method] = often.get(method, 0) + 1
    if not often:
        left_out = [f"left out: {', '.join(empty)}, {why}"] if empty else []
        return [f"on none of {len(tasks)} tasks has a method a score that can be compared", *left_out]
    by_number = sorted(often, key=lambda method: (-often[method], method))
    models = " and ".join(sorted({answer.facts["model"] for answer in tasks}))
    of_tasks = f"{len(counted)} task{'s' * (len(counted) != 1)}"
    most, *others = by_number
    first = f"{most} is best or within the spread of seeds on {often[most]} of {of_tasks} ({models})"
    sentences = [listed([first, *(f"{method} on {often[method]}" for method in others)])]
    held = [(method, _share_of_full(method, counted)) for method in by_number[:NAMED]]
    if shares := [f"{method} {percent(share)}" for method, share in held if share is not None]:
        sources = sorted({source for answer in counted for source in answer.facts["activation_sources"]})
        how = f"{' and '.join(sources)}, the median over these tasks"
        sentences.append(f"activation memory as a share of full's ({how}): {', '.join(shares)}")
    return [*sentences, f"not among these tasks: {', '.join(empty)}, {why}"] if empty else sentences


def _share_of_full(method: str, tasks: Sequence[Answer]) -> float | None:
    """The median over tasks of the method's activation memory as a share of full's; None: it is on no task known."""
    held = [answer.facts["activation_bytes"] for answer in tasks]
    shares = [sizes[method] / sizes["full"] for sizes in held if method in sizes and "full" in sizes]
    return median(shares) if shares else None


def of_task(found: Sequence[Result]) -> Answer:
    """The answer of the results of one model on one task: the best score, and of those near it the least memory."""
    first = found[0].first
    facts: dict[str, Any] = {
        "at": f"{first['task']}, {shape_text(*shape_of(first))}",
        **{name: first[name] for name in ("task", "model", "device", "precision", *SHAPE)},
        "tokens": int(first["batch_size"]) * int(first["sequence_length"]),
        "ended": {"ok": sorted(result.method for result in found)},
        "scored_by": first["scored_by"],
        "activation_bytes": {r.method: r.activation_bytes for r in found if is_number(r.activation_bytes)},
        "activation_sources": [source for source, _ in by_source([r.first for r in found], ACTIVATION)],
    }
    shared = ", ".join(setting_text(name, first[name]) for name in ("device", "precision"))
    title = f"{facts['at']}: {first['model']}, {shared}"
    scored = [result for result in found if math.isfinite(result.score.mean) and not wrong_gradient(result.first)]
    if not scored:
        return Answer(title, ("no method has a score",), facts)
    best = min(scored, key=lambda result: (-result.score.mean, result.method))
    near = sorted((r for r in scored if r is not best and _within_noise(best, r)), key=lambda result: result.method)
    over = f"over {len(best.seeds)} seeds" if len(best.seeds) > 1 else "with one seed"
    facts |= {
        "best": best.method,
        "score": best.score.mean,
        "deviation": best.score.deviation,
        "seeds": best.seeds,
        "within_noise": [result.method for result in near],
    }
    no_better = learnt_nothing(found)
    facts["learnt"] = len(no_better) <= len(scored) / 2
    if len(no_better) == len(scored):
        return Answer(title, (f"no method has learnt the task: {_all_the_same(best, len(scored))}",), facts)
    text = f"{best.method} scores best, {best.said_score()} ({first['scored_by']} on validation, measured {over})"
    if near and best.score.deviation is not None:
        text += f", and within the spread of seeds {_as_good(near)}"
    elif near:
        text += f", as {_as_good(near)}"
    if best.score.deviation is None:
        text += "; how far seeds differ is not known"
    nothing = [f"{listed(no_better)} learnt nothing: {_SAME_ANSWER}"] if no_better else []
    return Answer(title, (text, *_least_of_best([best, *near], found, facts), *nothing), facts)


_SAME_ANSWER = "with each seed no better than an answer that is always the same"


def _all_the_same(best: Result, number: int) -> str:
    scored = f"{best.first['scored_by']} on validation, measured"
    who = f"all {number} are" if number > 1 else f"{best.method} is"
    return f"{who} {_SAME_ANSWER}, the best {best.said_score()} ({scored})"


def _as_good(near: Sequence[Result]) -> str:
    return f"{listed([result.method for result in near])} {'do' if len(near) > 1 else 'does'}"


def _within_noise(best: Result, other: Result) -> bool:
    """Whether the scores differ by no more than the larger standard deviation over seeds; without one: are equal."""
    deviations = [r.score.deviation for r in (best, other) if r.score.deviation is not None]
    return best.score.mean - other.score.mean <= max(filter(math.isfinite, deviations), default=0.0)


def _least_of_best(near: Sequence[Result], found: Sequence[Result], facts: dict[str, Any]) -> Iterator[str]:
    """Of the methods that score best, which has the least activation memory, and its share of full's."""
    rows = [result.first for result in near]
    for source, known in by_source(rows, ACTIVATION):
        least = min(row[ACTIVATION] for row in known)
        methods = sorted(result.method for result in near if result.first[ACTIVATION] == least)
        facts.setdefault("least", []).append({"methods": methods, "activation_bytes": least, "source": source})
        text = f"{listed(methods)} {verb('hold', methods)} {format_bytes(least)} of activation memory ({source})"
        full = facts["activation_bytes"].get("full")
        if full and "full" not in methods:
            text += f", {least / full:.0%}".replace("%", " %") + " of full's"
        yield f"of these, {text}" if len(near) > 1 and len(methods) < len(near) else text
