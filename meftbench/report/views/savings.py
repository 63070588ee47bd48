"""What a step's peak consists of, and what a memory optimisation (lever) saves of it, with the reason why not more.

A lever is judged by two cells of one shape and setting whose methods differ in that lever alone.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meftbench.catalogue.labels import Part
from meftbench.catalogue.metrics import BREAKDOWN
from meftbench.units import format_bytes

PEAK = "peak_allocated_bytes"

_NAMES = {
    "parameters_bytes": "parameters",
    "buffers_bytes": "buffers of the model",
    "gradients_bytes": "gradients",
    "optimizer_bytes": "optimizer state",
    # By what it is, since activation memory is the peak of a step above the level before it: another number.
    "activations_bytes": "tensors made in forward",
    "temporaries_bytes": "temporaries",
    "inputs_bytes": "the batch",
    "workspace_bytes": "library workspaces",
    "other_bytes": "what is in no category",
}
_SHOWN_SHARE = 0.05  # categories below this share of a peak are not named
NOTHING = 0.005  # a lever that saves less than this share of the peak is said to save nothing


@dataclass(frozen=True)
class Saving:
    """What `lever` saves: the same method without and with it.

    without, with_lever: labels.  without_bytes, with_bytes: peaks.  why: how the peak's content changed; "" where the
    records do not have it.
    """

    lever: str
    without: str
    with_lever: str
    without_bytes: float
    with_bytes: float
    source: str
    why: str

    @property
    def saved_bytes(self) -> float:
        """Bytes by which the peak is lower; negative where it is higher."""
        return self.without_bytes - self.with_bytes

    @property
    def share(self) -> float:
        """`saved_bytes` as a share of the peak without the lever."""
        return self.saved_bytes / self.without_bytes

    def sentence(self) -> str:
        """`+checkpoint saves 89.1 MiB of lora's peak of 215.8 MiB (counted): ...`."""
        why = f": {self.why}" if self.why else ""
        if abs(self.share) < NOTHING:
            return f"+{self.lever} saves nothing on {self.without} ({self.source}){why}"
        if self.saved_bytes < 0:
            more = format_bytes(-self.saved_bytes)
            return f"+{self.lever} adds {more} to {self.without} ({self.source}){why}"
        saved, before = format_bytes(self.saved_bytes), format_bytes(self.without_bytes)
        return f"+{self.lever} saves {saved} of {self.without}'s peak of {before} ({self.source}){why}"

    def facts(self) -> dict[str, Any]:
        """The same as numbers."""
        return {
            "lever": self.lever,
            "without": self.without,
            "with": self.with_lever,
            "without_bytes": self.without_bytes,
            "with_bytes": self.with_bytes,
            "saves_bytes": self.saved_bytes,
            "source": self.source,
            "why": self.why,
        }


def savings(rows: Sequence[Mapping[str, Any]]) -> list[Saving]:
    """For each two rows with a peak of one source that differ in one lever alone, what the lever saves.

    rows: cells of one shape and setting that ended ok.  The most saved first, then by label.
    """
    by_form = {(form_of(row["parts"]), row[f"{PEAK}_source"]): row for row in rows}
    found = []
    for ((method, levers), source), row in by_form.items():
        for lever in levers:
            without = by_form.get(((method, levers - {lever}), source))
            if without is not None:
                found.append(_saving(lever, without, row))
    return sorted(found, key=lambda saving: (-saving.saved_bytes, saving.lever, saving.with_lever))


def of_each_lever(found: Sequence[Saving]) -> list[Saving]:
    """Of each lever the pair in which it saves most, and the one in which it saves least where that is nothing."""
    chosen = []
    for lever in dict.fromkeys(saving.lever for saving in found):
        of_lever = [saving for saving in found if saving.lever == lever]
        chosen.append(of_lever[0])
        if of_lever[-1].share < NOTHING <= of_lever[0].share:
            chosen.append(of_lever[-1])
    return chosen


def rescues(ended_ok: Sequence[Mapping[str, Any]], ran_out: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(method, lever): methods of cells that ran out of memory, and ended ok with this one lever more, by label."""
    forms = {form_of(row["parts"]) for row in ended_ok}
    found = []
    for row in ran_out:
        name, levers = form_of(row["parts"])
        for base, having in forms:
            if base == name and having > levers and len(having - levers) == 1:
                found += [(str(row["method"]), lever) for lever in having - levers]
    return sorted(found)


def form_of(parts: Sequence[Part]) -> tuple[str, frozenset[str]]:
    """The labels of the method and of its levers, whatever the order of these."""
    method, *levers = parts
    return method.label, frozenset(lever.label for lever in levers)


def _saving(lever: str, without: Mapping[str, Any], row: Mapping[str, Any]) -> Saving:
    source = str(row[f"{PEAK}_source"])
    return Saving(lever, without["method"], row["method"], without[PEAK], row[PEAK], source, _why(without, row))


# --- what a peak consists of ---


def composition(row: Mapping[str, Any]) -> dict[str, float]:
    """Bytes of each category at the peak, by metric, the largest first; {} where the records do not have them."""
    sizes = {name: row[name] for name in BREAKDOWN if _positive(row.get(name))}
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))


