"""Tells steps by their events alone: what a counter sees in them, and the events of a later step from those of the
first, which are the same but for what the first step leaves alive.

What it leaves alive is the optimizer's state, which later steps do not allocate again. (tests/prediction/
test_repeated.py compares this with steps that were traced one after the other.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from meftbench.prediction.allocator import AGAIN, ONCE, Event
from meftbench.prediction.columns import Trace
from meftbench.prediction.cuda_counter import WORKSPACE
from meftbench.probes.memory_counted import Observed, observe
from meftbench.probes.storage_counter import GRADIENT, StorageCounter


def step_after(first: Trace) -> Trace:
    """The second step and every later one, given the `first`. Its storages have other numbers than those of the first
    step, of which some are alive; all later steps have the same, since none is alive when one of them ends."""
    alive = np.zeros(int(first.storage.max(initial=-1)) + 1, dtype=np.bool_)
    alive[first.storage[first.is_kind("alloc")]] = True
    alive[first.storage[first.is_kind("free")]] = False
    born_here = np.zeros(len(alive), dtype=np.bool_)
    born_here[first.storage[first.is_kind("alloc")]] = True
    comes_again = born_here & ~alive
    of_storage = first.storage >= 0
    later = first.chosen(~of_storage | comes_again[first.storage])
    return replace(later, storage=np.where(later.storage >= 0, later.storage + len(alive), -1))


def told_steps(events: list[Event], starts: list[int]) -> list[Observed]:
    """What a counter would have seen in each of the steps that begin with the events of the numbers `starts`."""
    counter = StorageCounter()
    counter.live[WORKSPACE] = 0
    storages: dict[int, tuple[int, str]] = {}
    _tell(events[: starts[0]], counter, storages, counter.mark)
    return [
        observe(counter, partial(_tell, events[start:end], counter, storages), lambda: None)
        for start, end in zip(starts, [*starts[1:], None], strict=True)
    ]


def _tell(
    events: list[Event], counter: StorageCounter, storages: dict[int, tuple[int, str]], mark: Callable[[str], None]
) -> None:
    """Counts `events`. mark: called with the name of each phase that begins.

    storages: sizes in whole blocks, and categories, of what is alive, by key; changed here.
    """
    for kind, key, nbytes, category, origin in events:
        if kind == "phase":
            mark(category)
        elif kind in (ONCE, AGAIN):
            continue
        elif kind == "alloc":
            storages[key] = size, _ = -(-nbytes // counter.block) * counter.block, category
            counter.gain(size, category)
            if category != "host":
                counter.gradients.born(key)
        else:
            size, old_category = storages.pop(key)
            counter.lose(size, old_category)
            if kind == "book":
                storages[key] = size, category
                counter.live[category] += size
                counter.total += size
                if origin == GRADIENT:
                    counter.gradients.arrived(key, size)
            else:
                counter.gradients.ended(key)
