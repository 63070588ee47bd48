"""Levers: memory optimisations that compose with every method by `+`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from meftbench.catalogue.settings import Settings
from meftbench.errors import UserError
from meftbench.strict_yaml import settings_of


@dataclass(frozen=True)
class Lever:
    """A memory optimisation (lever) that composes with any method by `+`.

    uncounted: why memory cannot be counted on a CPU where it is used; None: it can.
    settings: what can be set in brackets, as in `checkpoint(every=2)`; None: nothing. A class with settings is given
        them when it is made.
    """

    home: str  # "module:Class", a subclass of methods.levers.base.Lever
    summary: str
    uncounted: str | None = None
    settings: type[Settings] | None = None


class Offload(Settings):
    """Hold what the backward pass needs in host memory; copies to the host and back run beside the computation.

    what: "all" saved tensors; or "checkpoints", those from which something is recomputed: the inputs of checkpointed
        layers, and the last streams and side information of reversible stacks.
    minimum_bytes: smaller tensors stay on the device.
    in_flight: tensors whose copies to the host may be under way before computation waits for the first of them; in the
        backward pass, one fewer are brought back before they are needed. 1: no copy runs beside the computation.
    """

    what: Literal["all", "checkpoints"] = "all"
    minimum_bytes: int = Field(1024, ge=1)  # as torchtune's and TRL's OffloadActivations
    in_flight: int = Field(2, ge=1)


LEVERS: dict[str, Lever] = {
    "checkpoint": Lever(
        "meftbench.methods.levers.checkpoint:Checkpoint",
        "keep only layer inputs and run each layer again in backward (non-reentrant); on MEFT: instead of reversal",
    ),
    "offload": Lever(
        "meftbench.methods.levers.offload:Offload",
        "hold what backward needs in host memory; with checkpoint: the checkpoints",
        settings=Offload,
    ),
    "tiled_mlp": Lever(
        "meftbench.methods.levers.tiled_mlp:TiledMlp",
        "run feed-forwards in tiles of tokens, again in backward; on MEFT: in the tiles of its own passes",
    ),
    "chunked_loss": Lever(
        "meftbench.methods.levers.chunked_loss:ChunkedLossLever",
        "cross-entropy over chunks of tokens, never the whole logits; for models that predict tokens",
    ),
    "compile": Lever(
        "meftbench.methods.levers.compiled:Compile",
        "torch.compile of what layers compute; on MEFT: of its token-wise work; not on counted memory",
        uncounted="compiled code allocates where the counter of a CPU does not see it",
    ),
    # After all levers that try layers when they are applied.
    "weight_offload": Lever(
        "meftbench.methods.levers.weight_offload:WeightOffload",
        "hold frozen weights in host memory, and bring those of two layers at a time to the device",
    ),
}


def settings_for(where: str, lever: str, given: dict[str, Any]) -> Settings:
    """The settings of a lever of LEVERS, checked. Raises UserError: one is unknown or wrong, or the lever has none."""
    schema = LEVERS[lever].settings
    if schema is None:
        raise UserError(where, f"lever {lever!r} has no settings", f"write +{lever} without brackets")
    return settings_of(where, schema, given)


def check_together(where: str, method: str, levers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UserError: a lever has nothing to act on with this method, or excludes another.

    levers: those that are on, each with its settings that differ from the defaults.
    """
    for lever in ("offload", "weight_offload"):
        if lever in levers and "compile" in levers:
            what = f"{lever} follows tensors that layers save and read one by one, which compiled code does not show"
            raise UserError(where, what, "leave compile out")
    if "weight_offload" in levers and method == "full":
        raise UserError(where, "full has no frozen weights to hold on the host", "leave weight_offload out")
    recomputes = "checkpoint" in levers or method.startswith("meft")
    if levers.get("offload", {}).get("what") == "checkpoints" and not recomputes:
        what = "nothing is recomputed, so that there are no checkpoints to offload"
        raise UserError(where, what, "add checkpoint, or write offload(what=all)")
