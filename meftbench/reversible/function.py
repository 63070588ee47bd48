"""The autograd function of a ReversibleStack: forward keeps the last streams, backward recomputes from them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from meftbench.reversible.passes import BackwardPass
from meftbench.reversible.placed import Kept
from meftbench.reversible.saved_state import Context, SavedState

if TYPE_CHECKING:
    from meftbench.reversible.stack import ReversibleStack


@dataclass
class Passage:
    """What the two autograd nodes below hand to each other outside of the autograd engine.

    context: what the layers are called with beside h.  saved: the saved state, once the forward pass has run.
    kept: the graph that the backward pass begins with, if the forward pass kept one.
    streams: in forward, from Reversal to Finish.  gradients: in backward, from Finish to Reversal.
    """

    stack: ReversibleStack
    context: Context
    saved: SavedState | None = None
    kept: Kept | None = None
    streams: list[Tensor] | None = None
    gradients: list[Tensor | None] | None = None


class Finish(torch.autograd.Function):
    """The hidden state (B, L, D) from the last two streams. `token` stands for them in the graph.

    It is a node of its own because the engine holds the gradient that a node receives until its backward returns: if
    one node did both, a stream-sized buffer that is no longer needed would live through the whole backward pass.
    """

    @staticmethod
    def forward(ctx: Any, passage: Passage, token: Tensor) -> Tensor:
        ctx.passage = passage
        ctx.save_for_backward(token)
        assert passage.streams is not None
        assert passage.saved is not None
        streams, passage.streams = passage.streams, None
        return passage.stack.finish(streams, passage.saved.dtype, passage.saved.arithmetic)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_BLD: Tensor) -> tuple[None, Tensor]:
        (token,) = ctx.saved_tensors
        ctx.passage.gradients = ctx.passage.stack.gradients_of_streams(dh_BLD)
        return None, torch.zeros_like(token)


class Reversal(torch.autograd.Function):
    """From h and all trained tensors to the last two streams, and to what the sublayers pass on (taps.py). Inputs:
    passage, number of trained tensors, h, the context's differentiable tensors, the trained tensors. Each gradient is
    returned once, never accumulated by a backward call inside, so that hooks (of DDP, GradScaler, users) see one
    gradient per parameter (docs/design.md 5).

    The first output is an empty token, to be given to `Finish`; the streams go by `passage`. The others are what was
    tapped (B·L, X), where somebody asks for it, in the order of forward.
    """

    @staticmethod
    def forward(ctx: Any, passage: Passage, trained_count: int, h_BLD: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.passage, ctx.trained = passage, tensors[len(tensors) - trained_count :]
        passage.context.differentiable = []  # they are this node's inputs; a second reference would keep their graph
        streams, passage.saved, passage.kept = passage.stack.run(h_BLD, passage.context, keep=True)
        saved = passage.saved
        if saved.range:
            saved.range.begin_copy()
        # What a side memory gave is no tensor, and goes to backward by the context alone.
        ctx.save_for_backward(*streams, *(side if isinstance(side, Tensor) else None for side in saved.sides))
        ctx.sides = [None if isinstance(side, Tensor) else side for side in saved.sides]
        saved.sides = []
        passage.streams = streams
        # They are this node's outputs; a reference from the saved state would be a cycle, freed only by gc.
        tapped, saved.tapped = saved.tapped, []
        ctx.tapped_counts = [len(of_sublayer) for of_sublayer in tapped]
        return h_BLD.new_empty(0), *itertools.chain.from_iterable(tapped)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, *of_tapped: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # kept only if the graph is retained
        streams = saved[:2]
        sides = [tensor if held is None else held for tensor, held in zip(saved[2:], ctx.sides, strict=True)]
        if _retained(ctx):
            streams = [stream.clone() for stream in streams]  # the backward pass overwrites them
        else:
            ctx.sides = []
        del saved
        passage: Passage = ctx.passage
        assert passage.saved is not None
        remaining = iter(of_tapped)
        backward_pass = BackwardPass(
            passage.stack,
            passage.saved,
            streams,
            # None where only what was tapped has a gradient.
            passage.gradients or [None, None],
            [list(itertools.islice(remaining, count)) for count in ctx.tapped_counts],
            passage.kept,
        )
        passage.gradients = passage.kept = None  # if the graph is retained, a second backward pass recomputes all
        del streams
        backward_pass.run(sides)
        dh0_BLD = None
        if ctx.needs_input_grad[2]:
            first_BLD, second_BLD = backward_pass.gradients
            dh0_BLD = (
                second_BLD if first_BLD is None else first_BLD if second_BLD is None else first_BLD.add_(second_BLD)
            )
        return (None, None, dh0_BLD, *backward_pass.of_context, *backward_pass.of_trained.of(ctx.trained))


def _retained(ctx: Any) -> bool:
    """Whether the graph is retained for another backward, so that the saved tensors were not freed."""
    try:
        return len(ctx.saved_tensors) > 0
    except RuntimeError:  # torch's "backward through the graph a second time": they were freed
        return False
