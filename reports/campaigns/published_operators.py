"""Memory of single operators that a library of kernels measured and published, beside what is predicted for them.

    python reports/campaigns/published_operators.py

Prints a row a measurement. The measurements are tests/groundtruth/data/operators.csv; README-operators.md beside it
says whose they are. They are those of plain torch and transformers, with which the library compares its own kernels.

An operator here is a function that allocates what the library's script had on the device before it measured. It returns
the iteration that was measured ten times; the median of the ten peaks was published. The ten are traced on torch's meta
device by CUDA's rules, and the trace is replayed by the allocator's rules (meftbench.prediction). The first iteration
is lower than the others where gradients of the one before are still alive.

Of embeddings (embeddings.csv) only differences between vocabularies are comparable: that script's process had
compiled modules before, and more was alive than the script names. The last lines show what is
left when the prediction is taken off.

These peaks hold CUDA's rules for workspaces of cuBLAS, for scratch memory of embeddings, and for how long autograd
keeps what it saved. None of them falls where a reduction has buffers or where autograd adds in place.

Not known: the versions of torch; what earlier measurements in the same process left in the allocator's cache.
Shape suffixes: B samples, L positions, H heads, E size of a head, D hidden size, R rows (tokens), V vocabulary.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meftbench.catalogue.profiles import Profile, find_profile
from meftbench.prediction.allocator import Event, replay
from meftbench.prediction.cuda_counter import CudaCounter
from meftbench.prediction.overlay import cuda_semantics
from meftbench.prediction.remembered import Remembered
from meftbench.units import MiB

DATA = Path(__file__).resolve().parents[2] / "tests" / "groundtruth" / "data"
MEASURED, EMBEDDINGS = DATA / "operators.csv", DATA / "embeddings.csv"
ITERATIONS = 10
PROFILES = {
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100",  # fewer multiprocessors; no figure of this card depends on their number
}

Mark = Callable[[str], None]  # called with the name of the phase that begins


class Prepared(NamedTuple):
    """iteration: one of the ten; forward has begun.  held: what is on the device meanwhile and the iteration lacks."""

    iteration: Callable[[Mark], None]
    held: tuple[object, ...] = ()


Prepare = Callable[[int, Mark], Prepared]  # by the size that is varied


def _on_device(*shape: int, dtype: torch.dtype = torch.float32, trained: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device="meta", requires_grad=trained)


def _classes(rows: int, number: int) -> Tensor:
    return torch.randint(number, (rows, 1), device="meta").squeeze(1)


# --- operators, each by the size that is varied ---


def cross_entropy(vocabulary: int, _mark: Mark) -> Prepared:
    """Of 16,384 tokens' logits in float32."""
    logits_RV = _on_device(8 * 2048, vocabulary, trained=True)
    targets_R = _classes(8 * 2048, vocabulary)

    def iteration(mark: Mark) -> None:
        loss = F.cross_entropy(logits_RV, targets_R)
        mark("backward")
        loss.backward()

    return Prepared(iteration)


def fused_linear_cross_entropy(rows: int, _mark: Mark) -> Prepared:
    """A head of Llama 3's vocabulary and its loss, apart, in bfloat16. A second head is held for the fused kernel."""
    head, second_head = (nn.Linear(4096, 128_256, bias=False, dtype=torch.bfloat16, device="meta") for _ in range(2))
    hidden_RD = _on_device(rows, 4096, dtype=torch.bfloat16, trained=True)
    targets_R = _classes(rows, 128_256)

    def iteration(mark: Mark) -> None:
        loss = F.cross_entropy(head(hidden_RD), targets_R)
        mark("backward")
        loss.backward()

    return Prepared(iteration, held=(second_head,))


