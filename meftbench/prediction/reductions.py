"""Buffers of torch's CUDA reductions: sums over many rows are divided among thread blocks that meet in global memory.

Gradients of biases and of the weights of norms are such sums. Source: aten/src/ATen/native/cuda/Reduce.cuh of torch
2.13 (`setReduceConfig`, `ReduceConfig::global_memory_size`), and TensorIterator.cpp for the order of dimensions. The
names of the source's variables are in the comments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

THREADS = 512  # MAX_NUM_THREADS of a block
WARP = 32
_FEWEST_VALUES, _MOST_VALUES = 16, 256  # min_values_per_thread, max_values_per_thread
_INDEX_LIMIT = 2**31 - 1  # offsets are 32-bit integers: larger reductions run in parts


class Axis(NamedTuple):
    """A dimension of the input: its size, its stride in bytes, and whether it is summed over."""

    size: int
    stride: int
    reduced: bool


class Multiprocessors(NamedTuple):
    """Those of a device: how many, and the most threads that one can hold."""

    number: int
    threads: int


def threads_of(capability: tuple[int, ...]) -> int:
    """The most threads that one multiprocessor holds, by compute capability (CUDA C++ Programming Guide, technical
    specifications per compute capability)."""
    major, minor = capability
    if (major, minor) == (7, 5):
        return 1024
    return 1536 if (major == 8 and minor > 0) or major >= 12 else 2048


def reduction_buffers(
    axes: list[Axis], item: int, accumulated: int, multiprocessors: Multiprocessors, offset: int = 0
) -> list[int]:
    """Bytes of the buffers of a reduction, in pairs: partial results and semaphores of each part that runs by itself.

    axes: of the input.  item, accumulated: bytes of an element, and of what a thread keeps for an output.  offset: of
    the input's first element in its storage.
    """
    axes = _merged(axes)
    if any(axis.size == 0 for axis in axes):
        return []
    if max(_extent(axes), math.prod(axis.size for axis in axes)) > _INDEX_LIMIT:
        widest = max(range(len(axes)), key=lambda number: (axes[number].size - 1) * max(1, axes[number].stride))
        half = axes[widest].size // 2
        parts = (half, axes[widest].size - half)
        return [
            nbytes
            for size in parts
            for nbytes in reduction_buffers(
                [*axes[:widest], axes[widest]._replace(size=size), *axes[widest + 1 :]],
                item,
                accumulated,
                multiprocessors,
                offset,
            )
        ]
    blocks = _launch(axes, item, multiprocessors, offset)
    if blocks.along_input == 1:
        return []
    outputs = _product(axes, reduced=False)
    return [accumulated * outputs * blocks.along_input * blocks.values_of_block, 4 * blocks.along_output]


@dataclass
class _Blocks:
    """along_input, along_output: the grid's sizes.  values_of_block: partial results of a block for each output."""

    along_input: int
    along_output: int
    values_of_block: int


