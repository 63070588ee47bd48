"""Defaults that depend on the model, for commands that answer a question about one model."""

from __future__ import annotations

from typing import Any

from meftbench.catalogue.backbones import BACKBONES
from meftbench.plan.models import image_tokens, known_config, max_positions

LONGEST = 2048  # tokens: the default, or the model's longest where that is less


def sensible_length(model: str, overrides: dict[str, Any]) -> int:
    """Tokens of a sample: as many as an image has, or the model's longest, 2,048 at most."""
    of_image = image_tokens(known_config(model, overrides) or {})
    return of_image or min(max_positions(model, overrides) or LONGEST, LONGEST)


def sensible_precision(model: str, overrides: dict[str, Any], head: str | None) -> str:
    """bf16 for language models, in which they are trained; fp32 for others."""
    kind = (known_config(model, overrides) or {}).get("model_type")
    heads = BACKBONES[kind].heads if kind in BACKBONES else (None,)
    return "bf16" if (head or heads[0]) in (None, "causal_lm") else "fp32"
