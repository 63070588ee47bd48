"""What can be run in several processes (ranks): the two fields that say so, and what they do not go together with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meftbench.catalogue.methods import METHODS
from meftbench.catalogue.parallelisms import PARALLELISMS
from meftbench.plan.cell import Cell
from meftbench.strict_yaml import Document, KeyPath

MOST_PROCESSES = 64  # that a counted cell starts on this machine
MOST_RANKS = 65_536  # of a cell that is predicted


def check_distributed(
    document: Document, place: Mapping[str, KeyPath], values: Mapping[str, Any], method: str, levers: list[str]
) -> None:
    """Raises UserError: ranks without a way to share a step or the reverse, or one that does not go with the rest.

    place: of each axis in the document.  values: by axis; `training` as well, where the cell has one.
    """
    ranks, name = values.get("world_size", 1), values.get("parallelism")
    if name is None:
        if ranks > 1:
            ways = " or ".join(PARALLELISMS)
            raise document.error(
                place["world_size"], f"it is not said how {ranks:,} ranks share a step", f"write parallelism: {ways}"
            )
        return
    if ranks == 1:
        raise document.error(
            place["parallelism"], f"{name} is for several ranks", "write world_size: 2, or leave it out"
        )
    predicted = str(values.get("device", "")).startswith("predicted:")
    most = MOST_RANKS if predicted else MOST_PROCESSES
    if ranks > most:
        raise document.error(place["world_size"], f"{ranks:,} ranks are more than are tried", f"write at most {most:,}")
    if values.get("training") is not None:
        what = "a training on a task runs in one process"
        raise document.error(place["parallelism"], what, "leave world_size and parallelism out")
    if values.get("packing"):
        what = "rows that are packed are not shared out among ranks"
        raise document.error(place["packing"], what, "leave packing out, or world_size and parallelism")
    if not METHODS[method].backward:
        what = f"{method} has no gradients to share, and its steps are those of one process"
        raise document.error(place["method"], what, "leave world_size and parallelism out")
    way = PARALLELISMS[name]
    precision = values.get("precision", Cell.model_fields["precision"].default)
    optimizer = values.get("optimizer", Cell.model_fields["optimizer"].default)
    for lever in levers:
        if (reason := way.refused_levers.get(lever)) is not None:
            raise document.error(place["method"], f"{name}: {lever} {reason}", f"leave {lever} out")
    if (reason := way.refused_precisions.get(precision)) is not None:
        raise document.error(place["precision"], f"{name} with {precision}: {reason}", "choose another precision")
    if (reason := way.refused_optimizers.get(optimizer)) is not None:
        raise document.error(place["optimizer"], f"{name} with {optimizer}: {reason}", "choose optimizer: adamw or sgd")
