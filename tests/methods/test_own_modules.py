"""Models that are not one of transformers' with its usual head: a trunk in a module of one's own, bare backbones,
masked language models, forwards with fewer arguments, wrappers. A method trains them, or says in a line why not."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BartModel,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    DistilBertConfig,
    DistilBertForMaskedLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaModel,
    OPTModel,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTModel,
)

import meftbench
from meftbench.errors import UserError
from meftbench.methods import prepare
from tests.models import METHODS, TINY, a_model

TOKENS = torch.arange(5, 29).view(2, 12)
ANSWERS = torch.tensor([0, 1])
PROMPTS = ["prompt-tuning", "p-tuning", "prefix-tuning"]
ALL = [*METHODS, "dora", "ia3", *PROMPTS]
LEVERS = ["checkpoint", "tiled_mlp", "chunked_loss", "offload", "compile"]


def a_config(backbone):
    return a_model(2, torch.float32, backbone, dropout=0.0).config


CONFIGS = {backbone: a_config(backbone) for backbone in ("bert", "roberta", "llama", "opt", "bart", "vit")}


class Own(nn.Module):
    """A user's module: a backbone under a name of theirs, a head, and the loss by itself."""

    def __init__(self, trunk, name="encoder"):
        super().__init__()
        self.add_module(name, trunk)
        self.trunk_name = name
        self.head = nn.Linear(32, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, labels, **inputs):
        h_BLD = self.get_submodule(self.trunk_name)(**inputs).last_hidden_state
        return nn.functional.cross_entropy(self.head(h_BLD[:, -1]), labels)


class Fewer(BertForSequenceClassification):
    def forward(self, input_ids, labels=None):
        return super().forward(input_ids=input_ids, labels=labels)


class FewerTokens(LlamaForCausalLM):
    def forward(self, input_ids, labels):
        return super().forward(input_ids=input_ids, labels=labels)


def bare(kind, backbone):
    return lambda: kind(copy.deepcopy(CONFIGS[backbone]))


BARE = {
    "BertModel": bare(BertModel, "bert"),
    "LlamaModel": bare(LlamaModel, "llama"),
    "OPTModel": bare(OPTModel, "opt"),
    "BartModel": bare(BartModel, "bart"),
    "ViTModel": bare(ViTModel, "vit"),
}
HEADS = {
    "BertForMaskedLM": bare(BertForMaskedLM, "bert"),
    "RobertaForMaskedLM": bare(RobertaForMaskedLM, "roberta"),
    "BertForPreTraining": bare(BertForPreTraining, "bert"),
    "BertForTokenClassification": bare(BertForTokenClassification, "bert"),
    "BertForQuestionAnswering": bare(BertForQuestionAnswering, "bert"),
    "Fewer": bare(Fewer, "bert"),
    "FewerTokens": bare(FewerTokens, "llama"),
}
OWN = {f"Own({name})": (lambda build=build: Own(build())) for name, build in BARE.items()}
MODELS = BARE | HEADS | OWN


def a_batch_of(model):
    """What the model's forward takes, labels among it where it has a loss."""
    if isinstance(model, Own):
        return {"labels": ANSWERS} | a_batch_of(model.get_submodule(model.trunk_name))
    if isinstance(model, ViTModel):
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    if isinstance(model, BertForQuestionAnswering):
        return {"input_ids": TOKENS, "start_positions": ANSWERS, "end_positions": ANSWERS}
    if isinstance(model, BertForTokenClassification):
        return {"input_ids": TOKENS, "labels": TOKENS % 2}
    if isinstance(model, Fewer):
        return {"input_ids": TOKENS, "labels": ANSWERS}
    if isinstance(model, BertForPreTraining):
        return {"input_ids": TOKENS, "labels": TOKENS, "next_sentence_label": ANSWERS}
    if isinstance(model, BertForMaskedLM | RobertaForMaskedLM | LlamaForCausalLM):
        return {"input_ids": TOKENS, "labels": TOKENS}
    return {"input_ids": TOKENS}


