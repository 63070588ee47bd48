"""Modules that read a sublayer's input directly add their gradient to the stream's gradient at once.

Autograd would hold the gradients from queries, keys and values side by side before it adds them up: two stream-sized
buffers at the moment when memory is scarcest. A module with the pre-hook `fork` passes its own on as soon as it is
computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

Sink = Callable[[Tensor], None]
_sink: ContextVar[Sink | None] = ContextVar("_sink", default=None)


@contextmanager
def gathered_in(sink: Sink) -> Iterator[None]:
    """Graphs built inside pass the gradients of what modules with the hook `fork` read to `sink`, one by one."""
    token = _sink.set(sink)
    try:
        yield
    finally:
        _sink.reset(token)


def fork(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Forward pre-hook for a module whose first argument is the sublayer's input (B, L, D) itself, not a function
    of it."""
    sink = _sink.get()
    if sink is None or not args[0].requires_grad:
        return None
    return (_Fork.apply(args[0], sink), *args[1:])  # type: ignore[no-untyped-call]


class _Fork(torch.autograd.Function):
    """h unchanged; its gradient goes to `sink` and not further along the graph."""

    @staticmethod
    def forward(ctx: Any, h_BLD: Tensor, sink: Sink) -> Tensor:
        ctx.sink = sink
        return h_BLD.view_as(h_BLD)

    @staticmethod
    def backward(ctx: Any, dh_BLD: Tensor) -> tuple[None, None]:
        ctx.sink(dh_BLD)
        return None, None
