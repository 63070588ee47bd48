"""What the blocks of a snapshot belong to: by their stacks, and by few rules where there are none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator_traces import SETTINGS, traces
from meftbench.prediction.allocator import snapshot
from meftbench.snapshots.owners import CATEGORIES, WORKSPACES, category_of, forward_of, own_line, owned_blocks
from meftbench.snapshots.owners import timeline as timeline_of
from meftbench.snapshots.replay import replay
from meftbench.snapshots.snapshot import Frame
from meftbench.snapshots.state import state_before
from snapshots import FRAMES, MiB, a_block, a_segment, a_snapshot, a_step, an_entry, checked

TORCH = "/opt/lib/site-packages/torch"
LINEAR = Frame(f"{TORCH}/nn/modules/linear.py", 134, "forward")
BERT = Frame("/opt/lib/site-packages/transformers/models/bert/modeling_bert.py", 389, "forward")
TRAIN = Frame("/home/me/work/train.py", 7, "main")
BACKWARD = Frame(f"{TORCH}/autograd/graph.py", 800, "_engine_run_backward")
ADAM = Frame(f"{TORCH}/optim/adamw.py", 150, "_init_group")


@pytest.mark.parametrize(
    ("stack", "category"),
    [
        ((), "in the trace"),
        ((TRAIN,), "in the trace"),
        ((LINEAR, BERT, TRAIN), "forward"),
        ((BACKWARD, TRAIN), "backward"),
        ((Frame("??", 0, "torch::autograd::Engine::thread_main"),), "backward"),
        ((Frame("/me/ops.py", 3, "backward"), Frame(f"{TORCH}/autograd/function.py", 300, "apply")), "backward"),
        ((LINEAR, BERT, BACKWARD, TRAIN), "backward"),
        ((ADAM, TRAIN), "optimizer"),
        ((Frame("C:\\lib\\bitsandbytes\\optim\\adamw.py", 9, "init_state"),), "optimizer"),
        ((LINEAR, Frame("/me/train.py", 9, "closure"), ADAM), "forward"),
        ((BACKWARD, Frame("/me/train.py", 9, "closure"), ADAM), "backward"),
        ((Frame("CUDABlas.cpp", 0, "at::cuda::getNewWorkspace()"), LINEAR, BERT), "workspace"),
        ((Frame("parameters", 0, "aten::zeros"), Frame("phase", 0, "optimizer")), "optimizer"),
    ],
)
def test_the_innermost_frame_that_tells_decides(stack, category):
    """What is computed again in backward belongs to backward; a step that an optimizer runs does not belong to it."""
    assert category == category_of(stack)
    assert category in CATEGORIES


def test_a_line_of_code_is_the_innermost_outside_of_torch():
    """Without the folders of the machine; without a forward, the innermost line of all."""
    assert "transformers/models/bert/modeling_bert.py:389 forward" == own_line((LINEAR, BERT, TRAIN))
    assert "transformers/models/bert/modeling_bert.py:389 forward" == forward_of((LINEAR, BERT, TRAIN))
    assert "work/train.py:7 main" == own_line((ADAM, TRAIN))
    assert "work/train.py:7 main" == forward_of((ADAM, TRAIN))
    assert ("only torch's own code", "no stack") == (own_line((LINEAR,)), own_line(()))
    assert "b?/a.py:1 f?" == own_line((Frame("/b\n/a.py", 1, "f\x1b"),))


def owned(content):
    snapshot = checked(content)
    state = state_before(snapshot)
    return owned_blocks(snapshot, state, replay(snapshot, state))


def test_blocks_have_their_birth_their_end_and_their_line():
    stays, goes = owned(a_step())

    assert (12 * MiB, 1, None, "forward") == (stays.size, stays.born, stays.freed, stays.category)
    assert (8 * MiB, 3, 4, "in the trace") == (goes.size, goes.born, goes.freed, goes.category)
    assert "transformers/models/bert/modeling_bert.py:389 forward" == stays.module
    assert [False, True, True, False] == [goes.alive_after(number) for number in (2, 3, 3, 4)]


def test_blocks_from_before_the_trace_are_called_so():
    """Freed in it or not; a workspace of 8,320 KiB is known by its size, if it stays."""
    size = WORKSPACES[0]
    blocks = [a_block(size, state="active_allocated"), a_block(20 * MiB - size)]
    trace = [an_entry("free_requested", 32 * MiB, MiB * 5), an_entry("free_completed", 32 * MiB, MiB * 5)]

    found = owned(a_snapshot([a_segment(0, *blocks), a_segment(32 * MiB, a_block(20 * MiB))], trace))

    assert [("workspace", -1, None), ("before the trace", -1, 0)] == [(b.category, b.born, b.freed) for b in found]


@pytest.mark.parametrize("size", WORKSPACES)
def test_the_first_block_of_a_workspaces_size_that_stays_is_one(size):
    """The second is not, nor is one with a stack of its own."""

    def of(stack):
        trace, segments = [], []
        for index in range(2):
            place = index * 64 * MiB
            trace += [an_entry("segment_alloc", place, 40 * MiB), an_entry("alloc", place, size, frames=stack)]
            segments.append(a_segment(place, a_block(size, state="active_allocated"), a_block(40 * MiB - size)))
        return [block.category for block in owned(a_snapshot(segments, trace))]

    assert ["workspace", "in the trace"] == of(())
    assert ["forward", "forward"] == of(FRAMES)


@given(traces(), SETTINGS, st.floats(0, 1), st.integers(1, 30))
def test_categories_add_up_to_what_is_allocated(events, settings, share, points):
    """At the peak and at every point of the timeline, which misses no peak."""
    shot = snapshot(events, settings)
    first = int(share * len(shot["device_traces"][0]))
    recorded = checked(shot | {"device_traces": [shot["device_traces"][0][first:]]})
    state = state_before(recorded)
    replayed = replay(recorded, state)

    blocks = owned_blocks(recorded, state, replayed)

    peak = replayed.peak("allocated")
    assert peak == sum(block.size for block in blocks if block.alive_after(replayed.peak_at))
    drawn = timeline_of(blocks, replayed, points)
    totals = [sum(levels) for levels in zip(*drawn["levels"].values(), strict=True)]
    moments = [replayed.before, *replayed.after]
    assert [moments[number].allocated for number in drawn["at"]] == totals
    assert peak == max(totals)
    assert points >= len(totals)