def a_new(name):
    torch.manual_seed(0)
    return MODELS[name]().train()


def loss_of(model, batch):
    output = model(**batch)
    if isinstance(output, torch.Tensor):
        return output
    return output["loss"] if "loss" in output else output.last_hidden_state.pow(2).mean()


def seen_of(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: type(module) for name, module in model.named_modules()},
    )


def the_same(found, expected):
    return found[1:] == expected[1:] and all(torch.equal(found[0][name], it) for name, it in expected[0].items())


def applied_or_refused(model, method):
    try:
        return prepare(model, method, seed=1), ""
    except UserError as error:
        return None, str(error)


@given(st.sampled_from(sorted(MODELS)), st.sampled_from(ALL), st.sampled_from(["", *LEVERS[:3]]))
@settings(max_examples=60)
def test_a_method_trains_the_model_or_says_in_a_line_why_not(name, method, lever):
    model = a_new(name)
    before, batch = seen_of(model), a_batch_of(model)
    applied, refusal = applied_or_refused(model, f"{method}+{lever}" if lever else method)
    if applied is None:
        assert len(refusal.splitlines()) == 1
        assert the_same(seen_of(model), before)
        return

    loss = loss_of(applied.model, batch)
    loss.backward()

    assert torch.isfinite(loss)
    trained = applied.trained()
    assert any(p.grad is not None and bool(p.grad.any()) for p in trained.values())
    own = {n for n in before[1] if before[1][n] and n.startswith("head.")} if isinstance(model, Own) else set()
    assert all(parameter.grad is not None for n, parameter in trained.items() if n in own)
    if method != "full":
        # Of the pre-trained model nothing is trained but a new head.
        weights = {n: p for n, p in applied.model.named_parameters() if p.requires_grad}
        new = ("lora", "adapter", "ia3", "prompt", "classifier", "head.", "qa_outputs")
        assert all(any(part in n for part in new) for n in weights), sorted(weights)


@pytest.mark.parametrize("name", sorted(OWN))
@pytest.mark.parametrize("method", ["lora+checkpoint", "parallel", "meft1-exact", "meft3+tiled_mlp", "ia3"])
def test_a_module_around_a_model_is_as_it_was_after_unload(name, method):
    model = a_new(name)
    before, batch = seen_of(model), a_batch_of(model)
    expected = loss_of(copy.deepcopy(model).eval(), batch)
    applied = meftbench.apply_method(model, method, seed=1)
    assert applied is model
    loss_of(model, batch).backward()
    with pytest.raises(UserError, match=r"applied already; take it off"):
        meftbench.apply_method(model, "lora")

    assert meftbench.unload(model) is model

    assert the_same(seen_of(model), before)
    assert torch.equal(loss_of(model.eval(), batch), expected)
    meftbench.apply_method(model, method, seed=1)


@pytest.mark.parametrize(("name", "method"), list(itertools.product(sorted(BARE), METHODS)))
def test_a_model_inside_another_module_computes_what_it_does_by_itself(name, method):
    alone, inside = a_new(name), Own(a_new(name))
    batch = a_batch_of(alone)
    alone = meftbench.apply_method(alone, method, seed=1).eval()
    meftbench.apply_method(inside, method, seed=1).eval()

    with torch.no_grad():
        assert torch.equal(inside.encoder(**batch).last_hidden_state, alone(**batch).last_hidden_state)


def test_what_is_the_users_own_keeps_whether_it_is_trained():
    for method in ("lora", "meft1-exact", "full"):
        model = meftbench.apply_method(a_new("Own(BertModel)"), method)
        assert model.head.weight.requires_grad
        assert not model.head.bias.requires_grad


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "LlamaModel", "Fewer", "BertForTokenClassification"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_peft_starts_where_the_pretrained_model_stands(name, method):
    model = a_new(name).eval()
    batch = a_batch_of(model)
    expected = model(**batch)
    wrapped = meftbench.apply_method(model, method, seed=1).eval()

    found = wrapped(**batch)

    assert list(found) == list(expected)
    assert torch.allclose(found[0], expected[0], atol=1e-6)


