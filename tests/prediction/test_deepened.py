"""What is told from few layers and micro-batches is what a trace of all of them gives: every event, size and replay."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from campaigns import campaign
from long_profile import many_minutes, sampled
from meftbench.errors import UserError
from meftbench.prediction.columns import Trace
from meftbench.prediction.deepened import Growth, IrregularError
from meftbench.prediction.loops import OtherRoundsError, shortened
from meftbench.prediction.repeating import repeated_by
from models import a_cell_of

extrapolation = campaign("extrapolation")
FOURTH = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
# By name: backbone, method, layers, and further fields of the cell. Each takes at least as many layers as a rule needs.
CASES = {
    "full": ("bert", "full", 6, {}),
    "seq2seq": ("bart", "full", 6, {"head": "seq2seq_lm", "attention_requested": "eager"}),
    "checkpoint": ("llama", "lora+checkpoint", 6, {}),
    "some layers checkpointed": ("bert", "lora+checkpoint(layers=6)", 12, {}),
    "every second layer checkpointed": ("qwen2", "lora+checkpoint(every=2)", 11, {}),
    "some layers reversible": ("llama", "meft3-exact(reversible_layers=6)", 12, {}),
    "tiles and chunks": ("llama", "meft1-exact(tiles=12)+chunked_loss", 6, {"sequence_length": 1024, "batch_size": 3}),
    "tiles of a feed-forward": ("opt", "lora+tiled_mlp", 6, {}),
    "loss in chunks": ("opt", "meft1-exact+chunked_loss", 6, {}),
    "optimizer in backward": ("opt", "full+optimizer_in_backward", 6, {}),
    "offload": ("vit", "lora+offload", 6, {}),
    "windows take turns": ("gemma2", "lora", 10, {}),
    "experts": ("qwen3_moe", "meft1-exact", 6, {}),
    "every fourth layer attends": ("qwen3_next", "lora", 20, {"layer_types": FOURTH * 5}),
    "a cache": ("bert", "prefix-tuning", 6, {}),
    "adafactor": ("llama", "full", 6, {"optimizer": "adafactor"}),
    "micro-batches": ("bert", "lora", 3, {"batch_size": 12, "micro_batch_size": 2}),
    "autocast": ("bert", "lora", 6, {"precision": "bf16-autocast"}),
    "no backward": ("opt", "mezo", 8, {}),
}

# Of these the campaign in reports/extrapolation says the same, or another case does.
LONG = ("seq2seq", "some layers checkpointed", "adafactor", "every fourth layer attends", "experts", "checkpoint")


def a_deep_cell(name):
    backbone, method, layers, changes = CASES[name]
    changes = dict(changes)
    kinds = changes.pop("layer_types", None)
    cell = a_cell_of(backbone, method, layers, **({"precision": "bf16", "device": "predicted:a100-80gb"} | changes))
    if kinds is None:
        return cell
    return cell.model_copy(update={"model_config_overrides": cell.model_config_overrides | {"layer_types": kinds}})


def totals(work):
    """By operator and where it runs: how often, and what it reads, writes, computes and launches. How this is divided
    among calls may depend on the depth, as where one call clears counters of all layers."""
    found = Counter()
    for operation, number in work.counts.items():
        operator = operation.operator
        key = (operator.name, operator.kind, operation.phase, operation.recomputed, operation.place)
        for what in ("read", "written", "flops", "launches"):
            found[*key, what] += number * getattr(operator, what)
    return found


@pytest.mark.parametrize(
    "name",
    [
        *sampled([name for name in CASES if name not in LONG], 2),
        *(pytest.param(name, marks=many_minutes) for name in LONG),
    ],
)
def test_what_is_told_of_a_deep_model_is_its_trace(name):
    """In the shape that came first, of which all layers are never traced, and in another one after it."""
    few, whole = extrapolation.WatchedTracer(), extrapolation.WatchedTracer(extrapolate=False)
    cell = a_deep_cell(name)
    micro_batch = 2 * cell.micro_batch_size
    another = cell.model_copy(
        update={"batch_size": cell.batch_size * 2, "micro_batch_size": micro_batch, "sequence_length": 48}
    )

    for shape in (cell, another):
        assert cell not in few.cells
        assert [] == extrapolation.differences(few(shape), whole(shape))
        assert totals(few.work(shape)) == pytest.approx(totals(whole(shape).work))


def test_of_tiles_and_chunks_few_are_traced():
    """A trace of twice as many tokens asks for few operators more; rounds that are not alike are all traced."""
    tracer, cell = extrapolation.WatchedTracer(), a_deep_cell("tiles and chunks")
    tracer.directly(cell)

    def operators(batch_size):
        before = tracer.remembered.hits + tracer.remembered.asked
        tracer.directly(cell.model_copy(update={"batch_size": batch_size, "micro_batch_size": batch_size}))
        return tracer.remembered.hits + tracer.remembered.asked - before

    assert 1.3 * operators(12) > operators(48)


def test_rounds_that_are_not_alike_are_all_traced(monkeypatch):
    """Where a lever keeps something for each round, for example."""
    few, whole = extrapolation.WatchedTracer(), extrapolation.WatchedTracer(extrapolate=False)
    cell, tried = a_deep_cell("tiles and chunks"), []

    def other(trace, left_out=()):
        if left_out:
            tried.append(len(left_out))
            raise OtherRoundsError
        return shortened(trace)

    monkeypatch.setattr("meftbench.prediction.tracer.shortened", other)

    assert [] == extrapolation.differences(few(cell), whole(cell))
    assert tried


def test_state_in_eight_bits_is_told():
    """Of an optimizer whose small states are kept whole: every step is traced, in few layers."""
    pytest.importorskip("bitsandbytes")
    few, whole = extrapolation.WatchedTracer(), extrapolation.WatchedTracer(extrapolate=False)
    cell = a_cell_of("llama", "lora", 6, precision="bf16", device="predicted:a100-80gb", optimizer="adamw-8bit")

    assert [] == extrapolation.differences(few(cell), whole(cell))
    assert cell not in few.cells


def test_another_shape_is_told_from_one_trace():
    """What the first shape told of deeper models holds for it, too: 3 layers are traced of 6, once."""
    tracer = extrapolation.WatchedTracer()
    cell = a_deep_cell("full")
    tracer(cell)
    before = tracer.traced

    tracer(cell.model_copy(update={"batch_size": 8, "micro_batch_size": 8, "sequence_length": 48}))

    assert (3, 4) == (before, tracer.traced)
    assert 3 == tracer.cells[-1].model_config_overrides["num_hidden_layers"]


def test_a_shape_in_which_layers_allocate_otherwise_is_told_from_two_traces():
    """In three tiles instead of one, where the first shape needed three depths; and it is what a trace of all is."""
    tracer, whole = extrapolation.WatchedTracer(), extrapolation.WatchedTracer(extrapolate=False)
    cell = a_cell_of("llama", "meft1-exact", 8, precision="bf16", device="predicted:a100-80gb")
    tracer(cell)
    before = tracer.traced
    longer = cell.model_copy(update={"batch_size": 3, "micro_batch_size": 3, "sequence_length": 4200})
    untiled = cell.model_copy(update={"batch_size": 1, "micro_batch_size": 1})

    assert not tracer(longer).trace.has_events_of(tracer(untiled).trace)
    assert [] == extrapolation.differences(tracer(longer), whole(longer))
    assert (3, 7) == (before, tracer.traced)


def test_a_trace_is_that_of_a_new_model_whatever_was_traced_before():
    """Buffers in host memory that another shape left are not used again: events say where each is from."""
    cell = a_deep_cell("offload")
    used, new = (extrapolation.WatchedTracer(extrapolate=False) for _ in range(2))
    used(cell.model_copy(update={"batch_size": 8, "micro_batch_size": 8}))

    assert [] == extrapolation.differences(used(cell), new(cell))


def test_layers_that_are_not_alike_are_all_traced():
    """A model in which a layer's index decides on its experts: no rule is looked for, or none is found."""
    few, whole = extrapolation.WatchedTracer(), extrapolation.WatchedTracer(extrapolate=False)
    cell = a_deep_cell("experts")
    config = cell.model_config_overrides | {"mlp_only_layers": [5]}
    cell = cell.model_copy(update={"model_config_overrides": config})

    assert [] == extrapolation.differences(few(cell), whole(cell))
    assert [cell] == few.cells
    assert 1 == len(repeated_by(cell).counts)


