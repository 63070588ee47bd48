"""Memory snapshots of torch made by hand, in the form that torch.cuda.memory._snapshot() returns."""

from __future__ import annotations

import pickle

from meftbench.snapshots.checks import checked_snapshot
from meftbench.snapshots.snapshot import DeviceSnapshot

MiB = 2**20
BASE = 0x7F00_0000_0000
FRAMES = [
    {"filename": "/home/me/site-packages/torch/nn/modules/linear.py", "line": 134, "name": "forward"},
    {"filename": "/home/me/site-packages/transformers/models/bert/modeling_bert.py", "line": 389, "name": "forward"},
    {"filename": "/home/me/train.py", "line": 7, "name": "main"},
]


def an_entry(action, address, size, stream=0, frames=(), **more):
    """One entry of a trace; addresses count from BASE, and sizes are in bytes."""
    key = "device_free" if action == "oom" else "addr"
    place = address if action == "oom" else BASE + address
    return {"action": action, key: place, "size": size, "stream": stream, "time_us": 0, "frames": [*frames], **more}


def a_block(size, requested=0, state="inactive", frames=()):
    return {"size": size, "requested_size": requested or size, "state": state, "frames": [*frames]}


def a_segment(address, *blocks, stream=0, kind="large", expandable=False, pool=(0, 0), device=0):
    """A segment that begins at BASE + address, with its blocks one behind the other."""
    position, placed = BASE + address, []
    for block in blocks:
        placed.append({"address": position, **block})
        position += block["size"]
    return {
        "device": device,
        "address": BASE + address,
        "total_size": position - BASE - address,
        "stream": stream,
        "segment_type": kind,
        "segment_pool_id": pool,
        "is_expandable": expandable,
        "frames": [],
        "blocks": placed,
    }


def a_snapshot(segments=(), trace=(), **settings):
    return {"segments": [*segments], "device_traces": [[*trace]], "allocator_settings": settings}


def a_step(**more):
    """12 MiB are allocated in a forward and stay; 8 MiB come and go in the segment that is taken for them."""
    stays, goes = 12 * MiB, 8 * MiB
    trace = [
        an_entry("segment_alloc", 0, stays),
        an_entry("alloc", 0, stays, frames=FRAMES),
        an_entry("segment_alloc", 32 * MiB, 20 * MiB),
        an_entry("alloc", 32 * MiB, goes),
        an_entry("free_requested", 32 * MiB, goes),
        an_entry("free_completed", 32 * MiB, goes),
    ]
    segments = [a_segment(0, a_block(stays, stays, "active_allocated", FRAMES)), a_segment(32 * MiB, a_block(20 * MiB))]
    return a_snapshot(segments, trace, **more)


def checked(content):
    """Device 0 of a snapshot, after the checks that a file goes through."""
    whole = checked_snapshot(content, "snapshot.pickle")
    return DeviceSnapshot(whole.settings, 0, whole.segments, whole.traces.get(0, ()))


def written(folder, content, name="snapshot.pickle"):
    file = folder / name
    file.write_bytes(pickle.dumps(content))
    return file
