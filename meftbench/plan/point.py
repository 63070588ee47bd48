"""From one point of a suite, or of the command line, to its cell, with every value checked (docs/measuring.md 1)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from meftbench.catalogue.combinations import check_attention, check_together
from meftbench.catalogue.labels import read_label, split_list
from meftbench.catalogue.levers import LEVERS, settings_for
from meftbench.catalogue.methods import METHODS
from meftbench.catalogue.peft_methods import NOT_APPLICABLE, positions_taken
from meftbench.catalogue.profiles import CARD, PREDICTED, find_profile
from meftbench.catalogue.settings import Settings
from meftbench.errors import UserError, unknown
from meftbench.plan.axes import AXES, FIELDS, OF_TRAINING, Axis
from meftbench.plan.cell import Cell, Levers
from meftbench.plan.config_fields import check_fields
from meftbench.plan.config_values import check_values
from meftbench.plan.distributing import check_distributed
from meftbench.plan.factories import check_arguments, check_own, is_factory
from meftbench.plan.models import attention_of, check_head, check_method, check_model, check_sequence_length
from meftbench.plan.optimizing import check_optimizer, check_own_optimizer
from meftbench.plan.packing import check_packing
from meftbench.plan.training import Positive
from meftbench.strict_yaml import Document, KeyPath, name_place, named, settings_of, validated, validated_part

Named = Any  # "meft1", or {name: meft1, adapter_size: 8}
_TYPES: dict[str, Any] = {
    "named": Named,
    "size": Annotated[int, Field(ge=1)],
    "natural": Annotated[int, Field(ge=0)],
    "positive": Positive,
    "flag": bool,
    "text": str,
}


def type_of(axis: Axis) -> Any:
    """The type of one value of an axis, as pydantic checks it."""
    return Literal[tuple(axis.known or ())] if axis.kind == "choice" else _TYPES[axis.kind]


class Strict(BaseModel):
    """A model that refuses unknown keys and does not convert values to other types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_POINT_FIELDS: dict[str, Any] = {name: (type_of(axis) | None, None) for name, axis in AXES.items()}


class Point(create_model("Axes", __base__=Strict, **_POINT_FIELDS)):  # type: ignore[misc]
    """A value for each axis of a cell; None: not given here."""


MOST_TOKENS = 2**40  # of a step
MOST_SEED = 2**64 - 1  # of torch
# Axes whose values become fields of a cell without being changed.
_UNCHANGED_AXES = AXES.keys() - {"model", "method", *OF_TRAINING}
# The path of each axis' value in the document; "": the path of the point itself.
Places = dict[str, KeyPath]


