"""Modules that read a sublayer's input directly hand its gradient straight to the stream's gradient.

Autograd would hold the gradients from queries, keys and values side by side before it adds them up: two stream-sized
buffers at the moment when memory is scarcest. A module with this hook passes its own on at once instead.
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
    """Graphs built inside give `sink` the gradients of what forked modules read, one after the other."""
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
    @staticmethod
    def forward(ctx: Any, h_BLD: Tensor, sink: Sink) -> Tensor:
        ctx.sink = sink
        return h_BLD.view_as(h_BLD)

    @staticmethod
    def backward(ctx: Any, dh_BLD: Tensor) -> tuple[None, None]:
        ctx.sink(dh_BLD)
        return None, None