def test_an_irregular_growth_falls_back_to_the_whole_trace(monkeypatch):
    """The model is traced with all its layers, once, and it is kept why; another shape is not tried again."""
    few, whole = extrapolation.WatchedTracer(), extrapolation.WatchedTracer(extrapolate=False)
    cell = a_deep_cell("full")

    def irregular(*traces):
        raise IrregularError("a layer is of another kind")

    monkeypatch.setattr("meftbench.prediction.tracer.Growth", irregular)

    assert [] == extrapolation.differences(few(cell), whole(cell))
    assert {"a layer is of another kind"} == set(few.irregular.values())
    assert cell in few.cells
    another = cell.model_copy(update={"sequence_length": 32})
    before = few.traced
    assert [] == extrapolation.differences(few(another), whole(another))
    assert [another] == few.cells[before:]


def test_a_refusal_names_the_cell_that_was_asked_for():
    """Not the one with fewer layers that was traced in its place."""
    cell = a_cell_of("bart", "lora", 6, precision="bf16", device="predicted:a100-80gb")

    with pytest.raises(UserError) as refused:
        extrapolation.WatchedTracer()(cell)

    assert cell.label == refused.value.where


@dataclass
class Layers:
    """A made-up step of a model. Sizes are bytes.

    parameters: of a layer.  kept: what its forward keeps for backward.  passing: what it frees again, and whether in
    the order of allocation.  hidden: its output, which lives until the next layer's.  rounds: of a loop in backward.
    by_depth: of a tensor with a part for each layer.  turns: whether odd layers keep a tensor more.
    grows: by which each layer is larger than the one before.  faster: the same of that.
    """

    parameters: list[int]
    kept: list[int]
    passing: list[int]
    in_order: bool
    hidden: int
    rounds: int
    by_depth: int
    turns: bool
    grows: int
    faster: int
    events: list = field(default_factory=list)
    numbers: count = field(default_factory=count)

    def born(self, nbytes, origin, category="activations"):
        key = next(self.numbers)
        self.events.append(("alloc", key, nbytes, category, origin))
        return key

    def ended(self, *keys):
        for key in keys:
            self.events.append(("free", key, 0, "", ""))

    def passed(self, sizes, origin):
        keys = [self.born(size, origin) for size in sizes]
        self.born_last = keys
        self.ended(*(keys if self.in_order else keys[::-1]))

    def trace(self, depth):
        """Parameters, forward, backward and an optimizer's step of a model of `depth` layers."""
        self.events, self.numbers = [], count()
        larger = [number * self.grows + number * number * self.faster for number in range(depth)]
        parameters = [
            self.born(size + more, "weight", "parameters") for more in larger for size in (*self.parameters, 64)
        ]
        start = len(self.events)
        table = self.born(64 + self.by_depth * depth, "table")
        hidden = self.born(self.hidden, "embedding")
        kept = []
        for number in range(depth):
            of_layer = [self.born(size + larger[number], "linear") for size in self.kept]
            if self.turns and number % 2:
                of_layer.append(self.born(96, "window"))
            self.passed(self.passing, "gelu")
            after = self.born(self.hidden, "add")
            self.ended(hidden)
            hidden = after
            kept.append(of_layer)
        loss = self.born(512, "loss")
        gradients = []
        for number, of_layer in reversed(list(enumerate(kept))):
            for _ in range(self.rounds):
                self.passed(self.passing, "tile")
            gradients += [self.born(size + larger[number], "gradient", "gradients") for size in (*self.parameters, 64)]
            self.ended(*of_layer)
        self.ended(loss, hidden, table)
        for _ in parameters:
            self.passed([128], "step")
        self.ended(*gradients)
        return Trace.of(self.events, [start])


