"""Every method of peft trains its adapter and a new head, and nothing else; what does not apply says why."""

from __future__ import annotations

import gc

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from meftbench.backbones.build import build_model
from meftbench.catalogue.methods import METHODS
from meftbench.catalogue.peft_methods import NOT_APPLICABLE, PEFT_METHODS
from meftbench.errors import UserError
from meftbench.measuring.batch import resident_batch
from meftbench.measuring.measurers import measure_cell
from meftbench.methods import prepare
from meftbench.plan.cell import Cell
from meftbench.plan.protocol import Protocol
from meftbench.plan.suite import parse_suite
from meftbench.strict_yaml import read

D, LAYERS, FFN, KV = 32, 2, 64, 16
HEAD = 2 * D + 2
SMALL = {"num_hidden_layers": LAYERS, "hidden_size": D, "num_attention_heads": 4, "intermediate_size": FFN}
TEXT = SMALL | {"vocab_size": 120}
LLAMA = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
BART = {"d_model": D, "vocab_size": 120} | {
    f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 4))
}
# model, what makes it small, head
MODELS = {
    "bert": ("bert-tiny@random", TEXT, None),
    "llama": ("llama-3.2-1b@random", LLAMA, None),
    "llama-classifier": ("llama-3.2-1b@random", LLAMA, "classification"),
    "vit": ("vit-tiny@random", SMALL | {"image_size": 32, "patch_size": 8}, None),
    "bart": ("bart-base@random", BART, None),
    "bart-lm": ("bart-base@random", BART, "seq2seq_lm"),
}
FITS = {
    "text": {"bert", "llama", "llama-classifier", "bart-lm"},
    "cached": {"bert", "llama", "llama-classifier", "bart-lm"},
    "llama": {"llama", "llama-classifier"},
    "decoders": {"llama", "llama-classifier"},
}
SIZES = {"block_size": 4, "vector_length": 16, "frequencies": 100, "virtual_tokens": 4}


def fits(name, model):
    return model in FITS.get(PEFT_METHODS[name].only, MODELS)


TYPES = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}


