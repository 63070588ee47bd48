"""From a point with a task to the points of its fine-tuning runs: the training, the head and the sequence length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from meftbench.catalogue.backbones import BACKBONES
from meftbench.catalogue.tasks import Task, find_task
from meftbench.errors import UserError
from meftbench.plan.factories import is_factory
from meftbench.plan.models import check_model, head_of, image_tokens, known_config
from meftbench.plan.point import config_of
from meftbench.plan.training import Training, Trainings, rates_for
from meftbench.strict_yaml import Document, KeyPath, name_place, named, validated_part

# The heads that can answer each kind of task; the first that the model's backbone has is used.
HEADS_FOR = {
    "classification": ("classification",),
    "regression": ("classification",),
    "choices": ("multiple_choice", "causal_lm"),
    "images": ("image_classification",),
}


class _Length(BaseModel):
    model_config = ConfigDict(strict=True)

    sequence_length: int | None = Field(default=None, ge=1)


def with_training(
    document: Document, places: Mapping[str, KeyPath], values: Mapping[str, Any], trainings: Trainings
) -> Iterator[dict[str, Any]]:
    """The `values` of a point with a task, once for each learning rate, with `training`, `head` and `sequence_length`.

    The sequence length is the first of these that is known: that of the task's entry in the suite, that of the point,
    the tokens of an image, the default of the task.
    Raises UserError: the task or a setting is unknown, the head cannot answer the task, no learning rate is given for
    the method, or the user's own model has no tokenizer.
    """
    place = places["task"]
    name, settings = named(document, place, values["task"], "task")
    task = find_task(document.where(name_place(place, values["task"])), name)
    if "task" in settings:
        raise document.error((*place, "task"), "names a task again", f"leave it out: this is {name!r}")
    entry = {"sequence_length": settings.pop("sequence_length", None)}
    length = validated_part(document, place, entry, _Length).sequence_length
    model_place = places.get("model", place)
    model, model_settings = named(document, model_place, values["model"], "model")
    overrides = config_of(document, model_place, model_settings)
    check_model(document.where(name_place(model_place, values["model"])), model, overrides)
    method = named(document, places.get("method", place), values["method"], "method")[0]
    config = known_config(model, overrides) or {}
    # Which head the user's own function gives its model is seen only when the function is called.
    own_model = is_factory(model)
    head = values.get("head") or (None if own_model else _head(document.where(place), task, config))
    if head is not None and head not in HEADS_FOR[task.kind]:
        cure = f"write {' or '.join(HEADS_FOR[task.kind])}"
        raise document.error(places.get("head", place), f"head {head!r} cannot answer {name!r}", cure)
    tokens_of_image = image_tokens(config)
    length = length or values.get("sequence_length") or tokens_of_image or task.sequence_length
    # The default head of the model is left out, as in cells without a task.
    default = head_of(str(config.get("model_type")), None)
    point = {**values, "head": values.get("head") or (None if head == default else head), "sequence_length": length}
    for training in _trainings(document, places, name, settings, trainings, method, values.get("learning_rate")):
        if own_model and task.kind != "images" and training.tokenizer is None:
            cure = "name its folder or hub id: `training: {tokenizer: ...}`, or --tokenizer"
            raise document.error(places.get("model", place), f"{model!r} brings no tokenizer for {name!r}", cure)
        yield {name: value for name, value in point.items() if value is not None} | {"training": training}


def _trainings(
    document: Document,
    places: Mapping[str, KeyPath],
    task: str,
    settings: dict[str, Any],
    trainings: Trainings,
    method: str,
    rate: float | None,
) -> Iterator[Training]:
    place = places["task"]
    rates = trainings.learning_rate
    if "learning_rate" in settings:
        checked = validated_part(document, place, {"learning_rate": settings.pop("learning_rate")}, Trainings)
        rates = checked.learning_rate
    chosen_rates = [rate] if rate is not None else list(rates_for(rates, method))
    if not chosen_rates:
        raise document.error(("training", "learning_rate"), f"no pattern matches {method!r}", 'add "*": 5.0e-4')
    settings_of_all = trainings.model_dump(exclude={"learning_rate"})
    for learning_rate in chosen_rates:
        yield validated_part(
            document, place, settings_of_all | settings | {"task": task, "learning_rate": learning_rate}, Training
        )


def _head(where: str, task: Task, config: dict[str, Any]) -> str:
    """The first head that can answer the task and that the backbone has; where the backbone is not known, the first.

    Raises UserError: the backbone has no such head.
    """
    answers = HEADS_FOR[task.kind]
    entry = BACKBONES.get(str(config.get("model_type")))
    if entry is None:
        return answers[0]
    available = next((head for head in answers if head in entry.heads), None)
    if available is None:
        what = f"task {task.name!r} needs a head {' or '.join(answers)}, and {config['model_type']} has none"
        raise UserError(where, what, "choose another task or model")
    return available
