"""A training: its loss, its scores, and that nothing is lost when it is cut short."""

import errno
import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from meftbench.catalogue.optimizers import OPTIMIZERS
from meftbench.errors import UserError
from meftbench.plan.point import Point, cell_at
from meftbench.plan.training import CELL_FOLDER, Training
from meftbench.strict_yaml import Document
from meftbench.tasks.callbacks import StepClock
from meftbench.tasks.trainer import TaskTrainer, last_checkpoint
from trainings import (
    NO_DROPOUT,
    TINY,
    TINY_OPT,
    TINY_VIT,
    a_choice,
    a_classification,
    a_regression,
    a_training,
    an_image_folder,
    losses,
    prepared,
    questions,
    trained,
)

TIMES = ("training_time_s", "training_tokens_per_s")


def a_trainer(cell, tmp_path):
    """Of a cell, before its training."""
    quality = prepared(cell)
    return TaskTrainer(cell, quality.applied(), quality.task, quality.encoded, tmp_path / "checkpoints", False)


def timeless(metrics):
    return {name: metric for name, metric in metrics.items() if name not in TIMES}


@pytest.fixture
def cell_folder(tmp_path, monkeypatch):
    """Where the runner says that checkpoints belong."""
    monkeypatch.setenv(CELL_FOLDER, str(tmp_path / "cell"))
    return tmp_path / "cell"


class Killed(BaseException):
    """What ends a process in the middle of a training."""


def killed_at(step, cell, monkeypatch):
    """The training of `cell`, ended when this execution begins its `step`-th step."""
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            trained(cell)


def kill_at(monkeypatch, step):
    taken = []

    def end(self, *args, **kwargs):
        taken.append(0)
        if len(taken) == step:
            raise Killed

    monkeypatch.setattr(StepClock, "on_step_begin", end)


# --- cut short ---


@pytest.mark.parametrize("method", ["full", "lora", "meft1-exact", "mezo"])
def test_a_training_taken_up_again_is_the_one_that_was_not_cut(tmp_path, monkeypatch, cell_folder, method):
    """Losses, curve, scores and tokens, to the last bit, with dropout: as if nothing had happened."""
    cell = a_training(a_classification(tmp_path / "mood"), method, model_config_overrides=TINY, max_steps=6)
    whole, observed = trained(cell)
    killed_at(5, cell, monkeypatch)

    rest, resumed = trained(cell)

    assert timeless(whole) == timeless(rest)
    assert (False, True) == (observed["resumed"], resumed["resumed"])
    assert 6 == len(losses(rest))
    assert not cell_folder.exists()


