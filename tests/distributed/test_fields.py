"""`world_size` and `parallelism` of a cell: what a suite may write, and what is refused in one line."""

from __future__ import annotations

import pytest

from meftbench.catalogue.levers import LEVERS
from meftbench.catalogue.optimizers import OPTIMIZERS
from meftbench.catalogue.parallelisms import PARALLELISMS
from meftbench.errors import UserError
from meftbench.plan.cell import Cell
from meftbench.plan.point import cell_of
from meftbench.plan.where import parse_where

SHAPE = {"model": "bert-tiny@random", "batch_size": 4, "sequence_length": 16}


def a_cell(method="full", **fields):
    return cell_of("estimate", {**SHAPE, "method": method, **fields})


@pytest.mark.parametrize("name", PARALLELISMS)
def test_a_cell_says_how_many_ranks_share_a_step_and_how(name):
    cell = a_cell(world_size=2, parallelism=name)

    assert (2, name) == (cell.world_size, cell.parallelism)
    assert f"bert-tiny@random/full/b4/s16/{name}-x2" == cell.label
    assert parse_where([f"world_size=2,parallelism={name}"])(cell)
    assert not parse_where(["world_size=1"])(cell)


def test_the_ids_of_cells_of_one_process_are_those_of_before():
    """The fields that were added have defaults, which are no part of an id."""
    fields = {**SHAPE, "micro_batch_size": 4, "method": "full"}

    assert Cell(**fields).cell_id == Cell(**fields, world_size=1, parallelism=None).cell_id
    assert Cell(**fields).cell_id != Cell(**fields, world_size=2, parallelism="ddp").cell_id


REFUSED = {
    "ranks without a way to share": ({"world_size": 2}, "write parallelism: ddp or fsdp2"),
    "a way without ranks": ({"parallelism": "ddp"}, "write world_size: 2"),
    "an unknown way": ({"world_size": 2, "parallelism": "zero3"}, "parallelism"),
    "no rank": ({"world_size": 0, "parallelism": "ddp"}, "world_size"),
    "too many processes": ({"world_size": 65, "parallelism": "ddp"}, "write at most 64"),
    "packed rows": (
        {"world_size": 2, "parallelism": "ddp", "packing": True, "model": "llama-3.2-1b@random"},
        "leave packing out",
    ),
    "no gradients": ({"world_size": 2, "parallelism": "ddp", "method": "mezo"}, "mezo has no gradients to share"),
    "a lever": ({"world_size": 2, "parallelism": "ddp", "method": "full+optimizer_in_backward"}, "leave optimizer_in"),
    "a precision": ({"world_size": 2, "parallelism": "fsdp2", "precision": "nf4", "method": "lora"}, "4-bit weight"),
    "an optimizer": ({"world_size": 2, "parallelism": "fsdp2", "optimizer": "adafactor"}, "choose optimizer: adamw"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused_in_one_line(case):
    fields, words = REFUSED[case]

    with pytest.raises(UserError, match=words) as refused:
        a_cell(**fields)

    assert "\n" not in str(refused.value)


def test_a_prediction_may_have_more_ranks_than_this_machine_runs():
    assert 1024 == a_cell(world_size=1024, parallelism="fsdp2", device="predicted:a100-80gb").world_size


def test_what_a_way_refuses_exists():
    for way in PARALLELISMS.values():
        assert way.refused_levers.keys() <= LEVERS.keys()
        assert way.refused_optimizers.keys() <= OPTIMIZERS.keys()
