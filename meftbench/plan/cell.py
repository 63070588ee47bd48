"""A cell, one point of a sweep: everything that determines what is run, and nothing about how it is measured."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, RootModel, SerializationInfo, field_validator, model_serializer

from meftbench.catalogue.labels import Part, joined, label_of, read_label
from meftbench.catalogue.levers import LEVERS
from meftbench.catalogue.methods import METHODS
from meftbench.catalogue.models import MODELS
from meftbench.catalogue.settings import Settings
from meftbench.catalogue.tasks import is_own
from meftbench.plan.axes import FIELDS, IN_LABEL, OF_TRAINING, WORDS
from meftbench.plan.factories import OWN_ATTENTION, is_factory
from meftbench.plan.identity import digest, place
from meftbench.plan.models import RANDOM, is_path, split_name
from meftbench.plan.training import Training


class Levers(RootModel[dict[str, bool]]):
    """The memory optimisations (levers) that are added to a method by `+`: each of the catalogue by name, on or off.

    A lever that this version does not have, but a newer or older one, may be named where it is off.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    root: dict[str, bool] = Field(default_factory=dict, validate_default=True)

    @classmethod
    def of(cls, names: Iterable[str]) -> Levers:
        """Levers of which those in `names` are on, and all others off."""
        return cls(dict.fromkeys(names, True))

    @field_validator("root")
    @classmethod
    def _with_all_names(cls, levers: dict[str, bool]) -> dict[str, bool]:
        for name, on in levers.items():
            if on and name not in LEVERS:
                raise ValueError(f"has no lever {name!r}: there are {', '.join(LEVERS)}")
        return {name: levers.get(name, False) for name in LEVERS}

    @model_serializer
    def _serialized(self, info: SerializationInfo) -> dict[str, bool]:
        return {name: on for name, on in self.root.items() if on or not info.exclude_defaults}

    def names(self) -> list[str]:
        """The levers that are on, in the order of the catalogue."""
        return [name for name, on in self.root.items() if on]


# Fields of a cell's training that are no part of its id: they do not change what is computed.
_NOT_IN_ID = {"data", "grid", "keep"}


