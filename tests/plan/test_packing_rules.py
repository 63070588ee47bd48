"""What may be packed, refused in one line before torch is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from meftbench.errors import UserError
from meftbench.plan.point import cell_of
from meftbench.plan.suite import parse_suite
from meftbench.strict_yaml import Document

POINT = {"model": "llama-3.2-1b@random", "method": "lora", "batch_size": 4, "sequence_length": 64, "packing": True}


def test_a_packed_cell_says_so_and_the_others_are_as_they_were():
    packed, plain = (cell_of("estimate", POINT | {"packing": packing}) for packing in (True, False))
    never = cell_of("estimate", {name: value for name, value in POINT.items() if name != "packing"})

    assert "llama-3.2-1b@random/lora/b4/s64/packed" == packed.label
    assert packed.recorded()["packing"] is True
    assert plain == never
    assert plain.cell_id == never.cell_id != packed.cell_id


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"model": "bert-base@random"}, "packing is for models that predict the next token, and the head is classifi"),
        ({"model": "vit-base@random", "sequence_length": 197}, "and the head is image_classification"),
        ({"model": "bart-base@random", "head": "seq2seq_lm"}, "and the head is seq2seq_lm"),
        ({"head": "classification"}, "and the head is classification"),
        ({"attention": "eager"}, "packing needs attention that keeps samples apart, and eager reads a whole row"),
        ({"model": "gemma-2-2b@random"}, "and eager reads a whole row"),
        ({"method": "prompt-tuning"}, "prompt-tuning puts virtual tokens before every sample"),
        ({"method": "prefix-tuning"}, "prefix-tuning puts virtual tokens before every sample"),
        ({"model": "my.models:make", "batch": "my.models:batch"}, "packing is not for a batch of your own"),
        ({"model": "my.models:make"}, "packing is not for a model of your own"),
        (
            {"model": {"name": "qwen3-0.6b@random", "config": {"layer_types": ["linear_attention"]}}},
            "packing needs layers that mix tokens by attention alone, and 'qwen3-0.6b@random' has linear_attention",
        ),
    ],
)
def test_what_cannot_be_packed_is_one_line(given, reason):
    with pytest.raises(UserError) as raised:
        cell_of("estimate", POINT | given)

    assert str(raised.value).startswith("estimate: packing: ")
    assert reason in str(raised.value)
    assert "leave packing out" in raised.value.cure


def test_packed_batches_of_a_task_are_not_padded_to_the_full_length():
    content = {
        "schema": 1,
        "name": "toy",
        "tasks": ["sciq"],
        "training": {"batches": "full"},
        "grid": {name: POINT[name] for name in ("model", "method", "batch_size", "packing")},
    }

    with pytest.raises(UserError, match="rows without padding cannot be padded to batches: full"):
        parse_suite(Document(Path("toy.yaml"), content, {}))