@pytest.mark.parametrize("method", PROMPTS)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("BertForMaskedLM", "peft has no prompts for the head of BertForMaskedLM"),
        ("Fewer", "or its forward takes no inputs_embeds"),
        ("BertForTokenClassification", "its virtual tokens would shift all of them"),
        ("BertForQuestionAnswering", "its virtual tokens would shift all of them"),
    ],
)
def test_prompts_are_refused_where_they_would_be_left_out_or_shift_the_answers(name, method, said):
    if method == "prefix-tuning" and "shift" in said:  # a prefix is a cache, and takes no positions of the labels
        meftbench.apply_method(a_new(name), method)
        return
    with pytest.raises(UserError, match=said):
        meftbench.apply_method(a_new(name), method)


def test_chunked_loss_is_refused_where_the_forward_does_not_bear_it():
    with pytest.raises(UserError, match="FewerTokens: its forward cannot be called without labels"):
        meftbench.apply_method(a_new("FewerTokens"), "full+chunked_loss")


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "OptimizedModule": torch.compile,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
@pytest.mark.parametrize("method", ["full", "lora", "meft1-exact"])
def test_a_wrapper_is_refused(wrapper, method, tmp_path):
    wrapped = WRAPPERS[wrapper](a_new("Fewer"))
    said = (
        rf"^{wrapper}: is a wrapper around Fewer; give the model inside, model\.(module|_orig_mod), and wrap it after"
    )

    with pytest.raises(UserError, match=said):
        meftbench.apply_method(wrapped, method)
    with pytest.raises(UserError, match=said):
        meftbench.save_adapter(wrapped, tmp_path / "adapter")
    with pytest.raises(UserError, match=said):
        meftbench.load_adapter(wrapped, tmp_path)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.text, self.image = a_new("BertModel"), a_new("ViTModel")

    def forward(self, **inputs):
        return self.text(**inputs)


def test_of_several_models_one_is_named():
    with pytest.raises(UserError, match=r'Two: has 2 transformers models inside: text, image; name one, module="text"'):
        meftbench.apply_method(Two(), "lora")

    model = meftbench.apply_method(Two(), "meft1-exact", module="text")

    assert not any("adapter" in name for name, _ in model.image.named_parameters())
    assert any("adapter" in name for name, _ in model.text.named_parameters())
    meftbench.unload(model)
    meftbench.apply_method(model, "lora", module="image")


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("texts", "Two: module: has no submodule 'texts'; name a transformers model: text, image"),
        ("text.encoder", "Two: module: 'text.encoder' is BertEncoder; name a transformers model: text, image"),
        ("", "Two: module: '' is Two; name a transformers model: text, image"),
    ],
)
def test_a_name_that_is_no_models_is_one_line(named, said):
    with pytest.raises(UserError) as caught:
        meftbench.apply_method(Two(), "lora", module=named)
    assert str(caught.value) == said


def test_a_module_without_a_transformers_model_is_trained_in_full_only():
    for method in [*METHODS[1:], "ia3", "full+tiled_mlp", "full+compile"]:
        with pytest.raises(UserError, match=r"^Sequential: has no layers of a transformers model; give a transformers"):
            meftbench.apply_method(nn.Sequential(nn.Linear(4, 4)), method)
    with pytest.raises(UserError, match="Sequential: transformers cannot checkpoint its layers"):
        meftbench.apply_method(nn.Sequential(nn.Linear(4, 4)), "full+checkpoint")
    assert meftbench.apply_method(nn.Sequential(nn.Linear(4, 4)), "full")[0].weight.requires_grad
    with pytest.raises(UserError, match="the model is list, no torch module"):
        meftbench.apply_method([nn.Linear(4, 4)], "full")


