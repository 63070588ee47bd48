"""Small real transformers models, and batches for them."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn

from meftbench.backbones.build import build_model
from meftbench.measuring.batch import resident_batch
from meftbench.measuring.build import build_step
from meftbench.measuring.step import Step
from meftbench.plan.cell import Cell

# Windows are collected at their edges; what is imported by now never becomes garbage.
gc.freeze()

MEFTS = ["meft1", "meft2", "meft3"]
EXACTS = ["meft1-exact", "meft2-exact", "meft3-exact"]
TWO_STEP = ["bdia", "midpoint", "leapfrog"]
REVERSIBLE = [*MEFTS, *EXACTS, *TWO_STEP]
METHODS = ["full", "lora", "houlsby", "pfeiffer", "parallel", *REVERSIBLE]
FOUR_LAYERS = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


_TEXT = FOUR_LAYERS | {"vocab_size": 120}
_OPT = {key: value for key, value in _TEXT.items() if key != "intermediate_size"} | {"ffn_dim": 64}
_BART = {"d_model": 32, "vocab_size": 120} | {
    f"{side}_{what}": value
    for side in ("encoder", "decoder")
    for what, value in (("attention_heads", 4), ("ffn_dim", 64))
}
_IMAGES = FOUR_LAYERS | {"image_size": 32, "patch_size": 8}
_DECODER = _TEXT | {"num_key_value_heads": 2, "head_dim": 8}
_GEMMA = _DECODER | {"sliding_window": 5, "query_pre_attn_scalar": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SHARED = _EXPERTS | {"shared_expert_intermediate_size": 16}
_DELTA_NET = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
_HYBRID = _DECODER | _DELTA_NET | {"linear_key_head_dim": 4, "linear_value_head_dim": 8}
_HYBRID_MOE = {key: value for key, value in _HYBRID.items() if key != "intermediate_size"} | _SHARED

# A name of `list models` for each family, and what makes it small. Dropout rates are named where it has them.
TINY: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "bert": ("bert-tiny", _TEXT, ("hidden_dropout_prob", "attention_probs_dropout_prob")),
    "roberta": ("roberta-base", _TEXT, ("hidden_dropout_prob", "attention_probs_dropout_prob")),
    "bart": ("bart-base", _BART, ("dropout", "attention_dropout")),
    "opt": ("opt-125m", _OPT | {"word_embed_proj_dim": 32}, ("dropout", "attention_dropout")),
    "opt-post": ("opt-350m", _OPT | {"word_embed_proj_dim": 16}, ("dropout", "attention_dropout")),
    "vit": ("vit-tiny", _IMAGES, ("hidden_dropout_prob", "attention_probs_dropout_prob")),
    "deit": ("deit-tiny", _IMAGES, ("hidden_dropout_prob", "attention_probs_dropout_prob")),
    "llama": ("llama-3.2-1b", _DECODER, ("attention_dropout",)),
    "mistral": ("mistral-7b", _DECODER | {"sliding_window": 5}, ("attention_dropout",)),
    "qwen2": ("qwen2.5-0.5b", _TEXT | {"num_key_value_heads": 2}, ("attention_dropout",)),
    "qwen3": ("qwen3-0.6b", _DECODER, ("attention_dropout",)),
    "mixtral": ("mixtral-8x7b", _DECODER | {"num_local_experts": 4}, ("attention_dropout",)),
    "qwen3_moe": ("qwen3-30b-a3b", _DECODER | _EXPERTS, ("attention_dropout",)),
    "qwen3_5": ("qwen3.5-0.8b", _HYBRID, ("attention_dropout",)),
    "qwen3_5_moe": ("qwen3.5-35b-a3b", _HYBRID_MOE, ("attention_dropout",)),
    "qwen3_next": ("qwen3-next-80b-a3b", _HYBRID | _SHARED, ("attention_dropout",)),
    "gemma2": ("gemma-2-2b", _GEMMA, ("attention_dropout",)),
    "gemma3": ("gemma-3-1b", _GEMMA, ("attention_dropout",)),
}


# torch's product of groups of rows, by which transformers runs experts, knows no float64.
EXPERTS_IN_FLOAT64 = {"_experts_implementation": "batched_mm"}

# Families whose layers are of two kinds, which alternate in small models.
_TWO_KINDS = {
    "gemma": ("sliding_attention", "full_attention"),
    "qwen3_5": ("linear_attention", "full_attention"),
    "qwen3_next": ("linear_attention", "full_attention"),
}


def _layer_types(backbone: str, layers: int) -> dict[str, list[str]]:
    """The field of the configuration with the kind of each layer, where the family has two kinds."""
    kinds = next((kinds for family, kinds in _TWO_KINDS.items() if backbone.startswith(family)), None)
    return {"layer_types": [kinds[n % 2] for n in range(layers)]} if kinds else {}


def a_model(
    layers: int = 4,
    dtype: torch.dtype = torch.float64,
    backbone: str = "bert",
    dropout: float = 0.1,
    head: str | None = None,
) -> nn.Module:
    """A small model with random weights, in training mode; of two layers or more, some attend through a window where
    the family does that."""
    name, overrides, rates = TINY[backbone]
    depth = (
        {"encoder_layers": layers, "decoder_layers": layers} if backbone == "bart" else {"num_hidden_layers": layers}
    )
    overrides = overrides | depth | dict.fromkeys(rates, dropout) | _layer_types(backbone, layers)
    if dtype == torch.float64:
        overrides |= EXPERTS_IN_FLOAT64
    attention = "eager" if backbone == "gemma2" else "sdpa"
    model = build_model(f"{name}@random", overrides, dtype=dtype, attention=attention, head=head)
    for key, parameter in model.named_parameters():
        if key.endswith(("_token", "position_embeddings")):
            nn.init.normal_(parameter, std=0.1)  # zeros in a new DeiT: its first norm would divide by nothing
    return model


def a_batch(samples: int = 3, length: int = 12, padded: int = 4) -> dict[str, Tensor]:
    """Tokens and labels; the first sample ends in `padded` positions of padding."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(samples, length, dtype=torch.long)
    mask[0, length - padded :] = 0
    return {
        "input_ids": torch.randint(5, 120, (samples, length), generator=generator),
        "attention_mask": mask,
        "labels": torch.arange(samples) % 2,
    }


