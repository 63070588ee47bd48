"""Levers: memory optimisations that compose with every method by `+`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from meftbench.catalogue.settings import Settings
from meftbench.errors import UserError
from meftbench.strict_yaml import settings_of


class CheckpointSettings(Settings):
    """Which layers run again in the backward pass, and what of a layer is kept for that.

    keep: `layer_input`, or `attention`: beside it what the fused attention operator gave, so that it runs once.
    every: the first of every so many layers runs again, the others keep all that they save (transformers'
        every_n_layers, torchtitan's selective_ac_option).
    layers: only the first so many layers run again (Megatron's block recomputation); `every` counts among these.
    """

    keep: Literal["layer_input", "attention"] = "layer_input"
    every: int = Field(1, ge=1)
    layers: int | Literal["all"] = "all"


class CompileSettings(Settings):
    """budget: torch's activation_memory_budget, the share that a compiled region may save for backward of what torch
    saves by default; 0: only its inputs. None: torch's default."""

    budget: float | None = Field(None, ge=0, le=1)


@dataclass(frozen=True)
class Lever:
    """A memory optimisation (lever) that composes with any method by `+`.

    uncounted: why memory cannot be counted on a CPU where it is used; None: it can.
    adds_to_reversal: whether it saves memory beside reversal; not if it takes its place, or does what reversal does.
    settings: what can be set in brackets, as in `checkpoint(every=2)`; None: nothing. A class with settings is given
        them when it is made.
    in_forward: whether it has its effect in forward passes without gradients, too. Methods that have no backward pass
        refuse the others.
    needs_gpu: why it does not run on a CPU at all; None: it does.
    replaces: what it puts in the place of the model's own; of two levers that replace the same, one is refused.
    precisions: in which it works; None: in all.
    """

    home: str  # "module:Class", a subclass of methods.levers.base.Lever
    summary: str
    uncounted: str | None = None
    settings: type[Settings] | None = None
    adds_to_reversal: bool = True
    in_forward: bool = False
    needs_gpu: str | None = None
    replaces: str | None = None
    precisions: tuple[str, ...] | None = None


_LOSS = "the loss over the vocabulary"
_KERNELS = "its Triton kernels run on CUDA only"


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
        adds_to_reversal=False,
        settings=CheckpointSettings,
    ),
    "offload": Lever(
        "meftbench.methods.levers.offload:Offload",
        "hold what backward needs in host memory; with checkpoint: the checkpoints",
        settings=Offload,
    ),
    "tiled_mlp": Lever(
        "meftbench.methods.levers.tiled_mlp:TiledMlp",
        "run feed-forwards in tiles of tokens, again in backward; on MEFT: in the tiles of its own passes",
        in_forward=True,
        adds_to_reversal=False,
    ),
    "chunked_loss": Lever(
        "meftbench.methods.levers.chunked_loss:ChunkedLossLever",
        "cross-entropy over chunks of tokens, never the whole logits; for models that predict tokens",
        in_forward=True,
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
        in_forward=True,
        settings=CompileSettings,
    ),
    "optimizer_offload": Lever(
        "meftbench.methods.levers.optimizer_offload:OptimizerOffload",
        "hold the optimizer's states in host memory, where weights are updated, and send gradients there",
    ),
    "optimizer_in_backward": Lever(
        "meftbench.methods.levers.optimizer_in_backward:OptimizerInBackward",
        "update each weight in backward as soon as its gradient is there, and free the gradient",
    ),
    # After all levers that try layers when they are applied.
    "weight_offload": Lever(
        "meftbench.methods.levers.weight_offload:WeightOffload",
        "hold frozen weights in host memory, and bring those of two layers at a time to the device",
    ),
}

# Levers that act around the model: what to do without them in a training of one's own.
NOT_IN_A_MODEL: dict[str, str] = {
    "offload": "run forward and loss under torch.autograd.graph.save_on_cpu(pin_memory=True)",
    "optimizer_in_backward": "step an optimizer of each parameter in its register_post_accumulate_grad_hook",
    "optimizer_offload": "take an optimizer that holds its states on the host, such as torchao's CPUOffloadOptimizer",
    "weight_offload": "measure it by meftbench, or leave it out",
}


def settings_for(where: str, lever: str, given: dict[str, Any]) -> Settings:
    """The settings of a lever of LEVERS, checked. Raises UserError: one is unknown or wrong, or the lever has none."""
    schema = LEVERS[lever].settings
    if schema is None:
        raise UserError(where, f"lever {lever!r} has no settings", f"write +{lever} without brackets")
    return settings_of(where, schema, given)
