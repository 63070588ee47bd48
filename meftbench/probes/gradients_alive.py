"""How many bytes of gradients were alive at a moment of a step, which is known only afterwards (docs/design.md 6).

In the backward pass a gradient is a tensor like any other until autograd gives it to its parameter: a reversible stack
returns all of its gradients at its very end, long after the peak. So the time at which every storage was allocated is
kept, and the bytes are counted once the gradients have arrived.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class _Lifetime:
    size: int
    birth: int
    end: int | None = None

    def holds(self, moment: int) -> bool:
        return self.birth <= moment and (self.end is None or self.end >= moment)


class GradientsAlive:
    """Lifetimes of the gradients of trained parameters; the time is the number of allocations.

    clock: allocations so far. A storage that ends after allocation n was alive right after n, not after n + 1.
    """

    def __init__(self) -> None:
        self.clock = 0
        self._births: dict[int, int] = {}
        self._by_key: dict[int, _Lifetime] = {}
        self._all: list[_Lifetime] = []

    def born(self, key: int) -> None:
        """The last allocation made the storage `key`; keys may be used again once a storage has ended."""
        self._births[key] = self.clock

    def arrived(self, key: int, size: int) -> None:
        """The storage `key` of `size` bytes turns out to be a trained parameter's gradient, or a part of it."""
        if key in self._by_key:
            return
        self._by_key[key] = _Lifetime(size, self._births[key])
        self._all.append(self._by_key[key])

    def ended(self, key: int) -> None:
        """The storage `key` is freed."""
        self._births.pop(key, None)
        if key in self._by_key:
            self._by_key.pop(key).end = self.clock

    def forget_ended(self) -> None:
        """A window of observation begins: gradients that ended before it are no longer needed."""
        self._all = list(self._by_key.values())

    def bytes_at(self, moment: int) -> int:
        """Bytes of gradients, and of storages that have since become one, right after allocation number `moment`."""
        return sum(lifetime.size for lifetime in self._all if lifetime.holds(moment))
