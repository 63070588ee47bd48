"""transformers.Trainer for a task: its loss, its score, and checkpoints of what is trained alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from meftbench.catalogue.tasks import Task
from meftbench.errors import UserError
from meftbench.measuring.build import OPTIMIZER_IMPLEMENTATIONS
from meftbench.methods import Applied
from meftbench.plan.cell import Cell
from meftbench.tasks.callbacks import EvaluateAt, StepClock
from meftbench.tasks.collate import IGNORED, Row
from meftbench.tasks.encode import Encoded
from meftbench.tasks.likelihood import likelihoods
from meftbench.tasks.scores import choose, scores_of

WEIGHTS = "trained.safetensors"
STATE = "trainer_state.json"
EVALUATION_BATCH = 4  # times as many samples as in a training step: no gradients are held


@dataclass(frozen=True)
class Scored:
    """An evaluation. scores: by name, the task's first foremost; None: undefined, and `absent` says why."""

    loss: float
    scores: dict[str, float | None]
    absent: str | None

    @property
    def score(self) -> float | None:
        return next(iter(self.scores.values()))


class TaskTrainer(Trainer):  # type: ignore[misc]
    """Trains `applied` on a task; validation chooses the checkpoint whose weights are left in the model.

    folder: of checkpoints. An unfinished training that lies there is taken up by `train_or_resume`.
    offset: of a regression, what is added to the model's outputs in float32, whatever it computes in: its head learns
        the difference to it.
    """

    control: Any  # TrainerControl, which Trainer does not annotate

    def __init__(
        self,
        cell: Cell,
        applied: Applied,
        task: Task,
        encoded: Encoded,
        folder: Path,
        cuda: bool,
        *,
        offset: float = 0.0,
    ) -> None:
        training = cell.training
        assert training is not None
        self.cell, self.applied, self.task, self.encoded, self.offset = cell, applied, task, encoded, offset
        self.first, *_ = encoded.evaluations
        self._found: dict[int, Scored] = {}  # of validation, by the step after which it was scored
        steps = total_steps(cell, len(encoded.train))
        count = min(training.evaluations, steps)
        when = frozenset(round(steps * number / count) for number in range(1, count + 1))
        callbacks: list[TrainerCallback] = [StepClock(), EvaluateAt(when)]
        if training.patience is not None:
            callbacks.append(EarlyStoppingCallback(training.patience))
        super().__init__(
            model=applied.model,
            args=_arguments(cell, folder, steps, cuda),
            train_dataset=encoded.train,
            eval_dataset=encoded.evaluations[self.first],
            data_collator=self._collate,
            callbacks=callbacks,
        )
        # A classifier's loss is a mean over samples: only of tokens must Trainer know how many a batch has.
        self.model_accepts_loss_kwargs = self._answers

    @property
    def _answers(self) -> bool:
        """Whether the head predicts the tokens of an answer."""
        return self.task.kind == "choices" and "choice_mask" not in self._collate([self.encoded.train[0]])

    @property
    def clock(self) -> StepClock:
        """Another after a resume: Trainer makes it anew from the checkpoint."""
        return next(found for found in self.callback_handler.callbacks if isinstance(found, StepClock))

    def train_or_resume(self) -> None:
        """Train to the end, from the last whole checkpoint where there is one. Raises UserError: the disk is full."""
        found = last_checkpoint(Path(self.args.output_dir))
        with self.applied.reference_autograd() if self.cell.training.ordinary else nullcontext():  # type: ignore[union-attr]
            self.train(resume_from_checkpoint=None if found is None else str(found))

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        full = self.cell.training.batches == "full"  # type: ignore[union-attr]
        return self.encoded.collate(rows, pad_to=self.cell.sequence_length if full else None)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.cell.training.group_by_length:  # type: ignore[union-attr]
            return super()._get_train_sampler(train_dataset)
        # Trainer takes len(input_ids), which of a question with choices is how many it has, and images have none.
        return LengthGroupedSampler(self.cell.batch_size, lengths=self._lengths(self.encoded.train))

    def _lengths(self, rows: Sequence[Row]) -> list[int]:
        return [1] * len(rows) if self.task.kind == "images" else [_length(row) for row in rows]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Of transformers, by the implementation that the cell names."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.cell.optimizer_impl is not None:
            for group in optimizer.param_groups:
                group |= OPTIMIZER_IMPLEMENTATIONS[self.cell.optimizer_impl]
        return optimizer

    # --- loss ---

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **given: Any
    ) -> Tensor | tuple[Tensor, Any]:
        if model.training:
            self.clock.tokens += tokens_of(inputs)
        if self.offset:
            inputs = {**inputs, "labels": inputs["labels"] - self.offset}
        with self.applied.around_forward():
            if "choice_mask" not in inputs:
                return super().compute_loss(model, inputs, return_outputs, **given)  # type: ignore[no-any-return]
            outputs = model(**{name: t for name, t in inputs.items() if name not in ("choice_mask", "labels")})
            loss = F.cross_entropy(_masked(outputs.logits, inputs["choice_mask"]), inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    # --- score ---

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss and scores of validation, as Trainer names them; a score that is undefined is not in the log."""
        found = self._found[self.state.global_step] = self.scored(self.first)
        named = {"loss": found.loss, "score": found.score, **found.scores}
        metrics = {f"eval_{name}": value for name, value in named.items() if value is not None}
        self.log(dict(metrics))
        metrics.setdefault("eval_score", -1.0)  # for the choice of the checkpoint: the worst there is
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def scored_best(self) -> Scored:
        """Validation by the weights that training left in the model: those of the best checkpoint, scored there.

        A training that was resumed after its best checkpoint scores it again.
        """
        found = self._found.get(int(self.state.best_global_step or self.state.global_step))
        return self.scored(self.first) if found is None else found

    def scored(self, name: str) -> Scored:
        """The loss and the task's scores of an evaluation, by the weights as they are."""
        rows = self.encoded.evaluations[name]
        self.model.eval()
        size = self.cell.micro_batch_size * EVALUATION_BATCH
        order = np.argsort(self._lengths(rows), kind="stable").tolist()  # batches of one length: little padding
        predictions, labels, losses, weights = [], [], [], []
        for start in range(0, len(rows), size):
            batch = self._prepare_inputs(self.encoded.collate([rows[index] for index in order[start : start + size]]))
            predicted, answer, loss, weight = self._predicted(batch)
            predictions.append(predicted)
            labels.append(answer)
            losses.append(loss)
            weights.append(weight)
        loss = float(np.average(losses, weights=weights))
        predicted, answers = np.concatenate(predictions), np.concatenate(labels)
        if np.isnan(predicted).any():
            return Scored(loss, dict.fromkeys(self.task.scores), "undefined: predictions are not numbers")
        found = scores_of(self.task, predicted, answers)
        return Scored(loss, found, _why_undefined(predicted, answers) if None in found.values() else None)

    def _predicted(self, batch: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray, float, int]:
        """Predictions and labels of a batch (one a sample), its mean loss, and over how many that is one."""
        if "answer_index" in batch:
            return self._likeliest(batch)
        inputs = {name: tensor for name, tensor in batch.items() if name != "choice_mask"}
        with torch.no_grad(), self.autocast_smart_context_manager():
            outputs = self.model(**inputs)
        logits, labels = outputs.logits.float(), batch["labels"]
        nothing = logits.isnan().any(-1).cpu().numpy()  # a training that diverged predicts no class
        if "choice_mask" in batch:
            logits = _masked(logits, batch["choice_mask"])
        if self.task.kind == "regression":
            predicted = logits.squeeze(-1)
            loss = F.mse_loss(predicted, labels.float() - self.offset)  # as in training: nothing is lost to the offset
        else:
            loss, predicted = F.cross_entropy(logits, labels), logits.argmax(-1)
        answers = predicted.cpu().numpy()
        if nothing.any():
            answers = np.where(nothing, np.nan, answers)
        return answers, labels.cpu().numpy(), float(loss), len(labels)

    def _likeliest(self, batch: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray, float, int]:
        """Of every question the choice whose tokens are the likeliest after it; (B, C, L) tokens and labels."""
        mask, answer = batch["choice_mask"], batch["answer_index"]
        with torch.no_grad(), self.autocast_smart_context_manager():
            likelihood = likelihoods(self.model, batch)
        tokens = (batch["labels"] != IGNORED).sum(-1)
        assert self.cell.training is not None
        normalised = self.cell.training.length_normalised
        predicted = choose(*(t.cpu().numpy() for t in (likelihood, tokens, mask)), normalised=normalised)
        if bool(likelihood.isnan().all(-1).any()):
            predicted = np.full(len(predicted), np.nan)
        right = answer[:, None]
        weight = int(tokens.gather(1, right).sum())
        loss = -float(likelihood.gather(1, right).sum()) / weight
        return predicted, answer.cpu().numpy(), loss, weight

    # --- checkpoints: what is trained, and no more ---

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().contiguous().clone() for name, p in self.applied.trained().items()}
        # What the trained weights compute depends on the steps of fixed-point streams, which training may have widened.
        tensors |= {name: held.get_extra_state() for name, held in self.applied.ranges.items()}
        save_file(tensors, folder / WEIGHTS)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            # torch.save says it by a RuntimeError, safetensors by one of its own.
            if not isinstance(error, OSError) and not _said_by_the_disk(error):
                raise
            shutil.rmtree(folder, ignore_errors=True)  # half a checkpoint is none
            cure = "make room; `finetune --resume`, or `run --resume --retry error`, goes on from the one before"
            raise UserError(str(folder), f"the checkpoint cannot be written ({_first_line(error)})", cure) from None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        kept = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        for name, held in self.applied.ranges.items():
            held.set_extra_state(kept[name])
        with torch.no_grad():
            for name, parameter in self.applied.trained().items():
                parameter.copy_(kept[name])

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        # By its name alone: a run folder may have been moved since.
        self._load_from_checkpoint(str(Path(self.args.output_dir) / Path(self.state.best_model_checkpoint).name))


