"""The answer of a run in sentences: for each shape, which method holds least, which is fastest, and what levers save.

Each sentence is there only where the records support it, and names the source of its numbers. Methods whose gradient is
wrong are never named best. The same records give the same sentences, in whatever order they were written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any

from meftbench.catalogue.methods import METHODS
from meftbench.catalogue.metrics import SHARED_CORES
from meftbench.plan.axes import SHAPE
from meftbench.report.results import groups, rows_of, setting_text, shape_text, wrong_gradient
from meftbench.report.views.savings import (
    PEAK,
    composition,
    composition_sentence,
    is_number,
    of_each_lever,
    rescues,
    savings,
    with_peak,
)
from meftbench.report.views.scores import COMPARED, Result, learnt_nothing, results, trained, untrained
from meftbench.units import format_bytes, format_duration

if TYPE_CHECKING:
    from pandas import DataFrame

ACTIVATION, STEP = "activation_peak_bytes", "step_time_s"
_NAMED = 4  # methods that a sentence lists at most; the facts have all


@dataclass(frozen=True)
class Answer:
    """What the cells of one shape and setting say together.

    title: the shape and what the cells share.  sentences: without a capital and a full stop.
    facts: the numbers behind the sentences, in bytes and seconds, as JSON can hold them.
    """

    title: str
    sentences: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)


def answers(frame: DataFrame) -> list[Answer]:
    """An answer for each shape of each group of comparable cells, then one for each task that was trained.

    frame: of `results.frame_of`.  Groups by title, then shapes from the smallest to the largest.
    """
    found = []
    frame = frame.sort_values(["run", "cell_id"])
    for group in sorted(groups(untrained(frame)), key=lambda group: group.title):
        rows = sorted(rows_of(group.frame), key=_shape_of)
        for _, cells in groupby(rows, key=_shape_of):
            found.append(_of_shape(group.title, sorted(cells, key=lambda row: (row["method"], row["cell_id"]))))
    by_table = sorted(results(trained(frame)), key=lambda result: [str(result.first[name]) for name in COMPARED])
    for _, table in groupby(by_table, key=lambda result: [str(result.first[name]) for name in COMPARED]):
        found.append(_of_task(list(table)))
    return found


def headline(frame: DataFrame, found: Sequence[Answer] | None = None) -> list[str]:
    """One to three sentences for the whole run, written as those of an answer; [] where no cell has finished.

    They are those of the shape at which most methods ended ok, and of several the largest. Of trainings on several
    tasks they say on how many of these each method is among the best. found: the answers, where they are known.
    """
    all_answers = answers(frame) if found is None else found
    if not all_answers:
        return ["no training has ended with a score"] if len(trained(frame)) else []
    tasks = [answer for answer in all_answers if "task" in answer.facts]
    if len(tasks) > 1 and len(tasks) == len(all_answers):
        return _over_tasks(tasks)
    chosen = max(
        all_answers,
        key=lambda answer: (len(answer.facts["ended"].get("ok", [])), answer.facts["tokens"], answer.title),
    )
    first, *others = chosen.sentences
    several = len({answer.facts["model"] for answer in all_answers}) > 1
    model = f" of {chosen.facts['model']}" if several else ""
    return [f"{'on' if chosen in tasks else 'at'} {chosen.facts['at']}{model}, {first}", *others][:3]


def _shape_of(row: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(row[name]) for name in SHAPE)


# --- cells of which steps were measured ---


def _of_shape(title: str, rows: Sequence[dict[str, Any]]) -> Answer:
    """The answer of the cells of one group and shape, which are in the order of their labels."""
    first = rows[0]
    ended_ok = [row for row in rows if row["status"] == "ok"]
    ended = {status: [row["method"] for row in rows if row["status"] == status] for status in _statuses(rows)}
    facts: dict[str, Any] = {
        "at": shape_text(*_shape_of(first)),
        **{name: first[name] for name in ("model", "device", "precision", *SHAPE)},
        "tokens": int(first["batch_size"]) * int(first["sequence_length"]),
        "ended": ended,
    }
    best = [*_least(ended_ok, facts), *_fastest(ended_ok, facts)]
    largest = _largest(ended_ok, facts)
    levers = _levers(ended_ok, ended.get("oom", []), facts)
    every_one = f"all {len(rows)} cells ended ok" if len(rows) > 1 else "the cell ended ok"
    all_ok = [every_one] if set(ended) == {"ok"} else []
    sentences = (*(["; ".join(best)] if best else []), *_failures(rows, ended), *largest, *levers, *all_ok)
    shared = [setting_text(name, first[name]) for name in ("device", "precision")]
    parts = [title, *(text for text in shared if text not in title.split(", "))]
    return Answer(f"{facts['at']}: {', '.join(parts)}", sentences, facts)


def _statuses(rows: Iterable[dict[str, Any]]) -> list[str]:
    return sorted({str(row["status"]) for row in rows}, key=lambda status: (status != "ok", status))


def _failures(rows: Sequence[dict[str, Any]], ended: Mapping[str, list[str]]) -> Iterator[str]:
    """Which cells did not end ok, and how they ended."""
    device = str(rows[0]["device"])
    for status, methods in ended.items():
        if status == "ok":
            continue
        many = len(methods) > 1
        if status == "oom" and device.startswith("predicted:"):
            verb = f"{'do' if many else 'does'} not fit {device.removeprefix('predicted:')} (predicted)"
        elif status == "oom":
            verb = "ran out of memory"
        elif status == "skipped":
            verb = f"{'were' if many else 'was'} skipped"
        else:
            verb = f"ended in {status}"
        number = f"{len(methods)} of {len(rows)} cells: " if many else ""
        yield f"{number}{_listed(methods)} {verb}"


def _listed(names: Sequence[str]) -> str:
    """`a, b and c`, or the first few `and 7 more`."""
    if len(names) > _NAMED:
        return f"{', '.join(names[:_NAMED])} and {len(names) - _NAMED} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _is_candidate(row: Mapping[str, Any]) -> bool:
    """Whether a cell may be named best: its gradient is not known to be wrong, and its step has a backward pass."""
    method = METHODS.get(str(row["method_name"]))
    return wrong_gradient(row) is None and (method is None or method.backward)


def _by_source(rows: Iterable[Mapping[str, Any]], metric: str) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The rows that have the metric as a finite number above zero, for each source of it: sources are not mixed."""
    known = [row for row in rows if is_number(row[metric]) and row[metric] > 0]
    sources = sorted({str(row[f"{metric}_source"]) for row in known})
    return [(source, [row for row in known if row[f"{metric}_source"] == source]) for source in sources]