def test_a_training_that_had_ended_is_only_scored(tmp_path, monkeypatch, cell_folder):
    """It was killed between its last checkpoint and its record."""
    cell = a_training(a_classification(tmp_path / "mood"))
    whole, _ = trained(cell)
    with monkeypatch.context() as patch:
        patch.setattr("meftbench.tasks.fine_tuning.FineTuning._metrics", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            trained(cell)
    with monkeypatch.context() as patch:
        kill_at(patch, 1)
        rest, _ = trained(cell)

    assert timeless(whole) == timeless(rest)


def test_a_run_folder_that_was_moved(tmp_path, monkeypatch, cell_folder):
    """The best checkpoint is where the others are, not where it was."""
    cell = a_training(a_classification(tmp_path / "mood"))
    killed_at(4, cell, monkeypatch)
    cell_folder.rename(tmp_path / "moved")
    monkeypatch.setenv(CELL_FOLDER, str(tmp_path / "moved"))

    metrics, observed = trained(cell)

    assert observed["resumed"]
    assert 4 == len(losses(metrics))


def test_half_a_checkpoint_is_none(tmp_path):
    """It is removed, and the one before is taken; what is none stays."""
    for name, state in (("checkpoint-2", "{}"), ("checkpoint-4", '{"glo'), ("checkpoint-10", None)):
        (tmp_path / name).mkdir()
        if state is not None:
            (tmp_path / name / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-of-mine").mkdir()

    assert tmp_path / "checkpoint-2" == last_checkpoint(tmp_path)
    assert ["checkpoint-2", "checkpoint-of-mine"] == sorted(path.name for path in tmp_path.iterdir())
    assert last_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("writer", "fault"),
    [
        ("meftbench.tasks.trainer.save_file", OSError(errno.ENOSPC, "No space left on device")),
        ("meftbench.tasks.trainer.save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
        ("torch.save", RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nframe #0")),
        ("torch.save", RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")),
        (
            "transformers.trainer_callback.TrainerState.save_to_json",
            OSError(errno.ENOSPC, "No space left on device"),
        ),
    ],
)
def test_a_full_disk(tmp_path, monkeypatch, cell_folder, writer, fault):
    """One line; the checkpoint before is whole, and the training goes on from it."""
    cell = a_training(a_classification(tmp_path / "mood"), max_steps=2)
    with monkeypatch.context() as patch:
        fail_at_second_checkpoint(patch, writer, fault)
        with pytest.raises(UserError) as caught:
            trained(cell)

    said = str(caught.value)
    assert said.startswith(f"{cell_folder}/checkpoints/checkpoint-2: the checkpoint cannot be written (")
    assert said.endswith("; make room; the same command with --resume goes on from the one before")
    assert "\n" not in said
    assert ["checkpoint-1"] == [path.name for path in (cell_folder / "checkpoints").iterdir()]
    whole, observed = trained(cell)
    assert (True, 2) == (observed["resumed"], len(losses(whole)))


def fail_at_second_checkpoint(patch, writer, fault):
    saved = TaskTrainer._save_checkpoint

    def second_fails(self, *args):
        if self.state.global_step > 1:
            patch.setattr(writer, lambda *_, **__: (_ for _ in ()).throw(fault))
        saved(self, *args)

    patch.setattr(TaskTrainer, "_save_checkpoint", second_fails)


def test_a_bug_while_a_checkpoint_is_written_is_no_full_disk(tmp_path, monkeypatch, cell_folder):
    cell = a_training(a_classification(tmp_path / "mood"))
    fail_at_second_checkpoint(monkeypatch, "torch.save", RuntimeError("a bug"))

    with pytest.raises(RuntimeError, match="a bug"):
        trained(cell)


def test_a_checkpoint_holds_what_is_trained_alone(tmp_path, monkeypatch, cell_folder):
    """A frozen model of gigabytes is not written again and again."""
    cell = a_training(a_classification(tmp_path / "mood"), "lora")
    killed_at(3, cell, monkeypatch)

    [checkpoint] = (cell_folder / "checkpoints").iterdir()

    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    assert "model.safetensors" not in sizes
    assert sizes["trained.safetensors"] < 40_000


# --- with and without reversal (issue 6, number 2) ---


@pytest.mark.parametrize("method", ["meft1-exact", "meft3-exact"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp64", 1e-9)])
def test_exact_reversal_trains_as_ordinary_autograd_does(tmp_path, method, precision, tolerance):
    """The same equations, nothing recomputed: the same loss at every step, and the same score."""
    task = a_classification(tmp_path / "mood")
    given = {"method": method, "precision": precision, "max_steps": 8}

    reversed_, _ = trained(a_training(task, **given))
    ordinary, _ = trained(a_training(task, **given, ordinary=True))

    assert losses(ordinary) == pytest.approx(losses(reversed_), rel=tolerance, abs=tolerance)
    assert ordinary["score"] == reversed_["score"]
    assert losses(ordinary)[0] != pytest.approx(losses(ordinary)[-1], rel=1e-3)


def test_ordinary_keeps_all_that_backward_needs(tmp_path, monkeypatch):
    """Nothing is recomputed: each layer's attention runs once a step, and again in backward where it is. The first
    step calibrates the range of the streams beforehand, in either."""
    calls = []
    step = TaskTrainer.training_step

    def watched(self, *args, **kwargs):
        layer = next(module for module in self.model.modules() if type(module).__name__ == "BertSelfAttention")
        calls.append(0)
        with layer.register_forward_pre_hook(lambda *_: calls.__setitem__(-1, calls[-1] + 1)):
            return step(self, *args, **kwargs)

    monkeypatch.setattr(TaskTrainer, "training_step", watched)
    task = a_classification(tmp_path / "mood")

    trained(a_training(task, "meft1-exact", ordinary=True, max_steps=1))
    trained(a_training(task, "meft1-exact", max_steps=1))

    assert [1 + 1, 1 + 2] == calls


# --- levers and micro-batches change no loss ---


@pytest.mark.parametrize("lever", ["checkpoint", "offload"])
def test_a_lever_changes_memory_not_losses(tmp_path, lever):
    task = a_classification(tmp_path / "mood")

    plain, _ = trained(a_training(task, "lora"))
    with_lever, _ = trained(a_training(task, f"lora+{lever}"))

    assert losses(plain) == pytest.approx(losses(with_lever), rel=1e-5)
    assert plain["score"] == with_lever["score"]


MODELS = {
    "classification": (a_classification, {}),
    "multiple_choice": (a_choice, {"head": "multiple_choice"}),
    "causal_lm": (a_choice, {"model": "opt-125m@random", "model_config_overrides": TINY_OPT}),
}


@pytest.mark.parametrize("head", MODELS)
def test_micro_batches_give_the_losses_of_the_batch(tmp_path, head):
    """Also of answers of different lengths, whose loss is a mean over tokens."""
    write, fields = MODELS[head]
    task = write(tmp_path / "task")

    whole, _ = trained(a_training(task, **fields))
    parts, _ = trained(a_training(task, **fields, micro_batch_size=2))

    assert losses(whole) == pytest.approx(losses(parts), rel=2e-5)
    assert whole["training_tokens"] == parts["training_tokens"]
    assert whole["score"] == parts["score"]


# --- loss and scores of each head ---


def test_micro_batches_give_the_losses_of_the_batch_without_a_backward_pass(tmp_path):
    """MeZO goes along one direction for all parts of a batch, whose slopes add up; and both kinds of head are trained
    by it."""
    task, fields = a_classification(tmp_path / "mood"), {"learning_rate": 1e-3, "max_steps": 3}
    whole, parts = (
        trained(a_training(task, "mezo", method_params={"trained": "lora"}, micro_batch_size=size, **fields))[0]
        for size in (4, 2)
    )

    assert losses(whole) == pytest.approx(losses(parts), rel=1e-5)
    assert whole["training_tokens"] == parts["training_tokens"]


def test_dummies_of_uneven_choices_have_no_effect(tmp_path):
    """Padded to three choices or scored one question at a time: the same loss and predictions."""
    cell = a_training(a_choice(tmp_path / "pick"), head="multiple_choice")
    trainer = a_trainer(cell, tmp_path)
    rows = trainer.encoded.train
    trainer.model.eval()

    batch = trainer.encoded.collate(list(rows))
    with torch.no_grad():
        together = trainer.compute_loss(trainer.model, dict(batch))
        alone = [trainer.compute_loss(trainer.model, trainer.encoded.collate([row])) for row in rows]
        logits = trainer.model(**{k: v for k, v in batch.items() if k not in ("choice_mask", "labels")}).logits
    right = [
        int(line[: len(row["options"])].argmax()) == row["answer"]
        for line, row in zip(logits, questions(8), strict=True)
    ]

    assert float(together) == pytest.approx(float(torch.stack(alone).mean()), rel=1e-5)
    scored = trainer.scored("validation")
    assert float(together) == pytest.approx(scored.loss, rel=1e-5)
    assert sum(right) / 8 == scored.score


@pytest.mark.parametrize("normalised", [True, False])
def test_a_decoder_is_scored_by_the_likelihood_of_the_choices(tmp_path, normalised):
    """By hand: the log-probabilities of a choice's tokens after the prompt, one after the other."""
    rows = questions(8)
    fields = MODELS["causal_lm"][1] | {"length_normalised": normalised}
    trainer = a_trainer(a_training(a_choice(tmp_path / "pick"), "full", **fields), tmp_path)
    trainer.model.eval()
    right, losses_of_right, tokens_of_right = [], [], []
    for row, encoded in zip(rows, trainer.encoded.evaluations["validation"], strict=True):
        likelihoods = []
        for ids, labels in zip(encoded["input_ids"], encoded["labels"], strict=True):
            with torch.no_grad():
                logits = trainer.model(input_ids=torch.tensor(ids[None].astype(np.int64))).logits[0]
            taken = [
                float(F.log_softmax(logits[place - 1], -1)[labels[place]])
                for place in range(len(ids))
                if labels[place] != -100
            ]
            if len(likelihoods) == row["answer"]:
                losses_of_right.append(-sum(taken))
                tokens_of_right.append(len(taken))
            likelihoods.append(sum(taken) / (len(taken) if normalised else 1))
        right.append(int(np.argmax(likelihoods)) == row["answer"])

    scored = trainer.scored("validation")

    assert sum(right) / 8 == scored.score
    assert sum(losses_of_right) / sum(tokens_of_right) == pytest.approx(scored.loss, rel=1e-5)


def test_a_decoder_learns_the_answer_alone(tmp_path):
    """Its loss is the mean over the answers' tokens of the batch."""
    trainer = a_trainer(a_training(a_choice(tmp_path / "pick"), "full", **MODELS["causal_lm"][1]), tmp_path)
    trainer.model.eval()
    batch = trainer.encoded.collate(list(trainer.encoded.train))

    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, dict(batch))
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    picked = batch["labels"][:, 1:] != -100
    by_hand = -F.log_softmax(logits[:, :-1], -1).gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None])[..., 0]
    assert float(by_hand[picked].mean()) == pytest.approx(float(found), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("implementation", ["foreach", "fused", "loop"])
def test_trains_by_the_implementation_of_its_optimizer(tmp_path, monkeypatch, optimizer, implementation):
    """The one whose memory the record tells, with losses alike but for rounding."""
    family = {"adamw": "adam", "sgd": "sgd"}[optimizer]  # AdamW is an Adam, and runs its kernels
    kernel = {"foreach": "_multi_tensor_", "fused": "_fused_", "loop": "_single_tensor_"}[implementation] + family
    module = importlib.import_module(f"torch.optim.{family}")
    taken, own = [], getattr(module, kernel)

    def counted(*args, **kwargs):
        taken.append(kernel)
        return own(*args, **kwargs)

    monkeypatch.setattr(module, kernel, counted)
    fields = {"optimizer": optimizer, "max_steps": 3}
    chosen, _ = trained(a_training(a_classification(tmp_path / "a"), "lora", optimizer_impl=implementation, **fields))
    assert taken
    usual, _ = trained(a_training(a_classification(tmp_path / "a"), "lora", **fields))
    assert chosen["training_loss"].samples == pytest.approx(usual["training_loss"].samples, rel=1e-4)


def test_a_regression(tmp_path):
    """Learns numbers, is scored by correlations; its loss is the squared error."""
    metrics, observed = trained(a_training(a_regression(tmp_path / "num"), "full", max_steps=8))

    assert ("pearson", metrics["pearson"]) == (observed["scored_by"], metrics["score"])
    assert -1 <= metrics["spearman"].value <= 1
    assert (None, "a regression has no commonest answer") == (
        metrics["score_constant"].value,
        metrics["score_constant"].absent,
    )


@pytest.mark.parametrize(
    ("method", "model", "starts"),
    [("full", "bert-base@random", 0.25), ("lora", "roberta-base@random", 0.25), ("full", "opt-1.3b@random", 2000.5**2)],
)
def test_a_regression_starts_at_the_mean_of_its_labels(tmp_path, method, model, starts):
    """Half of the labels are 2000 and half 2001; a decoder's head has no bias that could learn the difference."""
    facts = {"model": model, "model_config_overrides": TINY_OPT if "opt" in model else TINY}
    task = a_regression(tmp_path / "num", numbers=lambda i: 2000.0 + i % 2)

    metrics, _ = trained(a_training(task, method, head="classification", max_steps=1, **facts))

    assert losses(metrics)[0] == pytest.approx(starts, rel=0.2)
    assert metrics["validation_loss"].value == pytest.approx(starts, rel=0.5)


def test_large_labels_in_half_precision(tmp_path):
    """bfloat16 knows no year between 2000 and 2008: the mean is added in float32."""
    task = a_regression(tmp_path / "num", numbers=lambda i: 2000.0 + i % 2)

    metrics, _ = trained(a_training(task, "lora", precision="bf16-autocast", max_steps=2))

    assert metrics["score"].value is not None
    assert losses(metrics)[0] == pytest.approx(0.25, rel=0.5)


def test_the_kept_regression_predicts_labels(tmp_path, cell_folder):
    """Not their difference to the mean: the file is for others' programs."""
    task = a_regression(tmp_path / "num", numbers=lambda i: 2000.0 + i % 2)
    trained(a_training(task, "full", max_steps=1, keep="best", model_config_overrides=TINY))

    model = AutoModelForSequenceClassification.from_pretrained(cell_folder / "best").eval()

    assert float(model(input_ids=torch.tensor([[101, 2204, 102]])).logits) == pytest.approx(2000.5, abs=1)


@pytest.mark.parametrize(
    ("precision", "write"),
    [("fp64", a_regression), ("bf16", a_regression), ("bf16-autocast", a_regression), ("bf16", a_classification)],
)
def test_other_precisions(tmp_path, write, precision):
    metrics, _ = trained(a_training(write(tmp_path / "task"), precision=precision, max_steps=1))

    assert np.isfinite(losses(metrics)).all()


def test_labels_that_do_not_vary(tmp_path):
    """A correlation with them is undefined: the score is absent and says why, the training is kept."""
    metrics, _ = trained(a_training(a_regression(tmp_path / "num", lambda i: 1.0)))

    assert metrics["score"].value is None
    assert "undefined: the labels are constant" == metrics["score"].absent == metrics["spearman"].absent
    assert [None, None] == [score for _, _, score in metrics["learning_curve"].value]
    assert metrics["validation_loss"].value > 0


@pytest.mark.parametrize("kind", ["classification", "multiple_choice", "causal_lm", "regression"])
def test_a_training_that_diverges_has_no_score(tmp_path, monkeypatch, kind):
    """What is not a number is in no class; the losses say where it happened."""
    write, fields = (MODELS | {"regression": (a_regression, {})})[kind]
    prepare = TaskTrainer._prepare_inputs

    def broken(self, inputs):
        with torch.no_grad():
            for parameter in self.applied.trained().values():
                parameter.fill_(float("nan"))
        return prepare(self, inputs)

    monkeypatch.setattr(TaskTrainer, "_prepare_inputs", broken)
    metrics, _ = trained(a_training(write(tmp_path / "task"), "full", **fields))

    assert "undefined: predictions are not numbers" == metrics["score"].absent
    assert np.isnan(losses(metrics)).all()


def test_images(tmp_path):
    """A tiny ViT learns light from dark, on pictures of another size than its own."""
    cell = a_training(
        an_image_folder(tmp_path / "shades"),
        "full",
        model="vit-base@random",
        model_config_overrides=TINY_VIT,
        sequence_length=5,
        learning_rate=1e-2,
        max_steps=16,
        group_by_length=True,
    )

    metrics, observed = trained(cell)

    assert (1.0, 0.5) == (metrics["score"].value, metrics["score_constant"].value)
    assert {"validation": 8} == observed["evaluation_rows"]
    assert 16 * 4 == metrics["training_tokens"].value


def test_a_task_without_validation_spares_a_tenth(tmp_path):
    """Of the training rows, of which no more are scored than was said; test rows are scored beside."""
    cell = a_training(
        an_image_folder(tmp_path / "shades", ("train", "test")),
        model="vit-base@random",
        model_config_overrides=TINY_VIT,
        sequence_length=5,
        max_steps=1,
        evaluation_examples=4,
    )

    metrics, observed = trained(cell)

    assert (7, {"validation": 1, "test": 4}) == (observed["train_rows"], observed["evaluation_rows"])
    assert "validation: 1 rows held out" in observed["cuts"][-1]
    assert metrics["score_test"].value is not None


# --- how it goes ---


@pytest.mark.parametrize("write", [a_classification, a_choice])
def test_batches_of_like_lengths(tmp_path, write):
    """Rows are drawn by their tokens; of a question, by those of its longest choice."""
    head = {"head": "multiple_choice"} if write is a_choice else {}
    trainer = a_trainer(a_training(write(tmp_path / "task"), group_by_length=True, **head), tmp_path)
    lengths = trainer._get_train_sampler().lengths
    assert 4 == trainer._get_train_sampler().batch_size
    padded = [trainer.encoded.collate([row])["input_ids"].shape[-1] for row in trainer.encoded.train]

    assert padded == lengths


def test_it_ends_early(tmp_path, monkeypatch):
    """After so many evaluations without a better one; the best of them is reported."""
    scores = iter([0.5, 0.75, 0.25, 0.25, 1.0, 1.0])
    scored = TaskTrainer.scored

    def told(self, name):
        found = scored(self, name)
        told_score = next(scores) if self.is_in_train else 0.75
        return replace(found, scores={"accuracy": told_score})

    monkeypatch.setattr(TaskTrainer, "scored", told)
    cell = a_training(a_classification(tmp_path / "mood"), max_steps=12, evaluations=6, patience=2)

    metrics, _ = trained(cell)

    assert [2, 4, 6, 8] == [step for step, _, _ in metrics["learning_curve"].value]
    assert (4, 8) == (metrics["best_step"].value, metrics["training_steps"].value)


def test_more_evaluations_than_steps(tmp_path):
    """Then each step is scored."""
    metrics, _ = trained(a_training(a_classification(tmp_path / "mood"), max_steps=3, evaluations=9))

    assert [1, 2, 3] == [step for step, _, _ in metrics["learning_curve"].value]


def test_epochs(tmp_path):
    """A last batch that is not full is a step; part of an epoch is one, too."""
    task = a_classification(tmp_path / "mood", train=10)

    steps = [trained(a_training(task, max_steps=None, epochs=e))[0]["training_steps"].value for e in (0.1, 1.0, 1.5)]

    assert [1, 3, 4] == steps


def test_the_rate_warms_up_and_stays(tmp_path):
    """`constant` is reached over the warm-up, as the others are."""
    trainer = a_trainer(a_training(a_classification(tmp_path / "m"), schedule="constant", warmup_ratio=0.5), tmp_path)
    trainer.train_or_resume()

    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]

    assert [0.0, 0.005, 0.01, 0.01] == pytest.approx(rates)


@pytest.mark.parametrize(("batches", "lengths"), [("full", {16}), ("longest", {5, 6, 7, 8, 9})])
def test_batches_padded_full_or_to_their_longest(tmp_path, monkeypatch, batches, lengths):
    seen = set()
    step = TaskTrainer.training_step

    def watched(self, model, inputs, *rest):
        seen.add(inputs["input_ids"].shape[1])
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(TaskTrainer, "training_step", watched)
    trained(a_training(a_classification(tmp_path / "mood"), batches=batches))

    assert seen <= lengths


@pytest.mark.parametrize(
    ("method", "head"),
    [("ia3", "multiple_choice"), ("meft1", "multiple_choice"), ("ia3", "causal_lm"), ("houlsby", "causal_lm")],
)
def test_methods_on_questions(tmp_path, method, head):
    """Adapters of peft and ours, under the heads that answer questions."""
    write, fields = MODELS[head]

    metrics, _ = trained(a_training(write(tmp_path / "pick"), method, **fields, max_steps=2, evaluations=1))

    assert 0 <= metrics["score"].value <= 1
    assert np.isfinite(losses(metrics)).all()


def test_dropout_is_off_where_it_is_scored(tmp_path):
    cell = a_training(a_classification(tmp_path / "mood"), model_config_overrides=TINY)
    trainer = a_trainer(cell, tmp_path)

    assert trainer.scored("validation") == trainer.scored("validation")
    assert NO_DROPOUT.keys() <= set(trainer.model.config.to_dict())


OF_TRAINER = {
    "adamw": "adamw_torch",
    "adamw-8bit": "adamw_8bit",
    "paged-adamw": "paged_adamw_32bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
    "lion": "lion_32bit",
    "lion-8bit": "lion_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
    "sgd-momentum": "sgd",
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_the_one_that_trainer_makes(tmp_path, name):
    """Asked by Trainer's own name for it: the same kind of steps, with the same settings in every group."""
    if OPTIMIZERS[name].of_bitsandbytes:
        pytest.importorskip("bitsandbytes")
    cell = a_training(a_classification(tmp_path / "mood"), "lora", model_config_overrides=TINY, optimizer=name)
    trainer = a_trainer(cell, tmp_path)
    training = cell.training
    arguments = TrainingArguments(
        str(tmp_path / "own"),
        optim=OF_TRAINER[name],
        optim_args="momentum=0.9" if name == "sgd-momentum" else None,
        learning_rate=training.learning_rate,
        adam_beta1=training.adam_betas[0],
        adam_beta2=training.adam_betas[1],
        adam_epsilon=training.adam_epsilon,
        report_to=[],
    )
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    expected = kind([torch.nn.Parameter(torch.zeros(1))], **settings)

    found = trainer.create_optimizer()

    own = {"params", "weight_decay"}
    for group in found.param_groups:
        given = {key: value for key, value in group.items() if key not in own}
        assert given == {key: value for key, value in expected.param_groups[0].items() if key not in own}
    assert getattr(expected, "optimizer_name", kind.__name__) == getattr(found, "optimizer_name", type(found).__name__)
    assert getattr(expected, "is_paged", None) == getattr(found, "is_paged", None)
    for setting in ("optim_bits", "min_8bit_size", "max_unorm", "skip_zeros"):
        assert getattr(getattr(expected, "args", None), setting, None) == getattr(
            getattr(found, "args", None), setting, None
        )


@pytest.mark.parametrize("name", ["adamw-8bit", "adafactor"])
def test_a_training_by_another_optimizer_is_taken_up_again(tmp_path, monkeypatch, cell_folder, name):
    """Its states are in the checkpoint."""
    pytest.importorskip("bitsandbytes")
    fields = {"model_config_overrides": TINY, "max_steps": 4, "optimizer": name}
    cell = a_training(a_classification(tmp_path / "mood"), "full", **fields)
    whole, _ = trained(cell)
    killed_at(4, cell, monkeypatch)

    rest, _ = trained(cell)

    assert timeless(whole) == timeless(rest)


@pytest.mark.parametrize("lever", ["optimizer_in_backward", "optimizer_offload"])
def test_levers_of_the_optimizer_are_refused(lever):
    """Trainer steps the optimizer itself, after it has clipped the gradients."""
    point = {"model": "bert-tiny@random", "method": f"full+{lever}", "batch_size": 4, "sequence_length": 16}
    document = Document(Path("suite"), point | {"training": {}}, {})

    with pytest.raises(UserError, match=f"{lever} is not part of a training on a task; leave it out"):
        cell_at(document, {name: (name,) for name in Point.model_fields}, point | {"training": Training(task="rte")})
