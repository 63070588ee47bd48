"""Exact reversal on this machine: is it exact under every kernel, how fast is it, what does it hold, what fits?

    python reports/campaigns/exact_reversal.py reports/h100-exact --device cuda
    python reports/campaigns/exact_reversal.py reports/exact-speed-cpu --device cpu --sections exactness speed

Sections, each with a CSV and a part of summary.md, which is also printed:
    exactness  elements that backward restores otherwise than bit for bit: precisions x attention kernels x depths
    speed      step time of the exact methods against lora+checkpoint and its levers, interleaved in one run: the ratio,
               its lowest and its highest, and that of the fastest steps; on a CPU for each number of `--threads`
    limits     (CUDA) largest batch and longest sequence by doubling and bisection until memory is full
    kernels    (CUDA, Triton) the fused coupling: seconds, bytes moved, share of a copy's bandwidth
Peaks of memory are taken beside speed on CUDA (max_memory_allocated above the level before the step). Without a GPU
`--device cuda` says so and ends with exit code 4. tests/test_campaigns.py runs it in miniature.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from meftbench.catalogue.models import MODELS as CATALOGUE
from meftbench.errors import NOT_COMPARABLE, UserError
from meftbench.measuring.build import build_step
from meftbench.measuring.requests import describe
from meftbench.measuring.step import Step
from meftbench.plan.cell import Cell
from meftbench.plan.equal_parameters import matching_rank
from meftbench.records.store import made

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base": ("bert-base@random", {}),
    "bert-large": ("bert-large@random", {}),
    "24 x 2048": (
        "bert-large@random",
        {"hidden_size": 2048, "num_attention_heads": 32, "intermediate_size": 8192},
    ),
    "miniature": (
        "bert-tiny@random",
        {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "vocab_size": 99,
        },
    ),
}
# By name. LoRA of rank 8 and MEFT of adapter size 8 train about as many parameters; 64 is meftbench's default, and
# "matching" the rank that trains as many.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora+checkpoint": ("lora+checkpoint", {}),
    "lora+checkpoint, rank for 64": ("lora+checkpoint", {"rank": "matching"}),
    "meft1-exact, adapters of 8": ("meft1-exact", {"adapter_size": 8}),
    "meft1-exact, adapters of 64": ("meft1-exact", {}),
    "meft2-exact, adapters of 64": ("meft2-exact", {}),
    "meft3-exact, adapters of 8": ("meft3-exact", {"adapter_size": 8}),
    "meft3-exact, adapters of 64": ("meft3-exact", {}),
    "lora+checkpoint+tiled_mlp": ("lora+checkpoint+tiled_mlp", {}),
    "lora+checkpoint+offload": ("lora+checkpoint+offload", {}),
}
# What trains as many weights.
AS_MANY_WEIGHTS = {"adapters of 8": "lora+checkpoint", "adapters of 64": "lora+checkpoint, rank for 64"}
SHAPES = {"cuda": ((8, 128), (8, 512), (32, 512), (128, 512)), "cpu": ((8, 128), (8, 512))}
KERNELS = {
    "cuda": ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"),
    "cpu": ("FLASH_ATTENTION", "MATH"),
}
PRECISIONS = ("fp32", "bf16-autocast", "fp16-autocast", "bf16")


def a_cell(model: str, method: str, batch: int, length: int, precision: str, **settings: Any) -> Cell:
    name, overrides = MODELS[model]
    overrides = overrides | {"attention_probs_dropout_prob": 0.0}
    if length > 512:
        overrides |= {"max_position_embeddings": length}
    if settings.get("rank") == "matching":
        settings = settings | {"rank": matching_rank(CATALOGUE[name.removesuffix("@random")].config | overrides)}
    return Cell.of(
        method,
        method_params=settings,
        model=name,
        model_config_overrides=overrides,
        batch_size=batch,
        sequence_length=length,
        precision=precision,
    )


# --- exactness ---


class Differences:
    """Observer of a stack: elements not restored bit for bit."""

    def __init__(self) -> None:
        self.true: dict[int, list[Tensor]] = {}
        self.wrong = self.seen = 0

    def __call__(self, direction: str, block: int, streams: list[Tensor]) -> None:
        if direction == "forward":
            self.true[block] = [stream.to("cpu", copy=True) for stream in streams]
            return
        for stream, true in zip(streams, self.true.pop(block), strict=True):
            self.wrong += int((stream.cpu() != true).sum())
            self.seen += true.numel()


def exactness(device: torch.device, model: str, depths: tuple[int, ...]) -> pd.DataFrame:
    """One row a precision, kernel, depth, tiling: elements looked at, elements that differ. Dropout and padding on."""
    rows = []
    for precision in PRECISIONS:
        for kernel in KERNELS[device.type]:
            for depth in depths:
                for tiles in (1, 3, 8):
                    rows.append(
                        (precision, kernel, depth, tiles, *_differences(device, model, precision, kernel, depth, tiles))
                    )
                    print(*rows[-1], file=sys.stderr)
    return pd.DataFrame(rows, columns=["precision", "kernel", "layers", "tiles", "elements", "differing", "note"])


def _differences(
    device: torch.device, model: str, precision: str, kernel: str, depth: int, tiles: int
) -> tuple[int, int, str]:
    cell = a_cell(model, "meft1-exact", 2, 64, precision, tiles=tiles)
    cell = cell.model_copy(
        update={"model_config_overrides": cell.model_config_overrides | {"num_hidden_layers": depth}}
    )
    # A padding mask would take flash attention off the table on CUDA, so half of the tilings have none.
    step = build_step(cell, device, padding=0.0 if tiles == 3 else 0.25)
    observer = step.applied.stacks[0].observer = Differences()
    try:
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            step.forward_backward()
    except RuntimeError as error:
        if not no_such_kernel(error):
            raise
        return 0, 0, f"not offered: {str(error).splitlines()[0]}"
    return observer.seen, observer.wrong, ""


def no_such_kernel(error: RuntimeError) -> bool:
    """Whether torch says that none of the attention kernels allowed takes the shape; a kernel that broke is another."""
    return any(said in str(error) for said in ("No available kernel", "No viable backend"))


# --- speed ---


def speed(
    device: torch.device,
    models: list[str],
    shapes: tuple[tuple[int, int], ...],
    precision: str,
    rounds: int,
    methods: list[str],
    threads: list[int] | None = None,
) -> pd.DataFrame:
    """One row a model, shape, method and number of threads (None: as it is): median seconds over `rounds` interleaved
    steps, and the ratio to lora+checkpoint; also to that of the rank that trains as many weights, where it is run."""
    rows = []
    for model in models:
        for batch, length in shapes:
            for count in threads or [None]:
                with _threads(count):
                    chosen = {name: METHODS[name] for name in methods}
                    cells = {name: a_cell(model, m, batch, length, precision, **s) for name, (m, s) in chosen.items()}
                    steps = {name: build_step(cell, device) for name, cell in cells.items()}
                    samples, peaks = interleaved(steps, device, rounds)
                for method, seconds in samples.items():
                    median = statistics.median(seconds)
                    shape = (model, precision, batch, length, method, count, rounds, median, batch * length / median)
                    equal = samples.get(AS_MANY_WEIGHTS.get(method.partition(", ")[2], ""))
                    to_equal = ratios(seconds, equal)[0] if equal else math.nan
                    found = ratios(seconds, samples["lora+checkpoint"])
                    rows.append((*shape, *found, to_equal, peaks[method]))
                    print(*rows[-1], file=sys.stderr)
                del steps
                gc.collect()
    columns = ["model", "precision", "batch", "tokens", "method", "threads", "rounds", "step_s", "tokens_per_s"]
    columns += ["ratio_to_lora_checkpoint", "lowest", "highest", "of_fastest", "ratio_at_equal_weights"]
    return pd.DataFrame(rows, columns=[*columns, "activation_peak_bytes"])


def ratios(seconds: list[float], base: list[float]) -> tuple[float, float, float, float]:
    """Median, lowest and highest ratio of neighbours in time, and the ratio of the fastest steps.

    What disturbs a machine for long disturbs neighbours alike; the fastest steps are the least disturbed at all.
    """
    found = [a / b for a, b in zip(seconds, base, strict=True)]
    return statistics.median(found), min(found), max(found), min(seconds) / min(base)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved(
    steps: dict[str, Step], device: torch.device, rounds: int
) -> tuple[dict[str, list[float]], dict[str, int | None]]:
    samples: dict[str, list[float]] = {method: [] for method in steps}
    peaks: dict[str, int | None] = dict.fromkeys(steps)
    for step in steps.values():
        step.run()
    for turn in range(rounds):
        # Every other round backwards, so that none is always first.
        for method in list(steps) if turn % 2 == 0 else list(reversed(steps)):
            samples[method].append(_seconds(steps[method].run, device))
    if device.type == "cuda":
        for method, step in steps.items():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step.forward_backward()
            peaks[method] = torch.cuda.max_memory_allocated() - before
            step.optimizer.zero_grad(set_to_none=True)
    return samples, peaks


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


# --- limits ---


def limits(device: torch.device, models: list[str], precision: str, most: int = 2**21) -> pd.DataFrame:
    """One row a model and method: largest batch at 512 tokens, longest single sequence, until memory is full."""
    rows = []
    for model in models:
        for method, (named, settings) in METHODS.items():
            cell = partial(a_cell, model, named, precision=precision, **settings)
            batch = _largest(lambda n, cell=cell: _fits(cell(n, 512), device), 8, most // 512)
            length = _largest(lambda n, cell=cell: _fits(cell(1, n), device), 2048, most)
            rows.append((model, precision, method, batch, length))
            print(*rows[-1], file=sys.stderr)
    return pd.DataFrame(rows, columns=["model", "precision", "method", "largest_batch_at_512", "longest_sequence"])


def _fits(cell: Cell, device: torch.device) -> bool:
    try:
        build_step(cell, device).run()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _largest(fits: Callable[[int], bool], start: int, most: int) -> int:
    """The largest n that fits, to within 1/16 of it: doubling, then bisection."""
    low, high = 0, start
    while high <= most and fits(high):
        low, high = high, high * 2
    while low and high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# --- kernels ---


def kernels(device: torch.device, tokens: int = 32768, hidden: int = 2048, m: int = 3) -> pd.DataFrame:
    """Fused and plain coupling on one tile: seconds, bytes that must move, and the share of a copy's bandwidth."""
    from meftbench.reversible import Coupling, FixedPoint, fused

    coupling = Coupling(FixedPoint(), 2.0**-m)
    x = torch.randint(-(2**20), 2**20, (tokens, hidden), dtype=torch.int32, device=device)
    rows, source = [], torch.empty(tokens, hidden, device=device)
    bandwidth = 2 * source.nbytes / _timed(lambda: x.clone(), device)
    for dtype in (torch.float32, torch.bfloat16):
        value = torch.randn(tokens, hidden, device=device).to(dtype)
        moved = 2 * x.nbytes + value.nbytes + x.numel() * m // 8
        for name, plain in (("fused", False), ("plain", True)):
            with plain_coupling(fused) if plain else contextlib.nullcontext():
                side = coupling.forward_(x, x, value)
                forward = _timed(lambda v=value: coupling.forward_(x, x, v), device)
                inverse = _timed(lambda v=value, s=side: coupling.inverse_(x, x, v, s), device)
            for direction, seconds in (("forward", forward), ("inverse", inverse)):
                rows.append((name, str(dtype), direction, seconds, moved, moved / seconds / bandwidth))
    columns = ["kernel", "value", "direction", "seconds", "bytes_moved", "share_of_copy_bandwidth"]
    return pd.DataFrame(rows, columns=columns)


