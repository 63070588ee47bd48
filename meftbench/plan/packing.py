"""What can be packed: which models, heads and methods may read several samples from one row."""

from __future__ import annotations

from typing import Any

from meftbench.catalogue.peft_methods import PEFT_METHODS, Prompt
from meftbench.errors import UserError
from meftbench.plan.factories import is_factory
from meftbench.plan.models import head_of, known_config

# Types of layers (`layer_types` of transformers' configurations) that only mix tokens by attention.
ATTENDING = ("full_attention", "sliding_attention")


def check_packing(
    where: str,
    model: str,
    overrides: dict[str, Any],
    head: str | None,
    method: str,
    attention: str,
    *,
    batch: str | None,
) -> None:
    """Raises UserError: the samples of such a cell cannot be laid end to end in one row.

    What is not known of a model on the hub is checked when it is built (backbones/packed.py).
    """
    if batch is not None or is_factory(model):
        whose = "a batch" if batch is not None else "a model"
        raise UserError(where, f"packing is not for {whose} of your own", "leave packing out")
    config = known_config(model, overrides)
    if config is not None or head is not None:
        taken = head_of(str((config or {}).get("model_type")), head)
        if taken != "causal_lm":
            what = f"packing is for models that predict the next token, and the head is {taken}"
            raise UserError(where, what, "write head: causal_lm on a decoder, or leave packing out")
    if attention != "sdpa":
        what = f"packing needs attention that keeps samples apart, and {attention} reads a whole row"
        raise UserError(where, what, "write attention: sdpa, or leave packing out")
    others = sorted(set((config or {}).get("layer_types") or ()) - {*ATTENDING})
    if others:
        what = f"packing needs layers that mix tokens by attention alone, and {model!r} has {others[0]}"
        raise UserError(where, what, "leave packing out")
    if method in PEFT_METHODS and issubclass(PEFT_METHODS[method].settings, Prompt):
        what = f"{method} puts virtual tokens before every sample, and a packed row has them once"
        raise UserError(where, what, "choose another method, or leave packing out")
