"""transformers.Trainer and accelerate train a reversible model as they train any other."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import set_seed

from meftbench.methods import prepare
from tests.models import a_model

BACKBONES = ["bert", "llama"]


class Sentences(Dataset):
    def __init__(self, backbone):
        self.ids = torch.randint(5, 120, (16, 10), generator=torch.Generator().manual_seed(0))
        self.classified = backbone == "bert"

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids, mask = self.ids[index], torch.ones(10, dtype=torch.long)
        mask[8 - index % 2 :] = 0
        labels = torch.tensor(index % 2) if self.classified else torch.where(mask == 1, ids, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def a_prepared_model(backbone, dropout=0.1, **settings):
    model = a_model(
        2, dtype=torch.float32, backbone=backbone, dropout=dropout, head=None if backbone == "bert" else "causal_lm"
    )
    return prepare(model, "meft1-exact", {"strict": True, "tiles": 2} | settings, seed=1)


class _Gradients(TrainerCallback):
    """Notes the gradients that the optimizer is given in each step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None})

    def norm(self, step=0):
        return torch.cat([gradient.flatten() for gradient in self.steps[step].values()]).norm()


def a_trainer(backbone, folder, applied=None, steps=2, **said):
    given = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"} | said
    arguments = TrainingArguments(
        str(folder), max_steps=steps, use_cpu=True, logging_steps=1, report_to=[], disable_tqdm=True, seed=5, **given
    )
    data = Sentences(backbone)
    model = (applied or a_prepared_model(backbone)).model
    seen = _Gradients()
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=[seen]), seen


def assert_close(found, expected):
    """To single precision."""
    assert list(expected) == list(found)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_resumed_run_is_the_uninterrupted_one(backbone, tmp_path):
    """Dropout on: six steps, and the last three again from the checkpoint, give the same losses and weights."""
    said = {"save_strategy": "steps", "save_steps": 3}
    whole, _ = a_trainer(backbone, tmp_path, steps=6, **said)
    whole.train()
    resumed, _ = a_trainer(backbone, tmp_path, steps=6, **said)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    assert losses(whole) == losses(resumed)
    assert losses(whole)[-1] < losses(whole)[0]
    for name, expected in whole.model.state_dict().items():
        assert torch.equal(expected, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_its_file_is_the_state_of_the_model(backbone, tmp_path):
    """What Trainer saves is loaded strictly into a model with the method applied; tied weights are there once."""
    trainer, _ = a_trainer(backbone, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    found = load_file(tmp_path / "saved" / "model.safetensors")
    tied = set(getattr(trainer.model, "all_tied_weights_keys", {}))
    fresh = a_prepared_model(backbone).model

    assert set(trainer.model.state_dict()) - tied == set(found)
    missing, unexpected = fresh.load_state_dict(found, strict=False)
    assert set(missing) <= tied
    assert not unexpected
    for name, expected in trainer.model.state_dict().items():
        assert torch.equal(expected, fresh.state_dict()[name]), name


def accumulated(backbone, folder, applied, size, count):
    """The gradients of one step over `count` micro-batches."""
    said = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count, "max_grad_norm": 0.0}
    trainer, seen = a_trainer(backbone, folder, applied, steps=1, **said)
    trainer.train()
    return seen.steps[0]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradients_accumulate_as_in_ordinary_autograd(backbone, tmp_path):
    """Two micro-batches of 4, through the same equations without reversal."""
    found = accumulated(backbone, tmp_path, a_prepared_model(backbone), 4, 2)
    plain = a_prepared_model(backbone)
    with plain.reference_autograd():
        expected = accumulated(backbone, tmp_path, plain, 4, 2)

    assert_close(found, expected)


def test_micro_batches_add_up_to_the_batch(tmp_path):
    """Of a language model: Trainer passes it the number of counted labels. (To a classifier as well, which takes no
    notice, in plain transformers 5: its loss is then a sum over micro-batches.)"""
    whole, pieces = (
        accumulated("llama", tmp_path, a_prepared_model("llama", dropout=0.0), 8 // count, count) for count in (1, 2)
    )

    assert_close(pieces, whole)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_bf16_clipping_and_evaluation(backbone, tmp_path):
    """bf16 autocast, gradients clipped to 0.01 (strict verifies reversal), then `evaluate` and `predict`."""
    trainer, seen = a_trainer(backbone, tmp_path, bf16=True, max_grad_norm=0.01)
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    predicted = trainer.predict(Sentences(backbone))

    assert torch.isclose(torch.tensor(0.01), seen.norm(), rtol=1e-3)
    assert evaluated == pytest.approx(predicted.metrics["test_loss"], rel=1e-6)
    assert ((16, 2) if backbone == "bert" else (16, 10, 120)) == predicted.predictions.shape


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradient_checkpointing_leaves_a_stack_reversed(backbone, layers, tmp_path):
    """Trainer's switch checkpoints ordinary layers; in a stack, whose layers run again anyway, it changes nothing:
    the same gradients, and each layer once more in backward; once before, to calibrate the range."""
    pairs, runs = [], []
    for switched in (False, True):
        applied = a_prepared_model(backbone, reversible_layers=layers)
        trainer, seen = a_trainer(backbone, tmp_path, applied, steps=1, gradient_checkpointing=switched)
        block = applied.stacks[0].blocks[-1]
        query = next(m for name, m in block.named_modules() if name.endswith(("query", "q_proj")))
        counted = []
        assert isinstance(query, nn.Linear)
        query.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        set_seed(0)
        trainer.train()
        assert "reverse" == applied.stacks[0].activations
        pairs.append(seen.steps[0])
        runs.append(len(counted))

    assert [3, 3] == runs
    assert_close(pairs[1], pairs[0])


def test_accelerate_trains_as_a_plain_loop(tmp_path):
    """`prepare`, `backward`, `clip_grad_norm_` and `accumulate` of an Accelerator: the weights of a loop without it."""
    weights = []
    for accelerated in (False, True):
        model = a_prepared_model("llama", dropout=0.0).model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loader = DataLoader(Sentences("llama"), batch_size=8)
        if accelerated:
            accelerator = Accelerator(cpu=True)
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for batch in loader:
            loss = model(**batch).loss
            if accelerated:
                with accelerator.accumulate(model):
                    accelerator.backward(loss)
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                    optimizer.step()
                    optimizer.zero_grad()
            else:
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        weights.append(accelerator.unwrap_model(model) if accelerated else model)

    for found, expected in zip(weights[1].parameters(), weights[0].parameters(), strict=True):
        assert torch.equal(expected, found)
