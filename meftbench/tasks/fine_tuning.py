"""Fine-tuning one cell on a task: data, head, training and score, in one record with the memory of its steps.

docs/design.md 6 describes it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from meftbench.backbones.build import build_model, tokenizer_of
from meftbench.backbones.own import head_of_own
from meftbench.catalogue.tasks import Task, find_task
from meftbench.errors import UserError, reading, reason_of
from meftbench.measuring.build import built_model, packed_batch, step_on, with_method
from meftbench.measuring.packing import PackedStep
from meftbench.measuring.step import Step
from meftbench.methods import Applied
from meftbench.methods.saving import save_adapter
from meftbench.plan.cell import Cell
from meftbench.plan.factories import is_factory
from meftbench.plan.fine_tuning import HEADS_FOR
from meftbench.plan.models import RANDOM, folder_of, head_of, split_name
from meftbench.plan.training import BEST, CELL_FOLDER
from meftbench.records.record import Metric
from meftbench.tasks.data import Splits, load_splits
from meftbench.tasks.encode import Encoded, encode
from meftbench.tasks.scores import constant_score
from meftbench.tasks.trainer import Scored, TaskTrainer, last_checkpoint

HELD_OUT = 0.1  # of the training rows: what becomes validation where a task has no such split
HEAD_NAMES = {"classifier", "classification_head", "score"}  # what models of transformers call their heads
# The metric that holds the score of each evaluation but the first, by the evaluation's name.
METRIC_OF = {"test": "score_test", "validation_mismatched": "score_mismatched"}


class FineTuning:
    """A cell whose data have been read and encoded, so that it can be measured in a step and trained.

    Raises UserError: when there are no data, columns or labels do not fit, there is no tokenizer, or the model cannot
    be loaded.
    """

    def __init__(self, cell: Cell, device: torch.device) -> None:
        training = cell.training
        assert training is not None
        _check_installed(training.task)
        self.cell, self.device = cell, device
        self.task: Task = find_task(cell.label, training.task)
        splits = load_splits(
            self.task,
            training.data,
            train_examples=training.train_examples,
            evaluation_examples=training.evaluation_examples,
        )
        self.splits = _with_validation(splits, training.evaluation_examples)
        # Scores count all classes that the training rows have, even those that do not occur in an evaluation.
        self.task = replace(self.task, labels=self.splits.labels)
        self.num_labels = len(self.splits.labels) if self.splits.labels else 1
        self.head, config = self._head_and_config()
        self.encoded = self._encoded(config)

    def _head_and_config(self) -> tuple[str, Any]:
        """Head and configuration of the model. Raises UserError: when the user's own model does not fit the task."""
        cell = self.cell
        if not is_factory(cell.model):
            with torch.device("meta"):
                random_model = split_name(cell.model)[0] + RANDOM
                config: Any = build_model(random_model, cell.model_config_overrides, head=cell.head).config
            return head_of(config.model_type, cell.head), config
        options: dict[str, Any] = {"attention": cell.attention_requested, "seed": cell.seed}
        model: Any = build_model(cell.model, cell.model_config_overrides, **options)
        head, accepted = head_of_own(model), (cell.head,) if cell.head else HEADS_FOR[self.task.kind]
        if head is None or head not in accepted:
            needed = f"{self.task.name!r} needs a transformers model for {' or '.join(accepted)}"
            what = f"gives {type(model).__name__}, and {needed}"
            raise UserError(cell.model, what, "return such a model, or measure steps without a task")
        if head.endswith("classification") and model.config.num_labels != self.num_labels:
            what = f"gives a model of {model.config.num_labels} labels, and {self.task.name!r} has {self.num_labels}"
            raise UserError(
                cell.model, what, f"let it take num_labels, and set config: {{num_labels: {self.num_labels}}}"
            )
        return head, model.config

    def _encoded(self, config: Any) -> Encoded:
        cell = self.cell
        options: dict[str, Any] = {"head": self.head, "sequence_length": cell.sequence_length}
        if self.task.kind == "images":
            return encode(self.splits, self.task, image=(config.image_size, config.num_channels), **options)
        tokenizer = _tokenizer(cell)
        return encode(self.splits, self.task, tokenizer=tokenizer, vocab_size=config.vocab_size,
                      pad_id=config.pad_token_id, **options)  # fmt: skip

    def applied(self) -> Applied:
        """The model with the method applied, initialised by the cell's seed, on the device."""
        cell = self.cell
        model = built_model(cell, num_labels=self.num_labels)
        if self.task.kind == "regression":
            model.config.problem_type = "regression"  # type: ignore[union-attr]
        applied = with_method(cell, model)
        applied.model.to(self.device)
        if self.head == "multiple_choice":
            # Adding one number to the logits of all choices does not change their softmax, so the gradient of this
            # bias is zero up to rounding, and exactly zero with two choices.
            biases = {name for name in applied.trained() if "classifier" in name and name.endswith("bias")}
            applied.no_gradient |= biases
        return applied

    def step(self) -> Step:
        """The step whose memory is measured: on the first training rows, padded to the cell's sequence length; where
        rows are packed, without padding."""
        cell, rows = self.cell, self.encoded.train
        picked = [rows[index % len(rows)] for index in range(cell.batch_size)]
        if cell.packing:
            packed_rows, extra = packed_batch(cell, picked, self.device)
            return step_on(cell, self.applied(), packed_rows, self.device, kind=PackedStep, **extra)
        batch = self.encoded.collate(picked, pad_to=cell.sequence_length)
        batch.pop("choice_mask", None)  # the model's own loss includes choices that only fill up
        on_device = {name: tensor.to(self.device) for name, tensor in batch.items()}
        return step_on(cell, self.applied(), on_device, self.device)

    def train(self) -> tuple[dict[str, Metric], dict[str, Any]]:
        """Train to the end and score the best checkpoint: its metrics, and facts of the cell that only a run tells."""
        training = self.cell.training
        assert training is not None
        with _cell_folder() as folder:
            resumed = last_checkpoint(folder / "checkpoints") is not None
            applied = self.applied()
            biases = _head_biases(applied) if self.task.kind == "regression" else []
            # A regression head whose outputs start at 0 would spend the first steps on reaching the labels' mean, and
            # what adapters learn meanwhile leads to a plateau. So it learns the difference to the mean.
            offset = float(np.mean(self.splits.train["label"])) if biases else 0.0
            trainer = TaskTrainer(
                self.cell,
                applied,
                self.task,
                self.encoded,
                folder / "checkpoints",
                self.device.type == "cuda",
                offset=offset,
            )
            untrained = trainer.scored(trainer.first) if self.head == "causal_lm" else None
            trainer.train_or_resume()
            metrics = self._metrics(trainer)
            if untrained is not None:
                metrics["score_untrained"] = _metric(untrained.score, untrained)
            with torch.no_grad():
                for bias in biases:
                    bias.add_(offset)
            if training.keep == "best":
                _save_best(trainer.applied, self.cell, folder / BEST)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        observed = {
            "data": _without_local_folders(self.splits.origin),
            "data_digest": self.splits.digest,
            "cuts": list(self.splits.cuts),
            "licence": self.task.licence,
            "truncated_samples": self.encoded.truncated,
            "train_rows": len(self.encoded.train),
            "evaluation_rows": {name: len(rows) for name, rows in self.encoded.evaluations.items()},
            "scored_by": self.task.scores[0],
            "layers": getattr(trainer.model.config, "num_hidden_layers", None),
            "resumed": resumed,
        }
        return metrics, observed

    def _metrics(self, trainer: TaskTrainer) -> dict[str, Metric]:
        history = trainer.state.log_history
        losses = [float(entry["loss"]) for entry in history if "loss" in entry]
        evaluations = [entry for entry in history if "eval_loss" in entry]
        clock = trainer.clock
        metrics = {
            "training_loss": Metric(losses[-1], "measured", n=len(losses), samples=losses),
            "learning_curve": Metric(
                [[entry["step"], float(entry["eval_loss"]), entry.get("eval_score")] for entry in evaluations],
                "measured",
            ),
            "best_step": Metric(int(trainer.state.best_global_step or trainer.state.global_step), "measured"),
            "training_steps": Metric(int(trainer.state.global_step), "counted"),
            "training_tokens": Metric(clock.tokens, "counted"),
            "training_time_s": Metric(clock.seconds, "measured"),
            "training_tokens_per_s": Metric(clock.tokens / clock.seconds, "measured"),
        }
        if (widenings := trainer.applied.range_widenings) is not None:
            metrics["range_widenings"] = Metric(widenings, "counted")
        for name in self.encoded.evaluations:
            evaluation = trainer.scored_best() if name == trainer.first else trainer.scored(name)
            if name == trainer.first:
                metrics["validation_loss"] = Metric(evaluation.loss, "measured")
                metrics |= {score: _metric(value, evaluation) for score, value in evaluation.scores.items()}
            metrics["score" if name == trainer.first else METRIC_OF[name]] = _metric(evaluation.score, evaluation)
        constant = constant_score(self.task, np.asarray(self.splits.evaluations[trainer.first]["label"]))
        absent = "a regression has no commonest answer" if constant is None else None
        metrics["score_constant"] = Metric(constant, "counted", absent=absent)
        return metrics


