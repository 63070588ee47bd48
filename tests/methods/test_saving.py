"""An adapter on disk and back: saved, loaded, unloaded; bit for bit, or one line of error and nothing changed."""

from __future__ import annotations

import copy
import json
import os
import pickle
import warnings

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from torch import nn

import meftbench
from meftbench.backbones.build import build_model
from meftbench.catalogue.peft_methods import PEFT_METHODS
from meftbench.errors import UserError
from meftbench.measuring.batch import resident_batch
from meftbench.methods.bottleneck import Bottleneck
from meftbench.methods.unloading import in_new_head, trained_beside
from meftbench.reversible import ReversibleStack

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
D = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 3}
TEXT = D | {"vocab_size": 120}
BART = {
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 64))},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    "d_model": 32,
    "vocab_size": 120,
}
MODELS = {
    "bert": ("bert-tiny@random", TEXT, None),
    "bart": ("bart-base@random", BART, "seq2seq_lm"),
    "llama": ("llama-3.2-1b@random", TEXT | {"num_key_value_heads": 2, "head_dim": 8}, "causal_lm"),
    "gemma": ("gemma-3-1b@random", TEXT | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5}, "causal_lm"),
    "vit": ("vit-tiny@random", D | {"image_size": 32, "patch_size": 8}, None),
}
METHODS = [
    ("houlsby", {}),
    ("pfeiffer", {}),
    ("parallel", {}),
    ("meft1", {}),
    ("meft1-exact", {}),
    ("meft3-exact", {"reversible_layers": 1}),
    ("bdia", {}),
    ("leapfrog", {}),
    ("lora", {}),
]
# What transformers notes on an instance for itself; whether checkpointing is on is asked for.
OF_TRANSFORMERS = {"_is_hf_initialized", "gradient_checkpointing", "_require_grads_hooks"}
SAVED = ("meft1-exact", {"adapter_size": 4})


def a_model(family="bert", seed=0, **changes):
    name, overrides, head = MODELS[family]
    return build_model(name, overrides | changes, head=head, seed=seed)


def applied_to(model, method, settings):
    size = {"rank": 4} if method.startswith("lora") else {"adapter_size": 4}
    return meftbench.apply_method(model, method, seed=1, **(size | settings))