class GatedMlp(nn.Module):
    """Llama's feed-forward sublayer in bfloat16. x, result: (B, L, 4096)."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up = (self._linear(4096, 11_008) for _ in range(2))
        self.down = self._linear(11_008, 4096)
        self.activation = activation

    @staticmethod
    def _linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16, device="meta")

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x_BLD)) * self.up(x_BLD))  # type: ignore[no-any-return]


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def geglu(length: int, _mark: Mark) -> Prepared:
    """Forward and backward of 8 samples."""
    return _mlp(8, length, _gelu)


def swiglu(length: int, _mark: Mark) -> Prepared:
    """Forward and backward of 4 samples."""
    return _mlp(4, length, F.silu)


def _mlp(samples: int, length: int, activation: Callable[[Tensor], Tensor]) -> Prepared:
    x_BLD = _on_device(samples, length, 4096, dtype=torch.bfloat16, trained=True)
    layer = GatedMlp(activation)

    def iteration(mark: Mark) -> None:
        result_BLD = layer(x_BLD)
        mark("backward")
        result_BLD.backward(torch.randn_like(result_BLD), retain_graph=True)

    return Prepared(iteration)


def geglu_forward(length: int, mark: Mark) -> Prepared:
    """Forward alone. The script had run both passes before, so that the backward pass has its workspace already."""
    geglu(1024, mark).iteration(mark)
    mark("forward")
    x_BLD = _on_device(8, length, 4096, dtype=torch.bfloat16, trained=True)
    layer = GatedMlp(_gelu)

    def iteration(_mark: Mark) -> None:
        layer(x_BLD)

    return Prepared(iteration)


def geglu_backward(length: int, _mark: Mark) -> Prepared:
    """Backward alone, again and again through the graph of one forward pass."""
    x_BLD = _on_device(8, length, 4096, dtype=torch.bfloat16, trained=True)
    layer = GatedMlp(_gelu)
    gradient_BLD = torch.randn_like(x_BLD)
    result_BLD = layer(x_BLD)

    def iteration(mark: Mark) -> None:
        mark("backward")
        result_BLD.backward(gradient_BLD, retain_graph=True)

    return Prepared(iteration)


def layer_norm(width: int, _mark: Mark) -> Prepared:
    """Of 4,096 rows in float32. The weights of the library's own norm are held, too."""
    norm, second_norm = (nn.LayerNorm(width, eps=1e-6, device="meta") for _ in range(2))
    return _norm(norm, second_norm, _on_device(4096, width))


class LlamaNorm(nn.Module):
    """Llama's root mean square norm, with a weight in float32. x: (R, D); result: (R, D) in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, device="meta"))

    def forward(self, x_RD: Tensor) -> Tensor:
        dtype = x_RD.dtype
        x_RD = x_RD.to(torch.float32)
        mean_R1 = x_RD.pow(2).mean(-1, keepdim=True)
        x_RD = x_RD * torch.rsqrt(mean_R1 + 1e-6)
        return self.weight * x_RD.to(dtype)


def rms_norm(width: int, _mark: Mark) -> Prepared:
    """Of 2,048 rows in bfloat16. The weight of the library's own norm is held, too."""
    return _norm(LlamaNorm(width), LlamaNorm(width), _on_device(2048, width, dtype=torch.bfloat16))


def _norm(norm: nn.Module, second_norm: nn.Module, x_RD: Tensor) -> Prepared:
    gradient_RD = torch.randn_like(x_RD)
    x_RD.requires_grad_(True)

    def iteration(mark: Mark) -> None:
        result_RD = norm(x_RD)
        mark("backward")
        result_RD.backward(gradient_RD, retain_graph=True)

    return Prepared(iteration, held=(second_norm,))


def embedding_of(width: int) -> Prepare:
    """Of 16,384 tokens in float32, by vocabulary. The table of the library's own embedding is held, too."""

    def embedding(vocabulary: int, _mark: Mark) -> Prepared:
        table, second_table = (nn.Embedding(vocabulary, width, device="meta") for _ in range(2))
        tokens_BL = torch.randint(vocabulary, (8, 2048), device="meta")

        def iteration(mark: Mark) -> None:
            result_BLD = table(tokens_BL)
            mark("backward")
            result_BLD.backward(torch.randn_like(result_BLD))

        return Prepared(iteration, held=(second_table,))

    return embedding


def kl_div(vocabulary: int, _mark: Mark) -> Prepared:
    """Divergence of 16,384 tokens' distributions in float32."""
    rows = 8 * 2048
    found_RV = _on_device(rows, vocabulary, trained=True).log_softmax(-1)
    true_RV = _on_device(rows, vocabulary).softmax(-1)

    def iteration(mark: Mark) -> None:
        loss = F.kl_div(found_RV, true_RV, reduction="batchmean")
        mark("backward")
        loss.backward(retain_graph=True)

    return Prepared(iteration)


