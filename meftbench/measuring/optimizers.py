"""Optimizers of the catalogue, for steps and for trainings; where their states are held.

Those of bitsandbytes are used as transformers' Trainer uses them: embeddings keep states of 32 bits. What differs off
CUDA is how large states of paged ones are allocated.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from meftbench.catalogue import resolve
from meftbench.catalogue.optimizers import OPTIMIZERS
from meftbench.errors import UserError
from meftbench.methods.levers.optimizer_in_backward import OptimizerPerParameter
from meftbench.methods.levers.optimizer_offload import OffloadedOptimizer
from meftbench.methods.mezo import ForwardOnly
from meftbench.plan.cell import Cell

# Arguments of torch's optimizers for a cell's `optimizer_impl`.
_IMPLEMENTATIONS: dict[str, dict[str, bool]] = {
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "loop": {"foreach": False},
}
LEARNING_RATE = 1e-4  # of measured steps: so small that random labels do not move weights far
PAGED_FROM = 100_000  # elements of a tensor from which bitsandbytes pages its states (Optimizer8bit.get_state_buffer)
# True while a state is allocated that CUDA would page: it is no memory of torch's allocator.
allocating_paged: ContextVar[bool] = ContextVar("allocating_paged", default=False)
_STATE_BITS = "meftbench_state_bits"  # attribute of a parameter: bits of its states, where they are not the optimizer's
_PAGED = "meftbench_paged"  # attribute of a state that CUDA would page; on CUDA bitsandbytes calls it is_paged


def build_optimizer(cell: Cell, parameters: list[nn.Parameter], foreach: bool | None = None) -> Optimizer:
    """The cell's optimizer of some parameters, at a small learning rate.

    foreach: torch's argument where the cell names no implementation; None: torch chooses by the device.
    Raises UserError: the package that has it is not installed.
    """
    kind, arguments = class_of(cell)
    if OPTIMIZERS[cell.optimizer].implementations and cell.optimizer_impl is None:
        arguments |= {"foreach": foreach}
    return ready(kind(parameters, lr=LEARNING_RATE, **arguments))


def class_of(cell: Cell) -> tuple[Callable[..., Optimizer], dict[str, Any]]:
    """The class of the cell's optimizer, and arguments of it beside parameters, learning rate and betas.

    Raises UserError: the package that has it is not installed.
    """
    entry = OPTIMIZERS[cell.optimizer]
    if entry.of_bitsandbytes and find_spec("bitsandbytes") is None:
        where = f"optimizer {cell.optimizer}"
        raise UserError(where, "bitsandbytes is not installed", "pip install 'meftbench[quantize]'")
    implementation = _IMPLEMENTATIONS[cell.optimizer_impl] if cell.optimizer_impl else {}
    return resolve(entry.home), {**entry.arguments, **implementation}


def note_embeddings(model: nn.Module) -> None:
    """Note in the weights of embeddings that their states have 32 bits, as Trainer has it for optimizers of 8 bits:
    rows that a batch does not use keep tiny states, which 8 bits do not resolve."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            setattr(module.weight, _STATE_BITS, 32)


def ready(optimizer: Optimizer) -> Optimizer:
    """`optimizer`; one of bitsandbytes is told of parameters with states of other sizes (see `note_embeddings`), and
    pages nothing where there is no CUDA."""
    if not type(optimizer).__module__.startswith("bitsandbytes."):
        return optimizer
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        bits = getattr(parameter, _STATE_BITS, None)
        if bits is not None:
            manager.override_config(parameter, "optim_bits", bits)
            # The manager knows parameters by their id, which another tensor may have once this one has ended.
            weakref.finalize(parameter, manager.pid2config.pop, id(parameter), None)
    if optimizer.is_paged and all(parameter.device.type != "cuda" for parameter in parameters):  # type: ignore[attr-defined]
        optimizer.get_state_buffer = _state_buffer  # type: ignore[attr-defined]
    return optimizer


def _state_buffer(parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A new state, in place of bitsandbytes' own buffer: where there is no CUDA to page it, it is only noted that CUDA
    would, so that a counter can leave it out. Smaller ones are in torch's allocator there, too."""
    if parameter.numel() < PAGED_FROM:
        return torch.zeros_like(parameter, dtype=dtype)
    token = allocating_paged.set(True)
    try:
        state = torch.zeros_like(parameter, dtype=dtype)
    finally:
        allocating_paged.reset(token)
    setattr(state, _PAGED, True)
    return state


def tables_without_values(optimizer: Optimizer, mode: FakeTensorMode) -> None:
    """Replace the tables of values that bitsandbytes' optimizers of 8 bits look up by fake tensors of `mode`."""
    for part in _parts(optimizer):
        tables: dict[str, Tensor] = getattr(part, "name2qmap", {})
        for name, table in tables.items():
            tables[name] = mode.from_tensor(table)


# --- where states are ---

Place = Literal["optimizer", "host", "paged"]


def states_of(optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor, Place]]:
    """The tensors that an optimizer keeps: the parameter that each is of, the tensor, and where it is: on the device
    (`optimizer`), in host memory, or in CUDA's unified memory (`paged`)."""
    if isinstance(optimizer, OptimizerPerParameter):
        for part in optimizer.by_parameter.values():
            yield from states_of(part)
    elif isinstance(optimizer, OffloadedOptimizer):
        yield from ((parameter, state, "host") for parameter, state, _ in states_of(optimizer.inner))
    else:
        for parameter, values in optimizer.state.items():
            for value in values.values():
                if isinstance(value, Tensor):
                    yield parameter, value, "paged" if _is_paged(value) else "optimizer"


def paged_bytes(optimizer: Optimizer) -> int | None:
    """Bytes of states in CUDA's unified memory, or that would be there on CUDA; None: the optimizer pages nothing."""
    parts = list(_parts(optimizer))
    if not any(getattr(part, "is_paged", False) for part in parts):
        return None
    return sum(state.nbytes for _, state, place in states_of(optimizer) if place == "paged")


def keeps_state(optimizer: Optimizer) -> bool:
    """Whether the first step makes states, which the steps after it find."""
    return not all(
        isinstance(part, ForwardOnly) or (isinstance(part, torch.optim.SGD) and not part.defaults["momentum"])
        for part in _parts(optimizer)
    )


def _parts(optimizer: Optimizer) -> Iterator[Optimizer]:
    """The optimizers of libraries that `optimizer` consists of."""
    if isinstance(optimizer, OptimizerPerParameter):
        for part in optimizer.by_parameter.values():
            yield from _parts(part)
    elif isinstance(optimizer, OffloadedOptimizer):
        yield from _parts(optimizer.inner)
    else:
        yield optimizer


def _is_paged(state: Tensor) -> bool:
    return getattr(state, "is_paged", False) or getattr(state, _PAGED, False)
