"""Scratch memory of CUDA kernels: sizes by hand, and those that were seen on real GPUs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meftbench.prediction.reductions import Axis, Multiprocessors, reduction_buffers, threads_of
from meftbench.prediction.scratch import Gpu, scratch_rule

A100 = Gpu((8, 0), Multiprocessors(108, 2048))
RTX3090 = Gpu((8, 6), Multiprocessors(82, 1536))


def pieces(name, *args, gpu=A100):
    return scratch_rule(name)(args, gpu)


def a_tensor(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


# Seen in memory snapshots of real GPUs (tests/groundtruth/data): rows, columns, the buffer of partial sums.
SEEN = [
    (1000, 512, None),
    (1500, 512, 6_291_456),
    (2000, 512, 8_388_608),
    (512, 1024, None),
    (1024, 1024, 8_388_608),
    (2048, 1024, 16_777_216),
    (4096, 1024, 33_554_432),
    (512, 2560, None),
    (2048, 2560, 41_943_040),
]


@pytest.mark.parametrize(("rows", "columns", "expected"), SEEN)
def test_the_gradient_of_a_bias_is_summed_in_parts(rows, columns, expected):
    """The buffer as seen, and a semaphore for each 128 columns."""
    found = [piece.nbytes for piece in pieces("sum.dim_IntList", a_tensor(rows, columns), [0], True)]

    assert ([expected, 4 * -(-columns // 128)] if expected else []) == found


def test_leading_dimensions_are_one():
    """(4, 512, 1024) over its first two dimensions is (2048, 1024) over its first."""
    assert pieces("sum.dim_IntList", a_tensor(2048, 1024), [0]) == pieces(
        "sum.dim_IntList", a_tensor(4, 512, 1024), [0, 1]
    )


def test_sums_along_rows_and_of_everything():
    """A row of 4096 is one block's; 2^24 values meet in a buffer of 4 bytes for each of ceil(2^24/512/4/…) blocks."""
    assert [] == pieces("sum.dim_IntList", a_tensor(2048, 4096), [-1])
    # 512 threads, 32,768 values each: 108·4 blocks would fill the device, 2,048 give 16 values, 128 give 256.
    assert [4 * 432, 4] == [piece.nbytes for piece in pieces("sum.default", a_tensor(2**24))]
    assert [4 * 432, 4] == [piece.nbytes for piece in pieces("mean.default", a_tensor(2**20, 16))]


