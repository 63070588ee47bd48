"""A module of models and batches of one's own, and suites that name them."""

from __future__ import annotations

import pytest
import yaml

from meftbench.errors import UserError

SHAPE = {"batch_size": 2, "sequence_length": 16}

MODELS = """
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

CONFIG = dict(hidden_size=32, num_attention_heads=2, intermediate_size=64, vocab_size=100)
number = 3


def build(layers=1, **more):
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **CONFIG, **more))


def build_in_bf16():
    return build().to(torch.bfloat16)


class Own(nn.Module):
    # The pooler of its trunk is not used: it has no gradient.
    def __init__(self):
        super().__init__()
        self.trunk = BertModel(BertConfig(num_hidden_layers=1, **CONFIG))
        self.head = nn.Linear(32, 3)

    def forward(self, tokens, target):
        return nn.functional.cross_entropy(self.head(self.trunk(tokens).last_hidden_state[:, 0]), target)


class Lossless(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)


class Broken(Lossless):
    def forward(self, input):
        return super().forward(input[:, :3])


class Looking(Lossless):
    def forward(self, input):
        return super().forward(input).mean() * (2 if input.sum().item() > 0 else 1)


def batch(batch_size, sequence_length):
    return {"tokens": torch.randint(100, (batch_size, sequence_length)), "target": torch.randint(3, (batch_size,))}


def squares(batch_size, sequence_length):
    return {"input": torch.ones(batch_size, 4)}


def three(batch_size, sequence_length):
    return {"input": torch.ones(3, 4)}


def no_mapping(batch_size, sequence_length):
    return [1, 2]


def of_one_argument(batch_size):
    return {}


def raising():
    open("/nowhere/at/all")


def elsewhere():
    raise ValueError(f"no weights in {__file__}")


def a_dict():
    return {}


def of_nothing():
    return nn.Identity()


def without_environment():
    import os
    os.environ.clear()
    return build()


def changing(what):
    if what == "gradients":
        torch.set_grad_enabled(False)
    elif what == "device":
        torch.set_default_device("cpu:0")
    elif what == "autocast":
        torch.autocast("cpu").__enter__()
    elif what == "threads":
        torch.set_num_threads(torch.get_num_threads() + 1)
    else:
        torch.set_default_dtype(torch.float64)
    return build()


def on_meta():
    with torch.device("meta"):
        return Lossless()


def lazy():
    return nn.Sequential(nn.LazyLinear(4))


ONE = build()


def the_same():
    return ONE


class Nowhere(Lossless):
    def forward(self, input):
        return super().forward(input).mean() * float("nan")


def unbearable():
    return Lossless().requires_grad_(bool(torch.ones(1).item()))
"""


def line_of(part):
    """The line of MODELS that it stands in."""
    return next(number for number, line in enumerate(MODELS.splitlines(), start=1) if part in line)


def write_suite(folder, *points, name="own.yaml", **more):
    content = {"schema": 1, "name": "own", "protocol": {"warmup": 1, "steps": 1, "repeats": 1}}
    content |= {"defaults": {"method": "full"} | SHAPE, "include": [*points]} | more
    (folder / name).write_text(yaml.safe_dump(content))
    return folder / name


def the_line(call, *arguments, **named):
    with pytest.raises(UserError) as caught:
        call(*arguments, **named)
    assert 1 == len(str(caught.value).splitlines())
    return str(caught.value)
