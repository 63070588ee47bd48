"""Which levers do not go together, with a method, or with a model's attention: refused before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meftbench.catalogue.levers import LEVERS
from meftbench.catalogue.methods import METHODS, Reversible, why_refused
from meftbench.errors import UserError

Given = Mapping[str, Mapping[str, Any]]  # by lever, its settings


def check_together(where: str, method: str, levers: Given) -> None:
    """Refuse levers that the method does not work with, that have nothing to act on, or that exclude each other.

    method, levers: names of METHODS and of LEVERS, the latter each with the settings that were given.
    Raises UserError.
    """
    for lever in levers:
        if reason := why_refused(method, lever):
            raise UserError(where, reason, f"leave {lever} out")
    replacing: dict[str, str] = {}
    for lever in levers:
        part = LEVERS[lever].replaces
        if part is not None and replacing.setdefault(part, lever) != lever:
            raise UserError(where, f"{replacing[part]} and {lever} both replace {part}", "leave one of them out")
    for lever in ("offload", "weight_offload"):
        if lever in levers and "compile" in levers:
            what = f"{lever} follows tensors that layers save and read one by one, which compiled code does not show"
            raise UserError(where, what, "leave compile out")
    if "weight_offload" in levers and method == "full":
        raise UserError(where, "full has no frozen weights to hold on the host", "leave weight_offload out")
    recomputes = "checkpoint" in levers or issubclass(METHODS[method].settings, Reversible)
    if levers.get("offload", {}).get("what") == "checkpoints" and not recomputes:
        what = "nothing is recomputed, so that there are no checkpoints to offload"
        raise UserError(where, what, "add checkpoint, or write offload(what=all)")
    if "checkpoint" in levers and levers.get("compile", {}).get("budget") is not None:
        what = "compile(budget) and checkpoint both decide what a layer keeps, and checkpoint would have its way"
        raise UserError(where, what, "leave one of the two out")


def check_attention(where: str, levers: Given, attention: str | None) -> None:
    """Raises UserError: a setting of a lever does not work with the model's attention, a name of transformers'; None:
    it is not known."""
    if attention == "eager" and levers.get("checkpoint", {}).get("keep") == "attention":
        what = "checkpoint(keep=attention) keeps what a fused operator gives, and eager attention runs plain products"
        raise UserError(where, what, "take attention: sdpa, or keep=layer_input")
