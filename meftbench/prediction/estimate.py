"""The prediction of one cell: its memory, compared with that of its card, and the time of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from meftbench.catalogue.operations import Work
from meftbench.catalogue.profiles import CpuProfile, find_device
from meftbench.catalogue.speeds import Speeds
from meftbench.catalogue.versions import Versions
from meftbench.measuring.build import attention_used
from meftbench.plan.cell import Cell
from meftbench.plan.factories import OWN_ATTENTION
from meftbench.prediction.allocator import AllocatorSettings
from meftbench.prediction.on_cpu import trace_on_cpu
from meftbench.prediction.predict import predict
from meftbench.prediction.seconds import missing_rate, step_time
from meftbench.probes.host_memory import host_peak
from meftbench.records.record import Metric


def estimate(request: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """Memory and step time of one cell. request: `cell`; `profile`, a name; `allocator`, as PYTORCH_ALLOC_CONF has it;
    `versions`, as Versions.parse reads them.

    The answer has the `metrics` of a predicted cell's record, and of its `observed` the attention, for the step with
    the highest peak, which is the first or a later one; `alloc_retries` is how often torch must give back its cached
    memory on this card. Beside them: `fits`, whether the card has enough memory; `activation_peak_bytes` of the last
    step; `kernels`, those of attention; `time` (see `time_of`). Where the profile is that of a CPU, memory is that of
    the tensors, and no allocator is replayed.
    """
    cell, profile = Cell.model_validate(request["cell"]), find_device(request["profile"])
    if isinstance(profile, CpuProfile):
        return _on_cpu(cell, profile, tell)
    settings = AllocatorSettings.parse(request["allocator"])
    tell(f"predicting {cell.label} on {profile.device}")
    predicted = predict(cell, profile, settings=settings, versions=Versions.parse(request["versions"]))
    on_card = predicted.replayed_in(replace(settings, capacity=profile.memory_bytes - profile.context_bytes))
    # The first step has the highest peak where the optimizer then allocates temporaries that later steps do not.
    peaks = [step.peak.allocated for step in predicted.replayed.steps]
    highest = peaks.index(max(peaks))
    metrics = predicted.metrics(highest, highest)
    reserved = predicted.replayed.reserved_peak
    metrics["peak_reserved_bytes"] = Metric(reserved, "predicted")  # over all steps: nothing is given back between them
    metrics |= {"alloc_retries": Metric(on_card.retries, "predicted"), "host_rss_peak_bytes": host_peak()}
    return {
        "metrics": {name: metric.to_json(name) for name, metric in metrics.items()},
        "observed": {"attention_used": attention_used(cell, predicted.attention)},
        "fits": on_card.oom is None,
        "activation_peak_bytes": predicted.replayed.steps[-1].activation_peak,
        "kernels": _kernels(cell, predicted.attention),
        "time": time_of(predicted.work, profile.speeds, predicted.tokens, _no_time(cell)),
    }


def _no_time(cell: Cell) -> str | None:
    """Why the time of a cell's step is not predicted; None: it is."""
    return None if cell.parallelism is None else "what ranks send each other takes a time that is not predicted"


def _on_cpu(cell: Cell, profile: CpuProfile, tell: Callable[[str], None]) -> dict[str, Any]:
    """The answer for a CPU: what a trace by its operators counts."""
    tell(f"predicting {cell.label} on {profile.device}")
    traced = trace_on_cpu(cell)
    metrics = traced.metrics | {"passes_s": Metric(traced.seconds, "measured"), "host_rss_peak_bytes": host_peak()}
    return {
        "metrics": {name: metric.to_json(name) for name, metric in metrics.items()},
        "observed": {"attention_used": attention_used(cell, traced.attention)},
        "fits": traced.observed[-1].peak.total <= profile.memory_bytes,
        "activation_peak_bytes": traced.observed[-1].activation_peak,
        "kernels": _kernels(cell, traced.attention),
        "time": time_of(traced.work, profile.speeds, traced.tokens, _no_time(cell)),
    }


def time_of(work: Work, speeds: Speeds | None, tokens: int, absent: str | None = None) -> dict[str, Any]:
    """What a step costs: `recomputed_flops_share` and `host_transfer_bytes`, known for every device; `step_s`,
    `tokens_per_s`, `time_parts` (seconds, which add up to `step_s`) and `recomputed_s` where its speeds are known, else
    None, with the reason in `time_absent`. absent: such a reason that holds whatever the speeds."""
    cost = {
        "recomputed_flops_share": work.recomputed_flops_share,
        "host_transfer_bytes": work.host_transfer_bytes,
        "flops": work.flops,
    }
    dtype = None if speeds is None else missing_rate(work, speeds)
    if speeds is None or dtype is not None:
        absent = absent or (f"the profile has no speed for {dtype}" if dtype else "the profile has no speeds")
    if speeds is None or absent is not None:
        return cost | dict.fromkeys(("step_s", "tokens_per_s", "time_parts", "recomputed_s")) | {"time_absent": absent}
    time = step_time(work, speeds)
    answer = {"step_s": time.step_s, "tokens_per_s": tokens / time.step_s, "time_parts": time.parts}
    return cost | answer | {"recomputed_s": time.recomputed_s, "time_absent": None}


def _kernels(cell: Cell, operators: set[str]) -> list[str]:
    """Attention kernels, such as `flash`; `math` where no fused operator ran, `eager` where the cell asks for none."""
    if cell.attention_requested not in ("sdpa", OWN_ATTENTION):
        return ["eager"]
    names = (name.removeprefix("scaled_dot_product_").removesuffix("_attention") for name in operators)
    return sorted(names) or ["math"]