SIZES = st.integers(1, 6).map(lambda n: 256 * n)
LAYERS = st.builds(
    Layers,
    parameters=st.lists(SIZES, max_size=3),
    kept=st.lists(SIZES, max_size=3),
    passing=st.lists(SIZES, max_size=3),
    in_order=st.booleans(),
    hidden=SIZES,
    rounds=st.integers(0, 3),
    by_depth=st.sampled_from([0, 32]),
    turns=st.booleans(),
    grows=st.sampled_from([0, 0, 8]),
    faster=st.sampled_from([0, 0, 0, 8]),
)


def equal(one, other):
    return all(np.array_equal(getattr(one, column), getattr(other, column)) for column in ("what", "storage", "nbytes"))


@settings(max_examples=150)
@given(layers=LAYERS, fewest=st.integers(2, 3), times=st.integers(1, 9))
def test_made_up_models_are_told_right_or_not_at_all(layers, fewest, times):
    """With layers of one kind, of two that take turns, ever larger ones, a tensor that grows with the depth."""
    unit = 2 if layers.turns else 1
    first, second, third = (layers.trace(unit * (fewest + more)) for more in range(3))
    try:
        told = Growth(first, second, third).by(times)
    except IrregularError:
        # Layers of one size and order are told, whatever they keep.
        assert layers.grows or layers.faster or layers.by_depth or layers.turns
        return
    assert equal(layers.trace(unit * (fewest + times)), told)


@settings(max_examples=50)
@given(layers=LAYERS, times=st.integers(1, 6), factor=st.integers(2, 5))
def test_made_up_models_in_another_shape(layers, times, factor):
    """Activations `factor` times as large, parameters as they are: what the first shape told holds, or is not used."""
    layers.turns = False
    try:
        growth = Growth(*(layers.trace(depth) for depth in (3, 4, 5)))
        growth.by(times)
    except IrregularError:
        return
    layers.hidden *= factor
    for sizes in (layers.kept, layers.passing):
        sizes[:] = [size * factor for size in sizes]

    told = growth.alike(layers.trace(3), times)

    assert told is None or equal(layers.trace(3 + times), told)


def test_layers_of_two_kinds_are_not_told_one_by_one():
    """Nor is a model of which the last traced layer is the first of another kind."""
    layers = Layers([256], [512], [256], True, 512, 1, 0, turns=True, grows=0, faster=0)

    with pytest.raises(IrregularError, match="adds"):
        Growth(*(layers.trace(depth) for depth in (3, 4, 5)))
