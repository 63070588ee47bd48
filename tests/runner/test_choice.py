"""Which learning rates are tried: with `first-seed`, of the first seed all, of the others the best alone."""

from builders import a_cell
from meftbench.plan.training import Training
from meftbench.runner.choice import Rates
from stand_in import BRIEF, FINE
from sweeps import a_suite, statuses, sweep, told


def trained(rate=1e-3, seed=FINE, grid="first-seed", method="full", **training):
    return a_cell(method=method, seed=seed, training=Training(task="rte", learning_rate=rate, grid=grid, **training))


LOW, HIGH = trained(1e-4), trained(1e-3)
LATER_LOW, LATER_HIGH = trained(1e-4, BRIEF), trained(1e-3, BRIEF)
CELLS = [LOW, HIGH, LATER_LOW, LATER_HIGH]


def scored(*pairs):
    return {cell.cell_id: score for cell, score in pairs}


def better_rate(cell, cells, scores):
    return Rates(cells).better(cell, scores)


def test_another_rate_did_better():
    """A later seed leaves out the rate that the first has beaten; what did better is named."""
    scores = scored((LOW, 0.5), (HIGH, 0.7))

    assert HIGH == better_rate(LATER_LOW, CELLS, scores)
    assert better_rate(LATER_HIGH, CELLS, scores) is None


def test_the_first_seed_tries_all():
    assert better_rate(LOW, CELLS, scored((LOW, 0.5), (HIGH, 0.7))) is None


def test_a_rate_without_a_score_leaves_the_choice_open():
    """It failed, or is still running."""
    assert better_rate(LATER_LOW, CELLS, scored((HIGH, 0.7))) is None


def test_of_equals_the_first():
    assert LOW == better_rate(LATER_HIGH, CELLS, scored((LOW, 0.7), (HIGH, 0.7)))


def test_every_seed_tries_all_where_that_was_asked():
    cells = [trained(rate, seed, "every-seed") for seed in (FINE, BRIEF) for rate in (1e-4, 1e-3)]

    assert better_rate(cells[2], cells, scored((cells[0], 0.5), (cells[1], 0.7))) is None


def test_another_method_chooses_for_itself():
    """Or another setting of the training: only rate and seed may differ."""
    others = [trained(method="lora", seed=BRIEF), trained(1e-4, BRIEF, epochs=1.0)]

    scores = scored((LOW, 0.5), (HIGH, 0.7))

    assert [None, None] == [better_rate(cell, [*CELLS, *others], scores) for cell in others]


def test_a_cell_without_a_task_has_no_rate():
    assert better_rate(a_cell(), [a_cell()], {}) is None


def test_a_beaten_rate_is_skipped(tmp_path):
    """With a record that says by what; the others are trained."""
    run = sweep(a_suite(*CELLS), tmp_path / "run")

    assert ["ok", "ok", "skipped", "ok"] == statuses(run)
    assert LATER_LOW.cell_id == run.records[2].cell_id
    detail = run.records[2].status_detail
    assert ("RateNotChosen", HIGH.cell_id) == (detail["type"], detail["beaten_by"])
    assert f"{HIGH.label} did better" == detail["message"]


def test_a_run_taken_up_again_chooses_as_before(tmp_path, told_file):
    """By the scores that stand in its records; nothing is trained twice."""
    suite = a_suite(*CELLS)
    sweep(suite, tmp_path / "run", limit=2)

    run = sweep(suite, tmp_path / "run", resume=True)
    again = sweep(suite, tmp_path / "run", resume=True)

    assert ["ok", "ok", "skipped", "ok"] == statuses(run) == statuses(again)
    assert [LOW.cell_id, HIGH.cell_id, LATER_HIGH.cell_id] == [cell_id for cell_id, _ in told(told_file)]


def test_where_the_first_seed_is_not_run_no_rate_is_left_out(tmp_path):
    run = sweep(a_suite(*CELLS), tmp_path / "run", where=lambda cell: cell.seed == BRIEF)

    assert ["ok", "ok"] == statuses(run)


def test_several_at_a_time(tmp_path):
    """A later seed may begin before the choice can be made; the rate that is best has every seed all the same."""
    cells = [trained(rate, seed) for seed in (0, 1, 20) for rate in (1e-4, 1e-3)]

    run = sweep(a_suite(*cells), tmp_path / "run", jobs=2)

    best = [r for r in run.records if r.cell["training"]["learning_rate"] == 1e-3]
    assert ["ok"] * 3 == [record.status for record in best]
    assert 6 == len(run.records)
