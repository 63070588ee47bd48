"""What a cell repeats: layers of one kind, in one or two stretches of the stack, and micro-batches.

A trace of a cell that repeats more of these follows from traces of cells that repeat fewer (deepened.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import lcm
from typing import Any

from meftbench.backbones.build import configuration_of
from meftbench.catalogue.backbones import BACKBONES
from meftbench.catalogue.peft_methods import PEFT_METHODS
from meftbench.plan.cell import Cell
from meftbench.plan.factories import is_factory
from meftbench.plan.models import RANDOM, split_name

# Fields of a configuration with which a layer's index decides what it is, and their values where it does not.
_BY_INDEX = {"mlp_only_layers": [], "decoder_sparse_step": 1}


@dataclass(frozen=True)
class Repeating:
    """The numbers of what a cell repeats.

    counts: how many there are of each.  units: by how many each can be reduced, such as 6 where each sixth layer is of
        another kind.  cell_with: the cell that has other numbers of them.
    """

    counts: tuple[int, ...]
    units: tuple[int, ...]
    cell_with: Callable[[tuple[int, ...]], Cell]


def repeated_by(cell: Cell) -> Repeating:
    """What of a step of `cell` repeats; nothing where that is not known, as of a model of the user's own."""
    layers = _Layers.of(cell)
    micro_batches = cell.batch_size // cell.micro_batch_size
    counts = (*(layers.counts if layers is not None else ()), micro_batches)
    units = (*(layers.units if layers is not None else ()), 1)

    def cell_with(counts: tuple[int, ...]) -> Cell:
        changed = cell if layers is None else layers.cell_with(cell, counts[:-1])
        return changed.model_copy(update={"batch_size": cell.micro_batch_size * counts[-1]})

    return Repeating(counts, units, cell_with)


@dataclass(frozen=True)
class _Layers:
    """The layers of a cell's model, in the stretches that its method and levers treat differently.

    fields: of the configuration, with their number.  method_field: the setting of the method with the number of the
        last stretch; lever_field: the same of a lever.
    """

    counts: tuple[int, ...]
    units: tuple[int, ...]
    fields: tuple[str, ...]
    method_field: str | None
    lever_field: tuple[str, str] | None

    @classmethod
    def of(cls, cell: Cell) -> _Layers | None:
        """None: it is not known that layers are alike, and where they are not."""
        if is_factory(cell.model) or cell.batch is not None:
            return None
        name = split_name(cell.model)[0] + RANDOM
        config = configuration_of(name, cell.head, cell.model_config_overrides)
        if config.model_type not in BACKBONES or _names_layers(cell):
            return None
        if any(getattr(config, field, value) not in (value, None) for field, value in _BY_INDEX.items()):
            return None
        fields = ("encoder_layers", "decoder_layers") if config.model_type == "bart" else ("num_hidden_layers",)
        number = {int(getattr(config, field)) for field in fields}
        if len(number) > 1:
            return None
        layers = number.pop()
        unit = _period(getattr(config, "layer_types", None) or [None] * layers)
        checkpoint = cell.lever_params.get("checkpoint", {})
        unit = lcm(unit, checkpoint.get("every", 1))
        parts: list[int] = []
        method_field = lever_field = None
        if isinstance(reversible := cell.method_params.get("reversible_layers"), int):
            parts.append(min(reversible, layers))
            method_field = "reversible_layers"
        if isinstance(checkpointed := checkpoint.get("layers"), int):
            parts.append(min(checkpointed, layers))
            lever_field = ("checkpoint", "layers")
        if len(parts) == 2 or (parts and len(fields) == 2):
            return None
        counts = (layers - parts[0], parts[0]) if parts else (layers,)
        return cls(counts, (unit,) * len(counts), fields, method_field, lever_field)

    def cell_with(self, cell: Cell, counts: tuple[int, ...]) -> Cell:
        overrides = cell.model_config_overrides | dict.fromkeys(self.fields, sum(counts))
        update: dict[str, Any] = {"model_config_overrides": overrides}
        if self.method_field is not None:
            update["method_params"] = cell.method_params | {self.method_field: counts[-1]}
        if self.lever_field is not None:
            lever, field = self.lever_field
            update["lever_params"] = cell.lever_params | {lever: cell.lever_params[lever] | {field: counts[-1]}}
        return cell.model_copy(update=update)


def _names_layers(cell: Cell) -> bool:
    """Whether a method's settings may name layers by index: peft's own, or `targets` with a number in a path."""
    of_peft = cell.method in PEFT_METHODS and bool(cell.method_params.get("config"))
    return of_peft or re.search(r"(?<![A-Za-z_])\d", str(cell.method_params.get("targets"))) is not None


def _period(kinds: list[Any]) -> int:
    """The smallest number of layers after which all kinds repeat."""
    return next(unit for unit in range(1, len(kinds) + 1) if kinds[unit:] == kinds[: len(kinds) - unit])
