"""A share of each GPU campaign, for whoever has a card for minutes: what is held, is it exact, how fast, as predicted?

    python reports/campaigns/gpu_sample.py reports/h100-sample                 # on a GPU, eight minutes at most
    python reports/campaigns/gpu_sample.py OUT --device cpu --seconds 60       # in miniature, without memory's peaks

Sections, in this order, each with a CSV of its own and a part of summary.md that is written as soon as it is done:
    exactness   (exact_reversal.py, decoders.py) elements that backward restores otherwise than bit for bit: models x
                precisions x attention kernels x tiles, fused kernels on and off
    speed       (exact_reversal.py) step time of the exact methods against lora+checkpoint, interleaved; the fused
                kernels' share of a copy's bandwidth
    memory      (sweep_bert_base.py, decoders.py) the allocator's four peaks, context and workspaces, a process a cell,
                beside what is counted on the CPU
    prediction  (prediction.py) what is predicted of those cells
Within a section the most telling piece comes first. A section that has used its share of the time stops, and the
summary says how many pieces it left out; a piece that fails is a row with what went wrong, and the rest goes on.
Exit codes: 0, 1 where a piece failed or an element was not restored, 4 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import exact_reversal as reversal
import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from meftbench.errors import NOT_COMPARABLE, UserError
from meftbench.measuring.build import build_step
from meftbench.measuring.requests import describe
from meftbench.plan.cell import Cell
from meftbench.plan.protocol import Protocol
from meftbench.plan.suite import Suite
from meftbench.records.store import load_run, made
from meftbench.reversible import fused
from meftbench.runner import run_suite
from meftbench.verdicts import validation

Piece = tuple[tuple[Any, ...], Callable[[], tuple[Any, ...]]]  # what it is of, and what gives the rest of its row

BERT = ("bert-base@random", {"attention_probs_dropout_prob": 0.0})
LLAMA, QWEN = ("llama-3.2-1b@random", {}), ("qwen2.5-0.5b@random", {})
SMALL_BERT = (
    "bert-base@random",
    {"attention_probs_dropout_prob": 0.0, "num_hidden_layers": 12, "hidden_size": 64, "num_attention_heads": 4,
     "intermediate_size": 128, "vocab_size": 99},
)  # fmt: skip
SMALL_LLAMA = (
    "llama-3.2-1b@random",
    {"num_hidden_layers": 12, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
     "intermediate_size": 128, "vocab_size": 99},
)  # fmt: skip
EXACT = {"tiles": 16}
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("lora+checkpoint", {}),
    ("meft1-exact", EXACT),
    ("meft3-exact", EXACT),
    ("lora+checkpoint+tiled_mlp", {}),
    ("meft1-exact", {}),
    ("meft3-exact", {}),
)
# Model, precision, batch, tokens.
SHAPES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "cuda": (
        (BERT, "bf16-autocast", 8, 512),
        (LLAMA, "bf16", 2, 1024),
        (BERT, "fp32", 8, 128),
        (QWEN, "bf16", 8, 512),
    ),
    "cpu": ((SMALL_BERT, "fp32", 2, 16), (SMALL_LLAMA, "bf16", 2, 16)),
}
SHARES = {"exactness": 0.2, "speed": 0.25, "memory": 0.35, "prediction": 0.2}  # of the seconds
PEAKS = ("requested", "allocated", "active", "reserved")


@dataclass
class Section:
    """What has been found. failed: how many pieces raised; left_out: how many there was no time for."""

    columns: list[str]
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    failed: int = 0
    left_out: int = 0

    def run(self, pieces: list[Piece], until: float) -> None:
        """Each piece while `until` (of time.monotonic) has not come."""
        for index, (named, found) in enumerate(pieces):
            if time.monotonic() > until:
                self.left_out = len(pieces) - index
                return
            given = len(self.columns) - len(named) - 1
            try:
                row = (*found(), "")
            except Exception as error:  # the card is there for minutes: what can be had of the rest is
                traceback.print_exc()
                row = (*[None] * given, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
                self.failed += 1
            self.rows.append((*named, *row))
            print(*self.rows[-1], file=sys.stderr, flush=True)
            gc.collect()

    @property
    def frame(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=self.columns)


def a_cell(
    model: tuple[str, dict[str, Any]], method: str, precision: str, batch: int, length: int, **more: Any
) -> Cell:
    name, overrides = model
    return Cell.of(method, model=name, model_config_overrides=overrides, precision=precision, batch_size=batch,
                   sequence_length=length, **more)  # fmt: skip


def labelled(method: str, settings: dict[str, Any]) -> str:
    return f"{method}, {settings['tiles']} tiles" if settings else method


# --- exactness ---


def exactness(device: torch.device, until: float) -> Section:
    found = Section(["model", "method", "precision", "kernel", "fused", "tiles", "elements", "differing", "note"])
    on_gpu = device.type == "cuda"
    # The precisions that people train in, all kernels, first; then the rest.
    precisions = sorted(reversal.PRECISIONS, key=lambda name: name not in ("bf16-autocast", "bf16"))
    pieces: list[Piece] = []
    for precision in precisions:
        for kernel in reversal.KERNELS[device.type]:
            for with_fused in (True, False) if on_gpu else (False,):
                for tiles in (16, 1, 3):
                    for model, method in ((SMALL_BERT, "meft1-exact"), (SMALL_LLAMA, "meft3-exact")):
                        named = (model[0], method, precision, kernel, with_fused, tiles)
                        pieces.append((named, lambda named=named, model=model: restored(device, model, *named[1:])))
    found.run(pieces, until)
    return found


def restored(
    device: torch.device, model: Any, method: str, precision: str, kernel: str, with_fused: bool, tiles: int
) -> tuple[int | None, int | None]:
    """Elements looked at and elements that differ; a kernel that torch does not offer for the shape has seen none."""
    step = build_step(
        a_cell(model, method, precision, 2, 64, method_params={"tiles": tiles}),
        device,
        padding=0.0 if kernel == "FLASH_ATTENTION" and device.type == "cuda" else 0.25,  # it takes no mask there
    )
    observer = step.applied.stacks[0].observer = reversal.Differences()
    plain = contextlib.nullcontext() if with_fused else reversal.plain_coupling(fused)
    try:
        with plain, sdpa_kernel(getattr(SDPBackend, kernel)):
            step.forward_backward()
    except RuntimeError as error:
        if not reversal.no_such_kernel(error):
            raise
        return 0, 0
    return observer.seen, observer.wrong


# --- speed ---


def speed(device: torch.device, until: float) -> tuple[Section, Section]:
    steps = Section(
        ["model", "precision", "batch", "tokens", "method", "rounds", "step_s", "ratio_to_lora_checkpoint", "lowest",
         "highest", "of_fastest", "activation_peak_bytes", "note"]
    )  # fmt: skip
    for model, precision, batch, length in SHAPES[device.type]:
        if time.monotonic() > until:
            steps.left_out += len(METHODS)
            continue
        try:
            rows = list(_interleaved(device, model, precision, batch, length, 7 if device.type == "cuda" else 2))
        except Exception as error:  # as in Section.run
            traceback.print_exc()
            rows = [(None, *[None] * 7, f"{type(error).__name__}: {error}")]
            steps.failed += 1
        steps.rows += [(model[0], precision, batch, length, *row) for row in rows]
        print(*steps.rows[-len(rows) :], sep="\n", file=sys.stderr, flush=True)
        gc.collect()
    kernels = Section(["kernel", "value", "direction", "seconds", "bytes_moved", "share_of_copy_bandwidth", "note"])
    if device.type == "cuda":
        try:
            kernels.rows = [(*row, "") for row in reversal.kernels(device).itertuples(index=False, name=None)]
        except Exception as error:  # as in Section.run; without triton it is an ImportError
            traceback.print_exc()
            kernels.rows = [(*[None] * 6, f"{type(error).__name__}: {error}")]
            kernels.failed = 1
    return steps, kernels


def _interleaved(
    device: torch.device, model: Any, precision: str, batch: int, length: int, rounds: int
) -> Iterator[tuple[Any, ...]]:
    cells = {
        labelled(method, settings): a_cell(model, method, precision, batch, length, method_params=settings)
        for method, settings in METHODS
    }
    taken, peaks = reversal.interleaved({name: build_step(c, device) for name, c in cells.items()}, device, rounds)
    for method, seconds in taken.items():
        spread = reversal.ratios(seconds, taken["lora+checkpoint"])
        yield (method, rounds, statistics.median(seconds), *spread, peaks[method], "")


# --- memory, and what was predicted of it ---


def memory(device: torch.device, out: Path, until: float) -> Section:
    """Cells in processes of their own, one call of `run_suite` each, so that the time can be looked at between them."""
    on = "cuda" if device.type == "cuda" else "counted"
    columns = [*(f"peak_{name}_bytes" for name in PEAKS), "activation_peak_bytes", "context_bytes", "workspace_bytes"]
    found = Section(["label", *columns, "counted_activation_peak_bytes", "note"])
    cells = [
        a_cell(model, method, precision, batch, length, method_params=settings, device=on)
        for model, precision, batch, length in SHAPES[device.type]
        for method, settings in METHODS
    ]
    protocol = Protocol(warmup=1, steps=2, passes=("memory",), on_oom="record")
    suite = Suite("gpu-sample", "", protocol, tuple(cells), None)
    counting = Suite("gpu-sample-counted", "", protocol, tuple(suite.on("counted").cells), None)

    def piece(cell: Cell, counted: Cell) -> tuple[Any, ...]:
        record = _only(suite, out / "memory", cell)
        # The count of a decoder's step takes the CPU minutes.
        if cell.batch_size * cell.sequence_length <= 1024:
            return (*(record.value(name) for name in columns),
                    _only(counting, out / "counted", counted).value("activation_peak_bytes"))  # fmt: skip
        return (*(record.value(name) for name in columns), None)

    found.run([((c.label,), lambda c=c, d=d: piece(c, d)) for c, d in zip(cells, counting.cells, strict=True)], until)
    return found


def _only(suite: Suite, out: Path, cell: Cell) -> Any:
    """The record of one cell of a run that grows. Raises RuntimeError with its reason: it did not end well."""
    run = run_suite(suite, out, resume=True, where=lambda one: one.cell_id == cell.cell_id)
    (record,) = [one for one in run.records if one.cell_id == cell.cell_id]
    if record.status != "ok":
        raise RuntimeError(f"{record.status}: {record.status_detail.get('message', 'no reason')}")
    return record


def prediction(measured: Path, until: float) -> Section:
    """Predicted against measured, evenly spread cells, as many as the time allows at some ten seconds each."""
    found = Section(["label", "metric", "measured", "predicted", "error", "note"])
    run = load_run(measured)
    most = max(1, int((until - time.monotonic()) / 10))
    result = validation.validate(run, validation.profile_of(run).name, lambda line: print(line, file=sys.stderr), most)
    validation.save(run, result)
    found.rows = [(e.label, e.metric, e.measured, e.predicted, e.share, "") for e in result.errors]
    found.rows += [(line, None, None, None, None, line) for line in result.missing]
    found.failed = len(result.missing)
    found.left_out = max(0, len(validation.measured_records(run)) - most)
    return found


# --- the sample ---


def main(arguments: list[str] | None = None) -> int:
    """Run the sections; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=460, help="for all sections together (default: 460)")
    parser.add_argument("--sections", nargs="+", choices=list(SHARES))
    parser.add_argument("--measured", type=Path, help="for prediction: a run that a GPU measured, instead of `memory`")
    options = parser.parse_args(arguments)
    try:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise UserError("gpu_sample", "no CUDA device is available", "use --device cpu", NOT_COMPARABLE)
        made(options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return _sampled(options)


def _sampled(options: argparse.Namespace) -> int:
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    torch.manual_seed(0)
    (options.out / "environment.json").write_text(json.dumps(describe() | {"device": name}, indent=1))
    sections = options.sections or [s for s in SHARES if s != "prediction" or options.device == "cuda"]
    parts, failed, until = [f"# A sample on {name} (measured, {options.seconds:.0f} s at most)\n"], 0, time.monotonic()
    for section in sections:
        until = max(until, time.monotonic()) + SHARES[section] * options.seconds / sum(SHARES[s] for s in sections)
        found: dict[str, Section] = {}
        try:
            if section == "exactness":
                found[section] = exactness(device, until)
                failed += sum(bool(row[-2]) for row in found[section].rows)  # elements that differ
            elif section == "speed":
                found["speed"], found["kernels"] = speed(device, until)
            elif section == "memory":
                found[section] = memory(device, options.out, until)
            else:
                found[section] = prediction(options.measured or options.out / "memory", until)
        except UserError as error:
            print(error, file=sys.stderr)
            parts.append(f"## {section}\n\n{error}\n")
            failed += 1
        for title, of in found.items():
            if of.rows or of.left_out:
                of.frame.to_csv(options.out / f"{title}.csv", index=False)
                parts.append(f"## {title}\n\n{_said(title, of)}\n")
            failed += of.failed
        (options.out / "summary.md").write_text("\n".join(parts), encoding="utf-8")
    print("\n".join(parts))
    return 1 if failed else 0


def _said(title: str, found: Section) -> str:
    frame, lines = found.frame, []
    if title == "exactness":
        lines.append(
            f"{len(frame)} passes, {int(frame.elements.sum()):,} elements of streams restored, "
            f"{int(frame.differing.sum()):,} of them other than bit for bit; {int((frame.elements == 0).sum())} of the "
            "passes asked for a kernel that torch does not offer there."
        )
    if found.failed:
        lines.append(f"{found.failed} pieces failed: column `note` of {title}.csv.")
    if found.left_out:
        lines.append(f"No time was left for {found.left_out} pieces.")
    if title != "exactness":
        shown = frame.drop(columns="note", errors="ignore").to_string(index=False)
        lines.append("```\n" + "\n".join(line.rstrip() for line in shown.splitlines()) + "\n```")
    return "\n\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
