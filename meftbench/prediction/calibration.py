"""Measures how fast a device is (`meftbench doctor --calibrate`): the `speeds` of a profile.

What each measurement reads, writes and computes is counted by the counter that counts a traced step (work.py), so that
both sides of a prediction mean the same by a byte. Every time is the least of several, as what else the machine does
can only add to it; measurements take turns, so that a busy minute does not fall on one of them alone.
"""

from __future__ import annotations

import math
import mmap
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from meftbench.catalogue.operations import Work
from meftbench.catalogue.speeds import Rate
from meftbench.errors import NOT_COMPARABLE, UserError
from meftbench.prediction.work import WorkCounter

# Rows, inner dimension, columns: layers of small and larger models; adapters, and their gradients.
_PRODUCTS = [
    (64, 64, 64),
    *((128, 384, 384), (512, 384, 1536), (1024, 384, 384), (2048, 1536, 384), (1024, 576, 1536), (2048, 768, 3072)),
    *((1024, 384, 64), (1024, 64, 384), (1024, 384, 8), (1024, 8, 384), (2048, 768, 8), (2048, 8, 768)),
    *((384, 1024, 8), (8, 1024, 384), (64, 1024, 384), (384, 1024, 384), (1536, 2048, 768)),
    *((128, 32, 128), (128, 128, 32), (512, 64, 512)),
    *((16, 576, 8192), (16, 2048, 4096), (64, 576, 8192), (256, 576, 8192), (32, 8192, 576), (16, 384, 1536)),
]
_LARGE_PRODUCTS = [(4096, 4096, 4096), (8192, 4096, 4096), (4096, 64, 4096), (4096, 4096, 64), (4096, 4096, 16)]
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# Samples, heads, positions, size of a head.
_ATTENTIONS = [(8, 12, 64, 32), (8, 12, 128, 32), (4, 8, 256, 64), (2, 8, 512, 64), (1, 8, 1024, 64)]
_SIZES = [2**exponent for exponent in range(14, 28, 2)]  # bytes that an operator writes
_FRESH_FROM = 2**25  # bytes: on a CPU larger results are new pages in each call, which are measured by themselves
_GPU_SIZES = [2**exponent for exponent in range(16, 31, 2)]
_COLUMNS = 512
_RING = 2**26
_ROUNDS = 8

Tell = Callable[[str], None]


