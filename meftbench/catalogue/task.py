"""What a task is, and how a user's own folder of data describes one. Nothing here reads rows or loads torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from meftbench.errors import UserError
from meftbench.strict_yaml import read, validated

Kind = Literal["classification", "regression", "choices", "images"]
Score = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]

TASK_FILE = "task.yaml"
# Other names that a split may have in a folder.
ALIASES = {"validation": ("valid", "val", "dev")}
IMAGE_COLUMN = "image"
SCORES: dict[Kind, tuple[Score, ...]] = {
    "classification": ("accuracy",),
    "regression": ("pearson", "spearman"),
    "choices": ("accuracy",),
    "images": ("accuracy",),
}


@dataclass(frozen=True)
class Task:
    """A task: where its data are, which columns are used, and by which scores answers are judged.

    hub: path and configuration of the data set on the hub; None: it is not there.  revision: where the data are not on
        the hub's main branch.
    folder: below a data root; absolute for a user's own folder.
    evaluations: the hub's name of each split, by its name here. The first one chooses the checkpoint; splits without
        labels are not listed.
    texts: the columns of a question; for images the column of the image.  label: the column of the answer.
    choices: the columns of the choices: one that holds a list (or the hub's {text, label}), or one for each choice.
        Where `label` is among them, that column is the correct choice.
    template: the prompt of a decoder, with columns in braces.
    labels: class names in the order of their ids; None: no classes, or those that the data have.
    scores: the first is the metric `score`.  rows: how many each split has as published, to report differences.
    departures: how known files differ from the published split, by their SHA-256.
    sequence_length: in tokens; None for images.
    """

    name: str
    family: Literal["glue", "qa", "image", "own"]
    kind: Kind
    summary: str
    hub: tuple[str, str | None] | None
    folder: str
    texts: tuple[str, ...]
    label: str
    scores: tuple[Score, ...]
    licence: str
    train: str = "train"
    evaluations: Mapping[str, str] = field(default_factory=lambda: {"validation": "validation"})
    labels: tuple[str, ...] | None = None
    choices: tuple[str, ...] = ()
    template: str = ""
    rows: Mapping[str, int] = field(default_factory=dict)
    departures: Mapping[str, str] = field(default_factory=dict)
    sequence_length: int | None = 128
    revision: str | None = None


def _tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_tuple)]


class TaskFile(BaseModel):
    """`task.yaml` in a user's own folder, beside train.jsonl and validation.jsonl (or others that sources.py reads)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    kind: Kind
    texts: Names = Field(min_length=1, max_length=2)  # for images: the column of the image
    label: str
    labels: Names | None = Field(default=None, validate_default=True)
    choices: Names = Field(default=(), validate_default=True)
    template: str | None = None
    scores: Annotated[tuple[Score, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)] | None = (
        None
    )
    sequence_length: int = Field(default=128, ge=1)
    licence: str = "not stated"

    @field_validator("texts")
    @classmethod
    def _one_image(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if info.data.get("kind") == "images" and len(value) > 1:
            raise ValueError("must be one column where kind is images")
        return value

    @field_validator("choices")
    @classmethod
    def _of_its_kind(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if bool(value) != (info.data.get("kind") == "choices"):
            raise ValueError("name the columns of the choices where kind is choices, and only there")
        return value

    @field_validator("labels")
    @classmethod
    def _has_classes(cls, value: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        if value is not None and (info.data.get("kind") not in ("classification", "images") or len(value) < 2):
            raise ValueError("must be two class names or more, where kind is classification or images")
        if repeated := [name for name in value or () if (value or ()).count(name) > 1]:
            raise ValueError(f"names the class {repeated[0]!r} twice")
        return value

    @field_validator("template")
    @classmethod
    def _of_texts(cls, value: str | None, info: ValidationInfo) -> str | None:
        for _, name, _, _ in Formatter().parse(value or ""):
            if name is not None and name not in info.data.get("texts", ()):
                raise ValueError(f"names {{{name}}}, which is not among texts")
        return value

    @field_validator("scores")
    @classmethod
    def _can_be_computed(cls, value: tuple[Score, ...] | None, info: ValidationInfo) -> tuple[Score, ...] | None:
        correlations = {"pearson", "spearman"}
        regression = info.data.get("kind") == "regression"
        if value is not None and (not value or any((score in correlations) != regression for score in value)):
            raise ValueError("pearson and spearman are for regression, accuracy, f1 and matthews for the others")
        return value


def own_task(where: str, folder: Path) -> Task:
    """The task of a user's own folder: as its task.yaml describes it, or images where it has folders train/CLASS.

    Raises UserError: when the folder does not exist, has neither of the two, or task.yaml has a fault (with its line).
    """
    if not folder.is_dir():
        raise UserError(where, f"no task folder {str(folder)!r}", "check the path, or name a task")
    if (folder / TASK_FILE).is_file():
        return _of_file(folder, validated(read(folder / TASK_FILE, "kind: classification"), TaskFile))
    train = folder / "train"
    if train.is_dir() and any(entry.is_dir() for entry in train.iterdir()):
        return Task(
            name=folder.name,
            family="own",
            kind="images",
            summary=f"images in {folder}",
            hub=None,
            folder=str(folder.resolve()),
            texts=(IMAGE_COLUMN,),
            label="label",
            scores=SCORES["images"],
            licence="not stated",
            evaluations=_evaluations(folder),
            sequence_length=None,
        )
    cure = "write kind, texts and label into a task.yaml there; images lie in train/CLASS/ and validation/CLASS/"
    raise UserError(where, f"task folder {str(folder)!r} has no {TASK_FILE} and no images", cure)


def _of_file(folder: Path, content: TaskFile) -> Task:
    prompt = content.template or "\n".join(f"{{{column}}}" for column in content.texts)
    return Task(
        name=folder.name,
        family="own",
        kind=content.kind,
        summary=f"{content.kind} in {folder}",
        hub=None,
        folder=str(folder.resolve()),
        texts=content.texts,
        label=content.label,
        scores=content.scores or SCORES[content.kind],
        licence=content.licence,
        evaluations=_evaluations(folder),
        labels=content.labels,
        choices=content.choices,
        template=prompt if content.kind == "choices" else "",
        sequence_length=None if content.kind == "images" else content.sequence_length,
    )


def _evaluations(folder: Path) -> dict[str, str]:
    """Those of validation and test that exist; where neither does, validation, whose absence is reported later."""
    names = [
        name
        for name in ("validation", "test")
        if any(
            (folder / split).is_dir() or any(folder.glob(f"{split}[.-]*")) for split in (name, *ALIASES.get(name, ()))
        )
    ]
    return {name: name for name in names or ["validation"]}
