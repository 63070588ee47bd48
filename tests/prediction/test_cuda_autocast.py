"""Autocast on the CPU converts what autocast on CUDA would, while a prediction asks for it, and no longer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from meftbench.prediction.cuda_autocast import cuda_autocast

WIDE, LOW = torch.float32, torch.bfloat16
# Issue: CUDA's list of operators in float32 is longer than the CPU's.
CASES = {
    "layer_norm": (lambda x: F.layer_norm(x, (64,)), WIDE),
    "softmax": (lambda x: F.softmax(x, -1), WIDE),
    "log_softmax": (lambda x: F.log_softmax(x, -1), WIDE),
    "exp": (lambda x: x.exp(), WIDE),
    "sum": (lambda x: x.sum(), WIDE),
    "sum of rows": (lambda x: x.sum(-1, keepdim=True), WIDE),
    "pow": (lambda x: x.pow(2), WIDE),
    "number to a power": (lambda x: 2**x, WIDE),
    "prod": (lambda x: x.prod(-1), WIDE),
    "cumsum": (lambda x: x.cumsum(-1), WIDE),
    "norm": (lambda x: x.norm(), WIDE),
    "rsqrt": (lambda x: x.rsqrt(), WIDE),
    "log": (lambda x: x.log(), WIDE),
    "log1p": (lambda x: x.log1p(), WIDE),
    "reciprocal": (lambda x: x.reciprocal(), WIDE),
    "logsumexp": (lambda x: x.logsumexp(-1), WIDE),
    "cross_entropy": (lambda x: F.cross_entropy(x, torch.zeros(4, dtype=torch.long)), WIDE),
    "mse_loss": (lambda x: F.mse_loss(x, x), WIDE),
    "linear": (lambda x: F.linear(x.float(), torch.empty(8, 64)), LOW),
    "einsum": (lambda x: torch.einsum("ij,kj->ik", x.float(), torch.empty(3, 64)), LOW),
    "mean": (lambda x: x.mean(), LOW),
    "gelu": (lambda x: F.gelu(x), LOW),
    "sum asked for in half precision": (lambda x: x.sum(dtype=LOW), LOW),
    "sum of float64": (lambda x: x.double().sum(), torch.float64),
}


@pytest.mark.parametrize("name", CASES)
def test_the_dtype_that_cuda_gives(name):
    """ATen/autocast_mode.h; in the backward pass gradients have the dtype of what they are of."""
    run, expected = CASES[name]
    with FakeTensorMode(), cuda_autocast(), torch.autocast("cpu", LOW):
        x = torch.empty(4, 64, dtype=LOW, requires_grad=True)
        result = run(x)
        result.sum().backward()

    assert expected == result.dtype
    assert LOW == x.grad.dtype


def test_softmax_reads_float16_as_it_is():
    """The kernel has float32 for its result alone: beside it nothing is saved."""
    kept = []
    with FakeTensorMode(), cuda_autocast(), torch.autocast("cpu", torch.float16):
        x = torch.empty(4, 64, dtype=torch.float16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
            F.softmax(x, -1)

    assert [WIDE] == kept


def test_outside_nothing_changes():
    """After a prediction, and without autocast in one."""
    x = torch.ones(4, 64, dtype=LOW)
    with cuda_autocast():
        assert LOW == x.exp().dtype
    with torch.autocast("cpu", LOW):
        assert LOW == x.exp().dtype


def test_it_ends_with_an_error():
    """The lists are the CPU's own again although the traced step raised."""
    with pytest.raises(ZeroDivisionError), cuda_autocast():
        1 / 0  # noqa: B018
    with torch.autocast("cpu", LOW):
        assert LOW == torch.ones(4, dtype=LOW).exp().dtype
