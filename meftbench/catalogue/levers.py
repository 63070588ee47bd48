"""Levers: memory optimisations that compose with every method by `+`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meftbench.catalogue.settings import Settings
from meftbench.errors import UserError
from meftbench.strict_yaml import settings_of


@dataclass(frozen=True)
class Lever:
    """A memory optimisation (lever) that composes with any method by `+`.

    uncounted: why memory cannot be counted on a CPU where it is used; None: it can.
    instead_of_reversal: whether it takes the place of reversal, and so adds nothing to a reversible method.
    settings: what can be set in brackets, as in `checkpoint(every=2)`; None: nothing. A class with settings is given
        them when it is made.
    in_forward: whether it has its effect in forward passes without gradients, too. Methods that have no backward pass
        refuse the others.
    """

    home: str  # "module:Class", a subclass of methods.levers.base.Lever
    summary: str
    uncounted: str | None = None
    settings: type[Settings] | None = None
    instead_of_reversal: bool = False
    in_forward: bool = False


LEVERS: dict[str, Lever] = {
    "checkpoint": Lever(
        "meftbench.methods.levers.checkpoint:Checkpoint",
        "keep only layer inputs and run each layer again in backward (non-reentrant); on MEFT: instead of reversal",
        instead_of_reversal=True,
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
    "optimizer_offload": Lever(
        "meftbench.methods.levers.optimizer_offload:OptimizerOffload",
        "hold the optimizer's states in host memory, where weights are updated, and send gradients there",
    ),
    "optimizer_in_backward": Lever(
        "meftbench.methods.levers.optimizer_in_backward:OptimizerInBackward",
        "update each weight in backward as soon as its gradient is there, and free the gradient",
    ),
}


def settings_for(where: str, lever: str, given: dict[str, Any]) -> Settings:
    """The settings of a lever of LEVERS, checked. Raises UserError: one is unknown or wrong, or the lever has none."""
    schema = LEVERS[lever].settings
    if schema is None:
        raise UserError(where, f"lever {lever!r} has no settings", f"write +{lever} without brackets")
    return settings_of(where, schema, given)
