"""The answer of a run in sentences: for each shape, which method holds least, which is fastest, and what levers save.

Each sentence is there only where the records support it, and names the source of its numbers. Methods whose gradient is
wrong are never named best. The same records give the same sentences, in whatever order they were written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from meftbench.catalogue.methods import METHODS
from meftbench.catalogue.metrics import SHARED_CORES
from meftbench.plan.axes import SHAPE
from meftbench.report.results import groups, rows_of, setting_text, shape_text, wrong_gradient
from meftbench.report.views.answer_trainings import of_task, over_tasks
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
from meftbench.report.views.scores import COMPARED, results, trained, untrained
from meftbench.report.views.sentences import ACTIVATION, STEP, Answer, by_source, listed, percent, shape_of, verb
from meftbench.units import format_bytes, format_duration

if TYPE_CHECKING:
    from pandas import DataFrame


def answers(frame: DataFrame) -> list[Answer]:
    """An answer for each shape of each group of comparable cells, then one for each task that was trained.

    frame: of `results.frame_of`.  Groups by title, then shapes from the smallest to the largest.
    """
    found = []
    frame = frame.sort_values(["run", "cell_id"])
    for group in sorted(groups(untrained(frame)), key=lambda group: group.title):
        rows = sorted(rows_of(group.frame), key=shape_of)
        for _, cells in groupby(rows, key=shape_of):
            found.append(_of_shape(group.title, sorted(cells, key=lambda row: (row["method"], row["cell_id"]))))
    by_table = sorted(results(trained(frame)), key=lambda result: [str(result.first[name]) for name in COMPARED])
    for _, table in groupby(by_table, key=lambda result: [str(result.first[name]) for name in COMPARED]):
        found.append(of_task(list(table)))
    return found


def headline(frame: DataFrame, found: Sequence[Answer] | None = None, not_run: tuple[int, int] = (0, 0)) -> list[str]:
    """One to three sentences for the whole run, written as those of an answer; [] where no cell has finished.

    They are those of the shape at which most methods ended ok, and of several the largest. Of trainings on several
    tasks they say on how many of these each method is among the best; of cells in one process and in several ranks,
    what holds least in a rank each way. found: the answers, where they are known.  not_run: cells of the suites that
    have no record, of so many, so that nobody takes those that ended for all.
    """
    all_answers = answers(frame) if found is None else found
    if not all_answers:
        return ["no training has ended with a score"] if len(trained(frame)) else []
    tasks = [answer for answer in all_answers if "task" in answer.facts]
    if len(tasks) > 1 and len(tasks) == len(all_answers):
        return over_tasks(tasks)
    chosen = max(
        all_answers,
        key=lambda answer: (len(answer.facts["ended"].get("ok", [])), answer.facts["tokens"], answer.title),
    )
    first, *others = chosen.sentences
    several = len({answer.facts["model"] for answer in all_answers}) > 1
    model = f" of {chosen.facts['model']}" if several else ""
    in_ranks = [answer for answer in all_answers if answer is not chosen and _shares_step_otherwise(answer, chosen)]
    told = in_ranks or chosen.facts.get("world_size", 1) > 1
    where = f" {_in_ranks(chosen.facts)}" if told else ""
    of_ranks = [text for answer in in_ranks for text in _least_in_ranks(answer.facts)]
    ended = [answer.facts["ended"] for answer in all_answers]
    every = sum(len(cells) for one in ended for cells in one.values())
    whole = _ended_ok(sum(len(one.get("ok", [])) for one in ended), every)
    own = len(chosen.facts["ended"].get("ok", []))
    others = [whole if text == _ended_ok(own, own) else text for text in others]
    missing, of_suites = not_run
    if missing:
        first = f"{own} {'cell' if own == 1 else 'cells'} ended ok" if first == _ended_ok(own, own) else first
        left = f"{missing} of {of_suites} cells {'is' if missing == 1 else 'are'} not run yet"
        others = [left, *(text for text in others if text != whole)]
    opening = f"{'on' if chosen in tasks else 'at'} {chosen.facts['at']}{model}{where}, {first}"
    return [opening, *(["; ".join(of_ranks)] if of_ranks else []), *others][:3]


def _shares_step_otherwise(answer: Answer, other: Answer) -> bool:
    """Whether two answers are of one model and shape, and differ in how many processes share a step, and how."""
    facts = answer.facts
    alike = ("model", "at", "device", "precision")
    if "world_size" not in facts or "world_size" not in other.facts:
        return False
    return all(facts[name] == other.facts[name] for name in alike) and _in_ranks(facts) != _in_ranks(other.facts)


def _in_ranks(facts: Mapping[str, Any]) -> str:
    """`in one process`, `in 2 ranks under ddp`."""
    if facts["world_size"] == 1:
        return "in one process"
    return f"in {facts['world_size']} ranks under {facts['parallelism']}"


def _least_in_ranks(facts: Mapping[str, Any]) -> Iterator[str]:
    for least in facts["least"]:
        peak = f"{format_bytes(least['peak_bytes'])} ({least['source']})"
        each = " in a rank" if facts["world_size"] > 1 else ""
        yield f"{_in_ranks(facts)} {listed(least['methods'])} {verb('hold', least['methods'])} least, {peak}{each}"


def _ended_ok(number: int, every: int) -> str:
    """How many of so many cells ended ok."""
    if number < every:
        return f"{number} of {every} cells ended ok"
    return f"all {every} cells ended ok" if every > 1 else "the cell ended ok"


# --- cells of which steps were measured ---


def _of_shape(title: str, rows: Sequence[dict[str, Any]]) -> Answer:
    """The answer of the cells of one group and shape, which are in the order of their labels."""
    first = rows[0]
    ended_ok = [row for row in rows if row["status"] == "ok"]
    ended = {status: [row["method"] for row in rows if row["status"] == status] for status in _statuses(rows)}
    facts: dict[str, Any] = {
        "at": shape_text(*shape_of(first)),
        **{name: first[name] for name in ("model", "device", "precision", "world_size", "parallelism", *SHAPE)},
        "tokens": int(first["batch_size"]) * int(first["sequence_length"]),
        "ended": ended,
    }
    best = [*_least(ended_ok, facts), *_fastest(ended_ok, facts)]
    largest = _largest(ended_ok, facts)
    levers = _levers(ended_ok, [row for row in rows if row["status"] == "oom"], facts)
    all_ok = [_ended_ok(len(rows), len(rows))] if set(ended) == {"ok"} else []
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
            how = f"{'do' if many else 'does'} not fit {device.removeprefix('predicted:')} (predicted)"
        elif status == "oom":
            how = "ran out of memory"
        elif status == "skipped":
            how = f"{'were' if many else 'was'} skipped"
        else:
            how = f"ended in {status}"
        number = f"{len(methods)} of {len(rows)} cells: " if many else ""
        yield f"{number}{listed(methods)} {how}"


def _is_candidate(row: Mapping[str, Any]) -> bool:
    """Whether a cell may be named best: its gradient is not known to be wrong, and its step has a backward pass."""
    method = METHODS.get(str(row["method_name"]))
    return wrong_gradient(row) is None and (method is None or method.backward)


def _least(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Iterator[str]:
    """Which method has the lowest peak; beside it those that have a lower one, but are not comparable."""
    facts["least"] = []
    for source, known in by_source(rows, PEAK):
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
        each = " in a rank" if facts["world_size"] > 1 else ""
        text = f"{listed(methods)} {verb('hold', best)}{least} a peak of {format_bytes(peak)} ({source}){each}"
        if fact["activation_bytes"] is not None:
            text += f" with {format_bytes(fact['activation_bytes'])} of activation memory"
        if reference := _reference(candidates, best):
            fact |= {"reference": reference["method"], "reference_peak_bytes": reference[PEAK]}
            text += f", {percent(1 - peak / reference[PEAK])} below {reference['method']}"
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
    for source, known in by_source(rows, STEP):
        candidates = [row for row in known if _is_candidate(row)]
        if len(candidates) == 1:
            only = candidates[0]
            yield f"a step of {only['method']} takes {format_duration(only[STEP])} ({source}){_cores(candidates)}"
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
        text = f"{listed(methods)} {verb('are', methods)} fastest"
        # Of lora it is the cell that holds least, as for the peak: both sentences then have one reference.
        fastest = [row for row in candidates if row["method"] in methods]
        if reference := _reference(candidates, fastest, of_lora=True):
            ratio = reference[STEP] / seconds
            fact |= {"reference": reference["method"], "ratio": ratio}
            text += f", {ratio:.1f} × {reference['method']} ({source})"
        else:
            text += f", {format_duration(seconds)} a step ({source})"
        if near:
            text += f", {listed(sorted(near))} within the spread of {'their' if len(methods) > 1 else 'its'} times"
        shared = _cores(candidates)
        fact["cores_shared"] = bool(shared)
        facts["fastest"].append(fact)
        yield f"{text}{shared}"


def _cores(rows: Iterable[Mapping[str, Any]]) -> str:
    """What is said of times that were taken while other processes held the cores; "" where none was."""
    waited = any(_or(row["cpu_wait_share"], 0) > SHARED_CORES for row in rows)
    return ", while other processes held the cores" if waited else ""


def _or(value: Any, otherwise: float) -> float:
    return float(value) if is_number(value) else otherwise


def _largest(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Iterator[str]:
    """What the largest peak consists of."""
    for source, known in by_source(rows, PEAK):
        largest = min(known, key=lambda row: (-row[PEAK], row["method"]))
        sentence = composition_sentence(largest)
        if sentence:
            parts = composition(largest)
            phase = largest["peak_phase"]
            facts.setdefault("largest", []).append(
                {"method": largest["method"], "peak_bytes": largest[PEAK], "source": source, "phase": phase} | parts
            )
            yield sentence


def _levers(rows: Sequence[dict[str, Any]], ran_out: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Iterator[str]:
    """What each lever saves, and which methods fit with one lever more."""
    found = savings([row for row in with_peak(rows) if wrong_gradient(row) is None])
    facts["levers"] = [saving.facts() for saving in found]
    yield from (saving.sentence() for saving in of_each_lever(found))
    fitting = rescues(rows, ran_out)
    facts["fits_with"] = [{"method": method, "lever": lever} for method, lever in fitting]
    for method, pairs in groupby(fitting, key=lambda pair: pair[0]):
        yield f"{method} ends ok with {' or '.join(f'+{lever}' for _, lever in pairs)}"
