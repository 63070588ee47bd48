"""`+liger_loss` and `+cut_loss`: transformers' own loss and gradients by the libraries' kernels, or refused in a line.

Triton's interpreter runs Liger's kernels on the CPU where it is on (TRITON_INTERPRET=1, as .ci/run sets it). It runs
neither those of cut cross-entropy nor a cap, which call functions of CUDA's library. Elsewhere functions stand in for
the libraries, with their signatures, and show what the levers give them.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from copy import deepcopy
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from meftbench.errors import UserError
from meftbench.measuring.measurers import measure_cell
from meftbench.methods import prepare
from meftbench.methods.levers.fused_loss import Cut, Liger
from meftbench.methods.levers.vocabulary_loss import Head
from meftbench.plan.point import cell_of
from meftbench.plan.protocol import Protocol
from meftbench.prediction.fused_losses import LigerRule
from meftbench.probes.storage_counter import StorageCounter
from tests.models import a_batch_for, a_model, gradients

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = all(importlib.util.find_spec(name) for name in ("triton", "liger_kernel"))
needs_kernels = pytest.mark.skipif(
    not (INSTALLED and INTERPRETED), reason="triton's interpreter is off, or the extra `loss` is not installed"
)
LIGER = "liger_kernel.ops.fused_linear_cross_entropy"


def a_predictor(backbone, dtype):
    return a_model(2, dtype, backbone, dropout=0.0, head="seq2seq_lm" if backbone == "bart" else "causal_lm")


def both(backbone, method, lever, dtype):
    """(loss, gradients) of a method with and without the lever."""
    model = a_predictor(backbone, dtype)
    fused, plain = (prepare(deepcopy(model), name, seed=0).model for name in (f"{method}+{lever}", method))
    batch = a_batch_for(plain)
    assert bool((batch["labels"] == -100).any())
    return gradients(fused, batch), gradients(plain, batch)


def assert_same(found, expected, rel):
    (loss, gradient), (loss_expected, gradient_expected) = found, expected
    assert float(loss_expected) == pytest.approx(float(loss), rel=max(rel, 1e-6))
    assert list(gradient_expected) == list(gradient)
    largest = max(float(g.norm()) for g in gradient_expected.values())
    for name, g in gradient_expected.items():
        assert float((gradient[name] - g).norm()) <= rel * max(float(g.norm()), 1e-3 * largest), name


# --- what the libraries are given ---


def stand_in(name, monkeypatch, **contents):
    """A module of that name, below packages that are empty."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:count]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(contents)


