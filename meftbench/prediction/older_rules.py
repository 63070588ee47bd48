"""What a trace saves and allocates under older versions of torch and transformers (catalogue/versions.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations import sdpa_attention
from transformers.loss import loss_utils

from meftbench.backbones.own import transformers_part
from meftbench.catalogue.versions import Versions
from meftbench.errors import UserError
from meftbench.measuring.step import Step
from meftbench.prediction.experts import runs_experts


@contextmanager
def older_rules(versions: Versions, step: Step) -> Iterator[None]:
    """Within it, what a trace of `step` saves and allocates is as in `versions`.

    Raises UserError: the model is a mixture of experts, whose memory depends on tensors' values in `versions`.
    """
    model: Any = transformers_part(step.model)
    if not versions.groups_experts and model is not None and runs_experts(model):
        what = "before transformers 5 the memory of a mixture's experts depends on what they are given"
        raise UserError("--for-versions", what, "leave transformers out, or measure it")
    with ExitStack() as stack:
        for replaced in _replacements(versions):
            stack.enter_context(replaced)
        if versions.keeps_gradients:
            zero = step.optimizer.zero_grad

            def zeroed(set_to_none: bool = True) -> None:
                zero(set_to_none=False)

            stack.enter_context(mock.patch.object(step.optimizer, "zero_grad", zeroed))
        head = getattr(step.model, "get_output_embeddings", lambda: None)()
        if versions.widens_logits and head is not None:
            hook = head.register_forward_hook(lambda _module, _inputs, logits: logits.float())
            stack.callback(hook.remove)
        yield


def _replacements(versions: Versions) -> Iterator[AbstractContextManager[Any]]:
    if versions.softmax_keeps_input:
        yield mock.patch.object(F, "softmax", _keeping_input(F.softmax))
    if versions.repeats_keys and hasattr(sdpa_attention, "use_gqa_in_sdpa"):
        yield mock.patch.object(sdpa_attention, "use_gqa_in_sdpa", _shares_no_keys)
    if versions.shifts_logits:
        yield mock.patch.dict(loss_utils.LOSS_MAPPING, {"ForCausalLM": _loss_of_shifted_logits})


def _shares_no_keys(*arguments: object, **keywords: object) -> bool:
    """Not a mock's return value: a mock remembers its arguments, and would keep the keys of each layer alive."""
    return False


def _keeping_input(softmax: Any) -> Any:
    def kept(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = _KeepsInput.apply(softmax(input, *args, **kwargs), input)  # type: ignore[no-untyped-call]
        return result

    return kept


class _KeepsInput(torch.autograd.Function):
    """The identity of its first argument, that keeps its second until the backward pass."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


def _loss_of_shifted_logits(
    logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **_ignored: Any
) -> Tensor:
    """Cross-entropy of the logits (B, L, V) but for the last position, in float32, and the labels but for the first."""
    wide = logits.float()
    shifted = wide[..., :-1, :].contiguous()
    targets = labels[..., 1:].contiguous()
    return F.cross_entropy(shifted.view(-1, vocab_size), targets.view(-1), ignore_index=-100)
