"""Scratch memory: what CUDA kernels allocate for themselves while they run, beside what their operators return.

Every rule names the source that it was read from (torch 2.6 to 2.13). A rule gives the pieces that a kernel allocates,
in order. Shape suffixes: B samples, H heads, Q and K positions of queries and keys, T tokens of all samples, E size of
a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meftbench.prediction.reductions import Axis, Multiprocessors, reduction_buffers

HALF = (torch.float16, torch.bfloat16)
_SORTED_BY_A_BLOCK = 2304  # pairs of 64-bit numbers: 256 threads with 9 each (CUB, the single tile of DeviceRadixSort)
_UNSORTED = 3072  # rows of an embedding's gradient up to which torch adds them without sorting


class Piece(NamedTuple):
    """nbytes: of one allocation.  until: number of the later piece before whose allocation it is given back; None: it
    lives until the kernel ends."""

    nbytes: int
    until: int | None = None


@dataclass(frozen=True)
class Gpu:
    """What the rules need to know of a device. capability: such as (8, 0)."""

    capability: tuple[int, ...]
    multiprocessors: Multiprocessors


Rule = Callable[[tuple[Any, ...], Gpu], list[Piece]]


def scratch_rule(name: str) -> Rule | None:
    """The rule of the operator `name`, such as `sum.dim_IntList`; None: it needs no scratch memory that is known."""
    return _RULES.get(name.partition(".")[0]) or _RULES.get(name)


# --- attention ---


def _flash_backward(args: tuple[Any, ...], _gpu: Gpu) -> list[Piece]:
    """flash_attn/flash_api.cpp, mha_bwd: dq in float32 and the row sums of dout · out, both with the number of
    queries rounded up to 128; where heads of queries share keys, also dk and dv for every head of queries."""
    query, key = args[1], args[2]
    batch, heads, length, size = query.shape
    rows = -(-length // 128) * 128
    pieces = [Piece(batch * rows * heads * _flash_width(size) * 4), Piece(batch * heads * rows * 4)]
    if heads != key.shape[1]:
        pieces += [Piece(batch * key.shape[2] * heads * size * query.dtype.itemsize)] * 2
    return pieces


def _varlen_forward(_args: tuple[Any, ...], _gpu: Gpu) -> list[Piece]:
    """flash_attn/flash_api.cpp, mha_varlen_fwd: what a random state would be kept in; there is no dropout. The output
    and the log-sum-exp, one float32 for each query and head, are results of the operator."""
    return [Piece(16), Piece(8)]


def _varlen_backward(args: tuple[Any, ...], _gpu: Gpu) -> list[Piece]:
    """flash_attn/flash_api.cpp, mha_varlen_bwd: as `_flash_backward`, over the tokens of all samples and 128 rows more
    for each sample."""
    query_THE, key_THE, starts = args[1], args[2], args[6]
    tokens, heads, size = query_THE.shape
    rows = tokens + 128 * (starts.numel() - 1)
    pieces = [Piece(rows * heads * 4), Piece(rows * heads * _flash_width(size) * 4)]
    if heads != key_THE.shape[1]:
        pieces += [Piece(key_THE.shape[0] * heads * size * query_THE.dtype.itemsize)] * 2
    return pieces


def _flash_width(size: int) -> int:
    """The size of a head, rounded up as flash attention's backward pass holds dq."""
    return -(-size // 32) * 32 if size <= 128 else -(-size // 64) * 64


def _cudnn_backward(args: tuple[Any, ...], _gpu: Gpu) -> list[Piece]:
    """cudnn/MHA.cpp, run_cudnn_SDP_bprop: the workspace that cuDNN requests is not documented. It is assumed to be that
    of flash without dk and dv: dq in float32, and one float32 for each query and head. It has not been measured."""
    query = args[1]
    batch, heads, length, size = query.shape
    return [Piece(batch * heads * length * size * 4), Piece(batch * heads * length * 4)]


def _efficient_backward(args: tuple[Any, ...], gpu: Gpu) -> list[Piece]:
    """attention_backward.cu, _efficient_attention_backward, and mem_eff_attention/kernel_backward.h.

    delta, the row sums of dout · out in float32: in half precision the kernel computes it; in float32 ATen does, as a
    product of the size of the output, its sums, and a contiguous copy of those. Then the workspace, in which gradients
    are summed over blocks of keys. (Seen in float32 on a real GPU, with heads of 64; not in half precision.)
    """
    output_gradient, query, key = args[0], args[1], args[2]
    batch, heads, queries, _size = query.shape
    delta = batch * heads * queries * 4
    workspace = Piece(batch * heads * _efficient_workspace(query, key, gpu))
    if query.dtype in HALF:
        return [Piece(delta), workspace]
    return [Piece(output_gradient.numel() * 4, until=3), Piece(delta, until=3), Piece(delta), workspace]


def _efficient_workspace(query: Tensor, key: Tensor, gpu: Gpu) -> int:
    """Bytes for each sample and head: tiles of dq with a lock of 16 bytes each; in half precision, where a head is
    wider than a tile, dk and dv of each part of the keys, too (`Params::workspace_strideBH`)."""
    batch, heads, queries, size = query.shape
    rows, columns = _efficient_tile(query.dtype, size, gpu.capability)
    bytes_of_head = -(-queries // rows) * -(-size // columns) * (rows * columns * 4 + 16)
    if query.dtype in HALF and size > rows:
        parts = max(1, min(-(-key.shape[2] // columns), 200 // (batch * heads)))
        bytes_of_head += 2 * parts * columns * -(-size // rows) * rows * 4
    return -(-bytes_of_head // 16) * 16


def _efficient_tile(dtype: torch.dtype, size: int, capability: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tile (`kBlockSizeI`, `kBlockSizeJ`): the first kernel of kernels/cutlassB.h for this head
    size that fits into the device's shared memory."""
    if dtype not in HALF or size <= 64 or size > 128:
        return 64, 64
    if size <= 96:
        return 128, 64
    return (128, 128) if capability in ((8, 0), (9, 0), (10, 0)) else (64, 64)


# --- embeddings ---


def _embedding_backward(args: tuple[Any, ...], _gpu: Gpu) -> list[Piece]:
    """Embedding.cu, embedding_dense_backward_cuda, and EmbeddingBackwardKernel.cu.

    Few indices are added as they come. Otherwise they are sorted (sorted indices, and where each was), and equal ones
    form segments, of which parts of ten rows are summed in float32 before they are added. How many there will be is not
    known on the host, so that memory is for as many as there can be.
    """
    gradient, indices, rows = args[0], args[1], args[2]
    count = indices.numel()
    if count <= _UNSORTED:
        return []
    segments = min(count, rows)
    parts = count // 10 + segments
    width = 8 if gradient.dtype == torch.float64 else 4
    pieces = [8 * count, 8 * count, 8 * count, 8, 8 * segments, 8 * segments, 8, 8 * parts]
    return [Piece(nbytes) for nbytes in [*pieces, parts * gradient.shape[-1] * width]]


# --- indices ---


def _sorted_indices(args: tuple[Any, ...], _gpu: Gpu) -> list[Piece]:
    """Indexing.cu, index_put_with_sort_kernel, which adds values to the elements that indices name: the gradient of
    weight[ids], among others.

    Every index tensor is brought into its range and multiplied by a stride, and all are summed in the first of these
    products. The sums are sorted: sorted indices, where each was, and the numbers from 0. CUB sorts as many as one
    thread block holds with 1 byte of its own; for more it takes both arrays once more, and histograms, which are not
    counted. (Seen on real GPUs with 2,000 and 2,048 indices, not with more.) 32-bit indices and masks are converted
    first, which is not counted.
    """
    given = [index for index in args[1] if index is not None]
    if len(args) < 4 or not args[3] or any(index.dtype != torch.int64 for index in given):
        return []  # without args[3], accumulate, nothing is sorted
    count = math.prod(torch.broadcast_shapes(*(index.shape for index in given)))
    if count * args[0].numel() == 0:
        return []
    pieces: list[Piece] = []
    for number in range(len(given)):
        following = 2 * number + 2
        pieces += [Piece(8 * count, until=following), Piece(8 * count, until=following if number else None)]
    own = 1 if count <= _SORTED_BY_A_BLOCK else 16 * count
    return [*pieces, Piece(8 * count), Piece(8 * count), Piece(8 * count), Piece(own)]


# --- reductions ---

# Bytes that a reduction keeps for each output and thread, where that is not one number: Welford's mean, sum of squares
# and two counts; a value and its index.
_PAIRS = {"var": 16, "std": 16, "var_mean": 16, "std_mean": 16, "max": 16, "min": 16, "argmax": 16, "argmin": 16}
# The position of the argument that says which dimensions are reduced; None: all are.
_DIMENSIONS = {
    "sum.dim_IntList": 1, "mean.dim": 1, "amax": 1, "amin": 1, "prod.dim_int": 1, "linalg_vector_norm": 2,
    "var.correction": 1, "std.correction": 1, "var_mean.correction": 1, "std_mean.correction": 1, "max.dim": 1,
    "min.dim": 1, "argmax": 1, "argmin": 1, "any.dim": 1, "all.dim": 1, "norm.ScalarOpt_dim": 2, "sum.default": None,
    "mean.default": None, "prod.default": None, "max.default": None, "min.default": None,
}  # fmt: skip


def _reduction(name: str) -> Rule:
    """The rule of a reduction over the dimensions that its arguments name (reductions.py)."""
    place, kept = _DIMENSIONS[name], _PAIRS.get(name.partition(".")[0])

    def rule(args: tuple[Any, ...], gpu: Gpu) -> list[Piece]:
        tensor = args[0]
        given = None if place is None or place >= len(args) else args[place]
        dimensions = [given] if isinstance(given, int) else given
        reduced = {dimension % max(1, tensor.dim()) for dimension in dimensions or range(tensor.dim())}
        item = tensor.dtype.itemsize
        accumulated = kept or (8 if item == 8 or not tensor.dtype.is_floating_point else 4)
        if name.startswith(("any", "all")):
            accumulated = item  # ReduceLogicKernel.cu
        elif kept and item == 8:
            accumulated = 2 * kept
        axes = [
            Axis(size, stride * item, number in reduced)
            for number, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
        ]
        buffers = reduction_buffers(axes, item, accumulated, gpu.multiprocessors, tensor.storage_offset())
        # A reduction of more than 2 GiB runs in parts, each of which gives its buffers back.
        return [Piece(nbytes, until=2 * (number // 2) + 2) for number, nbytes in enumerate(buffers)]

    return rule


_RULES: dict[str, Rule] = {
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
    "_varlen_attn": _varlen_forward,
    "_varlen_attn_backward": _varlen_backward,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "embedding_dense_backward": _embedding_backward,
    "index_put": _sorted_indices,
    "index_put_": _sorted_indices,
} | {name: _reduction(name) for name in _DIMENSIONS}
