"""A prediction traces one step; those after it are what tracing them would have given."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from operator import itemgetter

import pytest

from builders import a_cell
from long_profile import sampled
from meftbench.catalogue import optimizers
from meftbench.catalogue.profiles import find_profile
from meftbench.prediction.allocator import AllocatorSettings, replay
from meftbench.prediction.cuda_counter import PredictedStep
from meftbench.prediction.deepened import Trace
from meftbench.prediction.overlay import cuda_semantics
from meftbench.prediction.predict import Predicted, predict
from meftbench.prediction.remembered import Remembered
from meftbench.prediction.trace import named_refusals, uncomputed_step
from meftbench.prediction.tracer import Tracer

PROFILE = find_profile("rtx4090")
ENDLESS = AllocatorSettings()
SMALL = {"batch_size": 4, "sequence_length": 64, "precision": "bf16"}
OPT = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "word_embed_proj_dim": 32}
CELLS = {
    "full": {},
    "full, in parts": {"method": "full", "batch_size": 6, "micro_batch_size": 2},
    "full, by sgd": {"method": "full", "optimizer": "sgd"},
    "lora": {},
    "lora, autocast": {"method": "lora", "precision": "bf16-autocast"},
    "lora+checkpoint": {},
    "lora+offload": {},
    "mezo": {},
    "lora+checkpoint+offload+weight_offload": {},
    "meft1-exact+offload+weight_offload": {},
    "parallel": {},
    "meft1": {},
    "meft1-exact": {},
    "meft3-exact": {},
    "a decoder": {"method": "meft1-exact+chunked_loss", "model": "opt-125m@random", "model_config_overrides": OPT},
}
# Whatever makes the first step another than those after it.
OPTIMIZERS = {
    "adamw-8bit in backward": {"method": "full+optimizer_in_backward", "optimizer": "adamw-8bit"},
    "adafactor in backward": {"method": "full+optimizer_in_backward", "optimizer": "adafactor"},
    "momentum on the host": {"method": "full+optimizer_offload", "optimizer": "sgd-momentum"},
    "paged-adamw-8bit": {"method": "full", "optimizer": "paged-adamw-8bit", "precision": "bf16-autocast"},
    "adamw in backward": {"method": "full+optimizer_in_backward", "precision": "bf16-autocast"},
}


def a_small_cell(name):
    given = {"method": name, "model": "bert-tiny@random"} | SMALL | (CELLS | OPTIMIZERS)[name]
    given.setdefault("micro_batch_size", given["batch_size"])
    return a_cell(**given)


class Asking(Remembered):
    """Remembers nothing."""

    def __call__(self, func, args, kwargs):
        return func(*args, **kwargs or {})


def traced(cell, steps):
    """Every step traced and every operator asked: what was observed, the events, where the last step begins."""
    step, mode = uncomputed_step(cell, foreach=True, on_meta=cell.precision == "bf16")
    with named_refusals(cell), cuda_semantics(PROFILE), mode, PredictedStep(step, Asking(), PROFILE) as counted:
        observed, starts = [], []
        for _ in range(steps):
            starts.append(len(counted.counter.events))
            observed.append(counted.run())
        listed, starts = Trace.of(counted.counter.events, starts).without_starts()
        events = listed.events()
    on_host = {event.key for event in events if event.category == "host"}
    seen = [event.kind == "phase" or (event.kind != "book" and event.key not in on_host) for event in events]
    starts = [sum(seen[:start]) for start in starts]
    events = [event for event, kept in zip(events, seen, strict=True) if kept]
    return observed, events, starts[-1]


def by_birth(events):
    """With keys by birth: those of two traces differ. Ends between two births are in no order: autocast empties its
    cache in the order of addresses."""
    births, found = {}, []
    for number, event in enumerate(events):
        if event.kind == "alloc":
            births[event.key] = number
        found.append((event.kind, births.get(event.key), event.nbytes, event.category, event.origin))
    ordered = []
    for kind, run in groupby(found, key=itemgetter(0)):
        ordered += sorted(run, key=itemgetter(1) if kind == "free" else lambda event: 0)
    return ordered


@pytest.mark.parametrize("name", sampled([*CELLS, *OPTIMIZERS], 3))
def test_steps_told_again_are_steps_traced(name):
    """Three of them: every event in its order, peaks by phase, breakdown, and what torch would reserve."""
    cell = a_small_cell(name)
    if optimizers.OPTIMIZERS[cell.optimizer].of_bitsandbytes:
        pytest.importorskip("bitsandbytes")
    observed, events, last = traced(cell, 3)

    found = predict(cell, PROFILE, warmup=1, steps=2, settings=ENDLESS)

    assert by_birth(events) == by_birth(found.events)
    assert last == found.step_from
    assert [replace(each, buffers=[]) for each in observed] == [*found.warm, *found.measured]
    assert replay(events, ENDLESS, found.starts) == found.replayed


def test_the_first_step_is_not_the_second():
    """The optimizer's state is born in the first: it was not there in its forward."""
    found = predict(a_small_cell("full"), PROFILE, settings=ENDLESS)

    assert found.warm[0].baseline < found.measured[0].baseline
    assert found.warm[0].phase_peaks["forward"] < found.measured[0].phase_peaks["forward"]


@pytest.mark.parametrize("method", ["lora+checkpoint", "meft1-exact"])
def test_what_is_remembered_of_other_shapes_changes_no_event(method):
    """Traces share what operators gave; most were not asked again."""
    tracer = Tracer(PROFILE)
    remembered = tracer.remembered
    cell = a_small_cell(method)
    for length in (32, 128, 64):
        predict(cell.model_copy(update={"sequence_length": length}), PROFILE, tracer=tracer)
    asked = remembered.asked

    again = tracer.directly(cell)

    assert predict(cell, PROFILE).events == Predicted(PROFILE, again, AllocatorSettings()).events
    assert 10 * (remembered.asked - asked) < remembered.hits


@pytest.mark.parametrize(
    "name", sampled([name for name, given in CELLS.items() if given.get("precision", "bf16") == "bf16"], 3)
)
def test_a_model_traced_in_other_shapes_is_as_good_as_new(name):
    """Larger, smaller, longer, shorter, and back: each trace is that of a model built for it, byte for byte."""
    cell, tracer = a_small_cell(name), Tracer(PROFILE)
    for batch, length in ((6, 64), (12, 32), (6, 128), (6, 64)):
        shaped = cell.model_copy(
            update={
                "batch_size": batch,
                "micro_batch_size": min(batch, 2 * cell.micro_batch_size),
                "sequence_length": length,
            }
        )
        again = predict(shaped, PROFILE, settings=ENDLESS, tracer=tracer)

        fresh = predict(shaped, PROFILE, settings=ENDLESS)
        assert fresh.replayed == again.replayed
        assert [event[:1] + event[2:] for event in fresh.events] == [event[:1] + event[2:] for event in again.events]
