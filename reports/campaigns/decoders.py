"""Decoders on a GPU: is reversal exact under each attention kernel, and what do batch and length cost by method?

    python reports/campaigns/decoders.py reports/decoders                     # on a GPU: both sections
    python reports/campaigns/decoders.py OUT --device cpu --sections exactness --layers 2 --shapes 2x64

exactness: for OPT-1.3B and Qwen2.5-1.5B shapes, each precision and each kernel that torch can be held to (flash,
    memory-efficient, math), streams restored bit for bit? Writes exactness.csv; a kernel that does not take the shape
    is a row that says so.
sweep: `meftbench run sweep-decoders`, 4-bit cells included, then its report. Writes OUT/sweep.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from meftbench.errors import NOT_COMPARABLE, UserError
from meftbench.measuring.build import build_step
from meftbench.plan.cell import Cell
from meftbench.probes.fidelity import StreamErrors
from meftbench.records.store import made

MODELS = ("opt-1.3b@random", "qwen2.5-1.5b@random")
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
METHODS = ("meft1-exact", "meft3-exact")
PRECISIONS = ("fp32", "bf16-autocast", "bf16")


def restored(cell: Cell, kernel: str, device: torch.device) -> tuple[int | None, float, str]:
    """Elements that backward did not restore bit for bit (None: not run), the loss, and what stood against it."""
    step = build_step(cell, device, padding=0.25 if kernel != "flash" else 0.0)  # flash takes no mask
    observers = []
    for stack in step.applied.stacks:
        stack.observer, stack.strict = StreamErrors(stack), True
        observers.append(stack.observer)
    try:
        with sdpa_kernel(KERNELS[kernel]):
            loss = float(step.forward_backward())
    except RuntimeError as error:
        return None, float("nan"), str(error).splitlines()[0]
    return sum(observer.mismatched for observer in observers), loss, ""


def exactness(device: torch.device, shapes: list[tuple[int, int]], layers: int | None) -> pd.DataFrame:
    """One row a model, method, precision, kernel and shape."""
    rows = []
    overrides = {} if layers is None else {"num_hidden_layers": layers}
    for model in MODELS:
        for method in METHODS:
            for precision in PRECISIONS:
                for batch, length in shapes:
                    cell = Cell.of(
                        method,
                        model=model,
                        model_config_overrides=overrides,
                        precision=precision,
                        batch_size=batch,
                        sequence_length=length,
                    )
                    for kernel in KERNELS:
                        found, loss, against = restored(cell, kernel, device)
                        rows.append((model, method, precision, kernel, batch, length, found, loss, against))
                        print(*rows[-1], flush=True)
    names = ["model", "method", "precision", "kernel", "batch_size", "sequence_length", "mismatched", "loss", "against"]
    return pd.DataFrame(rows, columns=names)


def main(arguments: list[str] | None = None) -> int:
    """Run the sections; 1 where an element was not restored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sections", nargs="+", choices=("exactness", "sweep"), default=("exactness", "sweep"))
    parser.add_argument("--layers", type=int, help="fewer layers, in the exactness section")
    parser.add_argument("--shapes", nargs="+", default=["4x512", "1x2048"], help="BATCHxTOKENS")
    options = parser.parse_args(arguments)
    wrong = 0
    try:
        if options.device == "cuda" and not torch.cuda.is_available():
            cure = "add --device cpu --sections exactness --layers 2"
            raise UserError("decoders", "there is no CUDA device", cure, NOT_COMPARABLE)
        made(options.out)
        if "exactness" in options.sections:
            shapes = [(int(b), int(n)) for b, _, n in (shape.partition("x") for shape in options.shapes)]
            frame = exactness(torch.device(options.device), shapes, options.layers)
            frame.to_csv(options.out / "exactness.csv", index=False)
            wrong = int((frame.mismatched.fillna(0) > 0).sum())
            print(f"{len(frame)} settings, {int(frame.mismatched.isna().sum())} not run, {wrong} not exact")
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if "sweep" in options.sections:
        run = str(options.out / "sweep")
        subprocess.run(["meftbench", "run", "sweep-decoders", "--device", options.device, "--out", run], check=False)
        subprocess.run(["meftbench", "report", run], check=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