def trained(model):
    """The same model after a step that moves every trained tensor."""
    batch = resident_batch(_base(model), 2, 8, torch.device("cpu"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model


def outputs(model):
    """Logits in evaluation; the mode stays."""
    batch = resident_batch(_base(model), 2, 8, torch.device("cpu"), seed=5)
    training = {module: module.training for module in model.modules()}
    with torch.no_grad():
        logits = model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits
    for module, mode in training.items():
        module.training = mode
    return logits


def _base(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def state_of(model):
    """All that can be seen of a model: tensors, whether they are trained, types of modules, hooks, attributes."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "types": {name: type(module) for name, module in model.named_modules()},
        "hooks": {name: [list(getattr(m, h).values()) for h in hooks] for name, m in model.named_modules()},
        "attributes": {name: set(vars(m)) - OF_TRANSFORMERS for name, m in model.named_modules()},
    }


def assert_same(found, expected, but=()):
    assert {k: v for k, v in found.items() if k != "tensors"} == {k: v for k, v in expected.items() if k != "tensors"}
    assert list(found["tensors"]) == list(expected["tensors"])
    for name, tensor in expected["tensors"].items():
        assert name.startswith(but) or torch.equal(tensor, found["tensors"][name]), name


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with a trained meft1-exact of a BERT, and what that model gives."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    model = trained(applied_to(a_model(), *SAVED))
    meftbench.save_adapter(model, folder)
    return folder, outputs(model)


@pytest.fixture
def folder(adapter, tmp_path):
    """A copy of it to be damaged."""
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((adapter[0] / name).read_bytes())
    return tmp_path


def change(folder, **values):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


def change_tensors(folder, changed):
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    safetensors.torch.save_file(changed(tensors), folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    del config["weights_sha256"]
    (folder / CONFIG).write_text(json.dumps(config))


# --- there and back ---


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("method", "settings"), METHODS, ids=[name for name, _ in METHODS])
def test_a_saved_adapter_gives_the_same_outputs_and_unloads_to_the_model_before(family, method, settings, tmp_path):
    """Trained, saved, loaded into a fresh model: equal logits. Unloaded: tensors, types, hooks, requires_grad as they
    were, but for the trained head; another method can then be applied."""
    model = a_model(family)
    before, plain = state_of(model), outputs(model)
    tuned = trained(applied_to(model, method, settings))
    meftbench.save_adapter(tuned, tmp_path / "adapter")
    expected = outputs(tuned)
    assert not torch.equal(plain, expected)

    loaded = meftbench.load_adapter(a_model(family), tmp_path / "adapter")
    assert torch.equal(expected, outputs(loaded))
    assert {n for n, p in tuned.named_parameters() if p.requires_grad} == {
        n for n, p in loaded.named_parameters() if p.requires_grad
    }

    assert meftbench.unload(tuned) is model
    head = {"bert": "classifier.", "vit": "classifier."}.get(family, "-")
    assert_same(state_of(model), before, but=(head,))
    model.load_state_dict(before["tensors"])
    assert torch.equal(plain, outputs(model))
    trained(applied_to(model, "meft3-exact" if method == "lora" else "lora", {}))


PROMPTS = {"task_type": "SEQ_CLS", "num_virtual_tokens": 4}


def by_peft(kind, **fields):
    """A BERT in peft's own wrapper, its new head trained beside."""
    model = a_model()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, getattr(peft, kind)(**fields))
    model.classifier.requires_grad_(True)
    return wrapped


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_what_peft_does_not_write_is_saved(kind, tmp_path):
    """The head beside a method of peft, and what prompts are computed from, are in the folder; the wrapper need not be
    ours."""
    tuned = by_peft(kind, **PROMPTS)
    before = state_of(a_model())
    meftbench.save_adapter(trained(tuned), tmp_path)
    expected = outputs(tuned)

    assert torch.equal(expected, outputs(meftbench.load_adapter(a_model(), tmp_path)))
    again = by_peft(kind, **PROMPTS)
    assert meftbench.load_adapter(again, tmp_path) is again
    assert torch.equal(expected, outputs(again))
    assert_same(state_of(meftbench.unload(tuned)), before, but=("classifier.",))


@pytest.mark.parametrize("method", ["pfeiffer", "meft3-exact", "lora"])
def test_weights_are_loaded_into_a_model_with_the_method_applied(method, tmp_path):
    """The file replaces the weights, and a state_dict does the same; mode, dtype and random numbers stay."""
    tuned = trained(applied_to(a_model(), method, {}))
    meftbench.save_adapter(tuned, tmp_path)
    other, third = applied_to(a_model(seed=3), method, {}), applied_to(a_model(), method, {}).eval()
    third.load_state_dict(tuned.state_dict())
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)

    other.load_state_dict(a_model_state(tuned, other))
    assert meftbench.load_adapter(other, tmp_path) is other
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(outputs(tuned), outputs(other))
    assert torch.equal(outputs(tuned), outputs(third))
    half = meftbench.load_adapter(a_model().bfloat16().eval(), tmp_path)
    assert not any(module.training for module in half.modules())
    assert method == "lora" or {p.dtype for p in half.parameters()} == {torch.bfloat16}


def a_model_state(tuned, other):
    """The tensors of `other`, with those of the pre-trained model from `tuned`."""
    frozen = {name for name, parameter in tuned.named_parameters() if not parameter.requires_grad}
    return {name: (tuned if name in frozen else other).state_dict()[name] for name in other.state_dict()}


def test_how_the_work_is_done_may_differ(adapter):
    """Tiles, groups of heads and verification are of the machine, not of the adapter."""
    model = applied_to(a_model(), "meft1-exact", {"tiles": 3, "strict": True})

    assert torch.allclose(adapter[1], outputs(meftbench.load_adapter(model, adapter[0])), atol=1e-5)


def test_levers_are_named_and_not_applied_again(tmp_path):
    """`+checkpoint` is of the training that was; the file says so, the loaded model does not do it."""
    meftbench.save_adapter(applied_to(a_model(), "meft1+checkpoint", {}), tmp_path)

    assert json.loads((tmp_path / CONFIG).read_text())["levers"] == ["checkpoint"]
    (stack,) = [m for m in meftbench.load_adapter(a_model(), tmp_path).modules() if isinstance(m, ReversibleStack)]
    assert stack.activations == "reverse"


@pytest.mark.parametrize("levers", ["checkpoint", "tiled_mlp", "checkpoint+tiled_mlp+chunked_loss"])
@pytest.mark.parametrize("method", ["parallel", "meft1", "lora", "meft3"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_levers_are_unloaded_too(family, method, levers):
    """Checkpoint switches, tiles and chunks are gone with the method, from layers that are not reversible as well."""
    if "chunked" in levers and family == "bert":
        levers = "checkpoint+tiled_mlp"
    model = a_model(family)
    before = state_of(model)
    settings = {"reversible_layers": 1} if method == "meft3" else {}

    tuned = applied_to(model, f"{method}+{levers}", settings)
    assert meftbench.unload(trained(tuned)) is model
    assert_same(state_of(model), before, but=("classifier.",))
    assert not model.is_activation_checkpointing


def test_what_was_frozen_and_hooked_before_is_so_afterwards():
    """A frozen embedding stays frozen; a user's hooks stay, on layers and on modules with hooks of ours."""
    calls = []
    model = a_model()
    model.bert.embeddings.requires_grad_(False)
    for module in (model.bert, model.bert.encoder.layer[1], model.bert.encoder.layer[1].output):
        module.register_forward_pre_hook(lambda module, args: calls.append(type(module).__name__))
    before = state_of(model)
    applied_to(model, "meft3-exact", {})
    meftbench.unload(model)

    assert_same(state_of(model), before)
    outputs(model)
    assert calls == ["BertModel", "BertLayer", "BertOutput"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize(("family", "method"), [("bert", "houlsby"), ("llama", "meft1-exact"), ("llama", "parallel")])
def test_a_copied_model_is_saved_and_unloaded(family, method, copied, tmp_path):
    """The note, the hooks and the layers are those of the copy; the original keeps its own."""
    model = a_model(family)
    before = state_of(model)
    tuned = trained(applied_to(model, method, {}))
    again = copied(tuned)
    meftbench.save_adapter(again, tmp_path)

    assert torch.equal(outputs(tuned), outputs(meftbench.load_adapter(a_model(family), tmp_path)))
    assert_same(state_of(meftbench.unload(again)), before, but=("classifier.",))
    assert any(isinstance(module, Bottleneck) for module in tuned.modules())


def test_what_else_was_trained_is_saved_and_keeps_from_unloading(tmp_path):
    """A pooler that the user unfroze is part of the adapter; then there is no way back, and unload says so."""
    model = applied_to(a_model(), "parallel", {})
    model.bert.pooler.requires_grad_(True)
    meftbench.save_adapter(trained(model), tmp_path)
    loaded = meftbench.load_adapter(a_model(), tmp_path)

    assert torch.equal(outputs(model), outputs(loaded))
    assert loaded.bert.pooler.dense.weight.requires_grad
    with pytest.raises(UserError, match=r"'bert.pooler.dense.weight'.*and 1 more tensor; load the pre-trained"):
        meftbench.unload(loaded)


def test_weights_that_an_adapter_was_started_from_do_not_come_back(tmp_path):
    """PiSSA takes its start out of the weights: saved and loaded as any, refused by unload; a wrong model is spared."""
    model = trained(by_peft("LoraConfig", init_lora_weights="pissa", target_modules=["query"]))
    meftbench.save_adapter(model, tmp_path)
    other = a_model(num_hidden_layers=4)
    before = state_of(other)

    assert torch.equal(outputs(model), outputs(meftbench.load_adapter(a_model(), tmp_path)))
    with pytest.raises(UserError, match="was started from them; load the pre-trained model afresh"):
        meftbench.unload(model)
    with pytest.raises(UserError, match="lacks"):
        meftbench.load_adapter(other, tmp_path)
    assert_same(state_of(other), before)


def test_a_merged_adapter_cannot_be_unloaded():
    """Taking it out of the weights again would round them."""
    model = applied_to(a_model(), "lora", {})
    model.merge_adapter()

    with pytest.raises(UserError, match="the adapter is merged into its weights; load the pre-trained"):
        meftbench.unload(model)


# --- what is in the folder ---


@pytest.mark.parametrize("method", ["meft1-exact", "lora"])
def test_the_base_model_is_named_and_another_one_warned_of(method, tmp_path):
    """A model from a local folder is named by it; on another base the adapter is loaded with a warning."""
    base = tmp_path / "base"
    a_model().save_pretrained(base)
    model = build_model(str(base))
    model.config._commit_hash = "0123abc"
    meftbench.save_adapter(applied_to(model, method, {}), tmp_path / "adapter")

    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(base), "0123abc")
    with pytest.warns(UserWarning, match=f"was trained on base_model_name_or_path '{base}', this model has None"):
        meftbench.load_adapter(a_model(), tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        meftbench.load_adapter(build_model(str(base)), tmp_path / "adapter")


def test_the_configuration_says_what_was_applied(adapter):
    """Method and settings in full; the file holds the adapters and the head, and nothing that is frozen."""
    config = json.loads((adapter[0] / CONFIG).read_text())
    tensors = safetensors.torch.load_file(adapter[0] / WEIGHTS)

    assert (config["peft_type"], config["method"], config["schema"]) == ("MEFTBENCH", "meft1-exact", 2)
    assert config["settings"]["adapter_size"] == 4
    assert config["settings"]["step_bits"] == "auto"
    assert config["base_model_class"] == "BertForSequenceClassification"
    assert config["modules_to_save"] == ["classifier"]
    assert sum(".adapter." in name for name in tensors) == 2 * 3 * 4
    assert sorted(os.listdir(adapter[0])) == [CONFIG, WEIGHTS]
    assert len(tensors) == 2 * 3 * 4 + 2 + 1  # and the range


def test_an_adapter_from_before_a_setting_was_added_goes_into_a_model_with_the_method_applied(folder, adapter):
    """The setting is what it was when there was none: streams of 32 bits."""
    config = json.loads((folder / CONFIG).read_text())
    del config["settings"]["stream_bits"]
    (folder / CONFIG).write_text(json.dumps(config))
    model = applied_to(a_model(), *SAVED)

    assert torch.equal(adapter[1], outputs(meftbench.load_adapter(model, folder)))


@pytest.mark.parametrize("written", [0, 1])
def test_a_full_disk_leaves_the_old_adapter(folder, written, monkeypatch):
    """Where the first or the second file cannot be written: one line, and both files are as before."""
    before = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    model, synced = trained(applied_to(a_model(), *SAVED)), []

    def full(descriptor):
        if len(synced) == written:
            raise OSError(28, "No space left on device")
        synced.append(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); make room"):
        meftbench.save_adapter(model, folder)
    synced.clear()
    with pytest.raises(UserError, match="No space left"):
        meftbench.save_adapter(model, folder / "new")

    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


# --- one line, and nothing changed ---


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda f: (f / CONFIG).unlink(), f"holds no {CONFIG}; name a folder"),
        (lambda f: (f / WEIGHTS).unlink(), f"holds no {WEIGHTS}; name a folder"),
        (lambda f: (f / CONFIG).write_text("{"), f"{CONFIG}: is damaged"),
        (lambda f: (f / CONFIG).write_text("[]"), "it is no mapping of fields to values"),
        (lambda f: (f / CONFIG).write_text('{"peft_type": "MEFTBENCH", "schema": 1}'), "method is missing"),
        (lambda f: change(f, schema=3), "is of schema 3; update meftbench"),
        (lambda f: change(f, method="meft9"), "unknown method 'meft9'"),
        (lambda f: change(f, peft_type="LORAX"), "peft cannot read it"),
        (lambda f: change(f, settings={"adapter_sise": 4}), "unknown key 'adapter_sise'"),
        (lambda f: os.truncate(f / WEIGHTS, 900), f"{WEIGHTS}: cannot be read"),
        (lambda f: change(f, weights_sha256="0"), f"was not written together with {CONFIG}"),
        (lambda f: change(f, hidden_sizes=[64]), "is for hidden size 64, the model's is 32"),
        (
            lambda f: change(f, settings={"adapter_size": 8}),
            r"is \(4, 32\), the model's \(8, 32\), and 17 more tensors",
        ),
        (lambda f: change(f, base_model_class="BertModel"), "was saved from a BertModel, not a BertForSequence"),
        (lambda f: change_tensors(f, lambda t: dict(list(t.items())[2:])), r"lacks '.*', and 1 more tensor;"),
        (lambda f: change_tensors(f, lambda t: t | {"x": torch.ones(2)}), "holds 'x', which the model has not;"),
    ],
)
def test_a_damaged_folder_is_one_line_and_the_model_stays(folder, damage, line):
    """Whatever does not fit is said before the model is changed, and the model can be used as it was."""
    damage(folder)
    model = a_model()
    before = state_of(model)

    with pytest.raises(UserError, match=line) as raised:
        meftbench.load_adapter(model, folder)
    assert "\n" not in str(raised.value)
    assert_same(state_of(model), before)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 2}, {"num_hidden_layers": 4}, {"hidden_size": 64}])