@contextlib.contextmanager
def plain_coupling(fused: Any) -> Iterator[None]:
    usable, fused.usable = fused.usable, lambda *_: False
    try:
        yield
    finally:
        fused.usable = usable


def _timed(run: Callable[[], object], device: torch.device, times: int = 20) -> float:
    for _ in range(3):
        run()
    return statistics.median(_seconds(run, device) for _ in range(times))


# --- the campaign ---


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no count from 1 on")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Run the sections; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sections", nargs="+", choices=["exactness", "speed", "limits", "kernels"])
    parser.add_argument("--models", nargs="+", choices=list(MODELS))
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 24, 48, 96])
    parser.add_argument("--shapes", nargs="+", help="BATCHxTOKENS ...")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="for speed; lora+checkpoint always runs")
    parser.add_argument(
        "--threads", type=_positive, nargs="+", help="on a CPU, for speed; default: as many as torch takes"
    )
    parser.add_argument("--rounds", type=_positive, default=7)
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    try:
        if on_gpu and not torch.cuda.is_available():
            raise UserError("exact_reversal", "no CUDA device is available", "use --device cpu", NOT_COMPARABLE)
        shapes = tuple(_shape(text) for text in options.shapes) if options.shapes else SHAPES[options.device]
        sections = options.sections or (
            ["exactness", "speed", "limits", "kernels"] if on_gpu else ["exactness", "speed"]
        )
        if not on_gpu and {"limits", "kernels"} & set(sections):
            raise UserError("--sections", "limits and kernels need a GPU", "leave them out, or use --device cuda")
        made(options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    models = options.models or (["bert-base", "bert-large", "24 x 2048"] if on_gpu else ["bert-base"])
    precision = "bf16-autocast" if on_gpu else "fp32"
    methods = list(dict.fromkeys(["lora+checkpoint", *(options.methods or METHODS)]))
    runs: dict[str, Callable[[], pd.DataFrame]] = {
        "exactness": lambda: exactness(device, "miniature", tuple(options.depths)),
        "speed": lambda: speed(device, models, shapes, precision, options.rounds, methods, options.threads),
        "limits": lambda: limits(device, models, precision),
        "kernels": lambda: kernels(device),
    }
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    parts = [f"# Exact reversal on {name} (measured)\n"]
    (options.out / "environment.json").write_text(json.dumps(describe() | {"device": name}, indent=1))
    for section in sections:
        frame = runs[section]()
        frame.to_csv(options.out / f"{section}.csv", index=False)
        parts.append(f"## {section}\n\n{_said(section, frame)}\n")
        (options.out / "summary.md").write_text("\n".join(parts), encoding="utf-8")  # what is done is kept
    print("\n".join(parts))
    return 0


def _shape(text: str) -> tuple[int, int]:
    batch, _, tokens = text.partition("x")
    if not (batch.isdigit() and tokens.isdigit()):
        raise UserError("--shapes", f"{text!r} is not BATCHxTOKENS", "write, say, 8x512")
    return int(batch), int(tokens)


def _said(section: str, frame: pd.DataFrame) -> str:
    if section != "exactness":
        return "```\n" + frame.to_string(index=False) + "\n```"
    run = frame[frame.note == ""]
    left_out = frame[frame.note != ""].groupby(["precision", "kernel"]).size()
    lines = [
        f"{len(run)} passes, {run.elements.sum():,} elements of streams restored, {run.differing.sum():,} of them "
        "other than bit for bit."
    ]
    lines += [f"- {p}, {k}: torch offers no such kernel for {n} of the settings" for (p, k), n in left_out.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
