"""What a traced training step does: how often each operator runs on tensors of each size, for how many operations and
bytes (`Work`). seconds.py turns it into time on a device.

Operations are counted by the formulas of torch's own flop counter (torch.utils.flop_counter), a multiplication and an
addition as two. Where torch has none, by those below: attention on a CPU, attention of packed rows, products of groups
of rows (experts), products with 4-bit weights. Bytes are those of the tensors that an operator is given and returns,
each read or written once: what a kernel that never reads a value twice moves. Views and metadata move nothing.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from meftbench.catalogue.operations import Operation, Operator, Work
from meftbench.methods.levers.transfers import allocating_as, moving

_ENGINE = torch.autograd.graph._engine_run_backward.__code__
_APPLY = torch.autograd.Function.__dict__["apply"].__func__.__code__

# Where an operator finds the two factors of its matrix product.
_FACTORS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "addbmm": 1, "_addmm_activation": 1, "_grouped_mm": 0}
_KINDS = {
    "softmax": ("_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data", "logsumexp"),
    "norm": (
        "native_layer_norm",
        "native_layer_norm_backward",
        "_fused_rms_norm",
        "_fused_rms_norm_backward",
        "native_group_norm",
    ),
    "activation": (
        *("gelu", "gelu_backward", "silu", "silu_backward", "silu_", "tanh", "tanh_", "sigmoid", "sigmoid_backward"),
        *("erf", "exp", "exp_", "log", "sin", "cos", "pow", "softplus", "softplus_backward"),
    ),
    "random": ("native_dropout", "bernoulli", "bernoulli_", "rand", "uniform_", "randint"),
    "normal": ("normal_", "randn"),
    "reduction": ("sum", "mean", "amax", "amin", "max", "min", "argmax", "linalg_vector_norm", "norm", "any", "all"),
    "gather": (
        *("embedding", "embedding_dense_backward", "index", "index_select", "gather", "index_put", "index_put_"),
        *("scatter", "scatter_", "scatter_add", "scatter_add_", "index_add", "index_add_", "nll_loss_forward"),
        "nll_loss_backward",
    ),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}
# Of these an operator reads no more of its first argument than it returns.
_READS_ROWS = {"embedding", "index", "index_select", "gather", "nll_loss_forward"}
# These write part of what they return or are given: as much as their source has.
_WRITES_ROWS = {"index_put_", "scatter_", "scatter_add_", "index_add_"}
# These overwrite their first argument without reading it.
_OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_", "exponential_"}
# New tensors whose content depends on no other tensor; those called "empty" are not even written.
_CREATES = {"zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "new_zeros", "new_ones", "new_full"}
_MOVES_NOTHING = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "_unsafe_view"),
    *("_reshape_alias", "detach", "alias", "lift_fresh", "sym_size", "_local_scalar_dense", "set_", "resize_"),
}
# Tensors that one kernel for lists of tensors takes at most, by the number of lists (ATen/native/cuda/
# MultiTensorApply.cuh, depth_to_max_tensors). A tensor of 320 pieces of 65,536 elements fills a kernel by itself.
_TENSORS_OF_KERNEL = (110, 64, 48, 36, 30)
_ELEMENTS_OF_KERNEL = 320 * 65_536


class _Seen(NamedTuple):
    """A call of an operator: `operators` (as found out when it was first called), where and when it ran."""

    operators: tuple[Operator, ...]
    phase: str
    recomputed: bool
    place: str


class WorkCounter:
    """Counts the operators of a step that a dispatch mode passes on.

    Kernels that are no operators of torch are noted by `kernel`, wherever it is called while the counter is `entered`.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[Any, str, bool, str], int] = {}
        self._operators: dict[Any, tuple[Operator, ...]] = {}
        self.phase = "forward"

    def begin_step(self) -> None:
        """Forget what was counted."""
        self._counts = {}

    def count(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, key: Any = None) -> None:
        """Count a call. key: the same for all calls with arguments of the same shapes, strides and dtypes, so that
        bytes and operations are worked out once; None: they are worked out anew."""
        operators = self._operators.get(key) if key is not None else None
        if operators is None:
            if _moves_nothing(func):
                return
            operators = _operators_of(func, args, kwargs, result)
            if key is not None:
                self._operators[key] = operators
        if operators:
            self._add(operators, 3)

    def add(self, operator: Operator) -> None:
        """Count a kernel that is no operator of torch."""
        self._add((operator,), 3)

    def _add(self, operators: tuple[Operator, ...], depth: int) -> None:
        phase = self.phase
        if phase == "optimizer" and operators[0].name in _CREATES:
            return  # the first step makes the optimizer's states, later ones find them
        place = "moved" if moving.get() else "host" if allocating_as.get() == "host" else "device"
        recomputed = phase == "backward" and (
            torch.is_grad_enabled() or (operators[0].flops > 0 and _in_forward_of_function(depth))
        )
        entry = (operators, phase, recomputed, place)
        self._counts[entry] = self._counts.get(entry, 0) + 1

    def snapshot(self) -> Mapping[Any, int]:
        """What was counted until now, for `repeat_since`."""
        return dict(self._counts)

    def repeat_since(self, before: Mapping[Any, int], times: int) -> None:
        """Count what was counted since the snapshot `before` so many times more."""
        for entry, count in self._counts.items():
            self._counts[entry] = count + times * (count - before.get(entry, 0))

    @property
    def work(self) -> Work:
        """What was counted since `begin_step`."""
        counts: Counter[Operation] = Counter()
        for (operators, phase, recomputed, place), times in self._counts.items():
            for operator in operators:
                counts[Operation(operator, phase, recomputed, place)] += times
        return Work(dict(counts))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within it, `kernel` counts here."""
        token = _counting.set(self)
        try:
            yield
        finally:
            _counting.reset(token)


_counting: ContextVar[WorkCounter | None] = ContextVar("counting", default=None)


def kernel(name: str, read: list[Tensor | None], written: list[Tensor | None], flops: int = 0) -> None:
    """Count a kernel that a trace stands in for without an operator of torch.

    read, written: the tensors that it reads and writes, each once.  flops: operations of matrix products in it.
    """
    counter = _counting.get()
    if counter is None:
        return
    tensors = [tensor for tensor in (*read, *written) if tensor is not None]
    kind = "fused product" if flops else "elementwise"
    counter.add(Operator(name, kind, _name_of(tensors[0].dtype), (), flops, _bytes(read), _bytes(written), 1.0))


def _in_forward_of_function(depth: int) -> bool:
    """Whether the operator is called from the forward of an autograd function: in a backward pass one that runs again.
    There gradients are not recorded, as in what computes gradients."""
    frame = sys._getframe(depth)
    while frame is not None and frame.f_code is not _ENGINE:
        if frame.f_code is _APPLY:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


# --- operators ---


@cache
def _moves_nothing(func: Any) -> bool:
    """Whether the operator returns a view or metadata, and writes to nothing."""
    if _base(func) in _MOVES_NOTHING:
        return True
    schema = func._schema
    views = any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)
    return views and not any(value.alias_info is not None and value.alias_info.is_write for value in schema.arguments)


def _base(func: Any) -> str:
    """The operator's name without the overload: `add` for `add.Tensor`."""
    return str(func.__name__).partition(".")[0]