@pytest.mark.parametrize("method", ["meft1-exact", "lora"])
def test_another_size_of_model_is_refused(method, changes, adapter, tmp_path):
    """Fewer or more layers, or wider ones: refused, the model as it was."""
    folder = adapter[0]
    if method == "lora":
        folder = tmp_path
        meftbench.save_adapter(applied_to(a_model(), "lora", {}), folder)
    model = a_model(**changes)
    before = state_of(model)

    with pytest.raises(UserError, match="load it into the model that it was saved from"):
        meftbench.load_adapter(model, folder)
    assert_same(state_of(model), before)


@pytest.mark.parametrize(
    ("method", "settings", "line"),
    [
        ("meft3-exact", {}, "is an adapter of meft1-exact, the model has meft3-exact applied"),
        ("full", {}, "the model has full applied"),
        ("lora", {}, "is an adapter of meft1-exact, the model has"),
        ("meft1-exact", {"adapter_size": 8}, "has adapter_size: 4, the model has adapter_size: 8"),
    ],
)
def test_another_method_on_the_model_is_refused(method, settings, line, adapter):
    """An adapter goes on the pre-trained model, or on one with the same method and settings."""
    size = {} if method in ("full", "lora") else {"adapter_size": 4}
    model = meftbench.apply_method(a_model(), method, **(size | settings))

    with pytest.raises(UserError, match=line):
        meftbench.load_adapter(model, adapter[0])