class Counting(TorchDispatchMode):
    """Counts what operators do while it is entered, in `counter`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter = WorkCounter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        self.counter.count(func, args, kwargs or {}, result)
        return result


def work_of(run: Callable[[], object]) -> Work:
    """What a call does, by the operators that it runs."""
    counting = Counting()
    with counting:
        run()
    return counting.counter.work


def timed(runs: list[Callable[[], object]], device: torch.device, budget: float) -> list[float]:
    """Seconds of one call of each, the least of `_ROUNDS` rounds in turn. budget: seconds for all of it, about."""
    each = budget / (_ROUNDS * len(runs))
    repeats = []
    for run in runs:
        run()
        once = _elapsed(run, 1, device)
        repeats.append(max(1, min(1000, int(each / max(once, 1e-7)))))
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(_ROUNDS):
        for number, run in enumerate(runs):
            found[number].append(_elapsed(run, repeats[number], device) / repeats[number])
    return [min(times) for times in found]


def _elapsed(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    _synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    _synchronize(device)
    return time.perf_counter() - begin


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def calibrate(request: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """The speeds of this machine's device. request: `device`: "cpu", "cuda" or None, for CUDA where there is one.

    The answer: `device`, its type; `speeds`, as `Speeds` has them; of a GPU `facts`, fields of a profile.
    Raises UserError: there is no CUDA device.
    """
    available = torch.cuda.is_available()
    kind = request["device"] or ("cuda" if available else "cpu")
    if kind == "cuda" and not available:
        raise UserError("doctor --calibrate", "no CUDA device is available", "take --device cpu", NOT_COMPARABLE)
    answer: dict[str, Any] = {"device": kind, "speeds": measured_speeds(torch.device(kind), tell)}
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        answer["facts"] = {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
        }
    return answer


# --- what is measured ---


def measured_speeds(device: torch.device, tell: Tell, budget: float = 45.0) -> dict[str, Any]:
    """The content of a profile's `speeds`.

    budget: seconds that it takes, about.
    """
    on_gpu = device.type == "cuda"
    tell(f"measuring products of matrices on {device.type}")
    matrix = {_name(dtype): _matrix(dtype, device, budget * 0.1) for dtype in _DTYPES}
    tell("measuring attention")
    dtypes = _DTYPES[:2]
    forward, backward = {}, {}
    for dtype in dtypes:
        forward[_name(dtype)], backward[_name(dtype)] = _attention(dtype, device, budget * 0.1)
    tell("measuring memory")
    memory = _memory(device, budget * 0.4)
    launch_s = _launch(device, budget * 0.05)
    content: dict[str, Any] = {"calibrated": True}
    if not on_gpu:
        content["threads"] = torch.get_num_threads()
    content |= {"matrix": matrix, "attention": forward, "attention_backward": backward, "memory": memory}
    content |= {"launch_s": _rounded(launch_s), "asynchronous": on_gpu}
    content |= _link(device, budget * 0.05) if on_gpu else {"fresh_bytes_per_s": _fresh(budget * 0.05)}
    where = f"torch {torch.__version__}, {platform.machine()}"
    content["sources"] = [f"all: measured by meftbench doctor --calibrate, {where}"]
    return content


def _matrix(dtype: torch.dtype, device: torch.device, budget: float) -> dict[str, Any]:
    sizes = [*_PRODUCTS, *(_LARGE_PRODUCTS if device.type == "cuda" else [])]
    times = timed([_product(*size, dtype, device) for size in sizes], device, budget)
    moved = [dtype.itemsize * (m * k + k * n + m * n) for m, k, n in sizes]
    return _content(_fitted_with_loading(sizes, times, moved) if device.type == "cpu" else _fitted_to(sizes, times))


def _product(rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """What was computed last with a weight that was used some time ago, as in a step."""
    first, weight_bytes = _random(rows, inner, dtype, device), columns * inner * dtype.itemsize
    weights = cycle([_random(columns, inner, dtype, device) for _ in range(max(1, min(64, _RING // weight_bytes)))])
    return lambda: first @ next(weights).t()


def _fitted_to(sizes: Sequence[tuple[int, ...]], times: list[float]) -> Rate:
    return fitted(
        [tuple(map(float, size)) for size in sizes], [2.0 * math.prod(s) / t for s, t in zip(sizes, times, strict=True)]
    )


def _fitted_with_loading(sizes: Sequence[tuple[int, ...]], times: list[float], moved: list[int]) -> Rate:
    """The same with the best of some speeds of loading, whose share of the times is taken off before."""
    best, least = _fitted_to(sizes, times), math.inf
    for loading in (5e9, 8e9, 12e9, 18e9, 27e9, 40e9, 60e9, 90e9):
        computing = [seconds - nbytes / loading for seconds, nbytes in zip(times, moved, strict=True)]
        if min(left / seconds for left, seconds in zip(computing, times, strict=True)) < 0.2:
            continue  # slower than some were measured to be
        rate = _fitted_to(sizes, computing)
        told = [
            2 * math.prod(size) / rate.at(size) + nbytes / loading for size, nbytes in zip(sizes, moved, strict=True)
        ]
        spread = sum(math.log(ours / theirs) ** 2 for ours, theirs in zip(told, times, strict=True))
        if spread < least:
            best, least = rate.model_copy(update={"loading_bytes_per_s": loading}), spread
    return best


def _attention(dtype: torch.dtype, device: torch.device, budget: float) -> tuple[dict[str, Any], dict[str, Any]]:
    forwards, backwards, works = [], [], []
    for shape in _ATTENTIONS:
        query, key, value = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
        run = _attending(query, key, value)
        output = run()
        back = _gradients_of(output, [query, key, value], torch.randn_like(output))
        forwards.append(run)
        backwards.append(back)
        works.append((work_of(run), work_of(back)))
    times = timed([*forwards, *backwards], device, budget)
    sizes = [(float(shape[2]), float(shape[2]), float(shape[3])) for shape in _ATTENTIONS]
    count = len(sizes)
    rates = [
        [float(work[part].flops) / times[part * count + number] for number, work in enumerate(works)] for part in (0, 1)
    ]
    return _content(fitted(sizes, rates[0])), _content(fitted(sizes, rates[1]))


def _attending(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    return lambda: F.scaled_dot_product_attention(query, key, value)


def _gradients_of(output: Tensor, leaves: list[Tensor], gradient: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(output, leaves, gradient, retain_graph=True)


def fitted(sizes: Sequence[tuple[float, ...]], rates: list[float]) -> Rate:
    """The `Rate` whose logarithms are nearest to those of the rates at the sizes, by the sum of squares.

    Found by going through the sizes' dimensions in turn and taking the best of some values of `half`: the sum has few
    variables, and is flat around its minimum.
    """
    half = [0.0] * len(sizes[0])
    candidates = [0.0, *(2.0**exponent for exponent in range(13))]
    for _ in range(4):
        for dimension in range(len(half)):
            tried = [[*half[:dimension], value, *half[dimension + 1 :]] for value in candidates]
            half = min(tried, key=lambda values: _spread(sizes, rates, values)[0])
    return Rate(rate=math.exp(_spread(sizes, rates, half)[1]), half=half)


def _spread(sizes: Sequence[tuple[float, ...]], rates: list[float], half: list[float]) -> tuple[float, float]:
    """The sum of squares of what is left of the rates' logarithms, and their mean: the rate without limits."""
    logs = [
        math.log(rate) - sum(math.log(d / (d + h)) for d, h in zip(size, half, strict=True))
        for size, rate in zip(sizes, rates, strict=True)
    ]
    mean = sum(logs) / len(logs)
    return sum((value - mean) ** 2 for value in logs), mean


