"""What a fine-tuning run trains on, and how: `tasks` and `training` of a suite, beside the axes that all cells have."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

# `type` in the status_detail of a record whose training was skipped, since another learning rate did better.
NOT_CHOSEN = "RateNotChosen"
# An environment variable by which the runner tells the process of a training the cell's folder in the run, which has
# its checkpoints until it ends and then the weights that are kept.
CELL_FOLDER = "MEFTBENCH_CELL_FOLDER"
BEST = "best"  # name of the kept weights in that folder
# An environment variable that is "tasks" where the worker is to import what trainings need before the first cell.
PRELOAD = "MEFTBENCH_PRELOAD"
# An environment variable in which a user may name the folder of all data, for suites that do not name one.
DATA_VARIABLE = "MEFTBENCH_DATA"
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # YAML knows lists only


class _Settings(BaseModel):
    """How a cell is trained on a task. The defaults are the settings of the paper's code for BERT (docs/paper.md).

    data: a folder with the data; None: MEFTBENCH_DATA, or the Hugging Face hub. It is no part of a cell's id, as the
        record has a digest of the rows that were used.
    tokenizer: a folder or hub id; None: the model's own, even where its weights are random.
    epochs: passes over the training rows.  max_steps: the number of optimizer steps, in place of `epochs`.
    schedule: of the learning rate after warm-up.  warmup_ratio: the share of the steps that are warm-up.
    clip: the largest norm of the gradient; None: gradients are not clipped.
    train_examples, evaluation_examples: how many rows of each split are used, the same for every seed; None: all.
    evaluations: how often the model is scored on validation, evenly spread; the best checkpoint's score is reported.
    patience: training ends after so many evaluations without a better score; None: it does not end early.
    batches: `longest` pads a batch to its longest row; `full` pads it to the cell's sequence_length.
    group_by_length: whether batches are made of rows of similar lengths.
    length_normalised: whether a language model's log likelihood of a choice is divided by the choice's tokens.
    ordinary: whether it is trained with reference autograd (the same equations under torch's autograd, nothing
        recomputed), for a comparison with reversal.
    grid: `every-seed`: every seed tries all learning rates; `first-seed`: only the first does, others take its best.
    keep: `best`: the trained weights of the best checkpoint stay in the run folder; `nothing`: no weights do.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    data: str | None = None
    tokenizer: str | None = None
    epochs: Positive = 3.0
    max_steps: Count | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = Field(default=0.06, ge=0, lt=1)
    weight_decay: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    adam_betas: Annotated[tuple[float, float], BeforeValidator(_pair)] = (0.9, 0.98)
    adam_epsilon: Positive = 1e-6
    clip: Positive | None = 1.0
    train_examples: Count | None = None
    evaluation_examples: Count | None = None
    evaluations: Count = 4
    patience: Count | None = None
    batches: Literal["longest", "full"] = "longest"
    group_by_length: bool = False
    length_normalised: bool = True
    ordinary: bool = False
    grid: Literal["every-seed", "first-seed"] = "every-seed"
    keep: Literal["nothing", "best"] = "nothing"


class Training(_Settings):
    """A task and the settings of one training on it. learning_rate: the highest of the schedule."""

    task: str
    learning_rate: Positive = 5e-4

    @property
    def label(self) -> str:
        """Its part of a cell's label: `rte/lr0.0005`, then the settings that differ from the defaults."""
        return "/".join([self.task, f"lr{self.learning_rate:g}", *self.own])

    @property
    def own(self) -> list[str]:
        """The settings, beside task and learning rate, that differ from the defaults: `epochs=1`, `ordinary`."""
        differences = []
        fields = type(self).model_fields
        for name in fields:
            value = getattr(self, name)
            if name not in ("task", "data", "learning_rate", "grid", "keep") and value != fields[name].default:
                shown = f"{value:g}" if isinstance(value, float) else value
                differences.append(name if value is True else f"{name}={shown}")
        return differences


def _numbers(value: Any) -> Any:
    """Learning rates as a list, also a single one; of a mapping from patterns of methods, each of its values."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return value if isinstance(value, list) else [value]


Rates = Annotated[list[Positive], Field(min_length=1)]


class Trainings(_Settings):
    """`training` of a suite: the settings for all its tasks.

    learning_rate: a number, a list, or a mapping from patterns of methods ("meft*") to either, of which the last that
        matches counts.
    """

    learning_rate: Annotated[
        Rates | dict[str, Rates],
        BeforeValidator(_numbers, json_schema_input_type=float | list[float] | dict[str, float | list[float]]),
    ] = Field(default_factory=lambda: [5e-4])


def rates_for(rates: list[float] | dict[str, list[float]], method: str) -> Iterable[float]:
    """The learning rates for a method label such as `lora+checkpoint`; none if no pattern matches."""
    if isinstance(rates, list):
        return rates
    matching_rates: Iterable[float] = ()
    for pattern, values in rates.items():
        if fnmatchcase(method, pattern):
            matching_rates = values
    return matching_rates
