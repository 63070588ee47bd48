"""What a compiled region keeps for the backward pass in a trace is what torch.compile keeps."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from meftbench.catalogue.profiles import find_profile
from meftbench.plan.cell import Cell
from meftbench.prediction.partitioned import Partitioned
from meftbench.prediction.predict import predict


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Other tests count what was compiled."""
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


class Layer(nn.Module):
    """A norm and a gated feed-forward, of which compiled code keeps less than half."""

    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(16, 64), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x + self.down(torch.nn.functional.silu(self.gate(normed)) * self.up(normed))


def kept_bytes(function, layer, x):
    """Bytes of the storages that are saved for the backward pass, without the parameters and x."""
    given = {tensor.untyped_storage()._cdata for tensor in [x, *layer.parameters()]}
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(x)
    assert output.requires_grad
    return sum(storage.nbytes() for key, storage in storages.items() if key not in given)


def test_the_partition_keeps_what_torch_compile_keeps():
    layer, x = Layer(), torch.randn(8, 16, requires_grad=True)
    compiled = torch.compile(layer.forward, backend="aot_eager_decomp_partition", dynamic=False)
    compiled(x)
    meta = Layer().to("meta")
    x_meta = torch.empty(8, 16, device="meta", requires_grad=True)
    partitioned = partial(Partitioned(Layer.forward), meta)

    kept = kept_bytes(partitioned, meta, x_meta)

    assert kept == kept_bytes(compiled, layer, x) < kept_bytes(layer, layer, x)


CONFIG = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def predicted(method, name, model, config, precision):
    """A metric of the last step of a small model, bytes."""
    cell = Cell.of(
        method,
        model=model,
        model_config_overrides=CONFIG | config,
        batch_size=8,
        sequence_length=128,
        precision=precision,
    )
    return predict(cell, find_profile("a100-80gb")).metrics()[name].value


@pytest.mark.parametrize(
    ("model", "config", "precision"),
    [("llama-3.2-1b@random", LLAMA, "bf16"), ("bert-base@random", {"num_attention_heads": 4}, "bf16-autocast")],
)
def test_a_compiled_model_holds_less_after_forward(model, config, precision):
    whole, compiled = (predicted(m, "saved_bytes", model, config, precision) for m in ("full", "full+compile"))

    limited = predicted("full+compile(budget=0.5)", "saved_bytes", model, config, precision)

    assert limited < compiled < whole


@pytest.mark.parametrize("method", ["lora+checkpoint", "meft1-exact"])
def test_layers_that_run_again_keep_nothing_that_compiled_code_could_leave_out(method):
    case = ("activation_peak_bytes", "llama-3.2-1b@random", LLAMA, "bf16")

    assert predicted(f"{method}+compile", *case) == pytest.approx(predicted(method, *case), rel=0.1)
