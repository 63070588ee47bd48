"""Every method of HF peft is traced: those that look at values, too, since what they would read is known beforehand."""

from __future__ import annotations

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from long_profile import sampled
from meftbench.catalogue.peft_methods import PEFT_METHODS
from meftbench.catalogue.profiles import find_profile
from meftbench.errors import UserError
from meftbench.measuring.build import build_step
from meftbench.plan.cell import Cell
from meftbench.prediction.allocator import AllocatorSettings
from meftbench.prediction.peft_shapes import peft_without_values
from meftbench.prediction.predict import Predicted, predict
from meftbench.prediction.trace import count_uncomputed, uncomputed_model
from meftbench.prediction.tracer import Tracer
from tests.prediction import test_trace

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
MODELS = {
    "bert": ("bert-tiny@random", SMALL | {"vocab_size": 120, "attention_probs_dropout_prob": 0.0}),
    "llama": ("llama-3.2-1b@random", SMALL | {"vocab_size": 120, "num_key_value_heads": 2, "head_dim": 16}),
}
SIZES = {"block_size": 4, "vector_length": 16, "frequencies": 300, "virtual_tokens": 4}
INSTALLED = {getattr(kind, "value", kind) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
A100 = find_profile("a100-80gb")


def a_cell(name, family, **changes):
    """A small cell of the method, in which 2 sequences of 16 tokens are trained on."""
    if PEFT_METHODS[name].peft_type not in INSTALLED:
        pytest.skip(f"the installed peft has no {name}")
    if name == "adamss":
        pytest.importorskip("sklearn")
    size = PEFT_METHODS[name].settings.size
    identifier, overrides = MODELS[family]
    values = {
        "model": identifier,
        "model_config_overrides": overrides,
        "method_params": {size: SIZES[size]} if size in SIZES else {},
        "batch_size": 2,
        "sequence_length": 16,
    }
    return Cell.of(name, **(values | changes))


# Those that need something of their own in a trace (peft_shapes.py) meet an encoder and a decoder; of the others every
# second meets each, which tests/methods/test_peft_zoo.py builds on both.
SPECIAL = {"boft", "frod", "glora", "loha", "lokr", "osf", "psoft", "shira", "unilora", "vblora", "waveft"}
MET = [
    (name, model)
    for number, name in enumerate(PEFT_METHODS)
    for turn, model in enumerate(MODELS)
    if (model == "llama" if PEFT_METHODS[name].only in ("llama", "decoders") else name in SPECIAL or number % 2 == turn)
]


@pytest.mark.parametrize(("name", "model"), sampled(MET, 3))
def test_a_traced_step_of_it_is_a_computed_step_byte_for_byte(name, model, monkeypatch):
    """Phase peaks, breakdown, what is held after forward; the attention mask, which a trace drops, is of ones."""
    monkeypatch.setattr(test_trace, "build_step", a_moved_step)
    test_trace.agree(a_cell(name, model), mask=False)


REFUSED_IN_FLOAT64 = ("olora", "pissa", "psoft")  # by peft, which decomposes no weights of that type


@pytest.mark.parametrize(("name", "model"), sampled([case for case in MET if case[0] not in REFUSED_IN_FLOAT64], 6))
def test_in_float64_as_well(name, model, monkeypatch):
    """Adapters have the type of the layer that they adapt, also where they are made without values."""
    monkeypatch.setattr(test_trace, "build_step", a_moved_step)
    test_trace.agree(a_cell(name, model, precision="fp64"), mask=False)


def a_moved_step(cell, device, padding):
    """The cell's step after a move to another device, as in a trace: OFT's buffers no longer share memory."""
    step = build_step(cell, device, padding)
    for module in step.model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.clone()
    return step


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-autocast"])
@pytest.mark.parametrize(
    "name", ["adamss", "boft", "frod", "glora", "loha", "lokr", "shira", "unilora", "vblora", "waveft"]
)
def test_those_that_look_at_values_are_predicted_in_every_precision(name, precision):
    """A prediction traces on the meta device, or with fake tensors under autocast. Trained numbers are as counted."""
    cell = a_cell(name, "llama", precision=precision)

    predicted = predict(cell, A100)

    weights = sum(p.nbytes for p in uncomputed_model(cell).model.parameters())
    assert weights < predicted.measured[-1].baseline < predicted.peak
    assert 0 < predicted.sizes["parameters_trainable"].value


def test_a_second_trace_of_a_model_finds_its_indices_on_the_host_again():
    """SHiRA moves its indices to the device in the first step, and they stay there: 2 of 4 bytes a trained number."""
    cell = a_cell("shira", "llama", method_params={"rank": 4})
    tracer = Tracer(A100)

    first, second = (Predicted(A100, tracer.directly(cell), AllocatorSettings()) for _ in range(2))

    assert first.measured[-1].baseline == second.measured[-1].baseline
    trained = first.sizes["parameters_trainable"].value
    weights = sum(p.nbytes for p in uncomputed_model(cell).model.parameters())
    assert weights + 2 * 4 * trained + 2 * 4 * trained <= first.measured[-1].baseline - A100.cublas_workspace_bytes


# Trained numbers, and what HF peft's runs held between steps on an L40S, MiB: Llama-3.2-3B in bfloat16, the adapter in
# float32 on q and v (huggingface/peft, method_comparison/MetaMathQA/results at commit 5d602fdb, Apache-2.0).
PUBLISHED = {
    "boft": ({}, 802_816, 6475.2),
    "frod": ({}, 5_456_808, 6543.7),
    "shira": ({"rank": 32}, 9_175_040, 6670.6),
    "unilora": ({"config": {"r": 32, "theta_d_length": 256}}, 256, 6568.2),
    "vblora": ({"vector_length": 256}, 1_212_416, 6481.7),
    "waveft": ({"frequencies": 5000}, 280_000, 6467.1),
}
# The runs also hold the logits and the cache of the last batch, whose length is not stated (use_cache was on). They are
# the same for all methods; here they are the mean of the differences, in MiB.
ALSO_HELD = 318.0
# The runs made adapters after the model was moved to its GPU. peft leaves these buffers on the host then; a model that
# is moved when it has its adapters takes them along, and that is what is predicted.
ON_HOST = ("boft_P", "frod_U", "frod_V", "frod_s_indices", "frod_s_size")


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_held_between_steps_is_what_was_measured(name):
    """Within 4 of 6,500 MiB. The runs keep gradients between steps, 4 bytes for each trained number."""
    settings, trained, measured = PUBLISHED[name]
    settings = settings | {"targets": ["q_proj", "v_proj"]}
    cell = a_cell(
        name,
        "llama",
        model="llama-3.2-3b@random",
        model_config_overrides={},
        method_params=settings,
        precision="bf16",
        head="causal_lm",
    )

    applied = uncomputed_model(cell)
    on_host = sum(b.nbytes for n, b in applied.model.named_buffers() if any(name in n.split(".") for name in ON_HOST))

    predicted = predict(cell, A100)

    assert trained == predicted.sizes["parameters_trainable"].value
    held = (predicted.measured[-1].baseline - on_host + 4 * trained) / 2**20
    assert measured == pytest.approx(held + ALSO_HELD, abs=4)


def test_values_are_given_to_peft_alone():
    """Elsewhere a condition on a tensor without values still ends in torch's error; with values it holds or not."""
    with peft_without_values():
        assert torch.ones(1)
        assert not torch.zeros(1)
        with pytest.raises(RuntimeError, match="meta tensors"):
            bool(torch.ones(1, device="meta"))
        assert [1, 2] == torch.bincount(torch.tensor([0, 1, 1])).tolist()
        assert torch.sparse_coo_tensor(torch.zeros(2, 1), torch.ones(1), (2, 2)).is_sparse


def test_settings_that_need_values_are_one_line():
    """AdaMSS's dynamic rank counts the singular values above a threshold: adapters differ in size by the weights."""
    cell = a_cell("adamss", "llama", method_params={"config": {"use_dynamic_rank": True}})

    with pytest.raises(
        UserError, match="adamss looks at values when it is applied, which a prediction has not"
    ) as caught:
        uncomputed_model(cell)

    assert "\n" not in str(caught.value)


def test_a_method_does_not_hide_what_the_model_itself_reads():
    """BART's classification head looks for the end of each text, with WaveFT as with lora."""
    tiny = {"d_model": 32, "vocab_size": 120, "encoder_layers": 1, "decoder_layers": 1} | {
        f"{side}_{what}": 4 for side in ("encoder", "decoder") for what in ("attention_heads", "ffn_dim")
    }
    cell = a_cell("waveft", "bert", model="bart-base@random", model_config_overrides=tiny, head="classification")

    with pytest.raises(UserError, match="looks at values"):
        count_uncomputed(cell)
