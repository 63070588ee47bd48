"""What a trace does not allocate and a device does: cuBLAS's workspaces, scratch memory; and sums in place."""

from __future__ import annotations

import pytest
import torch

from meftbench.catalogue.profiles import find_profile
from meftbench.catalogue.versions import Versions
from meftbench.prediction.cuda_counter import CudaCounter
from meftbench.prediction.remembered import Remembered
from meftbench.units import KiB, MiB

A100 = find_profile("a100-80gb")


def a_counter(versions=Versions(), profile=A100):  # noqa: B008 - frozen
    return CudaCounter("meta", Remembered(), profile, versions)


def a_weight(*shape):
    return torch.empty(*shape, device="meta", requires_grad=True)


def allocations(counter, origin=None):
    return [event[2] for event in counter.events if event[0] == "alloc" and origin in (None, event[4])]


def test_forward_alone_has_one_workspace_and_training_two():
    """Each thread's at its first product; neither is given back."""
    counter, x, w = a_counter(), a_weight(8, 16), a_weight(16, 16)
    with counter:
        counter.mark("forward")
        y = x.exp()
        assert 0 == counter.live["workspace"]
        y = y @ w
        assert 8320 * KiB == counter.live["workspace"]
        loss = (y @ w).sum()
        assert 8320 * KiB == counter.live["workspace"]
        counter.mark("backward")
        loss.backward()
        del loss, y
    assert 2 * 8320 * KiB == counter.live["workspace"]


def test_a_step_without_products_has_none():
    counter, x = a_counter(), a_weight(8, 16)
    with counter:
        x.exp().sum().backward()
    assert 0 == counter.live["workspace"]


def test_cublaslt_had_a_workspace_of_its_own_in_torch_2_9():
    """1 MiB, for a product with a bias vector."""
    for versions, expected in ((Versions(torch=(2, 9)), 1 * MiB), (Versions(), 8320 * KiB)):
        counter, x = a_counter(versions), a_weight(8, 16)
        with counter:
            torch.addmm(a_weight(16), x, a_weight(16, 16))
        assert expected == counter.live["workspace"]


def test_a_profile_may_have_a_workspace_of_cublaslt():
    """MI300X: hipBLAS 128 MiB, hipBLASLt 76 MiB beside it."""
    counter = a_counter(profile=find_profile("mi300x"))
    with counter:
        torch.addmm(a_weight(16), a_weight(8, 16), a_weight(16, 16))
        a_weight(8, 16) @ a_weight(16, 16)
    assert (76 + 128) * MiB == counter.live["workspace"]


def test_two_gradients_are_added_in_the_first():
    """h is used twice: on a device the sum of its gradients is no new tensor, as it is on meta."""
    with a_counter() as counter:
        h = a_weight(64, 64) * 2
        (h.sin() + h.cos()).sum().backward()
    assert [] == allocations(counter, "add.Tensor")[1:]  # the forward's own


def test_a_gradient_that_somebody_holds_is_added_to_the_other():
    """One that a hook keeps is not written to; if both are held, the sum is new."""
    held = []

    def summed(*keeping):
        with a_counter() as counter:
            h = a_weight(64, 64) * 2
            a, b = h.sin(), h.cos()
            for branch in keeping:
                branches = {"sin": a, "cos": b}
                branches[branch].grad_fn.register_hook(lambda inputs, _outputs: held.append(inputs[0]))
            (a.sum() + b.sum()).backward()
        found = len(allocations(counter, "add.Tensor")) - 1
        versions = [tensor._version for tensor in held]
        held.clear()
        return found, versions

    assert (0, []) == summed()
    assert (0, [0]) == summed("sin")
    assert (0, [0]) == summed("cos")
    assert (1, [0, 0]) == summed("sin", "cos")


def test_a_gradient_that_is_read_repeatedly_is_not_written_to():
    """The gradient of a sum is one number, read everywhere."""
    with a_counter() as counter:
        h = a_weight(64, 64) * 2
        (h.sum() + h.view(-1).sum()).backward()
    assert [64 * 64 * 4] == allocations(counter, "add.Tensor")[1:]


def test_under_grad_mode_sums_are_new():
    """With create_graph the engine adds out of place on a device, too."""
    with a_counter() as counter:
        x = a_weight(64, 64)
        h = x * 2
        torch.autograd.grad((h.sin() + h.cos()).sum(), x, create_graph=True)
    assert 1 <= len(allocations(counter, "add.Tensor")[1:])


def test_rows_are_put_into_the_gradient_itself():
    """Of a table read by indices: its zeros, and no copy of them."""
    table = a_weight(1000, 64)
    with a_counter() as counter:
        table[torch.zeros(8, dtype=torch.long, device="meta")].sum().backward()
    assert 1 == allocations(counter).count(1000 * 64 * 4)


def test_indices_of_a_tables_gradient_are_sorted():
    """2,048 of them, as seen on a real GPU (tests/groundtruth/data, 03), behind the zeros; all is given back."""
    table, ids = a_weight(1000, 64), torch.zeros(2048, dtype=torch.long, device="meta")
    with a_counter() as counter:
        table[ids].sum().backward()
    assert [1000 * 64 * 4, *[16_384] * 5, 1] == allocations(counter)[-7:]
    assert [*[16_384] * 5, 1] == allocations(counter, "index_put.default")
    assert 1000 * 64 * 4 == counter.total  # the gradient alone is left


@pytest.mark.parametrize(
    "taken",
    [
        lambda h: h.max(-1).values,
        lambda h: h.min(-1, keepdim=True).values,
        lambda h: h.topk(3, -1).values,
        lambda h: h.gather(-1, torch.zeros(64, 2, dtype=torch.long, device="meta")),
    ],
    ids=["max", "min", "topk", "gather"],
)
def test_gradients_of_chosen_elements_are_put_into_zeros(taken):
    """They have the size of what was chosen from, and under a dispatch mode alone a copy is made."""
    with a_counter() as counter:
        h = a_weight(64, 1000) * 2
        loss = taken(h).sum()
        before = allocations(counter).count(64 * 1000 * 4)
        loss.backward()
    assert 2 == allocations(counter).count(64 * 1000 * 4) - before  # the zeros, and their product with 2
    assert [] == allocations(counter, "scatter.src") + allocations(counter, "scatter_add.default")


def test_a_kernels_scratch_memory_is_given_back():
    """The gradient of a bias over 2048 rows of 1024: 16 MiB more while it is summed."""
    counter, x = a_counter(), torch.empty(2048, 1024, device="meta")
    with counter:
        counter.mark("backward")
        counter.reset()
        x.sum(0)
    assert 16_777_216 + 512 + 4096 == counter.peak.total
    assert 0 == counter.total
