"""What the search of `meftbench plan` answers, made up: rows with defaults, and a stand-in that answers a request."""

from __future__ import annotations

from typing import Any

from meftbench.plan.cell import Cell
from meftbench.report.views.plan_answer import as_plan

GiB = 2**30
CONTEXT = GiB // 2


def a_row(method: str = "lora", **fields: Any) -> dict[str, Any]:
    """A row of 6 GiB at micro-batch 4, 3 GiB at micro-batch 1, each without the context of half a GiB."""
    reserved = fields.get("peak_reserved_bytes", 6 * GiB)
    row = {
        "method": method,
        "parts": Cell.of(method, model="bert-base@random", batch_size=1, sequence_length=1).recorded()["parts"],
        "precision": "bf16",
        "optimizer": "adamw",
        "micro_batch_size": 4,
        "sequence_length": 512,
        "peak_allocated_bytes": reserved - GiB // 4,
        "peak_reserved_bytes": reserved,
        "process_device_bytes": reserved + CONTEXT,
        "breakdown": {"parameters": 2 * GiB, "activations": reserved - 9 * GiB // 4},
        "parameters_trainable": 1000,
        "smallest_reserved_bytes": min(3 * GiB, reserved),
        "step_s": None,
        "tokens_per_s": None,
        "recomputed_flops_share": 0.0,
        "host_transfer_bytes": 0,
        "relative_cost": 1.0,
        "retries": 0,
        "verified": True,
        "capacity_index": 0,
    }
    return row | fields


def too_large(method: str, needed: int, **fields: Any) -> dict[str, Any]:
    """A row that does not fit: `needed` bytes at micro-batch 1, context included."""
    reserved = needed - CONTEXT
    return a_row(method, micro_batch_size=1, peak_reserved_bytes=reserved, smallest_reserved_bytes=reserved, **fields)


def about(**fields: Any) -> dict[str, Any]:
    """What was asked: Qwen2.5-1.5B on a card of 8 GiB, and of 16 GiB."""
    return {
        "model": "qwen2.5-1.5b@random",
        "model_name": "qwen2.5-1.5b@random",
        "config": {},
        "head": "causal_lm",
        "options": {},
        "profile": "rtx4090",
        "profile_name": "rtx4090",
        "device": "a card",
        "verified": False,
        "validation": "not validated",
        "rules": "torch 2.13",
        "context_bytes": CONTEXT,
        "default_profile": False,
        "cards": [8 * GiB, 16 * GiB],
        "sequence_length": 512,
        "batch_size": None,
        "precisions": ["bf16"],
        "optimizer": "adamw",
        "explained": False,
        "map": None,
        "refused": {},
        "candidates": 9,
        "traced": 20,
        "predict_s": 3.0,
    } | fields


def a_plan(
    *rows: dict[str, Any], only_for_pairs: Any = (), price: Any = None, needs: bool = False, **fields: Any
) -> Any:
    """The answer of rows."""
    return as_plan(about(**fields), rows, only_for_pairs, price, needs)


def answering(request: dict[str, Any], timed: bool = True) -> dict[str, Any]:
    """An answer to a request: a micro-batch takes 2 GiB, levers and reversal save half of it, and cost a third."""
    rows = []
    for index, capacity in enumerate(request["capacities"]):
        for content in request["cells"]:
            cell = Cell(**{name: value for name, value in content.items() if name != "explain"})
            saving = len(cell.levers.names()) + cell.method.startswith("meft")
            fixed, each = GiB, 2 * GiB // 2**saving
            micro = max(0, (capacity - fixed) // each)
            cost = 1 + saving / 3
            row = a_row(
                cell.method_label,
                precision=cell.precision,
                optimizer=cell.optimizer,
                micro_batch_size=micro,
                peak_reserved_bytes=fixed + each * max(1, micro),
                sequence_length=request["sequence_length"],
                relative_cost=cost,
                tokens_per_s=900 / cost if timed else None,
                capacity_index=index,
            )
            rows.append(row | {"smallest_reserved_bytes": fixed + each})
    grid = {"batch_sizes": [1, 2], "lengths": [256, 512], "process_device_bytes": [[GiB, 2 * GiB], [2 * GiB, 9 * GiB]]}
    return {"seconds": 2.0, "traced": 7, "rows": rows, "refused": {}, "map": grid if request["map"] else None}