def _least(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Iterator[str]:
    """Which method has the lowest peak; beside it those that have a lower one, but are not comparable."""
    facts["least"] = []
    for source, known in _by_source(rows, PEAK):
        candidates = [row for row in known if _is_candidate(row)]
        if not candidates:
            lowest = min(known, key=lambda row: (row[PEAK], row["method"]))
            yield f"{lowest['method']} holds {format_bytes(lowest[PEAK])} ({source}), but {_why_not(lowest)}"
            continue
        peak = min(row[PEAK] for row in candidates)
        best = [row for row in candidates if row[PEAK] == peak]
        methods = [row["method"] for row in best]
        fact = {"methods": methods, "peak_bytes": peak, "activation_bytes": _activation_of(best), "source": source}
        least = " least," if len(known) > 1 else ""
        text = f"{_listed(methods)} {_verb('hold', best)}{least} a peak of {format_bytes(peak)} ({source})"
        if fact["activation_bytes"] is not None:
            text += f" with {format_bytes(fact['activation_bytes'])} of activation memory"
        if reference := _reference(candidates, best):
            fact |= {"reference": reference["method"], "reference_peak_bytes": reference[PEAK]}
            text += f", {_percent(1 - peak / reference[PEAK])} below {reference['method']}"
        lower = sorted((row for row in known if row[PEAK] < peak), key=lambda row: (row[PEAK], row["method"]))
        fact["lower_but"] = [{"method": row["method"], "peak_bytes": row[PEAK], "why": _why_not(row)} for row in lower]
        if lower:
            text += f" ({lower[0]['method']} holds {format_bytes(lower[0][PEAK])}, but {_why_not(lower[0])})"
        facts["least"].append(fact)
        yield text


def _activation_of(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The activation memory that rows have in common; None: it is not known, or differs."""
    values = {row[ACTIVATION] for row in rows}
    value = values.pop() if len(values) == 1 else None
    return value if is_number(value) else None


def _why_not(row: Mapping[str, Any]) -> str:
    return wrong_gradient(row) or "it has no backward pass and needs many more steps"


def _verb(verb: str, rows: Sequence[object]) -> str:
    """The verb for as many subjects: `holds`, `hold`."""
    return verb if len(rows) > 1 else {"are": "is"}.get(verb, f"{verb}s")


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %") if share >= 0.005 else "less than 1 %"


def _reference(
    rows: Sequence[Mapping[str, Any]], best: Sequence[Mapping[str, Any]], *, of_lora: bool = False
) -> Mapping[str, Any] | None:
    """The cell that `best` is held against: of `lora` the one with the levers that leave it the lowest peak.

    Where `best` has lora, or no cell has it, it is the cell with the lowest peak of another method; with `of_lora` None
    where `best` has lora. None also where there is no other method.
    rows: candidates, `best` among them.  A method is the same with any levers and settings.
    """
    names = {row["method_name"] for row in best}
    if of_lora and "lora" in names:
        return None
    others = [row for row in with_peak(rows) if row["method_name"] not in names]
    of_the_reference = [row for row in others if row["method_name"] == "lora"] or others
    return min(of_the_reference, key=lambda row: (row[PEAK], row["method"]), default=None)


def _fastest(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Iterator[str]:
    """Which method takes the shortest step, and by what ratio; those within the spread of its times are named, too."""
    facts["fastest"] = []
    for source, known in _by_source(rows, STEP):
        candidates = [row for row in known if _is_candidate(row)]
        if len(candidates) == 1:
            yield f"a step of {candidates[0]['method']} takes {format_duration(candidates[0][STEP])} ({source})"
        if len(candidates) < 2:
            continue
        best = min(candidates, key=lambda row: (row[STEP], row["method"]))
        seconds = best[STEP]
        tied = [row["method"] for row in candidates if row is not best and row[STEP] == seconds]
        slowest = _or(best[f"{STEP}_high"], seconds)
        near = [
            row["method"] for row in candidates if row[STEP] > seconds and _or(row[f"{STEP}_low"], row[STEP]) <= slowest
        ]
        methods = sorted([best["method"], *tied])
        fact = {"methods": methods, "step_time_s": seconds, "source": source, "within_spread": sorted(near)}
        text = f"{_listed(methods)} {_verb('are', methods)} fastest"
        # Of lora it is the cell that holds least, as for the peak: both sentences then have one reference.
        fastest = [row for row in candidates if row["method"] in methods]
        if reference := _reference(candidates, fastest, of_lora=True):
            ratio = reference[STEP] / seconds
            fact |= {"reference": reference["method"], "ratio": ratio}
            text += f", {ratio:.1f} × {reference['method']} ({source})"
        else:
            text += f", {format_duration(seconds)} a step ({source})"
        if near:
            text += f", {_listed(sorted(near))} within the spread of {'their' if len(methods) > 1 else 'its'} times"
        fact["cores_shared"] = any(_or(row["cpu_wait_share"], 0) > SHARED_CORES for row in candidates)
        if fact["cores_shared"]:
            text += ", while other processes held the cores"
        facts["fastest"].append(fact)
        yield text


def _or(value: Any, otherwise: float) -> float:
    return float(value) if is_number(value) else otherwise


def _largest(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Iterator[str]:
    """What the largest peak consists of."""
    for source, known in _by_source(rows, PEAK):
        largest = min(known, key=lambda row: (-row[PEAK], row["method"]))
        sentence = composition_sentence(largest)
        if sentence:
            parts = composition(largest)
            phase = largest["peak_phase"]
            facts.setdefault("largest", []).append(
                {"method": largest["method"], "peak_bytes": largest[PEAK], "source": source, "phase": phase} | parts
            )
            yield sentence


def _levers(rows: Sequence[dict[str, Any]], ran_out: list[str], facts: dict[str, Any]) -> Iterator[str]:
    """What each lever saves, and which methods fit with one lever more."""
    found = savings([row for row in with_peak(rows) if wrong_gradient(row) is None])
    facts["levers"] = [saving.facts() for saving in found]
    yield from (saving.sentence() for saving in of_each_lever(found))
    fitting = rescues([row["method"] for row in rows], ran_out)
    facts["fits_with"] = [{"method": method, "lever": lever} for method, lever in fitting]
    for method, pairs in groupby(fitting, key=lambda pair: pair[0]):
        yield f"{method} ends ok with {' or '.join(f'+{lever}' for _, lever in pairs)}"


# --- trainings ---


def _over_tasks(tasks: Sequence[Answer]) -> list[str]:
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
    sentences = [_listed([first, *(f"{method} on {often[method]}" for method in others)])]
    held = [(method, _share_of_full(method, counted)) for method in by_number[:_NAMED]]
    if shares := [f"{method} {_percent(share)}" for method, share in held if share is not None]:
        sources = sorted({source for answer in counted for source in answer.facts["activation_sources"]})
        how = f"{' and '.join(sources)}, the median over these tasks"
        sentences.append(f"activation memory as a share of full's ({how}): {', '.join(shares)}")
    return [*sentences, f"not among these tasks: {', '.join(empty)}, {why}"] if empty else sentences


def _share_of_full(method: str, tasks: Sequence[Answer]) -> float | None:
    """The median over tasks of the method's activation memory as a share of full's; None: it is on no task known."""
    held = [answer.facts["activation_bytes"] for answer in tasks]
    shares = [sizes[method] / sizes["full"] for sizes in held if method in sizes and "full" in sizes]
    return median(shares) if shares else None


def _of_task(found: Sequence[Result]) -> Answer:
    """The answer of the results of one model on one task: the best score, and of those near it the least memory."""
    first = found[0].first
    facts: dict[str, Any] = {
        "at": f"{first['task']}, {shape_text(*_shape_of(first))}",
        **{name: first[name] for name in ("task", "model", "device", "precision", *SHAPE)},
        "tokens": int(first["batch_size"]) * int(first["sequence_length"]),
        "ended": {"ok": sorted(result.method for result in found)},
        "scored_by": first["scored_by"],
        "activation_bytes": {r.method: r.activation_bytes for r in found if is_number(r.activation_bytes)},
        "activation_sources": [source for source, _ in _by_source([r.first for r in found], ACTIVATION)],
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
    nothing = [f"{_listed(no_better)} learnt nothing: {_SAME_ANSWER}"] if no_better else []
    return Answer(title, (text, *_least_of_best([best, *near], found, facts), *nothing), facts)


_SAME_ANSWER = "with each seed no better than an answer that is always the same"


def _all_the_same(best: Result, number: int) -> str:
    scored = f"{best.first['scored_by']} on validation, measured"
    who = f"all {number} are" if number > 1 else f"{best.method} is"
    return f"{who} {_SAME_ANSWER}, the best {best.said_score()} ({scored})"


def _as_good(near: Sequence[Result]) -> str:
    return f"{_listed([result.method for result in near])} {'do' if len(near) > 1 else 'does'}"


def _within_noise(best: Result, other: Result) -> bool:
    """Whether the scores differ by no more than the larger standard deviation over seeds; without one: are equal."""
    deviations = [r.score.deviation for r in (best, other) if r.score.deviation is not None]
    return best.score.mean - other.score.mean <= max(filter(math.isfinite, deviations), default=0.0)


def _least_of_best(near: Sequence[Result], found: Sequence[Result], facts: dict[str, Any]) -> Iterator[str]:
    """Of the methods that score best, which has the least activation memory, and its share of full's."""
    rows = [result.first for result in near]
    for source, known in _by_source(rows, ACTIVATION):
        least = min(row[ACTIVATION] for row in known)
        methods = sorted(result.method for result in near if result.first[ACTIVATION] == least)
        facts.setdefault("least", []).append({"methods": methods, "activation_bytes": least, "source": source})
        text = f"{_listed(methods)} {_verb('hold', methods)} {format_bytes(least)} of activation memory ({source})"
        full = facts["activation_bytes"].get("full")
        if full and "full" not in methods:
            text += f", {least / full:.0%}".replace("%", " %") + " of full's"
        yield f"of these, {text}" if len(near) > 1 and len(methods) < len(near) else text
