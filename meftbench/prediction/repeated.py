"""Tells steps by their events alone: what a counter sees in them, and the events of a later step from those of the
first, which are the same but for what the first step leaves alive.

What it leaves alive is the optimizer's state, which later steps do not allocate again. (tests/prediction/
test_repeated.py compares this with steps that were traced one after the other.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from meftbench.prediction.allocator import AGAIN, ONCE, Event
from meftbench.prediction.cuda_counter import WORKSPACE
from meftbench.probes.memory_counted import GRADIENT, Observed, StorageCounter, observe


def step_after(first: list[Event]) -> list[Event]:
    """The events of the second step and of every later one, given those of the `first`."""
    born: dict[int, int] = {}
    for index, event in enumerate(first):
        if event.kind == "alloc":
            born[event.key] = index
        elif event.kind == "free":
            born.pop(event.key, None)
    left_alive = set(born.values())
    later: list[Event] = []
    later_alive: set[int] = set()
    for index, event in enumerate(first):
        kind, key, nbytes, category, origin = event
        if kind in ("phase", ONCE, AGAIN):
            later.append(event)
        elif kind == "alloc" and index not in left_alive:
            # ~key is a new key: the old one, freed in the first step, may have passed to the optimizer's state.
            later.append(Event(kind, ~key, nbytes, category, origin))
            later_alive.add(key)
        elif kind != "alloc" and key in later_alive:
            later.append(Event(kind, ~key, nbytes, category, origin))
            if kind == "free":
                later_alive.remove(key)
    return later


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