@pytest.fixture
def libraries(monkeypatch):
    """Functions with the libraries' signatures, in plain torch, of whatever device."""

    class Function:
        @staticmethod
        def apply(h, weight, labels, bias, class_weight, ignored, square, smoothing, reduction, cap):
            assert (class_weight, square, smoothing) == (None, 0.0, 0.0)
            return (by_logits(h, weight, labels, bias, ignored, reduction, cap), None, None, None)

    def linear_cross_entropy(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", impl="cce"):
        assert e.dtype in (torch.bfloat16, torch.float16)  # as cut_cross_entropy's backward pass asserts
        return by_logits(e, c, targets, None, ignore_index, reduction, softcap)

    def by_logits(h, weight, labels, bias, ignored, reduction, cap):
        logits = F.linear(h, weight.to(h.dtype), None if bias is None else bias.to(h.dtype))
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return F.cross_entropy(logits.float(), labels, ignore_index=ignored, reduction=reduction)

    stand_in(LIGER, monkeypatch, LigerFusedLinearCrossEntropyFunction=Function)
    stand_in("cut_cross_entropy", monkeypatch, linear_cross_entropy=linear_cross_entropy)
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("method", ["full", "lora", "meft1-exact", "full+checkpoint"])
@pytest.mark.parametrize("backbone", ["opt", "llama", "gemma2", "bart"])
def test_liger_is_given_what_the_loss_is_of(libraries, backbone, method):
    """Hidden states, weight, bias, cap, shifted labels: the loss of float64, and of its gradients all."""
    assert_same(*both(backbone, method, "liger_loss", torch.float64), rel=1e-12 if backbone != "bart" else 1e-6)


@pytest.mark.parametrize("backbone", ["llama", "gemma2"])
def test_cut_is_given_what_the_loss_is_of(libraries, backbone):
    """In bfloat16; and under autocast, in which the hidden states become 16 bits as a Linear's input would."""
    assert_same(*both(backbone, "full", "cut_loss", torch.bfloat16), rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(*both(backbone, "lora", "cut_loss", torch.float32), rel=2e-2)


def test_a_head_that_is_trained_alone(libraries):
    """Liger gives a weight no gradient without one of the hidden states, which is therefore asked for."""
    model = a_predictor("llama", torch.float64)
    model.requires_grad_(False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    plain, fused = deepcopy(model), prepare(model, "full+liger_loss").model
    seen = []
    liger = sys.modules[LIGER].LigerFusedLinearCrossEntropyFunction
    apply = liger.apply
    liger.apply = staticmethod(lambda h, *rest: seen.append(h.requires_grad) or apply(h, *rest))

    assert_same(gradients(fused, a_batch_for(plain)), gradients(plain, a_batch_for(plain)), rel=1e-12)
    assert seen == [True]


# --- refusals ---


def test_two_losses_exclude_each_other():
    for levers in ("chunked_loss+liger_loss", "liger_loss+cut_loss", "chunked_loss+liger_loss+cut_loss"):
        with pytest.raises(UserError, match=r"both replace the loss over the vocabulary; leave one of them out"):
            prepare(a_predictor("llama", torch.float32), f"lora+{levers}")
        with pytest.raises(UserError, match=r"both replace the loss over the vocabulary; leave one of them out"):
            cell_of("estimate", values(method=f"lora+{levers}"))


def values(**changes):
    return {"model": "llama-3.2-1b@random", "method": "lora", "batch_size": 1, "sequence_length": 16} | changes


@pytest.mark.parametrize("precision", [{}, {"precision": "fp64"}])
def test_cut_needs_16_bits(precision, libraries):
    """Before anything is built; and where a model is prepared by hand, when it runs."""
    with pytest.raises(UserError, match=r"cut_loss does not work in fp(32|64); write one of: bf16, .*nf4"):
        cell_of("estimate", values(method="lora+cut_loss", **precision))
    model = prepare(a_predictor("llama", torch.float32), "lora+cut_loss").model
    with pytest.raises(UserError, match=r"gradients in 16 bits only, and the hidden states are float32; .*liger_loss"):
        model(**a_batch_for(model))


@pytest.mark.parametrize("lever", ["liger_loss", "cut_loss"])
def test_a_cpu_is_refused(lever, monkeypatch):
    """In one line: a cell before it is built, a model when it runs."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cell = cell_of("estimate", values(method=f"lora+{lever}", precision="bf16"))
    with pytest.raises(UserError, match=rf"{lever}: its Triton kernels run on CUDA only; use --device cuda or pred"):
        measure_cell(cell, Protocol(passes=["throughput"]))
    model = prepare(a_predictor("llama", torch.bfloat16), f"lora+{lever}").model
    with pytest.raises(
        UserError, match=rf"{lever}: its Triton kernels run on CUDA, and the model is on cpu; .*chunked"
    ):
        model(**a_batch_for(model))


@pytest.mark.parametrize(("lever", "module"), [("liger_loss", LIGER), ("cut_loss", "cut_cross_entropy")])
def test_a_library_that_is_not_installed(lever, module, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
    model = prepare(a_predictor("llama", torch.bfloat16), f"lora+{lever}").model
    with pytest.raises(UserError, match=rf"{lever}: [a-z-]+ cannot be imported .*; pip install 'meftbench\[loss\]'"):
        model(**a_batch_for(model))


@pytest.mark.parametrize("lever", ["liger_loss", "cut_loss"])
def test_heads_that_the_kernels_do_not_take(lever):
    linear, other = nn.Linear(4, 8), nn.Sequential(nn.Linear(4, 8))
    other.weight = linear.weight
    loss = {"liger_loss": Liger(), "cut_loss": Cut()}[lever]
    bias = torch.zeros(1, 8)

    assert "no plain Linear" in loss.refusal(Head(other, None, None, True))
    assert "bias" in loss.refusal(Head(linear, bias, None, True))
    assert loss.refusal(Head(nn.Linear(4, 8, bias=False), None, 30.0, True)) is None
    if lever == "cut_loss":
        with pytest.raises(UserError, match=r"cut_loss|has no bias of the logits"):
            prepare(a_predictor("bart", torch.bfloat16), "lora+cut_loss")


# --- with the libraries, in triton's interpreter ---


@needs_kernels
@pytest.mark.parametrize(
    ("backbone", "method"), [("llama", "full"), ("llama", "meft1-exact"), ("opt", "lora"), ("bart", "full")]
)
def test_loss_and_gradients_by_ligers_kernel(backbone, method):
    """To the rounding of the kernel, which computes in float32 whatever the weights are."""
    assert_same(*both(backbone, method, "liger_loss", torch.float32), rel=2e-5)


@needs_kernels
@pytest.mark.parametrize("trained", [True, False])
def test_the_rule_allocates_as_liger_does(trained):
    """Byte for byte at the peak, where Liger adds products, as it does on a CPU and on old GPUs."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def liger(h, weight, labels):
        return LigerFusedLinearCrossEntropyFunction.apply(h, weight, labels, None, None, -100, 0.0, 0.0, "sum", None)[0]

    def rule(h, weight, labels):
        return LigerRule(reuses=False, adds_products=True).summed(h, weight, labels, None, -100, None)

    assert counted(liger, "cpu", trained) == counted(rule, "meta", trained)


def counted(loss_of, device, trained):
    """The largest bytes alive in the forward pass, in which all gradients are made."""
    h = torch.ones(200, 32, device=device, requires_grad=True)
    weight = torch.ones(3000, 32, device=device, requires_grad=trained)
    labels = torch.zeros(200, dtype=torch.long, device=device)
    with StorageCounter(device) as counter:
        for given in (h, weight, labels):
            counter.book(given, "inputs")
        counter.mark("forward")
        loss_of(h, weight, labels).backward()
    return counter.phase_peaks["forward"]