def _operators_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> tuple[Operator, ...]:
    name = _base(func)
    values = _by_argument(func, args, kwargs)
    if name.startswith(("_foreach_", "_fused_")) and isinstance(args[0], list | tuple):
        return _of_lists(name, values, result)
    written = [tensor for value, is_write in values if is_write for tensor in _tensors(value)]
    given = [tensor for value, is_write in values if not is_write for tensor in _tensors(value)]
    if name not in _OVERWRITES:
        given += written if not _is_out(func, kwargs) else []
    storages = {tensor.untyped_storage()._cdata for tensor in (*given, *written)}
    returned = [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in storages]
    if not (written or returned):
        return ()
    read_bytes, written_bytes = _bytes(given), _bytes([*written, *returned])
    if name in _CREATES:
        read_bytes = 0
    elif name in _READS_ROWS:
        read_bytes = written_bytes + _bytes([*given[1:]])
    elif name in _WRITES_ROWS:
        source = given[-2] if len(given) > 1 and given[-1] is written[0] else given[0]
        read_bytes, written_bytes = 2 * source.nbytes, source.nbytes
    if name == "_safe_softmax":
        return _of_safe_softmax(args[0], result)
    flops = _flops(func, name, args, kwargs, result)
    kind, size = _kind_and_size(name, args, kwargs, returned, flops)
    dtype = _name_of(next((t.dtype for t in (*given, *returned, *written) if t.is_floating_point()), torch.int64))
    return (Operator(name, kind, dtype, size, flops, read_bytes, written_bytes, 1.0),)


