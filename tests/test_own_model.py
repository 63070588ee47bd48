"""`meftbench.measure` with the models and batches that people have: a number, or one line that says what to do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BatchEncoding

import meftbench
from meftbench.errors import UserError
from tests.models import a_batch, a_model

QUICK = {"steps": 1, "time": False}


class Model(nn.Module):
    """A linear layer and dropout; `form` makes of its loss what forward gives."""

    def __init__(self, form=lambda loss: {"loss": loss}):
        super().__init__()
        self.layer, self.dropout, self.form = nn.Linear(4, 4), nn.Dropout(0.5), form

    def forward(self, x, labels=None, scale=1.0, names=None):
        return self.form((self.dropout(self.layer(x)) * scale).square().mean())


BATCH = {"x": torch.ones(4, 4)}


def the_line(model, batch, **options):
    with pytest.raises(UserError) as caught:
        meftbench.measure(model, batch, **(QUICK | options))
    assert 1 == len(str(caught.value).splitlines())
    return str(caught.value)


@given(st.lists(st.booleans(), min_size=3, max_size=3), st.sampled_from(["full", "full+checkpoint", "meft1-exact"]))
@settings(max_examples=12)
def test_the_mode_that_a_model_is_found_in_changes_nothing(modes, method):
    """Training mode is measured, and every module's mode is afterwards what it was."""
    model = meftbench.apply_method(a_model(3, torch.float32), method, seed=1)
    expected = meftbench.measure(model.train(), a_batch(4, 32), **QUICK)["activation_peak_bytes"].value
    model.eval()
    for layer, mode in zip(model.modules(), modes, strict=False):
        layer.training = mode
    before = [module.training for module in model.modules()]

    found = meftbench.measure(model, a_batch(4, 32), **QUICK)

    assert expected == found["activation_peak_bytes"].value
    assert before == [module.training for module in model.modules()]


@pytest.mark.parametrize(
    "form",
    [
        lambda loss: loss,
        lambda loss: loss[None],
        lambda loss: (loss, None),
        lambda loss: {"loss": loss, "logits": None},
        lambda loss: type("Output", (), {"loss": loss})(),
    ],
)
def test_a_loss_in_any_form(form):
    assert meftbench.measure(Model(form), BATCH, **QUICK)["activation_peak_bytes"].value > 0


@pytest.mark.parametrize(
    "batch",
    [
        BATCH | {"labels": None},
        BATCH | {"scale": torch.tensor(2.0)},
        BATCH | {"scale": 2.0},
        {"x": [[1.0] * 4] * 4},
        {"x": np.ones((4, 4), np.float32)},
        BATCH | {"names": "a text"},
        BatchEncoding(BATCH),
    ],
)
def test_a_batch_of_any_form(batch):
    """None, numbers beside tensors, lists, arrays, a tokenizer's own kind: the same memory, in micro-batches too."""
    expected = meftbench.measure(Model(), BATCH, **QUICK)["parameters_total"]
    for size in (None, 3):
        found = meftbench.measure(Model(), batch, micro_batch_size=size, **QUICK)
        assert expected == found["parameters_total"]
        assert found["activation_peak_bytes"].value > 0


def test_under_no_grad_and_inference_mode():
    """Gradients are what is measured."""
    expected = meftbench.measure(Model(), BATCH, **QUICK)["activation_peak_bytes"].value
    with torch.no_grad():
        assert expected == meftbench.measure(Model(), BATCH, **QUICK)["activation_peak_bytes"].value
    model = Model()
    with torch.inference_mode():
        assert expected == meftbench.measure(model, BATCH, **QUICK)["activation_peak_bytes"].value
        assert not torch.is_grad_enabled()


def frozen(model):
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "batch", "options", "line"),
    [
        (Model(), {}, {}, "measure: the batch has no tensor of samples; give input_ids"),
        (Model(), [1], {}, "measure: the batch is list, no mapping; give a dict"),
        (Model(), {"x": torch.ones(0, 4)}, {}, "measure: the batch has no samples"),
        (Model(), {"x": [[1.0], [1.0, 2.0]]}, {}, "measure: x is no table of numbers ("),
        (Model(), BATCH | {"labels": torch.ones(3)}, {}, "different numbers of samples (x 4, labels 3)"),
        (Model(), {name: tensor.to("meta") for name, tensor in BATCH.items()}, {}, "measure: x has no values (meta)"),
        (nn.Sequential(nn.LazyLinear(2)), BATCH, {}, "Sequential: has parameters without a shape yet (LazyLinear"),
        (Model(), BATCH | {"idx": torch.ones(4)}, {}, "Model: does not take the batch (x, idx): "),
        (Model(lambda loss: None), BATCH, {}, "Model: gives no loss but NoneType; put `labels` into the batch"),
        (Model(lambda loss: {"logits": loss}), BATCH, {}, "Model: gives no loss but dict"),
        (Model(lambda loss: ()), BATCH, {}, "Model: gives no loss but tuple"),
        (Model(lambda loss: loss.expand(2)), BATCH, {}, "Model: its loss is float32 (2,), not one number; give"),
        (Model(lambda loss: loss.detach()), BATCH, {}, "Model: its loss needs no gradient"),
        (frozen(Model()), BATCH, {}, "Model: all its parameters are frozen; train some"),
        (nn.Identity(), BATCH, {}, "Identity: has no parameters"),
        (Model().to("meta"), BATCH, {}, "Model: its weights have no values (meta)"),
        (len, BATCH, {}, "measure: the model is builtin_function_or_method, no torch module"),
        (Model(), BATCH, {"steps": 0}, "measure: steps is 0; write a whole number from 1"),
        (Model(), BATCH, {"warmup": -1}, "measure: warmup is -1; write a whole number from 0"),
        (Model(), BATCH, {"steps": 1.5}, "measure: steps is 1.5"),
        (Model(), BATCH, {"micro_batch_size": 0}, "measure: micro_batch_size is 0"),
        (Model(), BATCH, {"rank": 4}, "measure: rank is a setting of no method"),
    ],
)
def test_what_cannot_be_measured_is_a_line(model, batch, options, line):
    assert line in the_line(model, batch, **options)


