"""Backbones: the architecture families that methods can be applied to, and the heads that are trained on them."""

from __future__ import annotations

from dataclasses import dataclass

HEADS: dict[str, str] = {
    "classification": "one label a sample, from the model's own pooling (BART: the last eos token)",
    "multiple_choice": "the likeliest of several texts",
    "causal_lm": "the next token at every position",
    "seq2seq_lm": "a second sequence from the first",
    "image_classification": "one label an image",
}


@dataclass(frozen=True)
class Backbone:
    """An architecture family by its transformers `model_type`.

    heads, attentions: names of HEADS and ATTENTIONS that it can have; the first is used where none is named.
    """

    home: str  # "module:OBJECT": a backbones.layout.Layout, or several, one for each list of layers
    summary: str
    heads: tuple[str, ...] = ("classification",)
    attentions: tuple[str, ...] = ("sdpa", "eager")


DECODER = ("causal_lm", "classification")
ENCODER = ("classification", "multiple_choice")
IMAGES = ("image_classification",)

BACKBONES: dict[str, Backbone] = {
    "bert": Backbone("meftbench.backbones.bert:BERT", "BERT: post-norm encoder", ENCODER),
    "roberta": Backbone("meftbench.backbones.bert:ROBERTA", "RoBERTa: post-norm encoder, positions from 2", ENCODER),
    "bart": Backbone(
        "meftbench.backbones.bart:BART", "BART: post-norm encoder and decoder", ("classification", "seq2seq_lm")
    ),
    "opt": Backbone("meftbench.backbones.opt:OPT", "OPT: pre-norm decoder (350m: post-norm)", DECODER),
    "vit": Backbone("meftbench.backbones.vit:VIT", "ViT: pre-norm encoder of images", IMAGES),
    "deit": Backbone("meftbench.backbones.vit:VIT", "DeiT: ViT with a distillation token", IMAGES),
    "llama": Backbone("meftbench.backbones.llama:LLAMA", "Llama: pre-norm decoder, rotary positions", DECODER),
    "mistral": Backbone("meftbench.backbones.llama:LLAMA", "Mistral: as Llama, sliding window", DECODER),
    "qwen2": Backbone(
        "meftbench.backbones.llama:LLAMA", "Qwen2 and 2.5: as Llama, biases at queries, keys, values", DECODER
    ),
    "qwen3": Backbone("meftbench.backbones.llama:LLAMA", "Qwen3: as Llama, normed queries and keys", DECODER),
    "mixtral": Backbone("meftbench.backbones.llama:LLAMA", "Mixtral: as Mistral, a mixture of experts", DECODER),
    "qwen3_moe": Backbone("meftbench.backbones.llama:LLAMA", "Qwen3-MoE: as Qwen3, a mixture of experts", DECODER),
    "qwen3_5_text": Backbone(
        "meftbench.backbones.hybrid:QWEN3_5", "Qwen3.5 (text): gated delta nets, every fourth layer attention", DECODER
    ),
    "qwen3_5_moe_text": Backbone(
        "meftbench.backbones.hybrid:QWEN3_5", "Qwen3.5 (text): the same, a mixture of experts", ("causal_lm",)
    ),
    "qwen3_next": Backbone(
        "meftbench.backbones.hybrid:QWEN3_NEXT", "Qwen3-Next: gated delta nets, a mixture of experts", DECODER
    ),
    "gemma2": Backbone(
        "meftbench.backbones.llama:GEMMA",
        "Gemma 2: norms on both sides, sliding and full attention",
        DECODER,
        ("eager",),
    ),
    "gemma3_text": Backbone(
        "meftbench.backbones.llama:GEMMA", "Gemma 3 (text): the same, normed queries and keys", DECODER
    ),
}
