"""Precisions and kinds of attention: names whose entries are only a line of help."""

from __future__ import annotations

PRECISIONS: dict[str, str] = {
    "fp64": "float64 weights and arithmetic (for checks)",
    "fp32": "float32 weights and arithmetic",
    "bf16-autocast": "float32 weights, bfloat16 autocast",
    "fp16-autocast": "float32 weights, float16 autocast, loss scaled (GradScaler)",
    "bf16": "bfloat16 weights and arithmetic",
    "nf4": "4-bit NormalFloat base weights (bitsandbytes), bfloat16 arithmetic",
}
ATTENTIONS: dict[str, str] = {
    "sdpa": "torch's scaled_dot_product_attention",
    "eager": "matrix products and softmax, scores held",
}