def test_a_method_by_name_time_and_a_table():
    """What the step takes beside what it holds; every number with its unit and its source."""
    model = a_model(3, torch.float32)

    found = meftbench.measure(model, a_batch(4, 32), method="meft1-exact", adapter_size=4)
    table = found.to_frame()

    assert found["step_time_s"].value > 0
    assert ["byte", "counted"] == list(table.loc["activation_peak_bytes", ["unit", "source"]])
    assert "measured" == table.loc["step_time_s", "source"]
    assert meftbench.unload(model) is model
    offloaded = meftbench.measure(model, a_batch(4, 32), method="lora+offload", **QUICK)
    assert offloaded["activation_peak_bytes"].value < found["activation_peak_bytes"].value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_said(value):
    model = a_model(1, torch.float32, dropout=0.0)
    with torch.no_grad():
        model.classifier.bias.fill_(value)
    with pytest.warns(UserWarning, match="the loss is nan: weights, inputs or labels"):
        found = meftbench.measure(model, a_batch(), steps=1, time=False)

    assert "the loss is nan" in found["collapse"].value
    assert "collapse" not in meftbench.measure(a_model(1, torch.float32), a_batch(), steps=1, time=False)


def test_the_public_functions_are_listed():
    assert {"apply_method", "measure", "load_adapter", "save_adapter", "unload", "run_suite"} <= set(dir(meftbench))


class Breaks(nn.Module):
    """A model of the user's that raises in forward or in backward."""

    def __init__(self, where):
        super().__init__()
        self.layer, self.where = nn.Linear(4, 1), where

    def forward(self, x):
        if self.where == "forward":
            raise KeyError("no such layer")
        h = self.layer(x).exp()
        if self.where == "backward":
            with torch.no_grad():
                h.add_(1)  # exp's gradient is its value
        return h.sum()


@pytest.mark.parametrize(("where", "kind"), [("forward", KeyError), ("backward", RuntimeError)])
def test_what_the_users_model_raises_is_one_line_and_its_cause(where, kind):
    with pytest.raises(
        UserError, match=rf"^Breaks: a training step of it fails \({kind.__name__}: .*\); mend"
    ) as caught:
        meftbench.measure(Breaks(where), {"x": torch.ones(2, 4)})

    assert isinstance(caught.value.__cause__, kind)
    assert 1 == len(str(caught.value).splitlines())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"input_ids": torch.full((3, 12), 9999)}, "IndexError: index out of range"),
        ({"labels": torch.tensor([0, 1, 7])}, "IndexError: Target 7 is out of bounds"),
        ({"input_ids": torch.ones(3, 12)}, "RuntimeError: Expected tensor for argument"),
    ],
)
def test_what_torch_says_of_a_batch_follows_our_line(changed, said):
    with pytest.raises(UserError, match="a training step of it fails") as caught:
        meftbench.measure(a_model(2, torch.float32), a_batch() | changed, time=False)
    assert said in str(caught.value)


def test_weights_for_inference_are_one_line():
    with torch.inference_mode():
        model = a_model(2, torch.float32)
    with pytest.raises(UserError, match=r"were made under torch\.inference_mode"):
        meftbench.measure(model, a_batch())


@pytest.mark.parametrize("batch", [None, {}, {"input_ids": torch.zeros(2, 4, dtype=torch.long)}])
@pytest.mark.parametrize("method", ["lora", "houlsby", "meft1-exact", "full+checkpoint"])
def test_a_model_is_as_it_was_where_it_could_not_be_measured(method, batch):
    """So that the next call, with a mended batch, does not find a method applied already."""
    model = a_model(2, torch.float32, dropout=0.0)
    before = {name: type(module) for name, module in model.named_modules()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(UserError):
        meftbench.measure(model, batch, method=method, **QUICK)

    assert before == {name: type(module) for name, module in model.named_modules()}
    assert trained == [parameter.requires_grad for parameter in model.parameters()]
    assert meftbench.measure(model, a_batch(), method=method, **QUICK)["activation_peak_bytes"].value > 0
