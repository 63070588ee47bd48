"""The schedule: which cell next, given what has finished."""

from hypothesis import given
from hypothesis import strategies as st

from builders import a_cell
from meftbench.runner.schedule import Attempt, Plan, Schedule, dominates, next_attempt, pending


def a_plan(cells, on_oom="record", repeats=1):
    return Plan(cells, {cell.cell_id: repeats for cell in cells}, on_oom)


def batches(*sizes, **fields):
    return [a_cell(batch_size=size, **fields) for size in sizes]


def played(plan, capacity):
    """Run a plan against a device on which cells of up to `capacity` samples × tokens fit: (batch, length, status)."""
    finished, history = {}, []
    while (attempt := next_attempt(plan, finished)) is not None:
        cell = attempt.cell
        fits = cell.micro_batch_size * cell.sequence_length <= capacity
        status = "skipped" if attempt.dominated_by else "ok" if fits else "oom"
        finished[attempt.key] = status
        history.append((cell.micro_batch_size, cell.sequence_length, status))
    return history


def test_cells_are_run_in_the_order_of_the_suite():
    assert [(8, 128, "ok"), (2, 128, "ok"), (4, 128, "ok")] == played(a_plan(batches(8, 2, 4)), 10**6)


def test_every_cell_once_and_then_again():
    """What drifts on a machine falls on all cells alike."""
    one, two = batches(1, 2)

    assert [(one, 0), (two, 0), (one, 1), (two, 1)] == [
        (attempt.cell, attempt.repeat) for attempt in a_plan([one, two], repeats=2).attempts
    ]


def test_what_has_finished_or_is_running_is_not_begun():
    one, two, three = batches(1, 2, 3)

    assert Attempt(three, 0) == next_attempt(a_plan([one, two, three]), {(one.cell_id, 0): "ok"}, {(two.cell_id, 0)})
    assert next_attempt(a_plan([one]), {(one.cell_id, 0): "error"}) is None


def test_a_cell_for_which_there_is_no_room_is_passed_over():
    one, two = a_cell(), a_cell(device="cuda")

    assert Attempt(two, 0) == next_attempt(a_plan([one, two]), {}, (), lambda cell: cell.device == "cuda")


def test_record_tries_every_cell():
    assert ["oom", "oom"] == [status for *_, status in played(a_plan(batches(4, 8)), 0)]


def test_skip_larger_starts_no_cell_that_needs_more():
    """Larger in batch, length or both is skipped, and says because of whom; smaller in one of them is tried."""
    cells = [a_cell(batch_size=b, sequence_length=s) for b in (2, 8, 4) for s in (64, 128)]

    assert [
        (2, 64, "ok"),
        (2, 128, "ok"),
        (8, 64, "oom"),
        (8, 128, "skipped"),
        (4, 64, "ok"),
        (4, 128, "oom"),
    ] == played(a_plan(cells, "skip-larger"), 256)
    failing = cells[2]
    attempt = next_attempt(
        a_plan(cells, "skip-larger"), {(c.cell_id, 0): "ok" for c in cells[:2]} | {(failing.cell_id, 0): "oom"}
    )
    assert failing.cell_id == attempt.dominated_by


def test_a_timeout_or_an_error_dominates_nobody():
    small, large = batches(1, 2)

    assert next_attempt(a_plan([small, large], "skip-larger"), {(small.cell_id, 0): "timeout"}).dominated_by is None


def test_another_method_or_lever_or_precision_is_not_dominated():
    """Only a cell that is the same but for its sizes says something of another."""
    small = a_cell(method="lora", batch_size=1)

    assert dominates(small, a_cell(method="lora", batch_size=2))
    for other in (
        a_cell(method="full", batch_size=2),
        a_cell(method="lora+checkpoint", batch_size=2),
        a_cell(method="lora", batch_size=2, precision="bf16"),
        a_cell(method="lora", batch_size=2, micro_batch_size=1, sequence_length=64),
    ):
        assert not dominates(small, other)