def test_an_adapter_is_saved_from_the_part_inside(tmp_path):
    batch = a_batch_of(a_new("Own(BertModel)"))
    for method in ("lora", "meft1-exact"):
        model = meftbench.apply_method(a_new("Own(BertModel)"), method, seed=1)
        with pytest.raises(
            UserError, match=r"Own: is your own module around 'encoder'; give save_adapter model.encoder"
        ):
            meftbench.save_adapter(model, tmp_path / method)
        meftbench.save_adapter(model.encoder, tmp_path / method)
        other = a_new("Own(BertModel)")
        with pytest.raises(
            UserError, match=r"Own: is your own module around 'encoder'; give load_adapter model.encoder"
        ):
            meftbench.load_adapter(other, tmp_path / method)

        other.encoder = meftbench.load_adapter(other.encoder, tmp_path / method)

        assert torch.equal(loss_of(other.eval(), batch), loss_of(model.eval(), batch))


@pytest.mark.parametrize("method", ["lora", "meft1-exact+offload", "full+checkpoint"])
def test_memory_of_a_module_around_a_model_is_measured(method):
    model = a_new("Own(LlamaModel)")

    found = meftbench.measure(model, a_batch_of(model), method=method, module="encoder", time=False, steps=1)

    assert found["activation_peak_bytes"].value > 0


def test_every_family_is_found_inside_a_module():
    """Also those whose layers are guessed, or called with different masks."""
    for backbone in TINY:
        trunk = a_model(2, torch.float32, backbone)
        model = meftbench.apply_method(nn.ModuleDict({"any": nn.ModuleList([trunk])}), "meft3-exact")
        assert [name for name, module in model.named_modules() if type(module).__name__ == "ReversibleStack"]


class TwiceNamed(nn.Module):
    """One model under two names, and its layers under a third."""

    def __init__(self, layers=False):
        super().__init__()
        self.first = self.second = a_new("BertModel")
        if layers:
            self.layers = self.first.encoder.layer

    def forward(self, input_ids):
        return self.first(input_ids).last_hidden_state + self.second(input_ids).last_hidden_state


@pytest.mark.parametrize("method", ["lora", "prefix-tuning", "meft1-exact", "houlsby"])
@pytest.mark.parametrize("named", [None, "first", "second"])
def test_a_model_of_two_names_is_one_model(method, named):
    model = meftbench.apply_method(TwiceNamed(), method, module=named)

    assert model.first is model.second
    meftbench.unload(model)
    assert model.first is model.second
    assert type(model.first) is BertModel


@pytest.mark.parametrize("method", ["meft1", "meft1-exact", "meft3-exact"])
def test_layers_of_a_second_name_would_escape_reversal(method):
    model = TwiceNamed(layers=True)
    before = seen_of(model)

    with pytest.raises(UserError, match=r"TwiceNamed: 'layers' holds layers that are reversible now"):
        meftbench.apply_method(model, method, module="first")

    assert the_same(seen_of(model), before)
    meftbench.apply_method(model, "houlsby", module="first")


def subclassed(place):
    """A model in which one module of every layer does more than transformers' class."""
    model = a_new("LlamaModel" if place.startswith("self_attn") or place == "mlp" else "BertModel")
    for layer in model.layers if isinstance(model, LlamaModel) else model.encoder.layer:
        module = layer.get_submodule(place)
        module.__class__ = type("Mine", (type(module),), {"__module__": "mine"})
    return model


@pytest.mark.parametrize("place", ["", "attention", "attention.self", "output", "self_attn", "mlp"])
@pytest.mark.parametrize("method", ["parallel", "meft1-exact", "meft3", "full+tiled_mlp"])
def test_what_a_subclass_does_is_not_left_out(place, method):
    model = subclassed(place)
    with pytest.raises(UserError, match=r"Mine: is a subclass of \w+, and layers are run here in parts"):
        meftbench.apply_method(model, method)
    meftbench.apply_method(model, "lora+checkpoint")