def _without_local_folders(origin: str) -> str:
    """Where data came from; of an absolute path its end, such as `qa/sciq`, to leave out this machine's folders."""
    path = Path(origin)
    return str(Path(*path.parts[-2:])) if path.is_absolute() else origin


def _check_installed(task: str) -> None:
    """Raises UserError: when a package is missing that training or scoring needs. Called before training begins."""
    missing = [name for name in ("datasets", "sklearn", "scipy", "accelerate", "PIL") if find_spec(name) is None]
    if missing:
        what = f"needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
        raise UserError(f"task {task}", what, "pip install 'meftbench[tasks]'")


def _metric(value: float | None, evaluation: Scored) -> Metric:
    """A score as a metric; where it is undefined, with the reason that the evaluation gives."""
    return Metric(value, "measured", absent=evaluation.absent if value is None else None)


def _with_validation(splits: Splits, limit: int | None) -> Splits:
    """The splits with `validation` first; where there is none, a tenth of the training rows becomes it.

    limit: the most rows that validation gets by this; None: all of the tenth.
    Raises UserError: when there are fewer than two training rows.
    """
    if "validation" in splits.evaluations:
        return splits
    if len(splits.train) < 2:
        what = "there is no validation split, and no training row to spare for one"
        raise UserError(splits.origin, what, "add validation rows, or train on more")
    parts = splits.train.train_test_split(test_size=HELD_OUT, seed=0)
    rows = parts["test"].select(range(min(len(parts["test"]), limit or len(parts["test"]))))
    cut_line = f"validation: {len(rows):,} rows held out of the training rows, as the task has no such split"
    return replace(
        splits,
        train=parts["train"],
        evaluations={"validation": rows} | splits.evaluations,
        cuts=[*splits.cuts, cut_line],
    )


