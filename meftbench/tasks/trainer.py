"""transformers.Trainer for a task: its loss, its score, and checkpoints of the trained tensors only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
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

from meftbench.backbones.packed import reading_padded
from meftbench.catalogue.optimizers import OPTIMIZERS
from meftbench.catalogue.tasks import Task
from meftbench.errors import UserError
from meftbench.measuring.optimizers import class_of, note_embeddings, ready
from meftbench.measuring.packing import LENGTHS, packed, starts_of, told
from meftbench.methods import Applied
from meftbench.plan.cell import Cell
from meftbench.tasks.callbacks import EvaluateAt, StepClock
from meftbench.tasks.collate import IGNORED, Row
from meftbench.tasks.encode import Encoded
from meftbench.tasks.likelihood import likelihoods
from meftbench.tasks.scores import choose, scores_of

WEIGHTS = "trained.safetensors"
STATE = "trainer_state.json"
EVALUATION_BATCH = 4  # micro-batches in a batch of an evaluation, which holds no gradients


@dataclass(frozen=True)
class Scored:
    """The result of an evaluation. scores: by name, the task's first one first; None: undefined, `absent` says why."""

    loss: float
    scores: dict[str, float | None]
    absent: str | None

    @property
    def score(self) -> float | None:
        return next(iter(self.scores.values()))


