"""The autograd function of a ReversibleStack: forward keeps the last streams, backward walks back from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from meftbench.reversible.notes import Context, Notes
from meftbench.reversible.passes import Walk
from meftbench.reversible.placed import Kept

if TYPE_CHECKING:
    from meftbench.reversible.stack import ReversibleStack


@dataclass
class Passage:
    """What goes from one node of the pair below to the other, past the autograd engine.

    context: what the layers are called with.  notes: of the forward pass, once it has run.
    kept: the graph that the walk back begins with, if forward kept one.
    streams: in forward, from Reversal to Finish.  gradients: in backward, from Finish to Reversal.
    """

    stack: ReversibleStack
    context: Context
    notes: Notes | None = None
    kept: Kept | None = None
    streams: list[Tensor] | None = None
    gradients: list[Tensor | None] | None = None


class Finish(torch.autograd.Function):
    """The hidden state (B, L, D) from the last two streams. `token` stands for them in the graph.

    A node of its own because the engine holds the gradient that a node is given until its backward returns: in
    one node with the walk, a stream-sized buffer would live through the whole walk for nothing.
    """

    @staticmethod
    def forward(ctx: Any, passage: Passage, token: Tensor) -> Tensor:
        ctx.passage = passage
        ctx.save_for_backward(token)
        assert passage.streams is not None
        assert passage.notes is not None
        streams, passage.streams = passage.streams, None
        return passage.stack.finish(streams, passage.notes.dtype, passage.notes.arithmetic)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_BLD: Tensor) -> tuple[None, Tensor]:
        (token,) = ctx.saved_tensors
        ctx.passage.gradients = ctx.passage.stack.gradients_of_streams(dh_BLD)
        return None, torch.zeros_like(token)


class Reversal(torch.autograd.Function):
    """h, and everything trained, to the last two streams. Inputs: passage, count of trained tensors, h, the
    context's differentiable tensors, the trained tensors. Gradients are returned once, never accumulated by a
    backward inside: hooks (DDP, GradScaler, user's) see one gradient a parameter (docs/design.md 5).

    The output is a token without content, to be given to `Finish`.
    """

    @staticmethod
    def forward(ctx: Any, passage: Passage, trained: int, h_BLD: Tensor, *tensors: Tensor) -> Tensor:
        ctx.passage, ctx.trained = passage, tensors[len(tensors) - trained :]
        passage.context.differentiable = []  # inputs of this node; a second reference would keep their graph
        streams, passage.notes, passage.kept = passage.stack.run(h_BLD, passage.context, keep=True)
        notes = passage.notes
        if notes.range:
            notes.range.begin_copy()
        ctx.save_for_backward(*streams, *notes.sides)
        notes.sides = []
        passage.streams = streams
        return h_BLD.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # kept only if the graph is retained
        streams, sides = saved[:2], saved[2:]
        if _retained(ctx):
            streams = [stream.clone() for stream in streams]  # the walk restores in place
        del saved
        passage: Passage = ctx.passage
        assert passage.gradients is not None
        assert passage.notes is not None
        walk = Walk(passage.stack, passage.notes, streams, passage.gradients, passage.kept)
        passage.gradients = passage.kept = None  # a second walk, if the graph is retained, recomputes all
        del streams
        walk.run(sides)
        dh0_BLD = None
        if ctx.needs_input_grad[2]:
            first, second = walk.gradients
            dh0_BLD = second if first is None else first if second is None else first.add_(second)
        return (None, None, dh0_BLD, *walk.of_context, *walk.of_trained.of(ctx.trained))


def _retained(ctx: Any) -> bool:
    try:
        return len(ctx.saved_tensors) > 0
    except RuntimeError:  # "backward through the graph a second time": they have been freed
        return False
