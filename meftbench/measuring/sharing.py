"""How a process (rank) of a distributed cell shares its training step with the others: by DDP, or by FSDP2.

Each rank has its own samples. The loss is the mean over all of them, so that gradients are those of one process whose
batch is that of all ranks together. Both ways are torch's own; what is done here is to apply them to a model that has a
method applied. The process group exists already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _disable_current_modes

from meftbench.backbones import layouts_of
from meftbench.catalogue.parallelisms import PARALLELISMS
from meftbench.errors import UserError, one_line
from meftbench.methods.applied import Applied
from meftbench.methods.levers.transfers import allocations_as
from meftbench.reversible import Relay, ReversibleStack

# True while DDP prepares a forward pass, when the ranks agree on the order of gradients in buckets.
preparing: ContextVar[bool] = ContextVar("preparing", default=False)


@dataclass(frozen=True)
class Rank:
    """One of the processes of a distributed cell, by its number from 0. parallelism: a name of PARALLELISMS."""

    number: int
    world_size: int
    parallelism: str

    def own(self, tensor: Tensor) -> Tensor:
        """This rank's samples of the batch of all ranks: as many of the first dimension as every other rank has."""
        return tensor.chunk(self.world_size)[self.number].clone()


class Sharing(Protocol):
    """One way to share a step.

    called: the module whose forward is the model's.
    gathering: the modules whose forward begins with gathering their weights.
    steps_to_settle: steps before those that are all alike in memory.
    """

    gathering: Sequence[nn.Module]
    steps_to_settle: int

    @property
    def called(self) -> nn.Module:
        """The module to call in place of the model."""

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        """Entered around forward and backward of a micro-batch. last: whether it is the last one of the step."""

    def begin_anew(self) -> None:
        """Drop what is held between steps and make it again, so that a counter which was entered since sees it."""


def shared(label: str, applied: Applied, rank: Rank, device: torch.device) -> Sharing:
    """Apply the cell's way to share a step to a model on its device, before its optimizer is made.

    Raises UserError: the model cannot be shared this way.
    """
    for stack in applied.stacks:
        stack.largest_of_all = partial(_largest_of_all, device)
    if rank.parallelism == "ddp":
        return Averaged(applied.model)
    return Sharded(label, applied, init_device_mesh(device.type, (rank.world_size,)))


def _largest_of_all(device: torch.device, tensor: Tensor) -> Tensor:
    """The elementwise largest of a tensor over all ranks. Its few bytes are no memory of the step."""
    with _disable_current_modes():
        largest = tensor.to(device, copy=True)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.to(tensor.device)


# --- DDP: every rank has all weights ---


