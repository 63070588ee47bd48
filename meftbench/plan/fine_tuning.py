"""What a task says of a cell beside its training: which head is trained, and how long a sample is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from meftbench.catalogue.backbones import BACKBONES
from meftbench.catalogue.tasks import Task, find_task
from meftbench.errors import UserError
from meftbench.plan.factories import is_factory
from meftbench.plan.models import head_of, image_tokens, known_config
from meftbench.plan.training import Training, Trainings, rates_for
from meftbench.strict_yaml import Document, KeyPath, name_place, named, validated_part

# By the kind of a task, the heads that can answer it; the first that the model's backbone has is taken.
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
    """`values` of a point that has a task, with `training`, `head` and `sequence_length`: one for each learning rate.

    The length: what the task's entry says, or the point, or else the task's own.
    Raises UserError: an unknown task or setting, a head that cannot answer it, no learning rate for the method.
    """
    place = places["task"]
    name, settings = named(document, place, values["task"], "task")
    task = find_task(document.where(name_place(place, values["task"])), name)
    if "task" in settings:
        raise document.error((*place, "task"), "names a task again", f"leave it out: this is {name!r}")
    said = {"sequence_length": settings.pop("sequence_length", None)}
    length = validated_part(document, place, said, _Length).sequence_length
    model, beside = named(document, places.get("model", place), values["model"], "model")
    method = named(document, places.get("method", place), values["method"], "method")[0]
    config = known_config(model, beside.get("config") or {}) or {}
    # The head that a function of the user's own gives its model is seen when it is called.
    own = is_factory(model)
    head = values.get("head") or (None if own else _head(document.where(place), task, config))
    if head is not None and head not in HEADS_FOR[task.kind]:
        cure = f"write {' or '.join(HEADS_FOR[task.kind])}"
        raise document.error(places.get("head", place), f"head {head!r} cannot answer {name!r}", cure)
    fixed = image_tokens(config)
    length = length or values.get("sequence_length") or fixed or task.sequence_length
    # What the model has anyway is not said, as in cells without a task.
    usual = head_of(str(config.get("model_type")), None)
    point = {**values, "head": values.get("head") or (None if head == usual else head), "sequence_length": length}
    for training in _of_each_rate(document, places, name, settings, trainings, method, values.get("learning_rate")):
        if own and task.kind != "images" and training.tokenizer is None:
            cure = "name its folder or hub id: `training: {tokenizer: ...}`, or --tokenizer"
            raise document.error(places.get("model", place), f"{model!r} brings no tokenizer for {name!r}", cure)
        yield {name: value for name, value in point.items() if value is not None} | {"training": training}


def _of_each_rate(
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
    chosen = [rate] if rate is not None else list(rates_for(rates, method))
    if not chosen:
        raise document.error(("training", "learning_rate"), f"no pattern matches {method!r}", 'add "*": 5.0e-4')
    said = trainings.model_dump(exclude={"learning_rate"})
    for learning_rate in chosen:
        yield validated_part(
            document, place, said | settings | {"task": task, "learning_rate": learning_rate}, Training
        )


def _head(where: str, task: Task, config: dict[str, Any]) -> str:
    """The head that answers the task on this backbone; the usual one where the backbone is not known yet."""
    answers = HEADS_FOR[task.kind]
    entry = BACKBONES.get(str(config.get("model_type")))
    if entry is None:
        return answers[0]
    found = next((head for head in answers if head in entry.heads), None)
    if found is None:
        what = f"task {task.name!r} needs a head {' or '.join(answers)}, and {config['model_type']} has none"
        raise UserError(where, what, "choose another task or model")
    return found