def test_gradient_accumulation_does_not_make_a_cell_larger_than_its_micro_batch():
    """Batch 8 in pieces of 1 fits where batch 2 in one piece did not."""
    assert not dominates(a_cell(batch_size=2), a_cell(batch_size=8, micro_batch_size=1))


def test_bracket_tries_the_middle_between_a_fitting_and_a_failing_batch():
    """After 1 fits and 64 fails: 8, then 16 or 32, until the boundary is known; only then the rest."""
    history = played(a_plan(batches(1, 64, 2, 4, 8, 16, 32), "bracket"), 16 * 128)

    assert [(1, "ok"), (64, "oom"), (8, "ok"), (16, "ok"), (32, "oom")] == [(b, status) for b, _, status in history[:5]]
    assert {2, 4} == {batch for batch, *_ in history[5:]}


def test_bracket_knows_one_line_from_another():
    """A fitting batch of another length brackets nothing."""
    cells = batches(1, sequence_length=16) + batches(32, 8, 16, 4, sequence_length=128)

    history = played(a_plan(cells, "bracket"), 8 * 128)

    assert [(1, 16, "ok"), (32, 128, "oom"), (8, 128, "ok"), (16, 128, "oom"), (4, 128, "ok")] == history


def test_cells_outside_the_selection_still_dominate():
    """`--where` leaves a cell out; what an earlier execution found of it counts."""
    small, large = batches(1, 2)
    plan = Plan([small, large], {large.cell_id: 1}, "skip-larger")

    assert small.cell_id == next_attempt(plan, {(small.cell_id, 0): "oom"}).dominated_by


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from(["full", "lora"])), min_size=1, unique=True
    ),
    capacity=st.integers(0, 90),
    repeats=st.integers(1, 2),
)
def test_every_policy_ends_every_attempt_once_and_never_misjudges(sizes, capacity, repeats):
    """All policies agree on what fits; what is skipped would have failed; nothing is run twice."""
    cells = [a_cell(batch_size=b, sequence_length=s, method=m) for b, s, m in sizes]
    for policy in ("record", "skip-larger", "bracket"):
        plan = a_plan(cells, policy, repeats)
        history = played(plan, capacity)
        assert len(cells) * repeats == len(history) == len(plan.attempts)
        assert all((status == "ok") == (batch * length <= capacity) for batch, length, status in history)
        assert not pending(plan, {attempt.key: "ok" for attempt in plan.attempts})


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 6), st.sampled_from(["counted", "cuda"])), min_size=1, unique=True
    ),
    capacity=st.integers(0, 40),
    policy=st.sampled_from(["record", "skip-larger", "bracket"]),
    at_a_time=st.integers(1, 3),
)
def test_a_schedule_that_changes_says_what_one_made_anew_says(sizes, capacity, policy, at_a_time):
    """After every start and end, of several attempts at a time on two kinds of devices."""
    plan = a_plan([a_cell(batch_size=b, sequence_length=s, device=device) for b, s, device in sizes], policy)
    schedule, finished, running = Schedule(plan, {}, kind=lambda cell: cell.device), {}, []
    of_kind = {"counted": lambda cell: cell.device == "counted", "cuda": lambda cell: cell.device == "cuda"}
    for kind in ["counted", "cuda"] * (2 * len(sizes) + at_a_time):
        expected = next_attempt(plan, finished, {attempt.key for attempt in running}, of_kind[kind])
        attempt = schedule.start({kind})
        assert expected == attempt
        running += [attempt] if attempt else []
        if running and (len(running) >= at_a_time or attempt is None):
            ended = running.pop(0)
            fits = ended.cell.micro_batch_size * ended.cell.sequence_length <= capacity
            finished[ended.key] = "skipped" if ended.is_skipped else "ok" if fits else "oom"
            schedule.end(ended.key, finished[ended.key])

    assert len(plan.attempts) == len(finished) + len(running)