class TaskTrainer(Trainer):  # type: ignore[misc]
    """Trains `applied` on a task; validation chooses the checkpoint whose weights are left in the model.

    folder: for checkpoints. `train_or_resume` goes on with an unfinished training there.
    offset: for a regression, a number that is subtracted from the labels, so that the head learns the difference to it.
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
        self._validations: dict[int, Scored] = {}  # results on validation by optimizer step
        steps = total_steps(cell, len(encoded.train))
        evaluations = min(training.evaluations, steps)
        evaluation_steps = frozenset(round(steps * number / evaluations) for number in range(1, evaluations + 1))
        callbacks: list[TrainerCallback] = [StepClock(), EvaluateAt(evaluation_steps)]
        if training.patience is not None:
            callbacks.append(EarlyStoppingCallback(training.patience))
        super().__init__(
            model=applied.model,
            args=_arguments(cell, folder, steps, cuda),
            train_dataset=encoded.train,
            eval_dataset=encoded.evaluations[self.first],
            data_collator=self._collate,
            callbacks=callbacks,
            optimizer_cls_and_kwargs=_optimizer_of(cell),
        )
        # Only for a loss over tokens must Trainer know their number in a batch; a classifier's is a mean over samples.
        self.model_accepts_loss_kwargs = self._predicts_answers

    @property
    def _predicts_answers(self) -> bool:
        """Whether the model is trained on the tokens of an answer, not on one logit for each choice."""
        return self.task.kind == "choices" and "choice_mask" not in self._collate([self.encoded.train[0]])

    @property
    def clock(self) -> StepClock:
        """The clock of the training; looked up each time, because Trainer makes a new one when it resumes."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, StepClock))

    def train_or_resume(self) -> None:
        """Train to the end, from the last complete checkpoint if any. Raises UserError: when the disk is full."""
        checkpoint = last_checkpoint(Path(self.args.output_dir))
        with self.applied.reference_autograd() if self.cell.training.ordinary else nullcontext():  # type: ignore[union-attr]
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if self.cell.packing:
            row, lengths = packed(rows)
            return row | told(starts_of(lengths, len(lengths))[0], lengths)
        full = self.cell.training.batches == "full"  # type: ignore[union-attr]
        return self.encoded.collate(rows, pad_to=self.cell.sequence_length if full else None)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.cell.training.group_by_length:  # type: ignore[union-attr]
            return super()._get_train_sampler(train_dataset)
        # Trainer would group by len(input_ids), which is the number of choices of a question; images have no input_ids.
        return LengthGroupedSampler(self.cell.batch_size, lengths=self._lengths(self.encoded.train))

    def _lengths(self, rows: Sequence[Row]) -> list[int]:
        return [1] * len(rows) if self.task.kind == "images" else [_length(row) for row in rows]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The cell's optimizer, or the method's own; Trainer groups the parameters by whether they decay."""
        note_embeddings(self.applied.model)
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.applied.own_optimizer is None:
            return ready(optimizer)
        # In the groups that transformers has made: only one of them decays.
        groups = [{name: group[name] for name in ("params", "weight_decay")} for group in optimizer.param_groups]
        self.optimizer = self.applied.own_optimizer(groups, lr=self.args.learning_rate, seed=self.cell.seed)
        return self.optimizer

    # --- loss ---

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The loss of a micro-batch, whose gradients are left in the parameters; or, of an optimizer that needs none,
        whose estimate is left in the optimizer."""
        self.clock.tokens += tokens_of(inputs)
        if self.applied.own_optimizer is None:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[no-any-return]
        optimizer: Any = self.optimizer
        inputs, parts = self._prepare_inputs(inputs), self.current_gradient_accumulation_steps

        def loss() -> Tensor:
            with self.compute_loss_context_manager():
                whole = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            assert isinstance(whole, Tensor)
            return whole if self.model_accepts_loss_kwargs and num_items_in_batch is not None else whole / parts

        with self.applied.without_gradients():
            estimate: Tensor = getattr(optimizer, "optimizer", optimizer).estimate(loss)  # accelerate wraps it
        return estimate

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **options: Any
    ) -> Tensor | tuple[Tensor, Any]:
        if self.offset:
            inputs = {**inputs, "labels": inputs["labels"] - self.offset}
        with self.applied.around_forward():
            if "choice_mask" not in inputs:
                return super().compute_loss(model, inputs, return_outputs, **options)  # type: ignore[no-any-return]
            outputs = model(**{name: t for name, t in inputs.items() if name not in ("choice_mask", "labels")})
            loss = F.cross_entropy(_masked(outputs.logits, inputs["choice_mask"]), inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    # --- score ---

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss and scores on validation, under Trainer's names; a score that is undefined is not in the log."""
        result = self._validations[self.state.global_step] = self.scored(self.first)
        values = {"loss": result.loss, "score": result.score, **result.scores}
        metrics = {f"eval_{name}": value for name, value in values.items() if value is not None}
        self.log(dict(metrics))
        metrics.setdefault("eval_score", -1.0)  # undefined: the worst score in the choice of the checkpoint
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def scored_best(self) -> Scored:
        """The result on validation of the best checkpoint, whose weights training has left in the model.

        It is known from training, but is computed again where training was resumed after that checkpoint.
        """
        result = self._validations.get(int(self.state.best_global_step or self.state.global_step))
        return self.scored(self.first) if result is None else result

    def scored(self, name: str) -> Scored:
        """The loss and the task's scores of the evaluation `name`, with the model's current weights."""
        with reading_padded(self.model):
            return self._scored(self.encoded.evaluations[name])

    def _scored(self, rows: Sequence[Row]) -> Scored:
        self.model.eval()
        size = self.cell.micro_batch_size * EVALUATION_BATCH
        order = np.argsort(self._lengths(rows), kind="stable").tolist()  # similar lengths in a batch: little padding
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
        scores = scores_of(self.task, predicted, answers)
        return Scored(loss, scores, _why_undefined(predicted, answers) if None in scores.values() else None)

    def _predicted(self, batch: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray, float, int]:
        """Predictions and labels of a batch (one a sample), its mean loss, and over how many that is the mean."""
        if "answer_index" in batch:
            return self._predicted_choices(batch)
        inputs = {name: tensor for name, tensor in batch.items() if name != "choice_mask"}
        with torch.no_grad(), self.autocast_smart_context_manager():
            outputs = self.model(**inputs)
        logits, labels = outputs.logits.float(), batch["labels"]
        diverged = logits.isnan().any(-1).cpu().numpy()  # after divergence: no class is predicted
        if "choice_mask" in batch:
            logits = _masked(logits, batch["choice_mask"])
        if self.task.kind == "regression":
            predicted = logits.squeeze(-1)
            loss = F.mse_loss(predicted, labels.float() - self.offset)  # on differences, as in training
        else:
            loss, predicted = F.cross_entropy(logits, labels), logits.argmax(-1)
        answers = predicted.cpu().numpy()
        if diverged.any():
            answers = np.where(diverged, np.nan, answers)
        return answers, labels.cpu().numpy(), float(loss), len(labels)

    def _predicted_choices(self, batch: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray, float, int]:
        """As `_predicted`, for a decoder: the likeliest choice of each question; the loss is a mean over tokens.

        batch: input_ids, attention_mask and labels (B, C, L), choice_mask (B, C), answer_index (B).
        """
        mask, answer = batch["choice_mask"], batch["answer_index"]
        with torch.no_grad(), self.autocast_smart_context_manager():
            likelihood = likelihoods(self.model, batch)
        tokens = (batch["labels"] != IGNORED).sum(-1)
        assert self.cell.training is not None
        normalised = self.cell.training.length_normalised
        predicted = choose(*(t.cpu().numpy() for t in (likelihood, tokens, mask)), normalised=normalised)
        if bool(likelihood.isnan().all(-1).any()):
            predicted = np.full(len(predicted), np.nan)
        correct = answer[:, None]
        weight = int(tokens.gather(1, correct).sum())
        loss = -float(likelihood.gather(1, correct).sum()) / weight
        return predicted, answer.cpu().numpy(), loss, weight

    # --- checkpoints, of the trained tensors only ---

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().contiguous().clone() for name, p in self.applied.trained().items()}
        # Trained weights fit the step sizes of fixed-point streams, which training may have widened: both are saved.
        tensors |= {name: calibrated.get_extra_state() for name, calibrated in self.applied.ranges.items()}
        save_file(tensors, folder / WEIGHTS)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            # On a full disk torch.save raises RuntimeError, and safetensors an error of its own.
            if not isinstance(error, OSError) and not _is_disk_error(error):
                raise
            shutil.rmtree(folder, ignore_errors=True)  # incomplete
            cure = "make room; the same command with --resume goes on from the one before"
            raise UserError(str(folder), f"the checkpoint cannot be written ({_first_line(error)})", cure) from None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        tensors = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        for name, calibrated in self.applied.ranges.items():
            calibrated.set_extra_state(tensors[name])
        with torch.no_grad():
            for name, parameter in self.applied.trained().items():
                parameter.copy_(tensors[name])

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        # Only the folder's name is used, because the run folder may have been moved since.
        self._load_from_checkpoint(str(Path(self.args.output_dir) / Path(self.state.best_model_checkpoint).name))