def rope_by_width(width: int, _mark: Mark) -> Prepared:
    """2,048 positions; the heads' size is varied."""
    return _rope(2048, width // 32)


def rope_by_length(length: int, _mark: Mark) -> Prepared:
    """Heads of 256."""
    return _rope(length, 8192 // 32)


def _rope(length: int, head: int) -> Prepared:
    """Rotary positions of 32 heads of queries and 8 of keys in bfloat16, as transformers turns them.

    The angles are a matrix product, which takes a workspace before anything is measured.
    """
    query, key = (_on_device(1, length, heads, head, dtype=torch.bfloat16, trained=True) for heads in (32, 8))
    query_BHLE, key_BHLE = query.transpose(1, 2), key.transpose(1, 2)
    gradients = torch.randn_like(query_BHLE), torch.randn_like(key_BHLE)
    frequencies_BE1 = 1.0 / 10_000 ** (torch.arange(0, head, 2, device="meta").float() / head)[None, :, None]
    positions_BL = torch.arange(length, device="meta")[None, :]
    angles_BLE = (frequencies_BE1 @ positions_BL[:, None, :].float()).transpose(1, 2)
    angles_BLE = torch.cat((angles_BLE, angles_BLE), dim=-1)
    cos_BLE, sin_BLE = angles_BLE.cos().to(query.dtype), angles_BLE.sin().to(query.dtype)

    def quarter_turned(x_BHLE: Tensor) -> Tensor:
        first, second = x_BHLE[..., : head // 2], x_BHLE[..., head // 2 :]
        return torch.cat((-second, first), dim=-1)

    def turned(x_BHLE: Tensor) -> Tensor:
        # The product with the cosine comes first, hence last in the backward pass.
        return x_BHLE * cos_BLE[:, None] + quarter_turned(x_BHLE) * sin_BLE[:, None]

    def iteration(mark: Mark) -> None:
        results = turned(query_BHLE), turned(key_BHLE)
        mark("backward")
        torch.autograd.grad(results, (query_BHLE, key_BHLE), gradients, retain_graph=True, allow_unused=True)

    return Prepared(iteration, held=(frequencies_BE1, positions_BL))


OPERATORS: dict[tuple[str, str, str], Prepare] = {
    ("cross_entropy", "full", "V"): cross_entropy,
    ("fused_linear_cross_entropy", "full", "BT"): fused_linear_cross_entropy,
    ("geglu", "full", "T"): geglu,
    ("geglu", "forward", "T"): geglu_forward,
    ("geglu", "backward", "T"): geglu_backward,
    ("layer_norm", "full", "N"): layer_norm,
    ("rms_norm", "full", "H"): rms_norm,
    ("rope", "full", "H"): rope_by_width,
    ("rope", "full", "T"): rope_by_length,
    ("swiglu", "full", "T"): swiglu,
    ("kl_div", "full", "V"): kl_div,
}


# --- the table ---


def predicted_operators() -> list[dict[str, Any]]:
    """A row a measurement: operator, mode, device, size_name, size, measured_bytes, predicted_bytes, profile.

    MiB were published, rounded to 32-bit floats. Up to 8 GiB this loses nothing, since blocks are multiples of 512
    bytes; a larger peak is known to 512 bytes, from 16 GiB on to 1,024, from 32 GiB on to 2,048.
    """
    return [_beside(measured) for measured in _rows(MEASURED)]


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _beside(measured: dict[str, str]) -> dict[str, Any]:
    profile = PROFILES[measured["device"]]
    prepare = OPERATORS[measured["operator"], measured["mode"], measured["size_name"]]
    return {
        **{key: measured[key] for key in ("operator", "mode", "device", "size_name")},
        "size": int(measured["size"]),
        "measured_bytes": round(float(measured["published_mib"]) * MiB),
        "predicted_bytes": predicted_peak(prepare, int(measured["size"]), find_profile(profile)),
        "profile": profile,
    }


def beside_embeddings() -> dict[int, list[int]]:
    """Bytes measured less bytes predicted, by width of the embedding, in order of vocabularies: what else was alive in
    the process, if the prediction is right. That is the same for all vocabularies, which it knows nothing of."""
    beside: dict[int, list[int]] = {}
    for row in _rows(EMBEDDINGS):
        prepare = embedding_of(int(row["width"]))
        predicted = predicted_peak(prepare, int(row["vocabulary"]), find_profile(PROFILES[row["device"]]))
        beside.setdefault(int(row["width"]), []).append(round(float(row["published_mib"]) * MiB) - predicted)
    return beside


def predicted_peak(prepare: Prepare, size: int, profile: Profile) -> int:
    """The median over iterations of the most that is allocated in one, in bytes of whole blocks."""
    starts = []
    with cuda_semantics(profile), CudaCounter("meta", Remembered(), profile) as counter:
        counter.mark("forward")
        prepared = prepare(size, counter.mark)
        assert counter.events is not None
        for _ in range(ITERATIONS):
            starts.append(len(counter.events))
            counter.mark("forward")
            prepared.iteration(counter.mark)
        events = [Event(*event) for event in counter.events]
    return int(statistics.median(step.peak.allocated for step in replay(events, starts=starts).steps))


def main(arguments: list[str] | None = None) -> int:
    """Predict and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    print(f"{'operator':<42}{'device':<24}{'measured':>15}{'predicted':>15}{'difference':>12}  bytes")
    for row in predicted_operators():
        name = f"{row['operator']} {row['mode']} {row['size_name']}={row['size']}"
        measured, predicted = row["measured_bytes"], row["predicted_bytes"]
        print(f"{name:<42}{row['device']:<24}{measured:>15,d}{predicted:>15,d}{predicted - measured:>+12,d}")
    for width, beside in beside_embeddings().items():
        print(f"embedding full D={width}: measured less predicted is {min(beside):,d} to {max(beside):,d} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
