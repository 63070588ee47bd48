"""The step after a traced one, from the trace of that one: the same, but for what the first has left alive.

What a first step leaves is the optimizer's state, which every later one finds. (tests/prediction/test_repeated.py
holds it against steps that were traced one after the other.)
"""

from __future__ import annotations

from collections.abc import Callable

from meftbench.prediction.allocator import Event
from meftbench.probes.memory_counted import GRADIENT, StorageCounter


def step_after(first: list[Event]) -> list[Event]:
    """The events of the step that follows one of events `first`, and of every step after that."""
    born: dict[int, int] = {}
    for index, event in enumerate(first):
        if event.kind == "alloc":
            born[event.key] = index
        elif event.kind == "free":
            born.pop(event.key, None)
    left = set(born.values())
    again: list[Event] = []
    alive: set[int] = set()
    for index, event in enumerate(first):
        kind, key, nbytes, category, origin = event
        if kind == "phase":
            again.append(event)
        elif kind == "alloc" and index not in left:
            # A key of its own: that of a storage which died before the state was born may be the state's now.
            again.append(Event(kind, ~key, nbytes, category, origin))
            alive.add(key)
        elif kind != "alloc" and key in alive:
            again.append(Event(kind, ~key, nbytes, category, origin))
            if kind == "free":
                alive.remove(key)
    return again


def tell(events: list[Event], counter: StorageCounter, mark: Callable[[str], None]) -> None:
    """Counts a step of which there are only the events. mark: is called with its phases."""
    held: dict[int, tuple[int, str]] = {}
    for kind, key, nbytes, category, origin in events:
        if kind == "phase":
            mark(category)
        elif kind == "alloc":
            held[key] = -(-nbytes // counter.block) * counter.block, category
            counter.gain(*held[key])
            counter.gradients.born(key)
        else:
            size, before = held.pop(key)
            counter.lose(size, before)
            if kind == "book":
                held[key] = size, category
                counter.live[category] += size
                counter.total += size
                if origin == GRADIENT:
                    counter.gradients.arrived(key, size)
            else:
                counter.gradients.ended(key)