def total_steps(cell: Cell, rows: int) -> int:
    """Optimizer steps of a training on `rows` rows; a last batch that is not full counts as a step."""
    training = cell.training
    assert training is not None
    return training.max_steps or max(1, round(training.epochs * -(-rows // cell.batch_size)))


def _optimizer_of(cell: Cell) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
    """The class and the arguments of the optimizer of a training."""
    training = cell.training
    assert training is not None
    kind, arguments = class_of(cell)
    adam = {"betas": training.adam_betas, "eps": training.adam_epsilon}
    taken = {name: adam[name] for name in OPTIMIZERS[cell.optimizer].adam}
    return kind, {"lr": training.learning_rate, **taken, **arguments}


def _arguments(cell: Cell, folder: Path, steps: int, cuda: bool) -> TrainingArguments:
    training = cell.training
    assert training is not None
    never = 10**9  # Trainer needs a period, but EvaluateAt decides when
    return TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=cell.micro_batch_size,
        gradient_accumulation_steps=cell.batch_size // cell.micro_batch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type="constant_with_warmup" if training.schedule == "constant" else training.schedule,
        warmup_steps=round(training.warmup_ratio * steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.clip or 0.0,
        bf16=cell.precision == "bf16-autocast",
        fp16=cell.precision == "fp16-autocast",
        seed=cell.seed,
        data_seed=cell.seed,
        use_cpu=not cuda,
        eval_strategy="steps",
        eval_steps=never,
        save_strategy="steps",
        save_steps=never,
        save_total_limit=2,  # with 1, Trainer's end removes the last one if another is the best
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
    """The newest complete checkpoint in `folder`; incomplete ones are removed."""
    complete = []
    candidates = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    for checkpoint in sorted(candidates, key=lambda path: int(path.name.rpartition("-")[2])):
        # Trainer writes its state last, so a checkpoint that has it is complete.
        try:
            json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
        else:
            complete.append(checkpoint)
    return complete[-1] if complete else None


def tokens_of(inputs: Mapping[str, Any]) -> int:
    """Tokens of a batch that are not padding; for images the samples, because only the backbone knows their tokens."""
    if LENGTHS in inputs:
        return sum(inputs[LENGTHS])
    mask = inputs.get("attention_mask")
    if mask is None:
        return len(inputs["labels"])
    if "choice_mask" in inputs:
        mask = mask * inputs["choice_mask"][..., None]  # a choice that only fills up counts as padding
    return int(mask.sum())


def _masked(logits: Tensor, choice_mask: Tensor) -> Tensor:
    return logits.float().masked_fill(~choice_mask, float("-inf"))


def _length(row: Mapping[str, Any]) -> int:
    """Tokens of an example; with choices those of the longest choice, to which the others are padded."""
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


def _is_disk_error(error: Exception) -> bool:
    disk_messages = ("PytorchStreamWriter", "inline_container", "No space left")
    return isinstance(error, SafetensorError) or any(text in str(error) for text in disk_messages)
