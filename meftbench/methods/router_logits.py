"""Logits of a mixture's routers, from layers that run in parts or in tiles, with their gradient.

transformers collects router logits by hooks on the routers. A router inside a reversible stack, or inside a
feed-forward in tiles, is called once a tile, and its graph does not reach the loss: the loss that balances the experts
would be wrong, and have no gradient. Here the layers pass the logits on themselves (reversible/taps.py), all tokens of
a layer together, and the base model's output has them where transformers would have put them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from meftbench.backbones import base_of
from meftbench.backbones.patched import FORWARD, name_of_forward
from meftbench.methods.applied import asks, refuse_asked
from meftbench.reversible.taps import tap, tapped_in

ROUTER_LOGITS = "output_router_logits"


def pass_router_logits_on(model: nn.Module) -> None:
    """Make the base model of `model` give the logits of its routers, where they are asked for, although its layers run
    in parts or in tiles. Where that is not possible, asking for them raises a UserError. A second call does nothing.

    It is not possible where transformers does not say which output of which modules the logits are, or where the
    forward of the base model was replaced.
    """
    base = base_of(model)
    place = name_of_forward(base)
    if getattr(vars(base).get(place), "func", None) is _with_router_logits:
        return
    routers = [] if place == FORWARD and FORWARD in vars(base) else _routers(base)
    if not routers:
        base.register_forward_pre_hook(_refuse, with_kwargs=True)
        return
    for router in routers:
        router.register_forward_hook(tap)
    # A partial as attribute of the instance is copied and pickled together with the model.
    setattr(base, place, partial(_with_router_logits, base))


def _routers(base: Any) -> list[nn.Module]:
    """The modules whose first output are router logits (tokens, experts), by what the class of the model says."""
    recorder = (getattr(base, "_can_record_outputs", None) or {}).get("router_logits")
    kind, index = getattr(recorder, "target_class", None), getattr(recorder, "index", None)
    if kind is None or index != 0:
        return []
    return [module for module in base.modules() if isinstance(module, kind)]


def _with_router_logits(base: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Replaces the `forward` of the base model's class."""
    forward = type(base).forward
    if not asks(base, kwargs, ROUTER_LOGITS):
        return forward(base, *args, **kwargs)
    logits: list[Tensor] = []
    with tapped_in(logits):
        output = forward(base, *args, **(kwargs | {ROUTER_LOGITS: False}))
    if isinstance(output, tuple):
        return *output, tuple(logits)
    output["router_logits"] = tuple(logits)
    return output


def _refuse(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    what = "layers that run in parts or in tiles do not give what a router computes in this model"
    refuse_asked(base, kwargs, (ROUTER_LOGITS,), what, "do not ask for it, or take a method and levers without parts")