def test_an_adapter_of_peft_on_another_method_is_refused(tmp_path):
    """In both directions, and with another rank."""
    meftbench.save_adapter(applied_to(a_model(), "lora", {}), tmp_path)

    with pytest.raises(UserError, match="is an adapter of lora, the model has houlsby applied"):
        meftbench.load_adapter(applied_to(a_model(), "houlsby", {}), tmp_path)
    with pytest.raises(UserError, match="has r: 4, the model has r: 2"):
        meftbench.load_adapter(applied_to(a_model(), "lora", {"rank": 2}), tmp_path)


def test_without_a_method_there_is_nothing_to_save_or_unload(tmp_path):
    """A pre-trained model, one in a module around it, full fine-tuning, no folder, a file in its place."""
    full, adapted = meftbench.apply_method(a_model(), "full"), applied_to(a_model(), "houlsby", {})
    (tmp_path / "file").write_text("")

    for call in (meftbench.unload, lambda model: meftbench.save_adapter(model, tmp_path)):
        for model in (a_model(), nn.Sequential(nn.Linear(2, 2))):
            with pytest.raises(UserError, match="has no method applied; apply one with"):
                call(model)
        with pytest.raises(UserError, match="full fine-tuning"):
            call(full)
    with pytest.raises(UserError, match="cannot be written"):
        meftbench.save_adapter(adapted, tmp_path / "file")
    with pytest.raises(UserError, match="no such folder; name a folder that save_adapter wrote"):
        meftbench.load_adapter(a_model(), tmp_path / "absent")


