"""Optimizers: each is its library's own, and keeps as much as its definition says."""

from __future__ import annotations

import gc
import importlib.util
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from meftbench.catalogue import resolve
from meftbench.catalogue.optimizers import OPTIMIZERS
from meftbench.catalogue.parallelisms import PARALLELISMS
from meftbench.errors import UserError
from meftbench.measuring.optimizers import PAGED_FROM, states_of
from meftbench.plan.point import cell_of
from meftbench.probes.counted_metrics import count_memory
from meftbench.probes.memory_counted import warmup_steps
from tests.models import a_step

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
NEEDS_IT = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed (extra: quantize)")
NAMES = [pytest.param(name, marks=[NEEDS_IT] if entry.of_bitsandbytes else []) for name, entry in OPTIMIZERS.items()]
BLOCK = 256  # elements that share a scale (absmax) in 8-bit states
# Some tensors are above the 100,000 elements from which states are paged, some below the 4,096 of 8-bit states.
WIDE = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 1600, "num_hidden_layers": 1} | {
    "vocab_size": 1700,
    "attention_probs_dropout_prob": 0.0,
}


def weights(step):
    return {name: parameter.detach().clone() for name, parameter in step.applied.trained().items()}


def by_the_library(name, step, steps):
    """Weights after steps of the library's optimizer, used as its documentation says, on the gradients of `step`."""
    entry = OPTIMIZERS[name]
    trained = list(step.applied.trained().values())
    optimizer = resolve(entry.home)(trained, lr=1e-4, **entry.arguments)
    for _ in range(steps):
        step.forward_backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bitsandbytes says that a CPU pages nothing
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return weights(step)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_the_librarys_own(name):
    """Three steps leave the weights that its class leaves when used directly. Embeddings, see below, are frozen."""
    ours, reference = (a_step("lora", optimizer=name, precision="fp32") for _ in range(2))
    before = weights(ours)
    torch.manual_seed(0)
    for _ in range(3):
        ours.run()
    torch.manual_seed(0)
    expected = by_the_library(name, reference, 3)

    assert all(torch.equal(expected[key], value) for key, value in weights(ours).items())
    assert any(not torch.equal(before[key], value) for key, value in weights(ours).items())


@NEEDS_IT
def test_embeddings_keep_32_bits_as_under_trainer():
    """Trainer registers the same override; another model's parameters, made later, are not affected."""
    import bitsandbytes

    step = a_step("full", optimizer="adamw-8bit", model_config_overrides=WIDE)
    step.run()
    embeddings = {id(m.weight) for m in step.model.modules() if isinstance(m, nn.Embedding)}
    for parameter, state in step.optimizer.state.items():
        wide = id(parameter) in embeddings or parameter.numel() < 4096
        assert (torch.float32 if wide else torch.uint8) == state["state1"].dtype
    overridden = bitsandbytes.optim.GlobalOptimManager.get_instance().pid2config
    assert embeddings <= overridden.keys()
    del step, parameter, state
    gc.collect()
    assert not embeddings & overridden.keys()


