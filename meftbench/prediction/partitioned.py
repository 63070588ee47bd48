"""`+compile` in a trace: what a compiled region keeps for the backward pass, as torch's own partitioner decides.

torch.compile makes kernels for a device, which a trace has not. What a region keeps between forward and backward is
decided before that, by a minimum cut through the graph of both (torch/_functorch/partitioners.py), from shapes alone.
So here both graphs of that partition run operator by operator. What is held between forward and backward is that of the
compiled model. What is held within a region is more: kernels that fuse operators need not hold what these pass on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from meftbench.errors import UserError
from meftbench.methods import Applied
from meftbench.methods.levers import compiled
from meftbench.methods.levers.base import held_at

_HIDDEN = "convert all Tensors to FakeTensors"  # in torch's message about a tensor that is no argument of a graph


class _Called(nn.Module):
    """A function of modules and other arguments, as one module that has theirs."""

    def __init__(self, function: Callable[..., Any], leaves: list[Any], spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({str(n): leaf for n, leaf in enumerate(leaves) if isinstance(leaf, nn.Module)})
        self.function, self.spec = function, spec
        self.constants = [None if isinstance(leaf, Tensor | nn.Module) else leaf for leaf in leaves]

    def forward(self, tensors: dict[int, Tensor]) -> Any:
        given: dict[int, Any] = {**tensors, **{int(n): module for n, module in self.inner.items()}}
        leaves = [given.get(n, constant) for n, constant in enumerate(self.constants)]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.function(*args, **kwargs)


class Partitioned:
    """A function (of modules, tensors and constants) that keeps for backward what torch.compile would.

    budget: as of `+compile(budget=...)`; None: torch's default.
    Each set of shapes is traced at its first call, without counting; modules of one kind share the trace.
    """

    def __init__(self, function: Callable[..., Any], budget: float | None = None) -> None:
        self.function, self.budget = function, budget
        self._graphs: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.function(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        called = _Called(self.function, leaves, spec)
        own = {**dict(called.named_parameters()), **dict(called.named_buffers())}
        tensors = {n: leaf for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        key = (
            spec,
            tuple(map(_look, own.items())),
            tuple(map(_look, tensors.items())),
            torch.is_autocast_enabled("cpu"),
        )
        if key not in self._graphs:
            try:
                self._graphs[key] = _partition(called, own, tensors, self.budget)
            except AssertionError as error:
                if _HIDDEN not in str(error):
                    raise
                what = "what it compiles reads tensors that are no arguments: a cache, or tiles that run again"
                raise UserError("compile", what, "leave compile out, or measure it with --device cuda") from None
        return self._graphs[key](own, tensors)


def _look(item: tuple[Any, Tensor]) -> Any:
    name, tensor = item
    return name, tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad


def _fake_mode_of(tensors: dict[int, Tensor]) -> AbstractContextManager[object]:
    """The mode of the tensors where they are fake ones, so that what operators make without arguments is fake too."""
    modes = (tensor.fake_mode for tensor in tensors.values() if isinstance(tensor, FakeTensor))
    return next(modes, nullcontext())


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _partition(
    called: _Called, own: dict[str, Tensor], tensors: dict[int, Tensor], budget: float | None
) -> Callable[..., Any]:
    # Imported here: they take seconds.
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.compilers import nop
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def function(own: dict[str, Tensor], tensors: dict[int, Tensor]) -> Any:
        return functional_call(called, own, (tensors,))

    graphs: Callable[..., Any] = aot_function(
        function,
        fw_compiler=nop,
        bw_compiler=nop,
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table(),
    )
    limited = {} if budget is None else {"activation_memory_budget": budget}
    with (
        torch._functorch.config.patch(limited),
        _disable_current_modes(),
        _fake_mode_of(tensors),
        torch.autograd.graph.saved_tensors_hooks(_same, _same),
    ):
        graphs(own, tensors)
    return graphs


def _call_of_layer(layer: Any, *args: Any, **kwargs: Any) -> Any:
    # Layers of models that transformers cannot checkpoint have no such attribute.
    off = held_at(layer, "gradient_checkpointing", False) if hasattr(layer, "gradient_checkpointing") else nullcontext()
    with off:
        return layer._call_impl(*args, **kwargs)


def _call_checkpointed(shared: Partitioned, layer: Any, *args: Any, **kwargs: Any) -> Any:
    """`layer`, checkpointed if it is to be. transformers checkpoints inside of what is compiled, where torch.compile
    marks all that the layer computes to be run again: the same is held if it is checkpointed from outside."""
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        return layer._gradient_checkpointing_func(partial(shared, layer, **kwargs), *args)
    return shared(layer, *args, **kwargs)


@contextmanager
def partitioned_instead_of_compiled(applied: Applied) -> Iterator[None]:
    """Within it, the layers of the model and the functions that `+compile` compiles are partitioned instead."""
    layers = [module for module in applied.model.modules() if module._compiled_call_impl is not None]
    lever = applied.levers.get("compile")
    budget = lever.budget if isinstance(lever, compiled.Compile) else None
    by_kind: dict[type, Partitioned] = {}
    before = [layer._compiled_call_impl for layer in layers]
    for layer in layers:
        shared = by_kind.setdefault(type(layer), Partitioned(_call_of_layer, budget))
        layer._compiled_call_impl = partial(_call_checkpointed, shared, layer)
    token = compiled.compiler.set(Partitioned)
    try:
        yield
    finally:
        compiled.compiler.reset(token)
        for layer, call in zip(layers, before, strict=True):
            layer._compiled_call_impl = call