def composition_sentence(row: Mapping[str, Any]) -> str | None:
    """`of full's 412.0 MiB (counted), tensors made in forward are 61 %`; None: the categories are not known, or none
    has a share that would be shown.

    row: a cell with a peak.
    """
    sizes = composition(row) if _positive(row[PEAK]) else {}
    shown = {name: size for name, size in sizes.items() if size >= _SHOWN_SHARE * row[PEAK]}
    if not shown:
        return None
    texts = [f"{_NAMES[name]} {size / row[PEAK]:.0%}".replace("%", " %") for name, size in shown.items()]
    first, verb = texts[0].rsplit(" ", 2), "is" if _NAMES[next(iter(shown))] in _SINGULAR else "are"
    head = f"of {row['method']}'s {format_bytes(row[PEAK])} ({row[f'{PEAK}_source']})"
    phase = _PHASES.get(str(row.get("peak_phase")))
    where = f"; the peak is {phase}" if phase else ""
    return f"{head}, {', '.join([f'{first[0]} {verb} {first[1]} {first[2]}', *texts[1:]])}{where}"


_SINGULAR = ("optimizer state", "the batch", "what is in no category")
_PHASES = {
    "load": "where the model is loaded",
    "forward": "in forward",
    "backward": "in backward",
    "optimizer": "in the optimizer's step",
}


def _why(without: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """How the content of the peak changed from one cell to the other, and what is now its largest part."""
    before, after = composition(without), composition(row)
    phases = [_PHASES.get(str(cell.get("peak_phase"))) for cell in (without, row)]
    saved = without[PEAK] - row[PEAK]
    if abs(saved) < NOTHING * without[PEAK]:
        return _why_nothing(before, phases[0])
    texts = []
    if moved := _most_changed(before, after, falling=saved > 0):
        grew, was, now = moved
        texts.append(
            f"at the peak, {grew} {'went' if saved > 0 else 'grew'} from {format_bytes(was)} to {format_bytes(now)}"
        )
    buffers = [_largest_buffer(cell) for cell in (without, row)]
    if saved > 0 and buffers[0] and buffers[1] and buffers[0] != buffers[1] and "optimizer" not in str(phases):
        texts.append(f"the largest tensors at the peak were {buffers[0]}, and are now {buffers[1]}")
    elif saved > 0 and (largest := _largest_of_step(row)) and not (moved and largest.startswith(moved[0])):
        texts.append(f"the largest part beside parameters is now {largest}")
    if phases[0] and phases[1] and phases[0] != phases[1]:
        texts.append(f"the peak was {phases[0]} and is now {phases[1]}")
    return "; ".join(texts)


def _why_nothing(before: Mapping[str, float], phase: str | None) -> str:
    if phase == _PHASES["optimizer"]:
        return "the peak is in the optimizer's step, in which no tensors of forward are held"
    if before:
        name, size = next(iter(before.items()))
        return f"the peak is {phase or 'elsewhere'}, where {_NAMES[name]} are the most ({format_bytes(size)})"
    return ""


def _most_changed(
    before: Mapping[str, float], after: Mapping[str, float], falling: bool
) -> tuple[str, float, float] | None:
    """The category that fell most, or grew most: its name, its bytes before and after. None: none did."""
    sign = 1 if falling else -1
    changes = {name: sign * (before.get(name, 0) - after.get(name, 0)) for name in BREAKDOWN}
    name = max(BREAKDOWN, key=lambda category: changes[category])
    if not (before and after) or changes[name] <= 0:
        return None
    return _NAMES[name], before.get(name, 0), after.get(name, 0)


def _largest_of_step(row: Mapping[str, Any]) -> str:
    """The largest category at the peak that is not the model's parameters, with its bytes; "" where not known."""
    for name, size in composition(row).items():
        if name != "parameters_bytes":
            return f"{_NAMES[name]} ({format_bytes(size)})"
    return ""


# --- the tensors that are alive at the peak of forward and backward (`peak_buffers`) ---


def _largest_buffer(row: Mapping[str, Any]) -> str:
    """The part of the model whose tensors hold most at the peak, with their bytes and the module with the
    largest part; "" where the record has none."""
    buffers = row.get("peak_buffers")
    sums: dict[str, Counter[str | None]] = defaultdict(Counter)
    for buffer in buffers if isinstance(buffers, list) else []:
        if buffer["category"] in ("activations", "temporaries"):
            sums[_part_of_model(buffer)][buffer.get("module")] += int(buffer["bytes"])
    if not sums:
        return ""
    part = min(sums, key=lambda name: (-sums[name].total(), name))
    module = min(sums[part], key=lambda path: (-sums[part][path], path or ""))
    most = f", the largest part in {module}" if module else ""
    return f"{part} ({format_bytes(sums[part].total())}{most})"


def _part_of_model(buffer: Mapping[str, Any]) -> str:
    """Which part of a model made a tensor, by operator and place: the loss, attention, or a kind of operator."""
    operator, place = str(buffer["op"]).partition(".")[0], str(buffer["place"])
    if any(word in operator for word in ("log_softmax", "nll_loss", "cross_entropy")) or "loss" in place:
        return "of the loss over the vocabulary"
    if "attention" in operator or "attention" in place:
        return "of attention"
    return f"outputs of {_OPERATORS.get(operator.strip('_'), operator.strip('_'))}"


_OPERATORS = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "linear"), "matrix products"),
    **dict.fromkeys(("native_layer_norm", "layer_norm", "rms_norm", "fused_rms_norm"), "norms"),
    **dict.fromkeys(("gelu", "silu", "relu", "tanh"), "the feed-forward's activation function"),
    **dict.fromkeys(("add", "mul", "sub", "div"), "elementwise arithmetic"),
    **dict.fromkeys(("dropout", "native_dropout", "bernoulli"), "dropout"),
}


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: object) -> bool:
    return is_number(value) and float(value) > 0  # type: ignore[arg-type]


def with_peak(rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The rows whose peak is known, finite and above zero."""
    return (row for row in rows if _positive(row[PEAK]))
