"""The allocator's rules against traces that torch recorded on real GPUs."""

from __future__ import annotations

import pytest
from real_traces import TRACES, as_pickled

from meftbench.snapshots.file import read_device
from meftbench.snapshots.replay import allocations, replay
from meftbench.snapshots.state import state_before
from meftbench.units import format_bytes
from snapshots import checked, written

ALLOCATIONS = {"00": 3907, "01": 4404, "02": 785, "03": 5002, "04": 6288, "05": 2218, "06": 1704, "12": 6651}


@pytest.fixture(params=TRACES, ids=lambda path: path.name[:2])
def real(request, tmp_path):
    """The number of a trace, and what was read from it as a pickle."""
    return request.param.name[:2], read_device(written(tmp_path, as_pickled(request.param)))


def test_all_traces_are_here():
    assert sorted(ALLOCATIONS) == [path.name[:2] for path in TRACES]


def test_every_allocation_gets_the_address_that_torch_chose(real):
    """All of them, and every segment is taken from the device when torch took it."""
    name, snapshot = real

    found = replay(snapshot)

    assert (ALLOCATIONS[name], ALLOCATIONS[name]) == (found.allocations, found.agreeing)
    assert (None, 0) == (found.first_difference, found.private)


def test_reserved_memory_is_that_of_the_device(real):
    """Peak and end by the rules are those in the trace; the end is the sum of the segments in the snapshot."""
    _, snapshot = real

    found = replay(snapshot)

    assert found.peak("reserved") == found.replayed_reserved_peak
    assert found.after[-1].reserved == found.replayed_reserved
    assert sum(segment.size for segment in snapshot.segments) == found.replayed_reserved


def test_the_replay_ends_with_the_blocks_of_the_snapshot(real):
    """Bytes of blocks in use, unsplit rests included, and of the requests in them."""
    _, snapshot = real
    in_use = [block for segment in snapshot.segments for block in segment.blocks if block.state == "allocated"]

    last = replay(snapshot).after[-1]

    assert sum(block.size for block in in_use) == last.allocated
    assert sum(block.requested for block in in_use) == last.requested


def test_every_allocation_has_a_birth_and_an_end(real):
    """They are as many as the trace has; alive at the end are those whose address is in use in the snapshot."""
    name, snapshot = real
    in_use = {b.address for segment in snapshot.segments for b in segment.blocks if b.state == "allocated"}
    before = {block.start for block in state_before(snapshot).live}
    freed_again = {entry.address for entry in snapshot.trace if entry.action == "free_completed"}

    found = allocations(snapshot.trace)

    assert ALLOCATIONS[name] == len(found)
    assert all(one.freed is None or one.freed > one.born for one in found)
    alive = {snapshot.trace[one.born].address for one in found if one.freed is None}
    assert in_use - alive == (before - freed_again) & in_use - alive
    assert alive <= in_use


def test_recordings_from_the_first_allocation_on_begin_with_an_empty_device():
    """Three were taken so: undone, nothing is left of them."""
    empty = [path.name[:2] for path in TRACES if state_before(checked(as_pickled(path))).is_empty]

    assert ["00", "01", "02"] == empty


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.name[:2])
def test_inspect_tells_a_real_trace_within_80_columns(path, tmp_path, cli):
    """Plain text where it is piped; all addresses agree; the figures are those of the trace."""
    written(tmp_path, as_pickled(path))

    code, out, _ = cli("inspect", "snapshot.pickle", "--quiet")

    assert 0 == code
    assert all(len(line) <= 80 and line.isprintable() for line in out.splitlines())
    count = f"{ALLOCATIONS[path.name[:2]]:,}"
    assert f"{count} of {count}  as torch chose them, replayed" in out
    reserved = format_bytes(replay(checked(as_pickled(path))).peak("reserved"))
    assert f"  peak reserved       {reserved:>16}  measured" in out