def _launch(axes: list[Axis], item: int, multiprocessors: Multiprocessors, offset: int) -> _Blocks:
    """setReduceConfig."""
    summed = [axis for axis in axes if axis.reduced]
    kept = [axis for axis in axes if not axis.reduced]
    inputs, outputs = _product(axes, reduced=True), _product(axes, reduced=False)
    # reduction_on_fastest_striding_dimension
    along_fastest = not kept or (bool(summed) and summed[0].stride < kept[0].stride)
    fastest = (summed or kept)[0].stride if along_fastest and axes else (kept[0].stride if kept else item)
    width_limit, height_limit = (inputs, outputs) if along_fastest else (outputs, inputs)  # dim0, dim1
    vector = 1  # output_vec_size
    if fastest == item:
        if along_fastest and width_limit >= 128 and len(summed) == 1:
            width_limit //= 4  # a thread loads four inputs at a time
        elif not along_fastest:
            vector = _output_vector(axes, item, offset)
            width_limit //= vector
    width, height = _block(width_limit, height_limit, THREADS // vector)
    input_step, output_step = (width, 1) if along_fastest else (1, width)
    # Warps of a block share the inputs of an output only where that leaves enough to each thread.
    shared_by_warps = -(-inputs // input_step) >= min(height * 16, _MOST_VALUES)
    if shared_by_warps:
        input_step *= height
    else:
        output_step *= height
    grid = -(-(outputs // vector) // output_step)
    values = -(-inputs // input_step)
    target = multiprocessors.number * (multiprocessors.threads // (width * height))
    along_input = 1  # ctas_per_output
    if shared_by_warps and values >= _MOST_VALUES and grid <= target:
        most = min(-(-target // grid), -(-values // _FEWEST_VALUES))
        along_input = max(most, -(-values // _MOST_VALUES))
    return _Blocks(along_input, grid, 1 if along_fastest else width * vector)


def _block(width_limit: int, height_limit: int, threads: int) -> tuple[int, int]:
    """set_block_dimension: width and height of a block, powers of two."""
    width_limit, height_limit = (
        threads if limit >= threads else 1 << max(0, limit.bit_length() - 1) for limit in (width_limit, height_limit)
    )
    height = min(height_limit, threads // min(width_limit, WARP))
    return min(width_limit, threads // height), height


def _output_vector(axes: list[Axis], item: int, offset: int) -> int:
    """get_output_vec_size: how many outputs a thread takes, 4, 2 or 1, by what divides sizes and strides."""
    first_kept = next(number for number, axis in enumerate(axes) if not axis.reduced)
    numbers = [offset, axes[first_kept].size]
    numbers += [axis.stride // item for number, axis in enumerate(axes) if number != first_kept]
    vector = 4
    while any(number % vector for number in numbers):
        vector //= 2
    return vector


def _merged(axes: list[Axis]) -> list[Axis]:
    """TensorIterator's order of dimensions, the fastest first, in which neighbours that are one range in the input and
    in the output become one (TensorIterator.cpp, reorder_dimensions and coalesce_dimensions)."""
    axes = [axis for axis in axes if axis.size != 1]
    outputs, contiguous = [], 1  # strides of the output, which is new: 0 where it is summed over
    for axis in axes[::-1]:
        outputs.append(0 if axis.reduced else contiguous)
        contiguous *= 1 if axis.reduced else axis.size
    ordered = list(zip(axes[::-1], outputs, strict=True))
    for number in range(1, len(ordered)):
        place = number
        for earlier in range(number - 1, -1, -1):
            comparison = _compared(ordered[earlier], ordered[place])
            if comparison > 0:
                ordered[earlier], ordered[place] = ordered[place], ordered[earlier]
                place = earlier
            elif comparison < 0:
                break
    merged: list[tuple[Axis, int]] = []
    for axis, output in ordered:
        if merged:
            (last, last_output) = merged[-1]
            same = last.size * last.stride == axis.stride and last.size * last_output == output
            if same and last.reduced == axis.reduced:
                merged[-1] = (last._replace(size=last.size * axis.size), last_output)
                continue
        merged.append((axis, output))
    return [axis for axis, _ in merged]


def _compared(first: tuple[Axis, int], second: tuple[Axis, int]) -> int:
    """Positive where `second` is to stand before `first`, negative where not, 0 where their strides do not tell. Each
    is a dimension of the input and its stride in the output: what is summed over (0 in the output) stands first."""
    (axis, output), (other, other_output) = first, second
    if (output == 0) != (other_output == 0):
        return 1 if other_output == 0 else -1
    for stride, other_stride in ((output, other_output), (axis.stride, other.stride)):
        if stride == 0 or other_stride == 0:
            continue
        if stride != other_stride:
            return 1 if stride > other_stride else -1
        if axis.size > other.size:
            return 1
    return 0


def _extent(axes: list[Axis]) -> int:
    """Bytes from the input's first element to the end of its last one, at most."""
    return 1 + sum((axis.size - 1) * axis.stride for axis in axes)


def _product(axes: list[Axis], *, reduced: bool) -> int:
    product = 1
    for axis in axes:
        product *= axis.size if axis.reduced == reduced else 1
    return product