# --- the range of fixed-point streams ---


def test_an_adapter_of_the_first_schema_computes_what_it_was_trained_to(tmp_path):
    """Its settings mean the defaults of its time: the paper's coupling, the mean of the streams, three side bits."""
    paper = {"adapter_size": 4, "step_bits": 16, "side_bits": 3, "coupling": "paper", "output": "mean"}
    old = {**paper, "adapter_input": "stream"}
    model = trained(applied_to(a_model("llama"), "meft2-exact", old))
    meftbench.save_adapter(model, tmp_path)
    change(tmp_path, schema=1)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["settings"] = {k: v for k, v in config["settings"].items() if k != "adapter_input"} | {"side_bits": None}
    (tmp_path / CONFIG).write_text(json.dumps(config))

    loaded = meftbench.load_adapter(a_model("llama"), tmp_path)

    assert torch.equal(outputs(model), outputs(loaded))


def test_an_adapter_without_its_range_is_one_line(folder):
    """A calibrated method whose file has lost the range: which one, and what to do."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    name = next(name for name in tensors if name.endswith(".range"))
    safetensors.torch.save_file({k: v for k, v in tensors.items() if k != name}, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    del config["weights_sha256"]
    (folder / CONFIG).write_text(json.dumps(config))

    with pytest.raises(UserError, match="the range of its fixed-point streams") as raised:
        meftbench.load_adapter(a_model(), folder)
    assert "\n" not in str(raised.value)


# --- what is trained beside the adapter ---

BESIDE = {
    "bert": ["bert.embeddings.word_embeddings", "bert.pooler", "bert.encoder.layer.1.output.LayerNorm"],
    "llama": ["model.embed_tokens", "model.norm", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"],
}


@given(
    st.sampled_from(["lora", "dora", "ia3", "vera", "prompt-tuning", "ln-tuning", "parallel", "meft1-exact"]),
    st.sampled_from(sorted(BESIDE)),
    st.data(),
)
@settings_of_hypothesis(max_examples=25)
def test_whatever_is_trained_beside_an_adapter_is_saved_or_keeps_from_unloading(tmp_path_factory, method, family, data):
    """Embeddings, norms, a projection that the adapter sits on: the loaded model gives the same, bit for bit."""
    names = data.draw(st.sets(st.sampled_from(BESIDE[family]), min_size=1))
    folder = tmp_path_factory.mktemp("beside")
    model = meftbench.apply_method(a_model(family), method, seed=1)
    base = _base(model)
    if method in ("parallel", "meft1-exact", "ln-tuning"):  # layers renamed by a stack, or norms its own
        names = {name for name in names if ".layer" not in name} or {BESIDE[family][0]}
    for name in names:
        base.get_submodule(name).requires_grad_(True)
    count = sum(p.requires_grad for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    meftbench.save_adapter(trained(model), folder)
    moved = [name for name, p in model.named_parameters() if name in before and not torch.equal(before[name], p)]

    loaded = meftbench.load_adapter(a_model(family), folder)

    assert moved
    assert torch.equal(outputs(model), outputs(loaded))
    assert count == sum(p.requires_grad for p in loaded.parameters())
    if method != "ln-tuning" or not all("norm" in name for name in names):
        with pytest.raises(UserError, match=r"requires grad.*load the pre-trained model afresh"):
            meftbench.unload(loaded)


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_what_a_method_of_peft_trains_is_its_own(method):
    """None of it is taken for something trained beside the adapter: all of them still unload or say why not."""
    fits = {"vblora": {"vector_length": 16}}
    for family in ("bert", "llama"):
        try:
            model = meftbench.apply_method(a_model(family), method, seed=1, **fits.get(method, {}))
        except UserError:
            continue
        names = trained_beside(model)
        assert all(in_new_head(model.get_base_model(), n.removeprefix("base_model.model.")) for n in names), names
        return
    pytest.fail(f"{method} fits neither")


@pytest.mark.parametrize("method", ["lora", "prompt-tuning", "parallel", "meft1-exact"])
def test_a_vocabulary_of_another_size(method, tmp_path):
    """An adapter goes into a model of its own vocabulary. One that was resized while it was on is saved with the
    embeddings, or refused; the model before cannot be given back."""
    model = trained(meftbench.apply_method(a_model("llama"), method, seed=1))
    meftbench.save_adapter(model, tmp_path / "before")
    _base(model).resize_token_embeddings(130, mean_resizing=False)

    with pytest.raises(UserError, match=r"resized from 120 to 130, and the embeddings are not trained, so not saved"):
        meftbench.save_adapter(model, tmp_path / "after")
    with pytest.raises(UserError, match=r"resized from 120 to 130 after the method was applied; load the pre-trained"):
        meftbench.unload(model)
    _base(model).get_input_embeddings().weight.requires_grad_(True)
    meftbench.save_adapter(model, tmp_path / "after")

    other = a_model("llama")
    with pytest.raises(
        UserError, match=r"is for a vocabulary of 130, the model's is 120; .*resize_token_embeddings\(130\)"
    ):
        meftbench.load_adapter(other, tmp_path / "after")
    assert not hasattr(other, "peft_config")
    other.resize_token_embeddings(130, mean_resizing=False)
    with pytest.raises(UserError, match=r"is for a vocabulary of 120, the model's is 130"):
        meftbench.load_adapter(other, tmp_path / "before")
    assert torch.equal(outputs(model), outputs(meftbench.load_adapter(other, tmp_path / "after")))


# --- damaged in any way ---

DAMAGED = {method: {} for method in ("meft1-exact", "meft3", "parallel", "lora", "vera", "prompt-tuning", "ia3")}
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 200), st.floats(), st.text(max_size=3), st.just([]), st.just({"a": 1})
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """For each method the two files, as a configuration and tensors."""
    found = {}
    for method in DAMAGED:
        folder = tmp_path_factory.mktemp("whole")
        meftbench.save_adapter(meftbench.apply_method(a_model(), method, seed=1), folder)
        found[method] = json.loads((folder / CONFIG).read_text()), safetensors.torch.load_file(folder / WEIGHTS)
        found[method][0].pop("weights_sha256", None)
    return found


def test_a_trained_name_that_the_model_has_not_is_one_line(saved, tmp_path):
    """Before anything is copied."""
    config, tensors = saved["parallel"]
    (tmp_path / CONFIG).write_text(json.dumps(config | {"backbone": ["bert.nowhere.weight"]}))
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS)
    model = a_model()
    before = state_of(model)

    _, error = loaded_or_refused(model, tmp_path)

    assert "says that 'bert.nowhere.weight' was trained, which the model has not; load it into the model" in error
    assert_same(state_of(model), before)


def damaged_tensors(draw, tensors):
    tensors, name = dict(tensors), draw(st.sampled_from(sorted(tensors)))
    match draw(st.sampled_from(["gone", "renamed", "reshaped", "longer", "nan", "inf", "int", "bool", "half", "more"])):
        case "gone":
            del tensors[name]
        case "renamed":
            tensors[name + "x"] = tensors.pop(name)
        case "reshaped":
            tensors[name] = tensors[name].reshape(-1)[None].contiguous()
        case "longer":
            tensors[name] = torch.cat([tensors[name], tensors[name]])
        case "nan" | "inf" as value:
            tensors[name] = torch.full_like(tensors[name].float(), float(value))
        case "int":
            tensors[name] = tensors[name].to(torch.int32)
        case "bool":
            tensors[name] = tensors[name].bool()
        case "half":
            tensors[name] = tensors[name].half()
        case "more":
            tensors["stray"] = torch.ones(2)
    return tensors


@given(st.sampled_from(sorted(DAMAGED)), st.booleans(), st.data())
@settings_of_hypothesis(max_examples=80)
def test_a_damaged_adapter_is_loaded_whole_or_not_at_all(tmp_path_factory, saved, method, in_weights, data):
    """One line and the model as it was, or a model that computes; never half of it, never NaN."""
    config, tensors = json.loads(json.dumps(saved[method][0])), saved[method][1]
    if in_weights:
        tensors = damaged_tensors(data.draw, tensors)
    else:
        part = config["settings"] if "settings" in config and data.draw(st.booleans()) else config
        key = data.draw(st.sampled_from(sorted(part)))
        if data.draw(st.booleans()):
            del part[key]
        else:
            part[key] = data.draw(VALUES)
    folder, model = tmp_path_factory.mktemp("damaged"), a_model()
    (folder / CONFIG).write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    before = state_of(model)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded, error = loaded_or_refused(model, folder)
    if error:
        assert 1 == len(error.splitlines())
        assert_same(state_of(model), before)
    else:
        assert torch.isfinite(outputs(loaded)).all()


def loaded_or_refused(model, folder):
    try:
        return meftbench.load_adapter(model, folder), None
    except UserError as error:
        return None, str(error)


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("which", [[True, False], [False, True], [True, True]])
def test_checkpointing_is_afterwards_as_it_was(which, options):
    """Which layers, and how: a user may have chosen both."""
    model = a_model()
    model.gradient_checkpointing_enable(options)
    for layer, checkpointed in zip(model.bert.encoder.layer, which, strict=False):
        layer.gradient_checkpointing = checkpointed
    before = [layer.gradient_checkpointing for layer in model.bert.encoder.layer]
    meftbench.unload(meftbench.apply_method(model, "houlsby+checkpoint"))

    assert before == [layer.gradient_checkpointing for layer in model.bert.encoder.layer]
    assert [options] * len(before) == [
        {key: value for key, value in layer._gradient_checkpointing_func.keywords.items() if key in options}
        for layer in model.bert.encoder.layer
    ]


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", ["parallel", "meft1-exact"])
def test_other_weights_under_an_adapter_are_said(family, method, tmp_path, recwarn):
    """Of one class, sizes and no name: only the weights tell; another precision of them is the same."""
    meftbench.save_adapter(applied_to(a_model(family), method, {}), tmp_path)
    for same in (a_model(family), a_model(family).bfloat16()):
        meftbench.load_adapter(same, tmp_path)
    assert not [warning for warning in recwarn if "other weights" in str(warning.message)]
    torch.manual_seed(5)
    other = a_model(family)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)

    with pytest.warns(UserWarning, match=r"was trained beside other weights: .* differs; load it into the pre-trained"):
        meftbench.load_adapter(other, tmp_path)


@pytest.mark.parametrize("sample", [True, None, 7, "text", [], {"a": None}, {"a": 1.0}, {"a": ["1"]}, {"a": [True]}])
def test_a_damaged_sample_of_the_weights_is_one_line(sample, tmp_path):
    meftbench.save_adapter(applied_to(a_model(), "parallel", {}), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text()) | {"base_sample": sample}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="base_sample is no mapping of names to lists of numbers; save the adapter"):
        meftbench.load_adapter(a_model(), tmp_path)


def test_an_adapter_without_a_sample_of_the_weights_is_loaded(tmp_path):
    """As older versions saved it."""
    meftbench.save_adapter(applied_to(a_model(), "parallel", {}), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["base_sample"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert torch.isfinite(outputs(meftbench.load_adapter(a_model(), tmp_path))).all()
