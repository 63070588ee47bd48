"""Attention over packed rows: several samples end to end in one row, each of which attends to itself alone.

It is registered with transformers under the name PACKED, and gets the samples' lengths as keyword arguments of the
model's forward, which transformers passes on to attention. transformers makes no mask for an attention of one's own.

Where it applies (`takes_varlen`), one kernel runs over the whole row: torch.nn.attention.varlen.varlen_attn, of flash
attention 2. Elsewhere transformers' sdpa attention runs over each sample by itself, and over samples of one length that
follow each other as over a batch. Neither holds a mask of the row, whose size would be the square of its tokens.

Shape suffixes: H heads, T tokens of a row, E size of a head; N samples of one length, L tokens of each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from meftbench.backbones.own import transformers_part
from meftbench.errors import UserError

PACKED = "meftbench_packed"
LARGEST_HEAD = 256  # of flash attention


def _varlen() -> Callable[..., Any] | None:
    """torch's attention over sequences of different lengths; None: it is missing, or has no windows or shared heads
    (before torch 2.12)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    needed = {"window_size", "scale", "enable_gqa"}
    return varlen_attn if needed <= inspect.signature(varlen_attn).parameters.keys() else None


VARLEN = _varlen()


def takes_varlen(query: Tensor, dropout: float) -> bool:
    """Whether the kernel for sequences of different lengths runs: on CUDA from Ampere on, in half precision, without
    dropout, for heads of up to 256 that are multiples of 8 (torch/nn/attention/varlen.py, flash_api.cpp)."""
    on_device = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)
    return on_device and fits_varlen(query, dropout)


def fits_varlen(query: Tensor, dropout: float) -> bool:
    """What `takes_varlen` asks for, whatever the device."""
    size = query.shape[-1]
    in_half = query.dtype in (torch.float16, torch.bfloat16)
    return VARLEN is not None and in_half and dropout == 0 and size % 8 == 0 and size <= LARGEST_HEAD


# --- what a step shows: the lengths of the samples in each row that attention has read ---

_read_rows: list[tuple[int, Sequence[int]]] | None = None


@contextmanager
def rows_read() -> Iterator[list[tuple[int, Sequence[int]]]]:
    """Collects (tokens of the row, lengths of its samples) of every packed row that attention reads inside."""
    global _read_rows  # a context variable would not be seen by autograd's threads
    previous, _read_rows = _read_rows, []
    try:
        yield _read_rows
    finally:
        _read_rows = previous


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed_lengths: Sequence[int] | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of the samples of a row, each to itself: (1, T, H, E), as transformers' attention functions.

    query: (1, H, T, E); key and value: the same with as many heads or fewer.
    sliding_window: the tokens that one attends to, itself included; None: all before it.
    packed_lengths: tokens of each sample, in order; None: the rows are not packed, and transformers' sdpa runs.
    cu_seq_lens_q: where samples begin, and where the last one ends: (samples + 1), int32, on the device.
    options: ignored, such as positions, which are in the queries and keys already.
    """
    if packed_lengths is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    if _read_rows is not None:
        _read_rows.append((query.shape[2], packed_lengths))
    query, key, value = (_in_autocast(tensor) for tensor in (query, key, value))
    longest = max(packed_lengths)
    window = sliding_window if sliding_window is not None and sliding_window < longest else None
    if takes_varlen(query, dropout):
        assert VARLEN is not None
        assert cu_seq_lens_q is not None
        query_THE, key_THE, value_THE = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        behind = -1 if window is None else window - 1
        out_THE = VARLEN(
            query_THE,
            key_THE,
            value_THE,
            cu_seq_lens_q,
            cu_seq_lens_q,
            longest,
            longest,
            scale=scaling,
            window_size=(behind, 0),
            enable_gqa=True,
        )
        return out_THE[None], None
    runs = [(length, len(list(same))) for length, same in groupby(packed_lengths)]
    parts = [(query, key, value)]
    if len(runs) > 1:
        # `split` instead of slices: the gradient of each slice would be as large as the whole.
        sizes = [length * count for length, count in runs]
        parts = list(zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True))
    outputs = []
    for (length, count), row in zip(runs, parts, strict=True):
        samples_NHLE = [tensor[0].unflatten(1, (count, length)).transpose(0, 1) for tensor in row]
        mask = None if window is None or window >= length else _windowed(length, window, query.device)
        out_NLHE, _ = sdpa_attention_forward(module, *samples_NHLE, mask, dropout=dropout, scaling=scaling)
        outputs.append(out_NLHE.flatten(0, 1))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


AttentionInterface.register(PACKED, packed_attention)


def _in_autocast(tensor: Tensor) -> Tensor:
    """The tensor in the precision of an autocast region. torch converts what its own attention reads, but not what the
    kernel for different lengths does."""
    kind = "cpu" if tensor.device.type == "meta" else tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def _windowed(length: int, window: int, device: torch.device) -> Tensor:
    """(1, 1, L, L), true where a token attends: itself and the `window` - 1 before it."""
    every = torch.ones(length, length, dtype=torch.bool, device=device)
    return every.tril_().triu_(1 - window)[None, None]


# --- models ---


def read_packed_rows(where: str, model: nn.Module) -> None:
    """Make a model, built with sdpa, read packed rows.

    Raises UserError: its layers do more across tokens than attend, or it does not tell attention the lengths.
    """
    part: Any = transformers_part(model)
    why = None
    if getattr(part, "_is_stateful", False):
        why = "its layers keep a state across tokens"
    elif not getattr(part, "_supports_attention_backend", False):
        why = "its attention is not told where samples begin"
    elif any(getattr(module, "is_causal", True) is False for module in model.modules()):
        why = "its tokens attend to those after them"
    if part is None or why:
        raise UserError(where, f"{type(model).__name__} cannot read packed rows: {why}", "leave packing out")
    part.config._attn_implementation = PACKED


@contextmanager
def reading_padded(model: nn.Module) -> Iterator[None]:
    """Inside, a model that reads packed rows reads padded batches and masks, as it was built. No backward pass of what
    it computes inside may come after."""
    config: Any = getattr(transformers_part(model), "config", None)
    if getattr(config, "_attn_implementation", None) != PACKED:
        yield
        return
    config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = PACKED
