"""Levers: memory optimisations that compose with every method by `+`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lever:
    """A memory optimisation (lever) that composes with any method by `+`.

    uncounted: why memory cannot be counted on a CPU where it is used; None: it can.
    in_forward: whether it has its effect in forward passes without gradients, too. Methods that have no backward pass
        refuse the others.
    """

    home: str  # "module:Class", a subclass of methods.levers.base.Lever
    summary: str
    uncounted: str | None = None
    in_forward: bool = False


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
        in_forward=True,
    ),
    "chunked_loss": Lever(
        "meftbench.methods.levers.chunked_loss:ChunkedLossLever",
        "cross-entropy over chunks of tokens, never the whole logits; for models that predict tokens",
        in_forward=True,
    ),
    "compile": Lever(
        "meftbench.methods.levers.compiled:Compile",
        "torch.compile of what layers compute; on MEFT: of its token-wise work; not on counted memory",
        uncounted="compiled code allocates where the counter of a CPU does not see it",
        in_forward=True,
    ),
}