@pytest.fixture(autouse=True)
def _installed(request):
    """An older peft has fewer methods, and one of them needs scikit-learn."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    if name in PEFT_METHODS and PEFT_METHODS[name].peft_type not in TYPES:
        pytest.skip(f"the installed peft has no {name}")
    if name == "adamss":
        pytest.importorskip("sklearn")


def sizes(name):
    """What the method needs on a model that is this small."""
    size = PEFT_METHODS[name].settings.size
    return {size: SIZES[size]} if size in SIZES else {}


def build(model):
    name, overrides, head = MODELS[model]
    built = build_model(name, overrides, head=head)
    built.config.use_cache = False
    return built


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", PEFT_METHODS)
def test_the_adapter_and_a_new_head_are_trained_and_nothing_else(name, model):
    """After one optimizer step every trained tensor has a gradient; none of the pre-trained ones is trained."""
    pretrained = build(model)
    head = {id(p) for n, p in pretrained.named_parameters() if n.startswith(("classif", "score"))}
    own = [p for p in pretrained.parameters() if id(p) not in head]
    batch = resident_batch(pretrained, 2, 8, torch.device("cpu"))
    if not fits(name, model):
        with pytest.raises(UserError, match=f"{name} fits only"):
            prepare(pretrained, name, sizes(name))
        return
    applied = prepare(pretrained, name, sizes(name), seed=1)
    trained = applied.trained()
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)

    for _ in range(2):
        optimizer.zero_grad()
        loss = applied.model(**batch).loss
        loss.backward()
        moved = {n for n, p in trained.items() if p.grad is not None and p.grad.any()}
        optimizer.step()

    assert torch.isfinite(loss)
    assert set(trained) - applied.no_gradient == moved - applied.no_gradient
    assert not any(p.requires_grad or p.grad is not None for p in own)
    assert all(p.grad is None for p in applied.model.parameters() if not p.requires_grad)
    heads = {n for n in trained if ".classif" in n or ".score" in n}
    assert bool(head) == bool(heads)
    assert heads < set(trained)


@pytest.fixture(scope="module")
def _imports_are_not_collected():
    """At the edges of every window; `meftbench.measuring.requests.preload` does so for a sweep."""
    gc.collect()
    gc.freeze()


@pytest.mark.usefixtures("_imports_are_not_collected")
@pytest.mark.parametrize("name", PEFT_METHODS)
def test_a_cell_of_it_is_measured(name):
    """Through all passes, with their checks of gradients and of what recomputes."""
    model, overrides, _ = MODELS["bert" if fits(name, "bert") else "llama"]
    cell = Cell.of(
        name,
        model=model,
        model_config_overrides=overrides,
        method_params=sizes(name),
        batch_size=2,
        sequence_length=8,
    )

    found = measure_cell(cell, Protocol(warmup=1, steps=1)).metrics

    assert found["activation_peak_bytes"].value > 0
    assert found["parameters_trainable"].value > 0


def test_every_type_of_the_installed_peft_is_a_method_or_has_a_reason():
    known = {row.peft_type for row in (*PEFT_METHODS.values(), *NOT_APPLICABLE.values())} | {"LORA"}
    new = TYPES - known

    assert not new, f"write a row of PEFT_METHODS or NOT_APPLICABLE in catalogue/peft_methods.py for {sorted(new)}"


@pytest.mark.parametrize(
    ("name", "model", "settings", "expected"),
    [
        ("lora", "bert", {"rank": 8}, LAYERS * 2 * 8 * 2 * D + HEAD),
        ("lora", "llama", {"rank": 4}, LAYERS * 4 * (2 * D + D + KV)),
        ("rslora", "bert", {"rank": 8}, LAYERS * 2 * 8 * 2 * D + HEAD),
        ("dora", "llama", {"rank": 4}, LAYERS * (4 * (2 * D + D + KV) + D + KV)),  # and magnitudes of both outputs
        ("ia3", "bert", {}, LAYERS * (2 * D + D + FFN) + HEAD),  # key, value; attention's and the feed-forward's output
        ("ia3", "llama", {}, LAYERS * (2 * KV + FFN)),
        ("ia3", "vit", {}, LAYERS * (2 * D + FFN) + HEAD),
        ("ln-tuning", "bert", {}, (LAYERS * 2 + 1) * 2 * D + HEAD),
        ("ln-tuning", "llama", {}, (LAYERS * 2 + 1) * D),
        ("prompt-tuning", "llama", {"virtual_tokens": 4}, 4 * D),
        ("prefix-tuning", "llama", {"virtual_tokens": 4}, 4 * LAYERS * 2 * KV),
        ("vera", "bert", {"rank": 16}, LAYERS * 2 * (16 + D) + HEAD),
    ],
)
def test_trainable_parameters_follow_the_closed_formula(name, model, settings, expected):
    applied = prepare(build(model), name, settings)

    assert expected == sum(p.numel() for p in applied.trained().values())


# --- what is refused, in one line ---


def refused(tmp_path, method, model="bert-tiny@random", length=8):
    file = tmp_path / "zoo.yaml"
    file.write_text(
        f"schema: 1\nname: zoo\ngrid: {{model: {model}, method: {method}, batch_size: 2, sequence_length: {length}}}\n"
    )
    with pytest.raises(UserError) as caught:
        parse_suite(read(file))
    assert 2 == caught.value.exit_code
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", NOT_APPLICABLE)
def test_what_does_not_apply_says_why(tmp_path, name):
    assert NOT_APPLICABLE[name].reason in refused(tmp_path, name)
    with pytest.raises(UserError, match="does not apply"):
        prepare(build("bert"), name)
    assert name not in METHODS


def test_a_method_that_does_not_fit_the_backbone_is_refused_before_anything_runs(tmp_path):
    assert "prompt-tuning fits only text" in refused(tmp_path, "prompt-tuning", "vit-tiny@random", 197)
    assert "Llama and Mistral, not bert" in refused(tmp_path, "adaption-prompt")
    for method in ("prefix-tuning", "cartridge"):
        assert "every layer attends, not qwen3_next" in refused(tmp_path, method, "qwen3-next-80b-a3b@random")


def test_virtual_tokens_need_positions(tmp_path):
    said = refused(tmp_path, "prompt-tuning", length=500)

    assert "500 and 16 virtual tokens is longer than the 512 positions" in said
    assert "at most 496" in said


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("ia3", {"feedforward_module": []}, "did you mean 'feedforward_modules'"),
        ("hira", {"r": 4}, "r is set by rank"),
        ("dora", {"use_dora": False}, "use_dora is what makes it dora"),
        ("gralora", {"gralora_k": 3}, "peft refuses it"),
    ],
)
def test_peft_checks_the_fields_passed_through(name, config, said):
    with pytest.raises(UserError, match=said) as caught:
        prepare(build("bert"), name, {"config": config})
    assert "\n" not in str(caught.value)


def test_fields_of_peft_are_passed_through():
    applied = prepare(build("bert"), "lokr", {"config": {"layers_to_transform": [0]}})

    assert any(".layer.0." in name for name in applied.trained())
    assert not any(".layer.1." in name for name in applied.trained())


def test_a_type_that_the_installed_peft_lacks_is_refused(monkeypatch):
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, "VERA")

    with pytest.raises(UserError, match=r"vera: the installed peft .* has no VERA; pip install"):
        prepare(build("bert"), "vera")


@pytest.mark.parametrize("name", ["glora", "ia3", "ln-tuning", "prefix-tuning", "adaption-prompt", "shadow", "shira"])
@pytest.mark.parametrize("lever", ["checkpoint", "tiled_mlp", "chunked_loss"])
def test_levers_change_no_gradient(name, lever, tmp_path):
    """Those that a method does not bear are refused, in a suite and from Python."""
    model = build("llama")
    reason = PEFT_METHODS[name].refuses.get(lever)
    if reason:
        assert reason in refused(tmp_path, f"{name}+{lever}", "llama-3.2-1b@random")
        with pytest.raises(UserError, match=reason):
            prepare(model, f"{name}+{lever}", sizes(name))
        return
    batch = resident_batch(model, 2, 8, torch.device("cpu"))
    applied = prepare(model, f"{name}+{lever}", sizes(name), seed=1)
    parameters = list(applied.trained().values())

    torch.manual_seed(0)
    found = torch.autograd.grad(applied.model(**batch).loss, parameters)
    torch.manual_seed(0)
    with applied.reference_autograd():
        expected = torch.autograd.grad(applied.model(**batch).loss, parameters)

    assert all(torch.allclose(e, f, atol=1e-6) for f, e in zip(found, expected, strict=True))