def expected_bytes(name, parameters, embeddings):
    """(device, paged) bytes of states, from the optimizers' definitions."""
    device = paged = 0
    tables = set()
    for parameter in parameters:
        count, item = parameter.numel(), parameter.dtype.itemsize
        eight = "8bit" in name and count >= 4096 and id(parameter) not in embeddings
        states = 0 if name == "sgd" else 1 if name.startswith(("lion", "sgd")) else 2
        if name == "adafactor":
            rows_and_columns = math.prod(parameter.shape[:-1]) + math.prod(parameter.shape[:-2] + parameter.shape[-1:])
            device += item * (rows_and_columns if parameter.dim() > 1 else count) + item  # and their mean size
        elif name in ("adamw", "sgd", "sgd-momentum"):
            device += states * count * item + (4 if name == "adamw" else 0)  # and the number of steps
        elif "paged" in name and count >= PAGED_FROM:
            paged += states * count * (1 if eight else 4)
        else:
            device += states * count * (1 if eight else 4)
        if eight:
            device += states * -(-count // BLOCK) * 4
            tables |= set(range(states))
    return device + 1024 * len(tables), paged


@pytest.mark.parametrize("name", NAMES)
def test_states_are_as_large_as_the_optimizers_definition(name):
    """Two bytes a weight and scales for blocks of 256 with 8 bits, a row and a column with Adafactor, and so on."""
    step = a_step("full", optimizer=name, model_config_overrides=WIDE)
    metrics = count_memory(step, warmup=1, steps=1)
    embeddings = {id(m.weight) for m in step.model.modules() if isinstance(m, nn.Embedding)}
    parameters = list(step.applied.trained().values())

    device, paged = expected_bytes(name, parameters, embeddings)

    # Tables of values are the same tensors in all states.
    found = {id(state): state.nbytes for _, state, place in states_of(step.optimizer) if place == "optimizer"}
    assert device == sum(found.values())
    rounded = sum(-(-size // 512) * 512 for size in found.values())
    # At its peak a step of Adafactor has replaced some of the scalars, which are its temporaries until it ends.
    replaced = 512 * len(parameters) if OPTIMIZERS[name].replaces_state else 0
    assert 0 <= rounded - metrics["optimizer_bytes"].value <= replaced
    if OPTIMIZERS[name].paged:
        assert paged == metrics["optimizer_paged_bytes"].value > 0
    else:
        assert "optimizer_paged_bytes" not in metrics


@pytest.mark.parametrize("name", NAMES)
def test_only_an_optimizer_without_states_needs_no_step_before(name):
    """The first step makes the states, so it is not measured."""
    step = a_step("lora", optimizer=name)

    assert int(OPTIMIZERS[name].keeps_state) == warmup_steps(step, 0)


@pytest.mark.parametrize("way", PARALLELISMS)
def test_ranks_need_as_many_steps_before_as_they_are_not_alike(way):
    """DDP makes its buckets anew in the second: memory that would look as if it grew."""
    steps = PARALLELISMS[way].steps_to_settle
    step = a_step("lora")
    step.sharing = SimpleNamespace(steps_to_settle=steps)

    assert [steps, steps, steps + 1] == [warmup_steps(step, n) for n in (0, steps, steps + 1)]
    assert {"ddp": 2, "fsdp2": 1}[way] == steps


@NEEDS_IT
def test_a_cpu_warns_of_nothing():
    """That it pages nothing is no news to somebody who counts."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a_step("full", optimizer="paged-adamw-8bit", model_config_overrides=WIDE).run()


@pytest.mark.parametrize("name", [name for name, entry in OPTIMIZERS.items() if entry.of_bitsandbytes])
def test_without_bitsandbytes_the_extra_is_named(monkeypatch, name):
    monkeypatch.setattr("meftbench.measuring.optimizers.find_spec", lambda _: None)

    with pytest.raises(UserError, match=r"^optimizer .*: bitsandbytes is not installed; pip install 'meftbench\[qu"):
        a_step("lora", optimizer=name)


# --- refused early ---

POINT = {"model": "bert-tiny@random", "method": "full", "batch_size": 4, "sequence_length": 16}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "adam"}, "unknown optimizer 'adam'"),
        ({"optimizer": "adamw-8bit", "optimizer_impl": "foreach"}, "adamw-8bit has one implementation; leave it out"),
        ({"optimizer": "adafactor", "optimizer_impl": "loop"}, "adafactor has one implementation"),
        ({"optimizer": "lion", "precision": "fp64"}, "lion computes in 32 bits, not in fp64"),
        ({"method": "full+optimizer_in_backward", "micro_batch_size": 2}, "micro-batches sum them"),
        ({"method": "full+optimizer_in_backward", "precision": "fp16-autocast"}, "write precision: bf16-autocast"),
        ({"method": "full+optimizer_offload", "optimizer": "paged-adamw-8bit"}, "choose optimizer: adamw-8bit"),
        ({"method": "full+optimizer_offload", "optimizer": "sgd"}, "sgd keeps no state; leave it out"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(values, message):
    with pytest.raises(UserError) as raised:
        cell_of("estimate", POINT | values)

    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
