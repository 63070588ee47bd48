"""`+chunked_loss` (a lever): cross-entropy over a vocabulary without the whole logits, for models that predict tokens.

The last hidden states go through head and loss a chunk of tokens at a time: only they and the head's weight are kept
for the backward pass, which runs each chunk again and writes its part of one gradient of the hidden states.

How many tokens a chunk has follows from what the model's last layer made in the same forward pass. A chunk of fewer
tokens takes more time: each reads the whole weight of the head, and one that is trained is given a gradient by each.
A chunk need not take less memory than the backward pass of that layer, which comes right after the loss and begins with
as much alive, so that the loss is not the peak of the step.

Shape suffixes: N tokens of the batch, T tokens of a chunk, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.nn import functional as F
from transformers import PreTrainedModel

from meftbench.backbones import layouts_of
from meftbench.errors import UserError
from meftbench.methods.applied import Applied
from meftbench.methods.levers.base import LeverNumber
from meftbench.methods.levers.vocabulary_loss import Head, LossLever, SummedLoss
from meftbench.reversible import ReversibleStack
from meftbench.reversible.gradients import Sums
from meftbench.reversible.recompute import AutocastState, Numerics, rng_state, run_again
from meftbench.reversible.rounds import rounds

# Where it is not known what the layers need, a chunk has 1 / CHUNKS of the tokens (+tiled_mlp has as many tiles).
CHUNKS = 16
# A chunk does not get smaller than that many tokens, or than 1 / CHUNKS of all: for fewer, reading the head's weight
# would take most of the time.
FEWEST = 256


class ChunkedLossLever(LossLever):
    """Computes the loss in chunks of tokens, of a size that follows from what the last layer needs."""

    name = "chunked_loss"

    def __init__(self) -> None:
        super().__init__()
        self._loss: InChunks | None = None

    def loss_of(self, model: PreTrainedModel, applied: Applied) -> SummedLoss:
        self._loss = InChunks(_last_layer(model, applied))
        return self._loss

    def numbers(self) -> dict[str, LeverNumber]:
        if self._loss is None or self._loss.rows is None:
            return {}
        return {"loss_chunk_rows": LeverNumber(self._loss.rows, "counted")}


def _last_layer(model: Any, applied: Applied) -> nn.Module | None:
    """The layer, or reversible stack, that runs last; None: it is not known where the model has its layers."""
    try:
        layouts = applied.layouts or layouts_of(model)
    except UserError:  # of a family that the catalogue has not, and whose layout cannot be guessed
        return None
    return layouts[-1].list_of(model)[2][-1]


class InChunks(SummedLoss):
    """The loss of one chunk of tokens after the other.

    layer: the layer, or reversible stack, that runs last and is the first in the backward pass; None: not known.
    rows: of a chunk in the last forward pass; None: there was none.
    fused: whether to use torch's linear_cross_entropy; None: where it is known to be as good (`_fused_is_as_good`).
    """

    def __init__(self, layer: nn.Module | None = None) -> None:
        self.layer = layer
        self.rows: int | None = None
        self.fused: bool | None = None
        self._outputs: dict[nn.Module, int] = {}  # bytes of the largest output of a module in the last layer

    def __call__(self, head: Head, h_ND: Tensor, labels_N: Tensor, ignored: int) -> Tensor:
        outputs, self._outputs = list(self._outputs.values()), {}
        room = None
        if self.layer is not None and outputs:
            room = room_beside(outputs, h_ND.nbytes, recomputed=_runs_again(self.layer))
        rows = self.rows = chunk_rows(len(h_ND), room, head)
        fused = _fused_is_as_good(head, h_ND) if self.fused is None else self.fused
        if fused:
            return _by_torch(head, h_ND, labels_N, ignored, rows)
        trained = [parameter for parameter in head.module.parameters() if parameter.requires_grad]
        if head.bias is not None and head.bias.requires_grad:
            trained.append(head.bias)
        total: Tensor = _Summed.apply(  # type: ignore[no-untyped-call]
            head, labels_N, ignored, rows, torch.is_grad_enabled(), h_ND, *trained
        )
        return total

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notes the bytes of what each module of the last layer gives: of the largest call, where it runs in tiles."""
        self._outputs = {}

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not any(output is given for given in args):
                self._outputs[module] = max(self._outputs.get(module, 0), output.nbytes)

        with ExitStack() as hooks:
            for module in self._watched():
                hook = module.register_forward_hook(note)
                hooks.callback(hook.remove)
            yield

    def _watched(self) -> list[nn.Module]:
        """The modules without submodules of the last layer. None of a compiled one: compiled code has no hooks."""
        layer: Any = self.layer
        if layer is None or layer._compiled_call_impl is not None:
            return []
        whole = layer.blocks[-1] if isinstance(layer, ReversibleStack) else layer
        return [module for module in whole.modules() if not any(True for _ in module.children())]


