"""Why offloading everything can need more memory of the device than checkpointing alone, and what offloading leaves.

    python reports/campaigns/offload.py reports/offload

Steps of Llama-3.2-1B in bf16 are predicted for one H100 (80 GB), a sample of 8,192 tokens, chunked loss in all rows.
Writes table.csv, a plot, and summary.md, which is also printed.

The rows "repeats stay" follow what TRL's OffloadActivations does (trl/models/activation_offloading.py at 0167b7d): five
copies in flight, and of a storage that several operations save, the tensors after the first stay on the device.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from meftbench.catalogue.profiles import find_profile
from meftbench.errors import UserError
from meftbench.methods.levers import offload
from meftbench.plan.cell import Cell
from meftbench.prediction.predict import predict
from meftbench.records.store import made
from meftbench.report.render.verdicts import markdown_table

MiB = 2**20
REPEATS_STAY = ", repeats stay"
UNLIMITED = 1_000_000
LEVERS = (
    *("lora", "lora+checkpoint"),
    *(f"lora+offload(in_flight={n})" for n in (1, 2, 5, 20, 40, UNLIMITED)),
    f"lora+offload(in_flight=5){REPEATS_STAY}",
    *("lora+checkpoint+offload", "lora+checkpoint+offload(what=checkpoints)"),
    *("meft1-exact", "meft1-exact+offload"),
    *("lora+weight_offload", "lora+checkpoint+weight_offload", "lora+offload+weight_offload"),
    *("lora+checkpoint+offload+weight_offload", "meft1-exact+weight_offload", "meft1-exact+offload+weight_offload"),
)
MODEL = "llama-3.2-1b@random"


class RepeatsStay(offload.HostMemory):
    """Host memory that copies a storage when it is saved first, and leaves later tensors of it on the device."""

    def copied(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if any(copy.source() is storage for copy in self._copies.values()):
            return None
        return super().copied(tensor)


def a_row(label: str, length: int, model: str, config: dict[str, Any]) -> dict[str, Any]:
    """Bytes of one step: held after forward; the largest growth in forward and in backward; the peak."""
    cell = Cell.of(
        f"{label.removesuffix(REPEATS_STAY)}+chunked_loss",
        model=model,
        model_config_overrides=config,
        batch_size=1,
        sequence_length=length,
        precision="bf16",
        device="predicted:h100",
    )
    repeats_stay = label.endswith(REPEATS_STAY)
    with mock.patch.object(offload, "HostMemory", RepeatsStay) if repeats_stay else nullcontext():
        found = predict(cell, find_profile("h100"))
    observed = found.measured[-1]
    return {
        "method": label.replace(str(UNLIMITED), "unlimited"),
        "tokens": length,
        "saved_bytes": observed.saved,
        "forward_bytes": observed.phase_peaks["forward"] - observed.baseline,
        "backward_bytes": observed.phase_peaks["backward"] - observed.baseline,
        "baseline_bytes": observed.baseline,
        "peak_bytes": found.peak,
        "host_bytes": observed.host_peak,
    }


def plot(frame: pd.DataFrame, ax: Axes) -> None:
    """Bars: the growth of a step over what is held between steps, and what is held after forward, by method."""
    rows = frame[::-1]
    grown = rows[["forward_bytes", "backward_bytes"]].max(axis=1)
    positions = range(len(rows))
    ax.barh(positions, grown / MiB, color="#56B4E9", label="largest in forward and backward")
    ax.barh(positions, rows.saved_bytes / MiB, height=0.4, color="#0072B2", label="held after forward")
    ax.set_yticks(list(positions), list(rows.method), fontsize=8)
    checkpointed = frame[frame.method == "lora+checkpoint"].iloc[0]
    line = max(checkpointed.forward_bytes, checkpointed.backward_bytes) / MiB
    ax.axvline(line, color="#D55E00", linewidth=1, label="lora+checkpoint")
    ax.set(
        xlabel="memory beside weights, optimizer and gradients of a step (MiB, predicted)",
        xscale="log",
        xlim=(10, None),
    )
    ax.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1))


def summary(frame: pd.DataFrame, model: str) -> str:
    """The table in Markdown, and what it shows."""
    head = ["method", "held after forward", "largest in forward", "in backward", "between steps", "peak", "host"]
    columns = ["saved_bytes", "forward_bytes", "backward_bytes", "baseline_bytes", "peak_bytes", "host_bytes"]
    rows = [[row.method, *(f"{getattr(row, name) / MiB:,.0f}" for name in columns)] for row in frame.itertuples()]
    growth = frame.set_index("method")[["forward_bytes", "backward_bytes"]].max(axis=1)
    checkpointed = growth["lora+checkpoint"]
    more = [name for name in growth.index if "+offload" in name and growth[name] > checkpointed]
    fewer = [name for name in growth.index if name.startswith("lora+offload(") and growth[name] <= checkpointed]
    tokens = f"{frame.tokens.iloc[0]:,}"
    said = f"""# Memory that offloading leaves on the device

Predicted for one H100 (80 GB): {model} in bf16, one sample of {tokens} tokens, AdamW, chunked loss in all rows. In MiB.
In all columns but the last three: beside what is held between steps. `python reports/campaigns/offload.py OUT`

{markdown_table(head, rows)}

A step without checkpoints saves every activation of every layer. Offloaded, a tensor leaves the device only when its
copy to the host is done, and it is brought back before its operation needs it. What stays on the device is therefore
what is in flight, and that is a choice:

- More than checkpointing alone: {", ".join(f"`{name}`" for name in more) or "none"}.
- No more than checkpointing alone: {", ".join(f"`{name}`" for name in fewer) or "none"}.

Two rules make the difference. With many copies in flight, the tensors that wait for the link to the host, and those
that are brought back for operations to come, are a layer's activations or more: as much as a checkpointed layer has
when it is recomputed. And where tensors of a storage that was saved before stay on the device, that storage is copied
to the host and its memory is not freed, such as the input of adapted projections, which is saved once for each of them.
With two storages in flight, each copied once, neither happens. Offloading everything then needs less memory than
checkpointing; over the link go, each way, as many bytes as the first row holds after forward, where with checkpoints
alone it is one input a layer.
"""
    return said


def main(arguments: list[str] | None = None) -> int:
    """Predict, write and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--length", type=int, default=8192, help="tokens of the sample")
    parser.add_argument("--layers", type=int, help="of the model, in place of its own number")
    options = parser.parse_args(arguments)
    config = {} if options.layers is None else {"num_hidden_layers": options.layers}
    try:
        made(options.out)  # before the work
        rows = []
        for label in LEVERS:
            rows.append(a_row(label, options.length, MODEL, config))
            print(f"{label}: {rows[-1]['peak_bytes'] / MiB:,.0f} MiB", file=sys.stderr)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    frame = pd.DataFrame(rows)
    frame.to_csv(options.out / "table.csv", index=False)
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    plot(frame, figure.subplots())
    for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
        figure.savefig(options.out / f"offload.{suffix}", metadata=metadata)
    text = summary(frame, MODEL.removesuffix("@random"))
    (options.out / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
