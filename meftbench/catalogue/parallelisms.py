"""How the processes (ranks) of a distributed cell share one training step, and what each way does not go together with.

A way refuses what it would do wrongly, and what was never tried with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_UNTRIED = "was never tried in several processes"


@dataclass(frozen=True)
class Parallelism:
    """One way to share a step.

    refused_levers: why a lever of LEVERS is refused, by its name.  precisions, optimizers: those that are refused,
        likewise.
    steps_to_settle: steps before those that are all alike in memory.
    """

    summary: str
    steps_to_settle: int = 1
    refused_levers: Mapping[str, str] = field(default_factory=dict)
    refused_precisions: Mapping[str, str] = field(default_factory=dict)
    refused_optimizers: Mapping[str, str] = field(default_factory=dict)


_WHOLE_WEIGHTS = "computes on whole weights, and a rank holds shards of them"

PARALLELISMS: dict[str, Parallelism] = {
    "ddp": Parallelism(
        "torch's DistributedDataParallel: each rank holds the whole model, gradients are averaged in buckets",
        steps_to_settle=2,  # the second one makes the buckets anew
        refused_levers={
            "optimizer_in_backward": "takes a gradient before it is averaged over the ranks",
            **dict.fromkeys(("liger_loss", "cut_loss", "compile", "optimizer_offload", "weight_offload"), _UNTRIED),
        },
    ),
    "fsdp2": Parallelism(
        "torch's fully_shard: weights, gradients and optimizer states are shared out, and a layer's weights are "
        "gathered while it computes",
        refused_levers={
            "offload": "would copy gathered weights to the host, which autograd saves",
            "weight_offload": "and fully_shard both decide where frozen weights are",
            **dict.fromkeys(("liger_loss", "cut_loss", "compile", "optimizer_offload"), _UNTRIED),
        },
        refused_precisions={
            "nf4": "a shard of a 4-bit weight has no statistics of its own",
            "fp16-autocast": "a rank would scale its loss without knowing of the other ranks' overflows",
        },
        refused_optimizers={
            **dict.fromkeys(
                ("adamw-8bit", "paged-adamw", "paged-adamw-8bit", "lion", "lion-8bit"),
                "its kernels take no sharded tensors",
            ),
            "adafactor": _WHOLE_WEIGHTS,
        },
    ),
}
