"""What a cell's optimizer, and the levers that hold it otherwise, do not go together with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meftbench.catalogue.optimizers import OPTIMIZERS
from meftbench.plan.cell import Cell
from meftbench.strict_yaml import Document, KeyPath

# The optimizers of a suite that may have methods with an optimizer of their own beside others: the default, and the
# one that theirs resembles.
_BESIDE_OWN_OPTIMIZER = ("adamw", "sgd")
IN_BACKWARD, OFFLOAD = "optimizer_in_backward", "optimizer_offload"


def check_optimizer(
    document: Document, place: Mapping[str, KeyPath], values: Mapping[str, Any], levers: list[str]
) -> None:
    """Raises UserError: the optimizer has no such implementation, does not work in the precision, or a lever does not
    work with it or with other values.

    place: of each axis in the document.  values: by axis; `training` as well, where the cell has one.
    """
    name = values.get("optimizer", Cell.model_fields["optimizer"].default)
    optimizer, precision = OPTIMIZERS[name], values.get("precision")
    if "optimizer_impl" in values and not optimizer.implementations:
        others = " or ".join(other for other, entry in OPTIMIZERS.items() if entry.implementations)
        what = f"{name} has one implementation"
        raise document.error(place["optimizer_impl"], what, f"leave it out, or choose optimizer: {others}")
    if precision == "fp64" and optimizer.of_bitsandbytes:
        cure = "choose another precision, or optimizer: adamw"
        raise document.error(place["optimizer"], f"{name} computes in 32 bits, not in fp64", cure)
    for lever in (IN_BACKWARD, OFFLOAD):
        if lever in levers and values.get("training") is not None:
            raise document.error(place["method"], f"{lever} is not part of a training on a task", "leave it out")
    if IN_BACKWARD in levers:
        _check_in_backward(document, place, values)
    if OFFLOAD in levers and optimizer.paged:
        what = f"{OFFLOAD}: the states of {name} are moved to the host by CUDA already"
        raise document.error(place["method"], what, f"choose optimizer: {name.removeprefix('paged-')}")
    if OFFLOAD in levers and not optimizer.keeps_state:
        raise document.error(place["method"], f"{OFFLOAD}: {name} keeps no state", "leave it out")


def _check_in_backward(document: Document, place: Mapping[str, KeyPath], values: Mapping[str, Any]) -> None:
    micro = values.get("micro_batch_size", values["batch_size"])
    if micro != values["batch_size"]:
        what = f"{IN_BACKWARD} takes each gradient at once, and micro-batches sum them"
        raise document.error(place["micro_batch_size"], what, "leave micro_batch_size out, or the lever")
    if values.get("precision") == "fp16-autocast":
        what = f"{IN_BACKWARD}: scaled gradients of fp16 are checked all together before a step"
        raise document.error(place["precision"], what, "write precision: bf16-autocast, or leave the lever out")


def check_own_optimizer(
    document: Document, place: Mapping[str, KeyPath], values: Mapping[str, Any], method: str
) -> None:
    """Raises UserError: an optimizer that a method without a backward pass cannot take, or a training in fp16."""
    if values.get("optimizer", _BESIDE_OWN_OPTIMIZER[0]) not in _BESIDE_OWN_OPTIMIZER:
        what = f"{method} has an optimizer of its own, and no gradients for {values['optimizer']}"
        raise document.error(place["optimizer"], what, "leave it out, or write sgd, which its own resembles")
    if "optimizer_impl" in values:
        what = f"{method} has an optimizer of its own, which goes tensor by tensor"
        raise document.error(place["optimizer_impl"], what, "leave it out")
    if values.get("training") is not None and values.get("precision") == "fp16-autocast":
        what = f"trainings in fp16 scale gradients, and {method} has none"
        raise document.error(place["precision"], what, "write precision: bf16-autocast")