def cell_at(document: Document, places: Places, values: dict[str, Any]) -> Cell:
    """The cell of a point. Raises UserError: a value is wrong or missing, with the place of the first such value."""
    root = places.get("", ("grid",))
    require(document, root, values, "model", "method", "batch_size")
    place = {name: places.get(name, (*root, name)) for name in Point.model_fields}
    model, model_settings = named(document, place["model"], values["model"], "model")
    overrides = config_of(document, place["model"], model_settings)
    check_arguments(document.where((*place["model"], "config")), overrides)
    if "sequence_length" not in values and not is_factory(model):  # that of an image follows from its configuration
        check_values(document, (*place["model"], "config"), overrides)
    require(document, root, values, "sequence_length")
    method, params, levers, lever_params = parse_method(document, place["method"], values["method"])
    model_place = document.where(name_place(place["model"], values["model"]))
    method_place = document.where(name_place(place["method"], values["method"]))
    batch = values["batch_size"]
    micro = values.get("micro_batch_size", batch)
    if batch % micro:
        what = f"micro_batch_size {micro} does not divide batch_size {batch}"
        raise document.error(place["micro_batch_size"], what, f"write a divisor of {batch}")
    if batch * values["sequence_length"] > MOST_TOKENS:
        what = f"{batch:,} × {values['sequence_length']:,} tokens are more than any device has held"
        raise document.error(place["batch_size"], what, "write fewer")
    if values.get("seed", 0) > MOST_SEED:
        raise document.error(place["seed"], f"{values['seed']:,} is no seed of torch", f"write at most {MOST_SEED:,}")
    refuse_unknown(document, place, values)
    if METHODS[method].settings.model_validate(params).whole and values.get("precision") == "nf4":
        cure = "choose another method, or precision: bf16"
        raise document.error(place["precision"], "4-bit weights cannot be trained", cure)
    check_optimizer(document, place, values, levers.names())
    _check_precision(document, place["precision" if "precision" in values else "method"], levers, values)
    device = parse_device(document.where(place["device"]), values.get("device", Cell.model_fields["device"].default))
    _check_training(document, place, values, device)
    check_distributed(document, place, values, method, levers.names())
    if not METHODS[method].backward:
        check_own_optimizer(document, place, values, method)
    check_model(model_place, model, overrides)
    check_own(document, place, model, values)
    if not is_factory(model):
        check_fields(document, (*place["model"], "config"), model, overrides)
        check_values(document, (*place["model"], "config"), overrides)
    check_head(document.where(place["head"]), model, overrides, values.get("head"))
    check_method(method_place, model, overrides, values.get("head"), method)
    taken = positions_taken(method, params)
    check_sequence_length(document.where(place["sequence_length"]), model, overrides, values["sequence_length"], taken)
    attention = attention_of(document.where(place["attention"]), model, overrides, values.get("attention"))
    if values.get("packing"):
        where = document.where(place["packing"])
        check_packing(where, model, overrides, values.get("head"), method, attention, batch=values.get("batch"))
        if values.get("training") is not None and values["training"].batches == "full":
            raise UserError(where, "rows without padding cannot be padded to batches: full", "leave one of them out")
    check_attention(method_place, {lever: lever_params.get(lever, {}) for lever in levers.names()}, attention)
    return Cell(
        model=model,
        model_config_overrides=overrides,
        method=method,
        method_params=params,
        levers=levers,
        lever_params=lever_params,
        training=values.get("training"),
        **{FIELDS[name]: value for name, value in values.items() if name in _UNCHANGED_AXES}
        | {"micro_batch_size": micro, "attention_requested": attention},
    )


def _check_precision(document: Document, place: KeyPath, levers: Levers, values: dict[str, Any]) -> None:
    """Raises UserError: a lever does not work in the cell's precision."""
    precision = values.get("precision", Cell.model_fields["precision"].default)
    for lever in levers.names():
        known = LEVERS[lever].precisions
        if known is not None and precision not in known:
            raise document.error(place, f"{lever} does not work in {precision}", f"write one of: {', '.join(known)}")


def _check_training(document: Document, place: Places, values: dict[str, Any], device: str) -> None:
    """Raises UserError: the cell cannot be trained on its device in its precision, or its head needs a task."""
    if values.get("training") is None:
        if values.get("head") == "multiple_choice":
            raise document.error(place["head"], "needs a task, whose choices it reads", "name one under `tasks`")
    elif device.startswith(PREDICTED):
        raise document.error(place["device"], "a training cannot be predicted", "write device: counted or cuda")
    elif values.get("precision") == "fp16-autocast" and device == "counted":
        raise document.error(place["precision"], "fp16 is not trained in on a CPU", "write precision: bf16-autocast")


def cell_of(verb: str, values: dict[str, Any]) -> Cell:
    """The cell of the values on the command line of `verb`. Raises UserError: as `cell_at`, with options as places."""
    document = Document(Path(verb), values, {})
    checked_values = validated(document, Point).model_dump(exclude_none=True)
    return cell_at(document, {name: (name,) for name in Point.model_fields}, checked_values)