def test_columns_that_four_does_not_divide_are_taken_one_by_one():
    """1022 columns: two at a time, so 256 threads a block: 32 wide, 8 high; 2048 rows are 256 values a thread."""
    grid = -(-511 // 32)  # 16
    blocks = max(min(-(-108 * 8 // grid), 256 // 16), 1)
    assert [4 * 1022 * blocks * 32 * 2, 4 * grid] == [
        piece.nbytes for piece in pieces("sum.dim_IntList", a_tensor(2048, 1022), [0])
    ]


def test_what_has_no_elements_or_no_sums_has_no_buffers():
    assert [] == pieces("sum.default", a_tensor(0, 5))
    assert [] == pieces("sum.default", a_tensor())
    assert [] == pieces("sum.dim_IntList", a_tensor(1, 4096), [0])
    assert scratch_rule("mm.default") is None


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=4),
    st.integers(0, 15),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([A100, RTX3090]),
)
def test_a_reductions_buffers_hold_every_partial_result_once(sizes, chosen, item, gpu):
    """Of any shape: pairs of a buffer that is a multiple of the outputs, and no more semaphores than outputs."""
    strides = [1]
    for size in sizes[:0:-1]:
        strides.insert(0, strides[0] * size)
    axes = [
        Axis(size, stride * item, bool(chosen >> n & 1))
        for n, (size, stride) in enumerate(zip(sizes, strides, strict=True))
    ]
    outputs = 1
    for axis in axes:
        outputs *= 1 if axis.reduced else axis.size
    extent = item * strides[0] * sizes[0]

    found = reduction_buffers(axes, item, 4, gpu.multiprocessors)

    assert 0 == len(found) % 2
    if extent < 2**31:
        assert len(found) in (0, 2)
        assert all(0 == nbytes % (4 * outputs) for nbytes in found[:1])
        assert all(nbytes <= 4 * outputs for nbytes in found[1:])


# bf16, shape and strides in elements, summed over: where torch's order of dimensions is that of the output and not that
# of the input, and where an input is read repeatedly (TensorIterator.cpp, reorder_dimensions).
@pytest.mark.parametrize(
    ("shape", "strides", "summed", "item", "expected"),
    [
        ((6, 128, 4096, 128), (128, 1, 768, 3145728), [2], 2, []),
        ((100, 128, 8, 4096), (1, 3276800, 100, 800), [3], 2, []),
        ((2048, 4096, 128), (0, 128, 1), [0, 1], 2, [536870912, 4]),
        ((512, 100, 64, 512), (0, 32768, 512, 1), [0, 2], 4, [838860800, 1600]),
    ],
)
def test_the_order_of_dimensions_is_torchs(shape, strides, summed, item, expected):
    axes = [
        Axis(size, stride * item, number in summed)
        for number, (size, stride) in enumerate(zip(shape, strides, strict=True))
    ]
    assert expected == reduction_buffers(axes, item, 4, A100.multiprocessors)


def test_a_reduction_beyond_two_gib_runs_in_halves():
    """2^30 values of 4 bytes: twice 2^29, the first of which has given its buffers back before the second begins."""
    whole, half = pieces("sum.default", a_tensor(2**30)), pieces("sum.default", a_tensor(2**29))

    assert 2 * [half[0].nbytes] == [piece.nbytes for piece in whole[::2]]
    assert [2, 2] == [piece.until for piece in whole[:2]]


def test_threads_of_a_multiprocessor():
    """By compute capability, as in NVIDIA's table."""
    found = {major_minor: threads_of(major_minor) for major_minor in [(7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (12, 0)]}
    assert {(7, 0): 2048, (7, 5): 1024, (8, 0): 2048, (8, 9): 1536, (9, 0): 2048, (12, 0): 1536} == found


@pytest.mark.parametrize(("key_heads", "shared"), [(8, []), (2, [300 * 8 * 96 * 2] * 2)])
def test_what_flash_backward_works_in_over_packed_rows(key_heads, shared):
    """dq and the row sums of 128 rows more for each of 3 samples; dk and dv for every head where heads share keys."""
    query, key = (a_tensor(300, heads, 96, dtype=torch.bfloat16) for heads in (8, key_heads))
    starts = torch.empty(4, dtype=torch.int32, device="meta")

    found = pieces("_varlen_attn_backward.default", None, query, key, key, query, None, starts, starts)

    assert [684 * 8 * 4, 684 * 8 * 96 * 4, *shared] == [piece.nbytes for piece in found]


def test_what_flash_backward_works_in():
    """dq in float32 for queries rounded up to 128, row sums; with shared keys, dk and dv for each head of queries."""
    q, k = a_tensor(2, 8, 130, 64, dtype=torch.bfloat16), a_tensor(2, 2, 130, 64, dtype=torch.bfloat16)

    found = pieces("_scaled_dot_product_flash_attention_backward.default", None, q, k)

    expected = [2 * 256 * 8 * 64 * 4, 2 * 8 * 256 * 4, 2 * 130 * 8 * 64 * 2, 2 * 130 * 8 * 64 * 2]
    assert expected == [piece.nbytes for piece in found]


def test_what_cudnn_backward_is_assumed_to_work_in():
    q = a_tensor(2, 4, 128, 64, dtype=torch.bfloat16)
    found = pieces("_scaled_dot_product_cudnn_attention_backward.default", None, q, q)
    assert [2 * 4 * 128 * 64 * 4, 2 * 4 * 128 * 4] == [piece.nbytes for piece in found]


def test_what_efficient_backward_works_in_as_seen():
    """A snapshot of TinyLlama in float32, 1 x 32 x 1000 x 64: the product, sums twice, then 8,396,800 bytes."""
    q = a_tensor(1, 32, 1000, 64)

    found = pieces("_scaled_dot_product_efficient_attention_backward.default", q, q, q)

    assert [(8_192_000, 3), (128_000, 3), (128_000, None), (8_396_800, None)] == found


def test_what_efficient_backward_works_in_in_half_precision():
    """The kernel computes its sums itself; heads of 128 have tiles of 128 on an A100 and of 64 on an RTX 3090."""
    name = "_scaled_dot_product_efficient_attention_backward.default"
    q = a_tensor(2, 4, 200, 128, dtype=torch.float16)

    on_a100, on_3090 = ([piece.nbytes for piece in pieces(name, q, q, q, gpu=gpu)] for gpu in (A100, RTX3090))

    assert [2 * 4 * 200 * 4, 2 * 4 * 2 * (128 * 128 * 4 + 16)] == on_a100
    # Of 64 rows and columns: 4 · 2 tiles of dq; and for each of 4 parts of the keys dk and dv, 64 x 128.
    assert [2 * 4 * 200 * 4, 2 * 4 * (4 * 2 * (64 * 64 * 4 + 16) + 2 * 4 * 64 * 128 * 4)] == on_3090


def test_an_embeddings_gradient_is_sorted_from_3073_indices_on():
    """4096 indices into 1000 rows: at most 1000 segments, and 409 + 1000 parts of ten rows, 64 wide in float32."""
    few = pieces("embedding_dense_backward.default", a_tensor(3072, 64), a_tensor(3072, dtype=torch.int64), 1000)
    many = pieces(
        "embedding_dense_backward.default",
        a_tensor(4096, 64, dtype=torch.bfloat16),
        a_tensor(4096, dtype=torch.int64),
        1000,
    )

    assert [] == few
    parts = 409 + 1000
    expected = [4096 * 8, 4096 * 8, 4096 * 8, 8, 8000, 8000, 8, 8 * parts, parts * 64 * 4]
    assert expected == [piece.nbytes for piece in many]


def indices(*shape):
    return a_tensor(*shape, dtype=torch.int64)


def test_indices_are_sorted_before_values_are_added():
    """(4, 512) indices into 10,000 rows, as seen on a real GPU (tests/groundtruth/data, 03): in their range, times the
    stride, of which the first is given back; sorted, where they were, the numbers from 0; CUB's own byte."""
    found = pieces("index_put.default", a_tensor(10_000, 64), [indices(4, 512)], a_tensor(4, 512, 64), True)

    assert [16_384] * 5 + [1] == [piece.nbytes for piece in found]
    assert [2, None, None, None, None, None] == [piece.until for piece in found]


def test_indices_of_several_dimensions_become_one_number():
    """Both products are made for all pairs, and the second is given back once it is added to the first."""
    table = a_tensor(100, 200, 8)
    found = pieces("index_put_.default", table, [indices(50, 1), indices(7)], a_tensor(50, 7, 8), True)

    assert [8 * 350] * 7 + [1] == [piece.nbytes for piece in found]
    assert [2, None, 4, 4, None, None, None, None] == [piece.until for piece in found]
    assert found[:2] + found[4:] == pieces(
        "index_put.default", table, [None, indices(350)], a_tensor(100, 350, 8), True
    )


def test_more_indices_than_a_thread_block_holds_are_sorted_in_memory():
    """Of 2,305 the sorted ones and their places are there twice."""
    own = [
        pieces("index_put.default", a_tensor(9, 8), [indices(count)], a_tensor(count, 8), True)[-1].nbytes
        for count in (2304, 2305)
    ]
    assert [1, 16 * 2305] == own


def test_values_that_are_not_added_need_no_sorted_indices():
    """Nor do no indices, and masks are not counted."""
    table, mask = a_tensor(9, 8), a_tensor(9, dtype=torch.bool)

    assert [] == pieces("index_put.default", table, [indices(5)], a_tensor(5, 8))
    assert [] == pieces("index_put.default", table, [indices(5)], a_tensor(5, 8), False)
    assert [] == pieces("index_put.default", table, [indices(0)], a_tensor(0, 8), True)
    assert [] == pieces("index_put.default", table, [mask], a_tensor(1, 8), True)
