"""Which module of a model runs: in the forward pass, in the backward pass, and where backward runs forward again.

Forward hooks tell when a module's forward begins and ends. The backward pass calls no module. But autograd numbers its
nodes in the order in which forward makes them, so that the node that runs tells by its number in whose forward it was
made. No hook is put on a tensor, and nothing is kept but names and numbers: the graph and its lifetimes stay as they
are.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

from torch import nn
from torch._C import _current_autograd_node, _current_graph_task_id
from torch._C._autograd import _get_sequence_nr
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

_NO_TASK = -1  # of `_current_graph_task_id`: no backward pass runs
_UNNUMBERED = 2**64 - 1  # the number of all nodes that put a gradient into its parameter


def module_paths(model: nn.Module) -> dict[int, str]:
    """The path of each module in `model` by its id, as in `named_modules`; "" is the model itself. Numbers of repeated
    layers are joined: `encoder.layer.*.attention`. A module that stands in several places has the first of them."""
    paths: dict[int, str] = {}

    def walk(module: nn.Module, path: str) -> None:
        if id(module) in paths:
            return
        paths[id(module)] = path
        numbered = [child for name, child in module._modules.items() if name.isdecimal()]
        alike = isinstance(module, nn.ModuleList) or len({type(child) for child in numbered}) == 1
        for name, child in module._modules.items():
            if child is not None:
                part = "*" if name.isdecimal() and alike and len(numbered) > 1 else name
                walk(child, f"{path}.{part}" if path else part)

    walk(model, "")
    return paths


def owners(model: nn.Module) -> dict[int, str]:
    """The path of the module that owns each parameter and buffer of `model`, by the tensor's id; of the first, where
    modules share it."""
    paths = module_paths(model)
    found: dict[int, str] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    found.setdefault(id(tensor), paths[id(module)])
    return found


@dataclass
class _Made:
    """By which modules a thread makes nodes. starts: numbers of nodes, rising.  makers: in whose forward the nodes from
    that number on are made.  task: the backward pass in which the thread last ran a module's forward."""

    starts: list[int] = field(default_factory=list)
    makers: list[str | None] = field(default_factory=list)
    task: int = _NO_TASK

    def maker(self, number: int) -> str | None:
        place = bisect_right(self.starts, number)
        return self.makers[place - 1] if place else None


class ModulesRunning:
    """Knows, while it is entered, which module of `model` runs: see `path`. One such object may be entered at a time.

    owner_of: paths of the modules that own parameters and buffers, by the tensor's id.
    """

    def __init__(self, model: nn.Module) -> None:
        self.owner_of = owners(model)
        self._paths = module_paths(model)
        self._running: list[tuple[int, str | None, int]] = []  # id of the module, path, backward pass that it runs in
        self._main = _Made()  # of the thread in which the step runs
        self._made: dict[int, _Made] = {}  # by thread: the backward pass of a GPU has one of its own, with its numbers
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        self.forget()
        self._hooks.callback(register_module_forward_pre_hook(self._begins).remove)
        # Always called: the forward that a checkpoint runs again ends by an exception once all is there that it needs.
        self._hooks.callback(register_module_forward_hook(self._ends, always_call=True).remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()
        self.forget()

    def forget(self) -> None:
        """A forward pass begins: nodes of those before are not run any more."""
        self._running.clear()
        self._main = _Made()
        self._made = {threading.get_ident(): self._main}

    def path(self) -> str | None:
        """The path of the innermost module whose forward runs, or to whose forward the node of the backward pass
        belongs that runs; where a node runs a module's forward again, that module. None: no module of the model."""
        task = _current_graph_task_id()
        innermost = self._running[-1] if self._running else None
        if innermost is not None and innermost[2] == task:
            return innermost[1]
        node = _current_autograd_node() if task != _NO_TASK else None
        if node is None:
            return innermost[1] if innermost is not None else None
        number = node._sequence_nr()
        if number == _UNNUMBERED:
            return self.owner_of.get(id(getattr(node, "variable", None)))
        return self._of_graph(task).maker(number)

    def _of_graph(self, task: int) -> _Made:
        """What made the graph that a backward pass goes through. A pass within another one goes through what that has
        run forward, in the thread of both; any other through what was made where the step runs."""
        here = self._made.get(threading.get_ident())
        if here is not None and _NO_TASK < here.task < task:
            return here
        return self._main

    def _begins(self, module: nn.Module, _args: Any) -> None:
        task = _current_graph_task_id()
        path = self._paths[id(module)] if id(module) in self._paths else self.path()
        self._running.append((id(module), path, task))
        self._note(path, task)

    def _ends(self, module: nn.Module, _args: Any, _result: Any) -> None:
        while self._running and self._running.pop()[0] != id(module):
            pass  # torch calls no hook at the end of a module whose forward raised
        self._note(self.path(), _current_graph_task_id())

    def _note(self, path: str | None, task: int) -> None:
        """Nodes that are made from here on are made by the module at `path`."""
        made = self._main if task == _NO_TASK else self._made.setdefault(threading.get_ident(), _Made())
        made.starts.append(_get_sequence_nr())
        made.makers.append(path)
        made.task = task