def _memory(device: torch.device, budget: float) -> dict[str, list[list[float]]]:
    sizes = _GPU_SIZES if device.type == "cuda" else _SIZES
    measured: list[tuple[str, int, Work]] = []
    runs = []
    for nbytes in sizes:
        for kind, run in _movers(nbytes, device):
            if device.type == "cpu" and kind not in ("elementwise", "in place") and nbytes > _FRESH_FROM:
                continue
            measured.append((kind, nbytes, work_of(run)))
            runs.append(run)
    times = timed(runs, device, budget)
    curves: dict[str, list[list[float]]] = {}
    for (kind, nbytes, work), seconds in zip(measured, times, strict=True):
        curves.setdefault(kind, []).append([float(nbytes), _rounded(work.moved_bytes / seconds)])
    return curves


def _movers(nbytes: int, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """For each kind of operator a call that writes so many bytes at once, forward and backward where it has both.

    Calls go round buffers of `_RING` bytes in all: in a step, too, most of what an operator reads was written by others
    than the one before it, and has left the caches by then.
    """
    rows = max(16, nbytes // 4 // _COLUMNS)
    rings = [
        cycle([torch.randn(rows, _COLUMNS, device=device) for _ in range(max(1, min(64, _RING // nbytes)))])
        for _ in range(3)
    ]
    table, numbers = torch.randn(30_000, _COLUMNS, device=device), torch.arange(rows, device=device) % 30_000
    norm = nn.LayerNorm(_COLUMNS, device=device).requires_grad_(False)
    first, second, third = rings
    yield "elementwise", lambda: torch.add(next(first), next(second), out=next(third))
    yield "in place", lambda: next(first).add_(next(second), alpha=1e-9)
    yield "permuted", lambda: _by_heads(next(first)).contiguous()
    yield "reduction", lambda: next(first).sum(0)
    yield "random", lambda: next(third).bernoulli_(0.9)
    yield "normal", lambda: next(third).normal_()
    yield "gather", lambda: F.embedding(numbers, table)
    for kind, function in (("softmax", _softmax), ("norm", norm), ("activation", F.gelu)):
        yield kind, _both(function, first, second)


def _by_heads(rows: Tensor) -> Tensor:
    """Rows of hidden states as attention takes them: samples, heads, positions, size of a head (32)."""
    return rows.view(8, -1, _COLUMNS // 32, 32).transpose(1, 2)


def _softmax(tensor: Tensor) -> Tensor:
    return torch.softmax(tensor, -1)


def _both(
    function: Callable[[Tensor], Tensor], values: Iterator[Tensor], gradients: Iterator[Tensor]
) -> Callable[[], object]:
    def run() -> object:
        leaf = next(values).detach().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, next(gradients))

    return run


def _launch(device: torch.device, budget: float) -> float:
    """Seconds an operator takes whatever its size: of a step of small layers, forward and backward."""
    layers = [nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)) for _ in range(8)]
    model = nn.Sequential(*layers).to(device)
    batch = torch.randn(2, 8, device=device)

    def step() -> None:
        model(batch).sum().backward()
        model.zero_grad(set_to_none=True)

    return timed([step], device, budget)[0] / work_of(step).launches


def _fresh(budget: float) -> float:
    """Bytes a second of pages that are written to for the first time, beyond what writing takes."""
    nbytes = 2 * _FRESH_FROM
    old = torch.zeros(nbytes, dtype=torch.uint8)

    def first_time() -> None:
        torch.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8).fill_(1)

    first, again = timed([first_time, lambda: old.fill_(1)], old.device, budget)
    return _rounded(nbytes / max(first - again, 1e-9))


def _link(device: torch.device, budget: float) -> dict[str, float]:
    """Copies between pinned host memory and the device, the slower direction; and the host's own memory."""
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    floats = host.view(torch.float32)
    moved = timed([lambda: there.copy_(host), lambda: host.copy_(there)], device, budget)
    own = timed([lambda: floats.add_(1.0)], torch.device("cpu"), budget)[0]
    return {
        "link_bytes_per_s": _rounded(host.nbytes / max(moved)),
        "host_bytes_per_s": _rounded(2 * host.nbytes / own),
    }


def _random(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float32, device=device).to(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _content(rate: Rate) -> dict[str, Any]:
    content: dict[str, Any] = {"rate": _rounded(rate.rate), "half": rate.half}
    return content | {name: value for name in ("loading_bytes_per_s",) if (value := getattr(rate, name)) is not None}


def _rounded(number: float) -> float:
    """Three figures: more are noise."""
    return float(f"{number:.3g}")
