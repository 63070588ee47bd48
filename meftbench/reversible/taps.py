"""Tensors inside a layer that leave it beside the hidden state, with their gradient, such as the logits of a router.

A module with the forward hook `tap` passes its output on to whoever asks by `tapped_in`; where nobody asks, nothing
happens. A tapped module must be part of token-wise work: its output has a row for each token. A pass that runs in tiles
collects the rows of each tile and passes their concatenation on, as if all tokens had been run at once.

Shape suffixes: N tokens of the batch, T of a tile; X the width of what is tapped (experts).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

_asking: ContextVar[list[Tensor] | None] = ContextVar("_asking", default=None)


def tap(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook: passes on the module's output (T, X), the first one where it gives several."""
    pass_on([output[0] if isinstance(output, tuple) else output])


@contextmanager
def tapped_in(collected: list[Tensor] | None) -> Iterator[None]:
    """Tensors that are passed on inside are appended to `collected`, in order; None: nobody asks for them."""
    token = _asking.set(collected)
    try:
        yield
    finally:
        _asking.reset(token)


def asked() -> bool:
    """Whether somebody asks for tapped tensors here."""
    return _asking.get() is not None


def pass_on(tensors: Sequence[Tensor]) -> None:
    """Give tensors to whoever asks for them."""
    collected = _asking.get()
    if collected is not None:
        collected.extend(tensors)


def joined_rows(tiles: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What each tile gave, (T, X) from every tapped module, as (N, X) from every tapped module."""
    return [torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in zip(*tiles, strict=True)]
