"""One point of a sweep: everything that says what is run, nothing about how it is measured."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, RootModel, SerializationInfo, field_validator, model_serializer

from meftbench.catalogue.levers import LEVERS
from meftbench.catalogue.methods import METHODS
from meftbench.catalogue.models import MODELS
from meftbench.catalogue.tasks import is_own
from meftbench.plan.axes import FIELDS, IN_LABEL, OF_TRAINING
from meftbench.plan.factories import OWN_ATTENTION, is_factory
from meftbench.plan.identity import digest, place
from meftbench.plan.models import RANDOM, is_path, split_name
from meftbench.plan.training import Training


class Levers(RootModel[dict[str, bool]]):
    """What composes with a method by `+`: every lever of the catalogue by name, on or off.

    A lever that this version does not know, of a newer or older one, may be named where it is off.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    root: dict[str, bool] = Field(default_factory=dict, validate_default=True)

    @classmethod
    def of(cls, names: Iterable[str]) -> Levers:
        """Those on that are named."""
        return cls(dict.fromkeys(names, True))

    @field_validator("root")
    @classmethod
    def _of_all(cls, given: dict[str, bool]) -> dict[str, bool]:
        for name, on in given.items():
            if on and name not in LEVERS:
                raise ValueError(f"has no lever {name!r}: there are {', '.join(LEVERS)}")
        return {name: given.get(name, False) for name in LEVERS}

    @model_serializer
    def _written(self, info: SerializationInfo) -> dict[str, bool]:
        return {name: on for name, on in self.root.items() if on or not info.exclude_defaults}

    def names(self) -> list[str]:
        """The levers that are on, in the order of the catalogue."""
        return [name for name, on in self.root.items() if on]


_NO_IDENTITY = {"data", "grid", "keep"}


class Cell(BaseModel):
    """A model, a method with its settings and levers, a shape, and the numerical setting.

    batch_size, micro_batch_size: samples; the step runs batch_size / micro_batch_size forward and
        backward passes and one optimizer step.  sequence_length: tokens a sample.
    method_params: the method's settings that differ from its defaults.
    head: what is trained on the backbone, a name of catalogue.HEADS; None: the first that its entry names.
    batch: of a function of one's own that gives the batch, `module:function`; None: the batch is made for the model.
    device: `counted`, `cuda`, or `predicted:PROFILE`.
    training: of a quality cell, the task it is trained on until it is scored; None: only steps are measured.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str
    model_config_overrides: dict[str, Any] = Field(default_factory=dict)
    method: str
    method_params: dict[str, Any] = Field(default_factory=dict)
    levers: Levers = Levers()
    batch_size: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    sequence_length: int = Field(ge=1)
    precision: str = "fp32"
    head: str | None = None
    attention_requested: str = "sdpa"
    optimizer: str = "adamw"
    optimizer_impl: str | None = None
    device: str = "counted"
    seed: int = 0
    training: Training | None = None
    batch: str | None = None

    @classmethod
    def of(cls, method: str, **fields: Any) -> Cell:
        """A cell of a method with its levers, "lora+checkpoint"; one micro-batch unless `micro_batch_size` is given."""
        name, *levers = method.split("+")
        own: dict[str, Any] = {"method": name, "micro_batch_size": fields.get("batch_size")}
        return cls(**(own | {"levers": Levers.of(levers)} | fields))

    @cached_property
    def cell_id(self) -> str:
        """Hash of what differs from the defaults: a field added later leaves old ids as they are.

        A folder is named by where it is, however its path was written.
        Where the data lie, which grid the cell is of and what is kept of it do not change what is run.
        """
        content = self.model_dump(mode="json", exclude_defaults=True, exclude={"training": _NO_IDENTITY})
        name, random = split_name(self.model)
        if is_path(name) and name not in MODELS and not is_factory(name):
            content["model"] = place(name) + (RANDOM if random else "")
        if self.training is not None and is_own(self.training.task):
            content["training"] |= {"task": place(self.training.task)}
        # Where a method's own defaults have changed, what was recorded before is not what would be run now.
        changed = getattr(METHODS[self.method].settings, "defaults", None)
        return digest(content if changed is None else content | {"defaults": changed})

    @property
    def weights(self) -> str:
        """`random`, `pretrained`, or `own`: whatever a function of the user's own gives."""
        if is_factory(self.model):
            return "own"
        return "random" if self.model.endswith("@random") else "pretrained"

    @property
    def method_label(self) -> str:
        """`lora+checkpoint`, `meft1(adapter_size=8)`: the method as tables and plots name it."""
        return "+".join([_labelled(self.method, self.method_params), *self.levers.names()])

    @property
    def model_label(self) -> str:
        return _labelled(self.model, self.model_config_overrides)

    @property
    def label(self) -> str:
        """MODEL/METHOD/bBATCH/sLENGTH, then what differs from the defaults: what budgets match."""
        fields = type(self).model_fields
        rest = [
            str(getattr(self, name))
            for name in IN_LABEL
            if getattr(self, name) not in (fields[name].default, OWN_ATTENTION)
        ]
        if self.micro_batch_size != self.batch_size:
            rest.insert(0, f"mb{self.micro_batch_size}")
        if self.batch is not None:
            rest.append(self.batch)
        if self.training is not None:
            rest.append(self.training.label)
        if self.seed != fields["seed"].default:
            rest.append(f"seed{self.seed}")
        return "/".join([self.model_label, self.method_label, f"b{self.batch_size}", f"s{self.sequence_length}", *rest])

    def settings(self) -> Any:
        """The method's validated settings, defaults filled in."""
        return METHODS[self.method].settings.model_validate(self.method_params)

    def recorded(self) -> dict[str, Any]:
        """The `cell` of a record (docs/measuring.md 2): all fields, and the method's settings in full."""
        full = self.model_dump(mode="json")
        full["method_params"] = self.settings().in_full()
        full["model_config"] = full.pop("model_config_overrides")
        # Readers of records look for this name; there is no such lever yet.
        full["levers"].setdefault("optimizer_in_backward", False)
        return full | {"weights": self.weights, "model_revision": None, "attention_used": None, "label": self.label}


def value_on(cell: Cell, axis: str) -> Any:
    """The value that a cell has on an axis, or of its field of that name; None of a training's, where it has none."""
    return getattr(cell.training if axis in OF_TRAINING else cell, FIELDS.get(axis, axis), None)


def _labelled(name: str, settings: dict[str, Any]) -> str:
    if not settings:
        return name
    return f"{name}({','.join(f'{key}={value}' for key, value in sorted(settings.items()))})"
