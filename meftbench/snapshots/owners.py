"""To what the blocks of a memory snapshot belong: a category by simple rules, and a line of the model's code.

The rules read stacks where the snapshot has them. torch runs backward in threads of its own: without C++ frames
(stacks="python") what is allocated there has no stack, and its category is "in the trace".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath

from meftbench.snapshots.replay import Replay, allocations
from meftbench.snapshots.snapshot import DeviceSnapshot, Frame, Frames
from meftbench.snapshots.state import State

CATEGORIES = ("before the trace", "workspace", "forward", "backward", "optimizer", "in the trace")
# Of cuBLAS in torch 2.6 to 2.13: 8,320 KiB; 32 MiB on Hopper; 4 MiB on older cards.
WORKSPACES = (8_519_680, 33_554_432, 4_194_304)
_UNMISTAKABLE_WORKSPACE = 8_519_680  # no common tensor has this size, the others some have

NO_STACK = "no stack"
ONLY_TORCH = "only torch's own code"
_OWN_PHASES = {"forward": "forward", "backward": "backward", "optimizer": "optimizer"}
_CUBLAS = re.compile(r"cublas(?:lt)?workspace|getNewWorkspace|CublasHandlePool|cublasCreate", re.IGNORECASE)
_BACKWARD = re.compile(r"_engine_run_backward|autograd::.*Engine")
_OPTIMIZER = re.compile(r"(?:^|/)optim[^/]*(?:/|\.py$)")


@dataclass(frozen=True, slots=True)
class Owned:
    """A block in use at some time. All sizes in bytes.

    born, freed: numbers of the entries; -1: before the trace; None: not freed in it.
    where: line of Python outside of torch that asked for it.  module: line of the innermost `forward` there, or
    `where` if there is none.
    """

    size: int
    requested: int
    born: int
    freed: int | None
    category: str
    where: str
    module: str

    def alive_after(self, number: int) -> bool:
        """Whether it is in use after entry `number` of the trace (-1: before the first)."""
        return self.born <= number and (self.freed is None or self.freed > number)


def owned_blocks(snapshot: DeviceSnapshot, state: State, replayed: Replay) -> list[Owned]:
    """Every block that was in use before the trace or was allocated in it, each with what it belongs to."""
    trace = snapshot.trace
    freed_before: dict[int, int] = {}
    known = {block.start for block in state.live}
    for number, entry in enumerate(trace):
        if entry.action == "alloc":
            known.discard(entry.address)
        elif entry.action in ("free_requested", "free_completed") and entry.address in known:
            known.discard(entry.address)
            freed_before[entry.address] = number
    found: list[Owned] = []
    for block in state.live:
        live, freed = block.item, freed_before.get(block.start)
        if live.awaiting:
            continue
        kind = "before the trace"
        if _is_cublas(live.frames) or (live.requested == _UNMISTAKABLE_WORKSPACE and freed is None):
            kind = "workspace"
        found.append(Owned(live.size, live.requested, -1, freed, kind, own_line(live.frames), forward_of(live.frames)))
    seen: set[int] = set()
    for requested, born, freed in allocations(trace):
        frames = trace[born].frames
        kind = category_of(frames)
        if kind == "in the trace" and requested in WORKSPACES and requested not in seen and freed is None:
            kind = "workspace"
        seen.add(requested)
        found.append(Owned(replayed.sizes[born], requested, born, freed, kind, own_line(frames), forward_of(frames)))
    return found


@lru_cache(maxsize=100_000)
def category_of(frames: Frames) -> str:
    """What a stack tells of a block that was allocated in the trace; one of `CATEGORIES`."""
    if _is_cublas(frames):
        return "workspace"
    for frame in frames:
        if frame.filename == "phase" and frame.name in _OWN_PHASES:  # a snapshot that meftbench predicted
            return _OWN_PHASES[frame.name]
    inside_forward = False
    for frame in frames:
        # Modules that are computed again in backward belong to it; an optimizer may be given the step as a function.
        if frame.name == "backward" or _BACKWARD.search(frame.name):
            return "backward"
        if _OPTIMIZER.search(frame.filename.replace("\\", "/")):
            return "forward" if inside_forward else "optimizer"
        inside_forward = inside_forward or _is_forward(frame)
    return "forward" if inside_forward else "in the trace"


@lru_cache(maxsize=100_000)
def own_line(frames: Frames) -> str:
    """The innermost line of Python outside of torch, as "models/bert.py:12 forward"."""
    for frame in frames:
        if _is_own(frame):
            return _line(frame)
    return NO_STACK if not frames else ONLY_TORCH


@lru_cache(maxsize=100_000)
def forward_of(frames: Frames) -> str:
    """The innermost line of a module's `forward` outside of torch; the innermost line if there is none."""
    for frame in frames:
        if _is_forward(frame) and _is_own(frame):
            return _line(frame)
    return own_line(frames)


def _is_cublas(frames: Frames) -> bool:
    return any(_CUBLAS.search(frame.name) for frame in frames)


def _is_forward(frame: Frame) -> bool:
    return frame.name == "forward" or frame.name.endswith(".forward")


def _is_own(frame: Frame) -> bool:
    path = frame.filename.replace("\\", "/")
    return path.endswith(".py") and "torch" not in PurePosixPath(path).parts


def _line(frame: Frame) -> str:
    """A frame without the folders of the machine: what lies below site-packages, or the file and its folder."""
    path = frame.filename.replace("\\", "/")
    _, installed, below = path.rpartition("site-packages/")
    short = below if installed else "/".join(PurePosixPath(path).parts[-2:])
    text = f"{short}:{frame.line} {frame.name}"
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def bytes_by(blocks: list[Owned], key: Callable[[Owned], str]) -> list[tuple[str, int, int]]:
    """What the blocks belong to, the bytes of their blocks and their number, largest first."""
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for block in blocks:
        sizes[key(block)] += block.size
        counts[key(block)] += 1
    return [(name, size, counts[name]) for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))]


def timeline(blocks: list[Owned], replayed: Replay, points: int = 600) -> dict[str, object]:
    """For a figure: `at`, numbers of entries (0: before the first); `levels`, allocated bytes of each category then;
    `reserved`.

    With more entries than `points`, of each stretch of entries that with the most allocated is taken: no peak is lost.
    """
    changes: dict[int, list[tuple[str, int]]] = {}
    for block in blocks:
        changes.setdefault(block.born + 1, []).append((block.category, block.size))
        if block.freed is not None:
            changes.setdefault(block.freed + 1, []).append((block.category, -block.size))
    moments = [replayed.before, *replayed.after]
    stretch = -(-len(moments) // points)
    chosen = {
        max(range(first, min(first + stretch, len(moments))), key=lambda number: moments[number].allocated)
        for first in range(0, len(moments), stretch)
    }
    level = dict.fromkeys(CATEGORIES, 0)
    levels: dict[str, list[int]] = {name: [] for name in CATEGORIES}
    for number in range(len(moments)):
        for name, change in changes.get(number, ()):
            level[name] += change
        if number in chosen:
            for name in CATEGORIES:
                levels[name].append(level[name])
    at = sorted(chosen)
    return {"at": at, "levels": levels, "reserved": [moments[number].reserved for number in at]}
