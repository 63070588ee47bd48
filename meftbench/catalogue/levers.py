"""Levers: memory optimisations that compose with every method by `+`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Lever:
    """A memory optimisation (lever) that composes with any method by `+`.

    uncounted: why memory cannot be counted on a CPU where it is used; None: it can.
    needs_gpu: why it does not run on a CPU at all; None: it does.
    replaces: what it puts in the place of the model's own; of two levers that replace the same, one is refused.
    precisions: in which it works; None: in all.
    """

    home: str  # "module:Class", a subclass of methods.levers.base.Lever
    summary: str
    uncounted: str | None = None
    needs_gpu: str | None = None
    replaces: str | None = None
    precisions: tuple[str, ...] | None = None


_LOSS = "the loss over the vocabulary"
_KERNELS = "its Triton kernels run on CUDA only"


LEVERS: dict[str, Lever] = {
    "checkpoint": Lever(
        "meftbench.methods.levers.checkpoint:Checkpoint",
        "keep only layer inputs and run each layer again in backward (non-reentrant); on MEFT: instead of reversal",
    ),
    "offload": Lever(
        "meftbench.methods.levers.offload:Offload",
        "hold what backward needs in host memory; with checkpoint: the checkpoints",
    ),
    "tiled_mlp": Lever(
        "meftbench.methods.levers.tiled_mlp:TiledMlp",
        "run feed-forwards in tiles of tokens, again in backward; on MEFT: in the tiles of its own passes",
    ),
    "chunked_loss": Lever(
        "meftbench.methods.levers.chunked_loss:ChunkedLossLever",
        "cross-entropy over chunks of tokens, never the whole logits; for models that predict tokens",
        replaces=_LOSS,
    ),
    "liger_loss": Lever(
        "meftbench.methods.levers.fused_loss:LigerLossLever",
        "Liger's fused linear cross-entropy: logits in chunks, gradients in forward; on CUDA",
        needs_gpu=_KERNELS,
        replaces=_LOSS,
    ),
    "cut_loss": Lever(
        "meftbench.methods.levers.fused_loss:CutLossLever",
        "cut cross-entropy: logits never leave the kernel; on CUDA, in 16 bits",
        needs_gpu=_KERNELS,
        replaces=_LOSS,
        precisions=("bf16", "bf16-autocast", "fp16-autocast", "nf4"),
    ),
    "compile": Lever(
        "meftbench.methods.levers.compiled:Compile",
        "torch.compile of what layers compute; on MEFT: of its token-wise work; not on counted memory",
        uncounted="compiled code allocates where the counter of a CPU does not see it",
    ),
}


def exclude_each_other(levers: Iterable[str]) -> str | None:
    """A sentence on two of `levers` that replace the same part of the model; None: no two do."""
    replacing: dict[str, str] = {}
    for name in levers:
        part = LEVERS[name].replaces
        if part is not None and replacing.setdefault(part, name) != name:
            return f"{replacing[part]} and {name} both replace {part}"
    return None
