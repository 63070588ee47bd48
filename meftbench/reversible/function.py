"""The autograd function of a ReversibleStack: forward keeps the last streams, backward walks back from them.

One walk serves all variants: a half replaces one of two streams, reading the other. Streams and their gradients
are held in two lists and nowhere else, so that a buffer is freed in the moment it is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from meftbench.reversible.recompute import AutocastState, modes_as, replayed_rng, rng_state

if TYPE_CHECKING:
    from meftbench.reversible.stack import ReversibleStack


@dataclass
class Context:
    """What a layer is called with beside the hidden state: masks, positions, another stack's output.

    differentiable: the tensors among it that need a gradient; it is accumulated over the stack.
    """

    leaves: list[Any]
    spec: Any
    places: list[int]
    differentiable: list[Tensor]

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Context:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        differentiable = [leaves[i] for i in places]
        detached = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return Context(detached, spec, places, differentiable if torch.is_grad_enabled() else [])

    def fresh(self, differentiable: bool) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
        """The arguments, with new leaves in place of the differentiable tensors; and those leaves."""
        leaves, roots = list(self.leaves), []
        if differentiable:
            for place in self.places:
                leaves[place] = leaves[place].detach().requires_grad_()
                roots.append(leaves[place])
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs, roots


@dataclass
class Passage:
    """What goes from one node of the pair below to the other, past the autograd engine.

    streams: in forward, from Reversal to Finish.  gradients: in backward, from Finish to Reversal.
    """

    stack: ReversibleStack
    context: Context
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
        streams, passage.streams = passage.streams, None
        # Detached: the result may be a stream, which Reversal has saved, and would hold this node in a cycle.
        return passage.stack.finish(streams).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_BLD: Tensor) -> tuple[None, Tensor]:
        (token,) = ctx.saved_tensors
        ctx.passage.gradients = ctx.passage.stack.gradients_of_streams(dh_BLD)
        return None, torch.zeros_like(token)


class Reversal(torch.autograd.Function):
    """h, and everything trained, to the last two streams. Inputs: passage, count of trained tensors, h, the
    context's differentiable tensors, the trained tensors. Gradients are returned once, never accumulated by a
    backward inside: hooks (DDP, GradScaler, user's) see one gradient a parameter (DESIGN 3.5).

    The output is a token without content, to be given to `Finish`.
    """

    @staticmethod
    def forward(ctx: Any, passage: Passage, trained: int, h_BLD: Tensor, *tensors: Tensor) -> Tensor:
        stack, context = passage.stack, passage.context
        device = h_BLD.device
        ctx.passage, ctx.stack, ctx.context, ctx.device = passage, stack, context, device
        ctx.trained = tensors[len(tensors) - trained :]
        ctx.autocast = AutocastState.now(device.type)
        ctx.rng = []
        # Dropout may be switched between forward and backward; recomputation must see the forward's mode.
        ctx.modes = [module.training for module in stack.modules()]
        context.differentiable = []  # they are inputs of this node; a second reference would keep their graph

        args, kwargs, _ = context.fresh(differentiable=False)
        streams = [stack.arithmetic.lift(h_BLD)] * 2
        sides: list[Tensor | None] = []
        with ctx.autocast.entered():
            for index, block in enumerate(stack.blocks):
                if stack.swap and index:
                    streams.reverse()
                if stack.observer:
                    stack.observer("forward", index, streams)
                for replaced, (coupling, half) in enumerate(zip(stack.couplings, block.halves, strict=True)):  # type: ignore[arg-type]
                    other_BLD = streams[1 - replaced]
                    before = rng_state(device)
                    value_BLD = half(block, stack.arithmetic.read(other_BLD), *args, **kwargs)
                    ctx.rng.append(None if torch.equal(before, rng_state(device)) else before)
                    streams[replaced], side = coupling.forward(streams[replaced], other_BLD, value_BLD)
                    sides.append(side)
                    del value_BLD, other_BLD, side
        ctx.save_for_backward(*streams, *sides)
        passage.streams = streams
        return h_BLD.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # kept only if the graph is retained
        streams, sides = saved[:2], saved[2:]
        del saved
        stack: ReversibleStack = ctx.stack
        assert ctx.passage.gradients is not None
        walk = _Walk(ctx, streams, ctx.passage.gradients)
        ctx.passage.gradients = None
        del streams
        with modes_as(stack, ctx.modes):
            for index in reversed(range(len(stack.blocks))):
                walk.reverse_half(index, 1, sides.pop())
                walk.reverse_half(index, 0, sides.pop())
                if stack.observer:
                    stack.observer("backward", index, walk.streams)
                if stack.swap and index:
                    walk.streams.reverse()
                    walk.gradients.reverse()
        dh0_BLD = _sum(*walk.gradients) if ctx.needs_input_grad[2] else None
        gradients = [walk.of_context[i] for i in range(len(ctx.context.places))]
        gradients += [walk.of_trained.get(id(parameter)) for parameter in ctx.trained]
        return (None, None, dh0_BLD, *gradients)


class _Walk:
    """The state of one backward pass: two streams, their gradients, and what has been accumulated."""

    def __init__(self, ctx: Any, streams: list[Tensor], gradients: list[Tensor | None]) -> None:
        self.ctx, self.stack = ctx, ctx.stack
        self.streams, self.gradients = streams, gradients
        self.of_context: list[Tensor | None] = [None] * len(ctx.context.places)
        self.of_trained: dict[int, Tensor] = {}

    def reverse_half(self, index: int, replaced: int, side: Tensor | None) -> None:
        """Recompute half `replaced` of block `index` once: restore the stream it replaced, and back-propagate."""
        block, coupling = self.stack.blocks[index], self.stack.couplings[replaced]
        other = 1 - replaced
        # The first half of the lowest block reads the stack's input: its gradient may not be wanted.
        wanted = index > 0 or replaced == 1 or self.ctx.needs_input_grad[2]
        args, kwargs, context_roots = self.ctx.context.fresh(differentiable=True)
        trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
        dy_BLD = self.gradients[replaced]
        with (
            torch.set_grad_enabled(dy_BLD is not None),
            self.ctx.autocast.entered(),
            replayed_rng(self.ctx.rng[2 * index + replaced], self.ctx.device),
        ):
            read_BLD = self.stack.arithmetic.read(self.streams[other]).detach().requires_grad_(wanted)
            value_BLD = block.halves[replaced](block, read_BLD, *args, **kwargs)
        self.streams[replaced] = coupling.inverse(self.streams[replaced], self.streams[other], value_BLD.detach(), side)
        if dy_BLD is None:
            return
        roots = ([read_BLD] if wanted else []) + context_roots + trained
        found: list[Tensor | None] = [None] * len(roots)
        if value_BLD.requires_grad and roots:
            # An edge instead of the tensor: the half's output need not live through its own backward pass.
            edge, dtype = get_gradient_edge(value_BLD), value_BLD.dtype
            del value_BLD
            found = list(torch.autograd.grad(edge, roots, dy_BLD.to(dtype), allow_unused=True))
        of_read = found.pop(0) if wanted else None
        dx_BLD = coupling.gradient_of_x(dy_BLD)
        del dy_BLD
        self.gradients[replaced] = dx_BLD
        self.gradients[other] = _sum(self.gradients[other], of_read)
        self.gradients[other] = _sum(self.gradients[other], coupling.gradient_of_centre(dx_BLD))
        for place, gradient in enumerate(found[: len(context_roots)]):
            self.of_context[place] = _sum(self.of_context[place], gradient)
        for parameter, gradient in zip(trained, found[len(context_roots) :], strict=True):
            if gradient is not None:
                total = _sum(self.of_trained.get(id(parameter)), gradient)
                assert total is not None
                self.of_trained[id(parameter)] = total


def _sum(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    return term if total is None else total if term is None else total + term