def a_batch_for(model: nn.Module, samples: int = 3, length: int = 12) -> dict[str, Tensor]:
    """What the model is trained on: text of which a quarter is padding, or images."""
    return resident_batch(model, samples, length, torch.device("cpu"), padding=0.25)


def a_cell(method: str = "full", **changes: Any) -> Cell:
    """A cell of a tiny model; "+lever" in the method's name switches levers on."""
    values: dict[str, Any] = {
        "model": "bert-tiny@random",
        "model_config_overrides": FOUR_LAYERS | {"vocab_size": 120, "attention_probs_dropout_prob": 0.0},
        "batch_size": 4,
        "sequence_length": 16,
    }
    return Cell.of(method, **(values | changes))


def a_step(method: str = "full", **changes: Any) -> Step:
    """The training step of `a_cell`, on the CPU."""
    return build_step(a_cell(method, **changes), torch.device("cpu"))


def a_cell_of(backbone: str, method: str, layers: int = 3, **changes: Any) -> Cell:
    """A cell of a family's small model without dropout; "+lever" in the method's name switches levers on."""
    name, overrides, rates = TINY[backbone]
    depth = (
        {"encoder_layers": layers, "decoder_layers": layers} if backbone == "bart" else {"num_hidden_layers": layers}
    )
    overrides = overrides | dict.fromkeys(rates, 0.0) | depth | _layer_types(backbone, layers)
    values: dict[str, Any] = {
        "model": f"{name}@random",
        "model_config_overrides": overrides,
        "batch_size": 4,
        "sequence_length": 64,
        "attention_requested": "eager" if backbone == "gemma2" else "sdpa",
    }
    return Cell.of(method, **(values | changes))


def gradients(model: nn.Module, batch: dict[str, Tensor], seed: int = 7) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and the gradient of every trained parameter; random numbers as from `seed`."""
    torch.manual_seed(seed)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = model(**batch).loss
    return loss.detach(), dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def worst_relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative L2 error over tensors; both must have the same names."""
    assert list(found) == list(expected)
    return max(float((found[n] - e).norm() / e.norm()) for n, e in expected.items() if e.norm() > 0)