class _Summed(torch.autograd.Function):
    """From hidden states (N, D) and the head's trained tensors to the sum of the cross-entropies, a chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any, head: Head, labels_N: Tensor, ignored: int, rows: int, recorded: bool, h_ND: Tensor, *trained: Tensor
    ) -> Tensor:
        ctx.head, ctx.ignored, ctx.trained = head, ignored, trained
        ctx.chunks = [slice(start, min(start + rows, len(h_ND))) for start in range(0, max(len(h_ND), 1), rows)]
        ctx.save_for_backward(h_ND, labels_N)
        ctx.autocast, ctx.numerics = AutocastState.now(h_ND.device.type), Numerics.now()
        ctx.rng = None if head.is_linear else rng_state(h_ND.device)
        sums = None
        # Where gradients are recorded, so they are here, and what they need is not kept: otherwise autocast would keep
        # casts of weights that have no history, for whoever asks for them next.
        with torch.set_grad_enabled(recorded), saved_tensors_hooks(_not_kept, _not_kept):
            for chunk in rounds(ctx.chunks):
                of_chunk = head.summed(h_ND.detach()[chunk], labels_N[chunk], ignored).detach()
                if sums is None:
                    sums = of_chunk.new_empty(len(ctx.chunks))
                sums[chunk.start // rows] = of_chunk
                del of_chunk
        assert sums is not None
        return sums.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor | None, ...]:
        h_ND, labels_N = ctx.saved_tensors
        needs_grad, of_trained = ctx.needs_input_grad[5], Sums(wide=False)
        dh_ND = torch.empty_like(h_ND, memory_format=torch.contiguous_format) if needs_grad else None
        with run_again(ctx.autocast, ctx.numerics, ctx.rng, h_ND.device):
            for chunk in rounds(ctx.chunks):
                leaf = h_ND[chunk].detach().requires_grad_(needs_grad)
                edge = get_gradient_edge(ctx.head.summed(leaf, labels_N[chunk], ctx.ignored))
                roots = [*([leaf] if needs_grad else []), *ctx.trained]
                gradients = list(torch.autograd.grad([edge], roots, [d_sum], allow_unused=True))
                del edge
                if dh_ND is not None:
                    dh_ND[chunk] = gradients.pop(0)
                of_trained.add(ctx.trained, gradients)
                del gradients
        return (None, None, None, None, None, dh_ND, *of_trained.of(ctx.trained))


def _not_kept(_: Any) -> Any:
    """What autograd is given in place of a tensor that no backward pass reads: nothing."""


def _runs_again(layer: Any) -> bool:
    """Whether the layer runs again in the backward pass."""
    if isinstance(layer, ReversibleStack):
        return layer.activations != "cache"
    return bool(getattr(layer, "gradient_checkpointing", False))


def room_beside(outputs: list[int], hidden: int, *, recomputed: bool) -> int:
    """Bytes that a layer's backward pass takes at least, beyond what is alive while the loss is computed.

    A layer that runs again makes its outputs once more; any other holds them already, and makes the gradients of the
    largest: of what a function gave and of what it was given. Of what is alive with the loss, the hidden states that
    the head reads and a gradient of theirs are gone then.

    outputs: bytes of what each of the layer's modules gave in the forward pass.  hidden: of the hidden states.
    recomputed: whether the layer runs again.
    """
    return max(0, (sum(outputs) if recomputed else 2 * max(outputs)) - 2 * hidden)


def chunk_rows(tokens: int, room: int | None, head: Head) -> int:
    """Number of tokens in a chunk: as many as `room` has place for, but no more than half of all, so that the whole
    logits never exist, and no fewer than FEWEST or a sixteenth.

    room: bytes; None: not known, and a chunk is a sixteenth.
    """
    fewest = -(-tokens // CHUNKS)
    if room is None:
        return max(1, fewest)
    weight = head.module.weight
    rows = room // bytes_of_row(head)
    if weight.requires_grad:
        # The gradient of a chunk, as large as the weight, is alive beside the sum of those before it.
        rows = min(rows, max(room - weight.nbytes, 0) // (len(weight) * weight.itemsize))
    return max(1, min(max(rows, min(FEWEST, fewest)), -(-tokens // 2)))


def bytes_of_row(head: Head) -> int:
    """Bytes that a token takes at the peak of a chunk's backward pass: log-probabilities, their gradient and that of
    the logits; with a cap, also what tanh gave and was given."""
    item = head.module.weight.itemsize
    wide = 4 if head.in_float32 or item < 4 else item
    return len(head.module.weight) * (3 * wide + (2 * item if head.cap is not None else 0))


def _by_torch(head: Head, h_ND: Tensor, labels_N: Tensor, ignored: int, rows: int) -> Tensor:
    # allow_retain_graph: plain cross-entropy allows a second backward pass, too.
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None, allow_retain_graph=True)  # type: ignore[attr-defined,unused-ignore]
    return F.linear_cross_entropy(  # type: ignore[attr-defined,no-any-return,unused-ignore]
        h_ND,
        head.module.weight,
        labels_N,
        linear_bias=head.module.bias if head.bias is None else head.bias[0],
        reduction="sum",
        ignore_index=ignored,
        options=options,
    )


def _fused_is_as_good(head: Head, h_ND: Tensor) -> bool:
    """Whether torch's linear_cross_entropy may replace the chunks here.

    Not in half precision, because it rounds the loss to half precision. Not on the CPU, where it is one operator, and
    memory inside it cannot be counted (torch 2.13: neither a trace nor a dispatch mode sees its chunks).
    """
    return (
        hasattr(F, "linear_cross_entropy")
        and h_ND.device.type == "cuda"
        and h_ND.dtype == head.module.weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cuda")
        and head.is_linear
        and (head.module.bias is None or head.bias is None)
        and head.cap is None
    )