def test_a_layer_of_another_class_is_one_line():
    for method in ("parallel", "meft1-exact"):
        model = a_new("BertModel")
        model.encoder.layer[1] = nn.Identity()
        with pytest.raises(UserError, match=r"its layers are of several classes \(BertLayer, Identity\)"):
            meftbench.apply_method(model, method)


def test_hooks_that_reversible_layers_do_not_call_are_said():
    model = a_new("BertModel")
    model.encoder.layer[1].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="hooks on 1 layers, the first of them layer 1, will not be called"):
        meftbench.apply_method(model, "meft1-exact")


def test_a_loss_that_is_more_than_one_of_tokens_is_not_chunked():
    model = a_new("FewerTokens")
    known = LlamaForCausalLM(model.config)
    meftbench.apply_method(known, "full+chunked_loss")
    own, headed = LlamaForCausalLM(model.config), LlamaForCausalLM(model.config)
    own.loss_function = lambda logits, labels, vocab_size, **_: (
        2 * nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    )
    headed.lm_head = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 120))
    for refused, said in (
        (a_new("BertForPreTraining"), "its loss is not the cross-entropy"),
        (own, "its loss is not the cross-entropy"),
        (headed, "its head is no single projection"),
    ):
        with pytest.raises(UserError, match=said):
            meftbench.apply_method(refused, "full+chunked_loss")


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT, IMAGES = SMALL | {"vocab_size": 120}, SMALL | {"image_size": 32, "patch_size": 16}


def of_two_models(kind):
    if kind == "texts":
        both = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**TEXT), BertConfig(**TEXT))
        return EncoderDecoderModel(both)
    both = CLIPTextConfig(**TEXT).to_dict(), CLIPVisionConfig(**IMAGES).to_dict()
    return CLIPModel(CLIPConfig(text_config=both[0], vision_config=both[1]))


@pytest.mark.parametrize(
    ("kind", "part", "targets"), [("texts", "encoder", ["query"]), ("images", "text_model", ["q_proj"])]
)
def test_a_model_put_together_from_two_names_its_parts(kind, part, targets):
    """Each has layers of its own; LoRA takes both where it is told their projections."""
    for method in ("meft1-exact", "parallel", "lora"):
        with pytest.raises(UserError, match=rf'consists of 2 models; .*name one: module="{part}"'):
            meftbench.apply_method(of_two_models(kind), method)
        meftbench.apply_method(of_two_models(kind), method, module=part)
    with pytest.raises(UserError, match=rf"no submodule 'middle'; name a transformers model: .*{part}"):
        meftbench.apply_method(of_two_models(kind), "meft1-exact", module="middle")
    adapted = meftbench.apply_method(of_two_models(kind), "lora", targets=targets)
    assert any("lora_A" in name for name, _ in adapted.named_parameters())


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=120)), {}),
        (lambda: T5ForConditionalGeneration(T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, vocab_size=120)), {}),
        (
            lambda: DistilBertForMaskedLM(DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=2)),
            {"targets": ["q_lin", "v_lin"]},
        ),
    ],
)
@pytest.mark.parametrize("levers", ["", "+checkpoint"])
def test_lora_trains_layers_that_do_not_split(model, settings, levers):
    """It needs names of projections, peft's or the user's; no more is asked of it than of full fine-tuning."""
    tuned = meftbench.apply_method(model(), f"lora{levers}", **settings)
    tuned.config.decoder_start_token_id = 0
    tuned(input_ids=TOKENS, labels=TOKENS).loss.backward()

    assert any("lora_B" in name and p.grad.any() for name, p in tuned.named_parameters() if p.grad is not None)
    with pytest.raises(UserError, match="do not split as those that are known"):
        meftbench.apply_method(model(), "meft1-exact")


def test_checkpointing_that_is_on_is_said_to_meft():
    model = LlamaForCausalLM(copy.deepcopy(CONFIGS["llama"]))
    model.gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match="gradient checkpointing, which is on, makes backward keep the gradient"):
        meftbench.apply_method(model, "meft1-exact")