class _Ddp(DistributedDataParallel):
    """DDP that says when it prepares a forward pass: the second one makes the buckets anew, in the order in which
    gradients arrived. They are memory of gradients."""

    def _pre_forward(self, *inputs: Any, **kwargs: Any) -> Any:
        token = preparing.set(True)
        try:
            with allocations_as("gradients"):
                return super()._pre_forward(*inputs, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            preparing.reset(token)


class Averaged:
    """By torch's DistributedDataParallel with its defaults: gradients are copied into buckets of 25 MiB (the first of
    1 MiB), which are averaged over the ranks as soon as they are full, and copied back."""

    steps_to_settle = PARALLELISMS["ddp"].steps_to_settle

    def __init__(self, model: nn.Module) -> None:
        self.gathering: Sequence[nn.Module] = ()
        self._model = model
        self._wrapper: _Ddp | None = None

    @property
    def called(self) -> nn.Module:
        if self._wrapper is None:
            # Every rank has made the same weights from the cell's seed, so that none are sent.
            with allocations_as("gradients"):
                self._wrapper = _Ddp(self._model, init_sync=False)
        return self._wrapper

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        """Gradients of micro-batches are summed in this rank, and averaged with those of the last one."""
        if last:
            return nullcontext()
        assert isinstance(self.called, _Ddp)
        return self.called.no_sync()

    def begin_anew(self) -> None:
        self._wrapper = None
        assert self.called is not None


# --- FSDP2: every rank has a shard of each weight ---


class Sharded:
    """By torch's fully_shard on each layer and on the whole model, with its defaults.

    A layer's weights are gathered before it computes, and given back afterwards, in forward and in backward; what is
    in no layer (embeddings, head) is gathered for the whole step. A reversible stack calls parts of its blocks and
    never a block, so that fully_shard's hooks would not be run: there the frozen weights of a block are gathered when
    the stack enters it (`_GatheredBlocks`), and its trained weights, which are few, are gathered for the whole step.
    """

    steps_to_settle = PARALLELISMS["fsdp2"].steps_to_settle

    def __init__(self, label: str, applied: Applied, mesh: DeviceMesh) -> None:
        self._model = applied.model
        self.gathering: Sequence[nn.Module] = ()
        gathered_by_stacks: set[nn.Parameter] = set()
        try:
            for layer in _layers(applied):
                if isinstance(layer, ReversibleStack):
                    blocks = _GatheredBlocks(layer, mesh)
                    applied.reference_switches.append(blocks.all_gathered)
                    gathered_by_stacks |= blocks.weights
                elif any(True for _ in layer.parameters()):
                    fully_shard(layer, mesh=mesh)
            fully_shard(applied.model, mesh=mesh, ignored_params=gathered_by_stacks)
            self.gathering = [module for module in applied.model.modules() if isinstance(module, FSDPModule)]
        except (NotImplementedError, ValueError) as error:
            what = f"fully_shard refuses the model ({one_line(error).rstrip('.')})"
            raise UserError(label, what, "take parallelism: ddp, or another method") from None

    @property
    def called(self) -> nn.Module:
        return self._model

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        """Gradients of each micro-batch are shared out at once, and summed as shards."""
        return nullcontext()

    def begin_anew(self) -> None:
        """Weights are shards from the beginning, and nothing else is held between steps."""


def _layers(applied: Applied) -> list[nn.Module]:
    """The layers of the model, and its reversible stacks in the place of those that they replace."""
    model: Any = applied.model
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # the model inside peft's wrapper
    found = [layer for layout in applied.layouts or layouts_of(model) for layer in layout.list_of(model)[2]]
    return [layer for layer in found if not isinstance(layer, Relay)]


class _Holder(nn.Module):
    """Holds a block of a stack for fully_shard, which wants a module with a forward; it is never called."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self) -> None:
        raise AssertionError("a holder of a block is never called")


class _GatheredBlocks:
    """The frozen weights of a stack's blocks, of which those of the block that computes are gathered.

    weights: the shards.
    """

    def __init__(self, stack: ReversibleStack, mesh: DeviceMesh) -> None:
        if stack.activations == "checkpoint" and len(stack.checkpointed or stack.blocks) < len(stack.blocks):
            what = "fully_shard: blocks that keep all that they save would keep their gathered weights"
            raise UserError("checkpoint", what, "checkpoint all blocks: leave `every` and `layers` out")
        self._holders: list[Any] = []
        for block in stack.blocks:
            trained = {parameter for parameter in block.parameters() if parameter.requires_grad}
            if all(parameter in trained for parameter in block.parameters()):
                self._holders.append(None)
            else:
                self._holders.append(fully_shard(_Holder(block), mesh=mesh, ignored_params=trained))
        self.weights = {
            parameter for block in stack.blocks for parameter in block.parameters() if not parameter.requires_grad
        }
        self._gathered: set[int] = set()
        self._stays = self._leaving = False
        stack.entered = self._enter
        stack.register_forward_hook(partial(_give_back, self))

    def _enter(self, number: int) -> None:
        """Block `number` computes next: its weights are gathered, and those of the others given back."""
        if self._stays:
            return
        if torch._C._current_graph_task_id() != -1:
            self._give_back_at_end()
        self.give_back(but=number)
        self._gather(number)

    def _gather(self, number: int) -> None:
        if number not in self._gathered and self._holders[number] is not None:
            with allocations_as("parameters"):
                self._holders[number].unshard()
            self._gathered.add(number)

    def give_back(self, but: int | None = None) -> None:
        """Free the gathered weights of all blocks, or of all `but` one."""
        for number in self._gathered - {but}:
            self._holders[number].reshard()
            self._gathered.discard(number)

    def _give_back_at_end(self) -> None:
        """When the backward pass that runs now has ended, no weights stay gathered."""
        if not self._leaving:
            self._leaving = True
            # As fully_shard does itself, for the outermost backward pass.
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)

    def _end_of_backward(self) -> None:
        self._leaving = False
        self.give_back()

    @contextmanager
    def all_gathered(self) -> Iterator[None]:
        """Within it, the weights of all blocks are gathered, as reference autograd needs them, which keeps them."""
        for number in range(len(self._holders)):
            self._gather(number)
        self._stays = True
        try:
            yield
        finally:
            self._stays = False
            self.give_back()


def _give_back(blocks: _GatheredBlocks, _stack: nn.Module, _arguments: Any, _output: Any) -> None:
    """The hook at the end of a stack's forward pass."""
    if not blocks._stays:
        blocks.give_back()