def _of_safe_softmax(scores: Tensor, result: Tensor) -> tuple[Operator, ...]:
    """One operator of torch, but four kernels: a softmax; whether scores are -inf; whether all of a row are; zeros
    there (aten/src/ATen/native/transformers/attention.cpp, _safe_softmax)."""
    whole, marks, dtype = result.nbytes, scores.numel(), _name_of(result.dtype)
    return (
        Operator("_softmax", "softmax", dtype, (), 0, scores.nbytes, whole, 1.0),
        Operator("eq", "elementwise", dtype, (), 0, scores.nbytes, marks, 1.0),
        Operator("all", "reduction", "bool", (), 0, marks, marks // max(1, scores.shape[-1]), 1.0),
        Operator("where", "elementwise", dtype, (), 0, whole, whole, 1.0),
    )


def _of_lists(name: str, values: list[tuple[Any, bool]], result: Any) -> tuple[Operator, ...]:
    """An operator on lists of tensors, as one on each tensor with its share of a kernel: so the work of a model grows
    with its depth by whole operators."""
    lists = [(value, write) for value, write in values if isinstance(value, list | tuple) and _tensors(value)]
    returned = result if isinstance(result, list | tuple) else []
    most = _TENSORS_OF_KERNEL[min(len(lists) + bool(returned), len(_TENSORS_OF_KERNEL)) - 1]
    list_kind = "elementwise" if returned else "in place"
    operators = []
    for number, first in enumerate(lists[0][0]):
        tensors = [(value[number], write) for value, write in lists if number < len(value)]
        written = _bytes([tensor for tensor, write in tensors if write] + list(returned[number : number + 1]))
        read = _bytes([tensor for tensor, write in tensors if not write or name not in ("_foreach_copy_",)])
        launches = max(1 / most, first.numel() / _ELEMENTS_OF_KERNEL)
        operators.append(Operator(name, list_kind, _name_of(first.dtype), (), 0, read, written, launches))
    return tuple(operators)


def _by_argument(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Any, bool]]:
    """The values of an operator's arguments, each with whether it is written to."""
    found = []
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        found.append((value, argument.alias_info is not None and argument.alias_info.is_write))
    return found


def _is_out(func: Any, kwargs: Mapping[str, Any]) -> bool:
    return any(argument.is_out for argument in func._schema.arguments) and bool(kwargs)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for tensor in value if isinstance(tensor, Tensor)] if isinstance(value, list | tuple) else []


def _bytes(tensors: Any) -> int:
    """Bytes of the tensors' elements; of one that repeats elements (an expanded one), of its storage."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
            total += min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())
    return int(total)


@cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- operations ---


def _flops(func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    own = _FORMULAS.get(name)
    if own is not None:
        return own(args, kwargs, result)
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def _of_cpu_attention(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))


def _of_cpu_attention_backward(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))


def _of_packed_attention(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    """Every text counts as long as the longest, since a trace has no values."""
    query, longest = args[0], args[6]
    return int(4 * query.numel() * longest)


def _of_packed_attention_backward(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    query, longest = args[1], args[9]
    return int(10 * query.numel() * longest)


def _of_groups(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    """Each row is multiplied once, with the matrix of its group; of two matrices, rows are what is summed over."""
    first, second = args[:2]
    return int(2 * first.numel() * second.shape[-1])


def _of_four_bit(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    return int(2 * args[0].numel() * result.shape[-1])


_FORMULAS: dict[str, Callable[[tuple[Any, ...], Mapping[str, Any], Any], int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _of_cpu_attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _of_cpu_attention_backward,
    "_varlen_attn": _of_packed_attention,
    "_varlen_attn_backward": _of_packed_attention_backward,
    "_grouped_mm": _of_groups,
    "gemm_4bit": _of_four_bit,
}


def _kind_and_size(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], returned: list[Tensor], flops: int
) -> tuple[str, tuple[int, ...]]:
    """The kind of an operator (see `Operator`), and of a product or of attention its dimensions."""
    if "dot_product" in name or "varlen_attn" in name:
        first = args[1 if "backward" in name else 0]
        shape = tuple(first.shape) if first.dim() == 4 else (1, *first.shape)
        key = args[2 if "backward" in name else 1]
        keys = key.shape[-2] if first.dim() == 4 else args[9 if "backward" in name else 6]
        causal = any(value is True for value in args) or kwargs.get("is_causal") is True
        kind = "attention backward" if "backward" in name else "attention"
        return kind, (int(shape[0]), int(shape[1]), int(shape[2]), int(keys), int(shape[-1]), int(causal))
    if name in _FACTORS:
        first, second = args[_FACTORS[name] : _FACTORS[name] + 2]
        batch = second.shape[0] if second.dim() == 3 else 1
        rows = first.shape[-2] if first.dim() == 3 or batch == 1 else -(-first.shape[0] // batch)
        return "matrix", (int(batch), int(rows), int(first.shape[-1]), int(second.shape[-1]))
    if flops and name == "gemm_4bit":
        return "matrix", (1, args[0].numel() // args[0].shape[-1], int(args[0].shape[-1]), int(returned[0].shape[-1]))
    if flops:  # a convolution: as the product of its patches with its filters
        output = args[0] if "backward" in name else returned[0]
        filters = args[2 if "backward" in name else 1]
        columns, filter_size = int(output.shape[1]), filters.numel() // filters.shape[0]
        return "matrix", (1, output.numel() // columns, int(filter_size), columns)
    if name in ("clone", "copy_", "_to_copy", "cat") and not all(t.is_contiguous() for t in _sources(name, args)):
        return "permuted", ()
    return _KIND_OF.get(name, "elementwise" if returned else "in place"), ()


def _sources(name: str, args: tuple[Any, ...]) -> list[Tensor]:
    return _tensors(args[1] if name == "copy_" else args[0])