class Cell(BaseModel):
    """A model, a method with its settings and levers, a shape, precision, optimizer, device and seed.

    batch_size, micro_batch_size: in samples; a step has batch_size / micro_batch_size forward and backward passes
        and one optimizer step.  sequence_length: tokens per sample.
    method_params: the method's settings that differ from its defaults.
    lever_params: by lever, its settings that differ from its defaults.
    head: the model's head, a name in catalogue.backbones.HEADS; None: the first in the backbone's entry.
    packing: whether the samples of a micro-batch are laid end to end in one row, without padding.
    world_size: processes (ranks) that share a training step; each has batch_size samples of its own.
    parallelism: how they share it, a name in catalogue.parallelisms.PARALLELISMS; None: there is one process.
    batch: the user's own function that makes the batch, as `module:function`; None: a batch is made for the model.
    device: `counted`, `cuda` (any GPU), `cuda:PROFILE` (the card of a device profile), or `predicted:PROFILE`.
    training: for a fine-tuning run, the task and how the cell is trained on it until it is scored; None: only steps are
        measured.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str
    model_config_overrides: dict[str, Any] = Field(default_factory=dict)
    method: str
    method_params: dict[str, Any] = Field(default_factory=dict)
    levers: Levers = Levers()
    lever_params: dict[str, dict[str, Any]] = Field(default_factory=dict)
    batch_size: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    sequence_length: int = Field(ge=1)
    precision: str = "fp32"
    head: str | None = None
    attention_requested: str = "sdpa"
    optimizer: str = "adamw"
    optimizer_impl: str | None = None
    packing: bool = False
    device: str = "counted"
    seed: int = 0
    training: Training | None = None
    batch: str | None = None
    world_size: int = Field(default=1, ge=1)
    parallelism: str | None = None

    @classmethod
    def of(cls, method: str, **fields: Any) -> Cell:
        """A cell of `method`, such as "lora+checkpoint"; it has one micro-batch unless `micro_batch_size` is given."""
        (name, settings), *levers = read_label("Cell.of", method)
        defaults: dict[str, Any] = {
            "method": name,
            "method_params": settings,
            "levers": Levers.of(lever for lever, _ in levers),
            "lever_params": {lever: params for lever, params in levers if params},
            "micro_batch_size": fields.get("batch_size"),
        }
        return cls(**(defaults | fields))

    @cached_property
    def cell_id(self) -> str:
        """Hash of the fields that differ from their defaults, so that a field added later leaves old ids unchanged.

        A folder or file is hashed by its location, however its path is written. Of the training, `data` (its folder),
        `grid` (which learning rates each seed tries) and `keep` (which weights are kept) do not count.
        """
        content = self.model_dump(mode="json", exclude_defaults=True, exclude={"training": _NOT_IN_ID})
        name, random = split_name(self.model)
        if is_path(name) and name not in MODELS and not is_factory(name):
            content["model"] = place(name) + (RANDOM if random else "")
        if self.training is not None and is_own(self.training.task):
            content["training"] |= {"task": place(self.training.task)}
        # The version of a method's defaults, where they have changed since records were first written: records of
        # other defaults must have another id.
        defaults_version = getattr(METHODS[self.method].settings, "defaults", None)
        return digest(content if defaults_version is None else content | {"defaults": defaults_version})

    @property
    def weights(self) -> str:
        """`random`, `pretrained`, or `own`: whatever weights the user's own function gives the model."""
        if is_factory(self.model):
            return "own"
        return "random" if self.model.endswith("@random") else "pretrained"

    @property
    def parts(self) -> list[Part]:
        """The method and then each lever that is on, with the settings that differ from the defaults."""
        levers = [Part(name, self.lever_params.get(name, {})) for name in self.levers.names()]
        return [Part(self.method, self.method_params), *levers]

    @property
    def method_label(self) -> str:
        """The method as tables and plots name it: `lora+checkpoint`, `meft1(adapter_size=8)+checkpoint(every=2)`."""
        return joined(self.parts)

    @property
    def model_label(self) -> str:
        return label_of(self.model, self.model_config_overrides)

    @property
    def label(self) -> str:
        """MODEL/METHOD/bBATCH/sLENGTH, and what differs from the defaults; the globs of budgets match it."""
        fields = type(self).model_fields
        rest = [
            WORDS.get(name) or str(getattr(self, name))
            for name in IN_LABEL
            if getattr(self, name) not in (fields[name].default, OWN_ATTENTION)
        ]
        if self.micro_batch_size != self.batch_size:
            rest.insert(0, f"mb{self.micro_batch_size}")
        if self.parallelism is not None:
            rest.append(f"{self.parallelism}-x{self.world_size}")
        if self.batch is not None:
            rest.append(self.batch)
        if self.training is not None:
            rest.append(self.training.label)
        if self.seed != fields["seed"].default:
            rest.append(f"seed{self.seed}")
        return "/".join([self.model_label, self.method_label, f"b{self.batch_size}", f"s{self.sequence_length}", *rest])

    def settings(self) -> Any:
        """The method's validated settings, with defaults filled in."""
        return METHODS[self.method].settings.model_validate(self.method_params)

    def lever_settings(self) -> dict[str, Settings]:
        """The validated settings of each lever that is on and has any, with defaults filled in."""
        schemas = {name: LEVERS[name].settings for name in self.levers.names()}
        return {
            name: schema.model_validate(self.lever_params.get(name, {})) for name, schema in schemas.items() if schema
        }

    def recorded(self) -> dict[str, Any]:
        """The `cell` of a record (docs/measuring.md 2): all fields, with all settings of the method.

        parts: beside these, the method and its levers with the settings that differ from the defaults.
        """
        full = self.model_dump(mode="json")
        full["method_params"] = self.settings().in_full()
        full["model_config"] = full.pop("model_config_overrides")
        full["lever_params"] = {name: settings.in_full() for name, settings in self.lever_settings().items()}
        parts = [part.recorded() for part in self.parts]
        observed = {"model_revision": None, "attention_used": None}
        return full | {"weights": self.weights, **observed, "label": self.label, "parts": parts}


def value_on(cell: Cell, axis: str) -> Any:
    """The value of a cell on an axis, or of its field of that name; None: of training, which the cell lacks."""
    return getattr(cell.training if axis in OF_TRAINING else cell, FIELDS.get(axis, axis), None)
