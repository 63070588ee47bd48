"""Several processes: DistributedDataParallel and FSDP2 over gloo give the gradients of one process and all samples."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from meftbench.errors import UserError
from meftbench.methods import prepare
from meftbench.reversible import ReversibleStack
from tests.models import a_model

PROCESSES = 2
DDP = [
    (backbone, method, split)
    for backbone in ("bert", "llama")
    for method in ("meft1-exact", "meft3")
    for split in (1, 2)
]


def prepared(backbone, method):
    head = None if backbone == "bert" else "causal_lm"
    return prepare(a_model(2, backbone=backbone, dropout=0.0, head=head), method, seed=1).model


def samples(backbone):
    ids = torch.randint(5, 120, (8, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": torch.arange(8) % 2 if backbone == "bert" else ids}


def pieces_of(rank, backbone, count):
    """The share of a process, in micro-batches."""
    each = 8 // PROCESSES // count
    first = rank * 8 // PROCESSES
    cuts = [slice(start, start + each) for start in range(first, first + each * count, each)]
    return [{key: value[cut] for key, value in samples(backbone).items()} for cut in cuts]


def expected_gradients(model, backbone):
    model(**samples(backbone)).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return expected


def worst(model, expected):
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert list(expected) == list(found)
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}
    return max(float((whole[name] - e).norm() / e.norm()) for name, e in expected.items() if e.norm() > 0)


def by_ddp(rank, backbone, method, split):
    model = prepared(backbone, method)
    expected = expected_gradients(model, backbone)
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    pieces = pieces_of(rank, backbone, split)
    for number, piece in enumerate(pieces, start=1):
        with nullcontext() if number == split else parallel.no_sync():
            (parallel(**piece).loss / split).backward()
    return worst(model, expected)


def by_fsdp(rank, unit):
    model = prepared("bert", "meft1-exact")
    expected = expected_gradients(model, "bert")
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for stack in [module for module in model.modules() if isinstance(module, ReversibleStack)]:
        for module in {"model": [], "stack": [stack], "blocks": stack.blocks}[unit]:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    (piece,) = pieces_of(rank, "bert", 1)
    try:
        model(**piece).loss.backward()
    except UserError as error:
        return str(error)
    return worst(model, expected)


def run(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    found = {" ".join(map(str, case)): by_ddp(rank, *case) for case in DDP}
    found |= {f"fsdp {unit}": by_fsdp(rank, unit) for unit in ("model", "stack", "blocks")}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    # Not by the way of destructors: the refused step has left collectives behind, whose threads would end in an abort.
    os._exit(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process found, in one start of both."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(run, (folder,), PROCESSES)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize(("backbone", "method", "split"), DDP)
def test_ddp_gives_the_gradients_of_one_process(results, backbone, method, split):
    """float64, no dropout; micro-batches under `no_sync` too."""
    for found in results:
        assert found[f"{backbone} {method} {split}"] <= 1e-9


@pytest.mark.parametrize("unit", ["model", "stack"])
def test_fsdp_shards_whole_models_and_stacks(results, unit):
    """`fully_shard` of the model, or of each stack, whose weights are then gathered for the walk back."""
    for found in results:
        assert found[f"fsdp {unit}"] <= 1e-9


def test_fsdp_of_single_blocks_is_refused_in_a_line(results):
    """A stack calls parts of a block, never the block, which so would not be gathered."""
    for found in results:
        assert "give fully_shard the whole stack or model" in found["fsdp blocks"]