def _tokenizer(cell: Cell) -> Any:
    """The tokenizer that `training.tokenizer` names, else the model's own. Raises UserError: when loading fails."""
    from transformers import AutoTokenizer

    training = cell.training
    assert training is not None
    name, _ = split_name(cell.model)
    source = training.tokenizer or tokenizer_of(name) or str(folder_of(name))

    def not_loaded(error: Exception) -> UserError:
        cure = "name a folder or a hub id by `training: {tokenizer: ...}`"
        return UserError(cell.label, f"no tokenizer can be loaded from {source!r} ({reason_of(error)})", cure)

    with reading(not_loaded):
        return AutoTokenizer.from_pretrained(source)


def _head_biases(applied: Applied) -> list[nn.Parameter]:
    """The trained biases of a regression's head; empty for decoders, whose heads have none."""
    parameters = applied.trained().items()
    return [
        p for name, p in parameters if p.shape == (1,) and name.endswith("bias") and HEAD_NAMES & {*name.split(".")}
    ]


@contextmanager
def _cell_folder() -> Iterator[Path]:
    """The cell's folder in its run, removed if it stays empty; outside a run, a temporary folder."""
    if path := os.environ.get(CELL_FOLDER):
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        if not any(folder.iterdir()):
            folder.rmdir()
        return
    with tempfile.TemporaryDirectory(prefix="meftbench-") as name:
        yield Path(name)


def _save_best(applied: Applied, cell: Cell, folder: Path) -> None:
    """Save the trained weights as `load_adapter` or, after full fine-tuning, `from_pretrained` reads them.

    Raises UserError: when they cannot be written.
    """
    try:
        if cell.settings().whole:
            applied.model.save_pretrained(folder)  # type: ignore[operator]
        else:
            save_adapter(applied.model, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(str(folder), f"the best weights cannot be written ({error})", "make room") from None
