"""What a quality cell trains on, and how: `tasks:` and `training:` of a suite, beside the axes that every cell has."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

# `type` in a record's status_detail of a training that was left out: another learning rate did better.
NOT_CHOSEN = "RateNotChosen"
# What the runner tells the process of a training by its environment: the cell's folder in its run, where checkpoints
# are kept until it ends and what is kept of it; and what to import before the first.
CELL_FOLDER = "MEFTBENCH_CELL_FOLDER"
BEST = "best"  # the weights that are kept, in that folder
PRELOAD = "MEFTBENCH_PRELOAD"
# What a user names the folder of all data by, where a suite does not.
DATA_VARIABLE = "MEFTBENCH_DATA"
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # YAML knows lists only


class _Settings(BaseModel):
    """How a task is trained on; defaults are the settings of the paper's code for BERT (docs/paper.md).

    data: a folder with the data; None: MEFTBENCH_DATA, or the Hugging Face hub. It is no part of a cell's identity: the
        record holds a digest of the rows that were used.
    tokenizer: a folder or hub id; None: the model's own, also where weights are random.
    schedule: of the learning rate, from its highest after warm-up down to 0.
    epochs: passes over the training rows; max_steps: optimizer steps, which end it earlier or later than epochs.
    train_examples, evaluation_examples: rows used of each split, the same whatever the seed; None: all.
    evaluations: how often validation is scored, evenly spread; the best checkpoint by the task's score is reported.
    patience: evaluations without a better score after which training ends; None: it does not end early.
    batches: `longest` pads to the longest of a batch, as training does; `full` to the cell's sequence_length.
    length_normalised: of questions to a language model: likelihood of a choice divided by its tokens.
    ordinary: the same equations under reference autograd, nothing recomputed: what reversal is held against.
    grid: `every-seed` tries all learning rates with every seed; `first-seed` with the first, others take its best.
    keep: `nothing` of the weights, or the `best` adapter in the run folder.
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
    """A task, and one training on it. learning_rate: at its highest."""

    task: str
    learning_rate: Positive = 5e-4

    @property
    def label(self) -> str:
        """`rte/lr0.0005`, and what else differs from the defaults, as a cell's label has it."""
        return "/".join([self.task, f"lr{self.learning_rate:g}", *self.own])

    @property
    def own(self) -> list[str]:
        """What differs from the defaults beside task and rate: `epochs=1`, `ordinary`."""
        said = []
        fields = type(self).model_fields
        for name in fields:
            value = getattr(self, name)
            if name not in ("task", "data", "learning_rate", "grid", "keep") and value != fields[name].default:
                shown = f"{value:g}" if isinstance(value, float) else value
                said.append(name if value is True else f"{name}={shown}")
        return said


def _numbers(value: Any) -> Any:
    """A rate or a list of them; of a mapping, by glob of the method."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return value if isinstance(value, list) else [value]


Rates = Annotated[list[Positive], Field(min_length=1)]


class Trainings(_Settings):
    """`training:` of a suite, for all its tasks.

    learning_rate: a number, a list, or a mapping from patterns of methods ("meft*") to either; the last that matches.
    """

    learning_rate: Annotated[
        Rates | dict[str, Rates],
        BeforeValidator(_numbers, json_schema_input_type=float | list[float] | dict[str, float | list[float]]),
    ] = Field(default_factory=lambda: [5e-4])


def rates_for(rates: list[float] | dict[str, list[float]], method: str) -> Iterable[float]:
    """The learning rates for a method label such as `lora+checkpoint`; none where no pattern matches."""
    if isinstance(rates, list):
        return rates
    found: Iterable[float] = ()
    for pattern, values in rates.items():
        if fnmatchcase(method, pattern):
            found = values
    return found