def total_steps(cell: Cell, rows: int) -> int:
    """Optimizer steps of a training on so many rows; a last batch that is not full is a step."""
    training = cell.training
    assert training is not None
    return training.max_steps or max(1, round(training.epochs * -(-rows // cell.batch_size)))


def _arguments(cell: Cell, folder: Path, steps: int, cuda: bool) -> TrainingArguments:
    training = cell.training
    assert training is not None
    never = 10**9  # EvaluateAt says when; Trainer wants a period
    return TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=cell.micro_batch_size,
        gradient_accumulation_steps=cell.batch_size // cell.micro_batch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type="constant_with_warmup" if training.schedule == "constant" else training.schedule,
        warmup_steps=round(training.warmup_ratio * steps),
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_betas[0],
        adam_beta2=training.adam_betas[1],
        adam_epsilon=training.adam_epsilon,
        max_grad_norm=training.clip or 0.0,
        optim="adamw_torch" if cell.optimizer == "adamw" else cell.optimizer,
        bf16=cell.precision == "bf16-autocast",
        fp16=cell.precision == "fp16-autocast",
        seed=cell.seed,
        data_seed=cell.seed,
        use_cpu=not cuda,
        eval_strategy="steps",
        eval_steps=never,
        save_strategy="steps",
        save_steps=never,
        save_total_limit=2,  # of one, Trainer removes the last at its end, where another is the best
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that was written to its end; those that were not are removed."""
    whole = []
    named = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    for found in sorted(named, key=lambda path: int(path.name.rpartition("-")[2])):
        # Trainer writes its state last.
        try:
            json.loads((found / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(found)
        else:
            whole.append(found)
    return whole[-1] if whole else None


def tokens_of(inputs: Mapping[str, Tensor]) -> int:
    """Tokens of a batch that are not padding; of images: samples (their tokens are the backbone's business)."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return len(inputs["labels"])
    if "choice_mask" in inputs:
        mask = mask * inputs["choice_mask"][..., None]  # a choice that stands in for none is padding
    return int(mask.sum())


def _masked(logits: Tensor, choice_mask: Tensor) -> Tensor:
    return logits.float().masked_fill(~choice_mask, float("-inf"))


def _length(row: Mapping[str, Any]) -> int:
    """Tokens of an example; of one with choices, of its longest, to which they are padded."""
    ids = row["input_ids"]
    return max(map(len, ids)) if isinstance(ids, list) else len(ids)


def _why_undefined(predictions: np.ndarray, labels: np.ndarray) -> str:
    if not np.isfinite(predictions).all():
        return "undefined: predictions are not finite"
    if len(labels) < 2:
        return "undefined: a correlation needs two rows"
    return f"undefined: the {'labels' if np.ptp(labels) == 0 else 'predictions'} are constant"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _said_by_the_disk(error: Exception) -> bool:
    signs = ("PytorchStreamWriter", "inline_container", "No space left")
    return isinstance(error, SafetensorError) or any(sign in str(error) for sign in signs)