def config_of(document: Document, place: KeyPath, model_settings: dict[str, Any]) -> dict[str, Any]:
    """The fields under `config` of a model's entry. Raises UserError: they are not a mapping, or the entry has a key
    other than `name` and `config`."""
    for key in model_settings:
        if key != "config":
            raise unknown(document.where((*place, key), key=True), "key", key, ["name", "config"])
    fields = model_settings.get("config", {})
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        what = f"{fields!r} is no mapping of fields to values"
        raise document.error((*place, "config"), what, "write config: {num_hidden_layers: 4}")
    return dict(fields)


def refuse_unknown(document: Document, places: Places, values: dict[str, Any]) -> None:
    """Raises UserError: a value is unknown on an axis that has known values, such as precision or optimizer."""
    for name, axis in AXES.items():
        if axis.known is not None and name in values and values[name] not in axis.known:
            raise unknown(document.where(places[name]), name, values[name], axis.known)


def parse_device(where: str, device: str) -> str:
    """The device, checked: `counted`, `cuda`, `cuda:PROFILE` (the card of a device profile) or `predicted:PROFILE`.

    Raises UserError: it is anything else."""
    if device.startswith((PREDICTED, CARD)):
        find_profile(device.partition(":")[2], where)
    elif device not in ("counted", "cuda"):
        raise unknown(where, "device", device, ["counted", "cuda", f"{CARD}PROFILE", f"{PREDICTED}PROFILE"])
    return device


def parse_method(
    document: Document, path: KeyPath, value: Any
) -> tuple[str, dict[str, Any], Levers, dict[str, dict[str, Any]]]:
    """The method, its settings that differ from their defaults, its levers (memory optimisations), and by lever its
    settings that differ from their defaults.

    value: such as "lora+checkpoint(every=2)" or {name: meft1, adapter_size: 8}; settings may be in both forms at once.
    Raises UserError: a name or setting is unknown, a lever or setting is named twice, or the method refuses a lever.
    """
    text, settings = named(document, path, value, "method")
    place = name_place(path, value)
    if len(labels := split_list(text)) > 1:
        cure = f"write them as a list: [{', '.join(labels)}]" if document.lines else "name one here"
        raise document.error(place, f"{text!r} is {len(labels)} methods", cure)
    (name, in_brackets), *levers = read_label(document.where(place), text)
    if name in NOT_APPLICABLE:
        raise document.error(place, f"{name} does not apply: {NOT_APPLICABLE[name].reason}", "choose another method")
    if name not in METHODS:
        raise unknown(document.where(place), "method", name, METHODS)
    lever_names = [lever for lever, _ in levers]
    for lever in lever_names:
        if lever not in LEVERS:
            raise unknown(document.where(place), "lever", lever, LEVERS)
        if lever_names.count(lever) > 1:
            raise document.error(place, f"lever {lever!r} is named twice", "name it once")
    for key in in_brackets.keys() & settings.keys():
        raise document.error((*path, key), f"is also in the brackets of {text!r}", "name it once")
    schema = METHODS[name].settings
    where = document.where(place)
    if in_brackets:
        settings_of(where, schema, in_brackets)
    checked = validated_part(document, path, in_brackets | settings, schema)
    lever_params = {lever: _changed(settings_for(where, lever, given)) for lever, given in levers if given}
    settings_of_levers = {lever: lever_params.get(lever, {}) for lever in lever_names}
    check_together(f"{where}: {text}" if levers else where, name, settings_of_levers)
    return (
        name,
        _changed(checked),
        Levers.of(lever_names),
        {lever: params for lever, params in lever_params.items() if params},
    )


def _changed(settings: Settings) -> dict[str, Any]:
    """The settings that differ from their defaults, as plain values under their names in a suite."""
    return settings.model_dump(mode="json", by_alias=True, exclude_defaults=True)


def require(document: Document, root: KeyPath, values: dict[str, Any], *names: str) -> None:
    """Raises UserError: one of `names` is not among `values`. root: the path of the point."""
    for required in names:
        if required not in values:
            raise document.error((*root, required), "is missing", f"name a {required} here or under `defaults`")
