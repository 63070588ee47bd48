"""Measured times: what their samples can show, and what is said where they cannot."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_record, a_run, changed, measured
from meftbench.records.record import Metric
from meftbench.verdicts import noise
from meftbench.verdicts.compare import compare
from meftbench.verdicts.noise import Evidence, evidences


def samples(count, median=1.0, seed=0):
    """`count` times around `median` seconds, within 1 % of it."""
    draw = random.Random(seed)
    return [median * (1 + draw.uniform(-0.01, 0.01)) for _ in range(count)]


def a_timed_cell(times, **metrics):
    ordered = sorted(times)
    middle = ordered[len(ordered) // 2]
    quartiles = {"min": ordered[len(ordered) // 4], "max": ordered[(3 * len(ordered)) // 4]}
    return a_record(
        metrics={"step_time_s": Metric(middle, "measured", n=len(times), samples=[*times], **quartiles)} | metrics
    )


@pytest.fixture
def compared(tmp_path):
    """The comparison of two runs of one cell."""

    def comparison(before, after, **options):
        return compare(a_run(tmp_path / "a", before), a_run(tmp_path / "b", after), **options)

    return comparison


def test_five_steps_that_are_all_slower_are_worse(compared):
    """With n, p and the interval of the ratio: of 252 orders of ten times two are as extreme, so p is 2/252."""
    (change,) = compared(a_timed_cell(samples(5)), a_timed_cell(samples(5, 1.2, seed=1))).changes

    assert ("worse", (5, 5)) == (change.judgement, change.evidence.n)
    assert 2 / 252 == pytest.approx(change.evidence.p)
    assert 1.1 < change.evidence.low < 1.2 < change.evidence.high < 1.3
    assert "; n 5 and 5, p 0.0079, ratio of medians 1.1" in change.text()


def test_three_steps_show_nothing_and_that_is_said(compared):
    """The most extreme of 20 orders of six times has p 0.1, whatever the times are."""
    comparison = compared(a_timed_cell([1.0, 1.01, 1.02]), a_timed_cell([7.0, 7.01, 7.02]))

    assert ["noise"] == [change.judgement for change in comparison.changes]
    assert 0.1 == pytest.approx(comparison.changes[0].evidence.p)
    assert "1 times have too few samples to show a change (3 and 3, whatever they are)" in comparison.notes[0]


def test_too_few_samples_are_said_by_their_number(compared):
    comparison = compared(a_timed_cell([1.0, 1.01]), a_timed_cell([7.0, 7.01, 7.02]))

    assert "(2 and 3, whatever they are)" in comparison.notes[0]


@pytest.mark.parametrize("before", [[1.0], samples(5)])
@pytest.mark.parametrize("has_test", [True, False])
def test_a_single_step_shows_nothing(compared, monkeypatch, before, has_test):
    """It has no noise of its own to be beyond, with scipy or without."""
    monkeypatch.setattr(noise, "available", lambda: has_test)

    comparison = compared(a_timed_cell(before), a_timed_cell([7.0]))

    assert ["noise"] == [change.judgement for change in comparison.changes]
    assert f"too few samples to show a change ({len(before)} and 1, whatever they are)" in comparison.notes[0]


def test_more_repeats_are_more_samples(tmp_path):
    """Two repeats of three steps each are six samples."""

    def repeats(median):
        return [changed(a_timed_cell(samples(3, median, seed)), repeat=seed) for seed in (0, 1)]

    runs = [a_run(tmp_path / name, *repeats(median)) for name, median in (("a", 1.0), ("b", 1.2))]

    (change,) = compare(*runs).changes

    assert ("worse", (6, 6)) == (change.judgement, change.evidence.n)


def test_a_speed_is_judged_by_the_times_it_is_computed_from(compared):
    """Half the tokens a second: the ratio is below 1, and that is worse."""
    changes = compared(
        a_timed_cell(samples(5), tokens_per_s=measured(100.0)),
        a_timed_cell(samples(5, 2.0, seed=1), tokens_per_s=measured(50.0)),
        metrics=["tokens_per_s"],
    ).changes

    assert ["worse"] == [change.judgement for change in changes]
    assert changes[0].evidence.high < 0.6


def test_a_part_of_the_step_without_samples_is_no_regression(compared):
    """The samples of the whole step say nothing of its forward pass."""
    changes = compared(
        a_timed_cell(samples(5), forward_s=measured(0.5)),
        a_timed_cell(samples(5, 2.0, seed=1), forward_s=measured(0.6)),
        metrics=["forward_s"],
    ).changes

    assert ["noise"] == [change.judgement for change in changes]


@pytest.mark.parametrize("installed", [None, "1.14.1", "0.19.0rc1"])
def test_without_scipy_quartiles_decide_and_the_cure_is_named(compared, monkeypatch, installed):
    """The comparison still says what it can."""

    def version(name):
        if installed is None:
            raise noise.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(noise, "version", version)

    comparison = compared(a_timed_cell(samples(5)), a_timed_cell(samples(5, 1.2, seed=1)))

    assert [("worse", None)] == [(change.judgement, change.evidence) for change in comparison.changes]
    assert [
        "1 times are judged by whether their quartiles overlap, since scipy 1.15 is not installed: "
        "pip install 'meftbench[compare]'"
    ] == comparison.notes


def test_noise_is_seldom_taken_for_a_change():
    """Of 400 pairs of ten times from one distribution, 5 % have p below 0.05; the interval lets fewer pass."""
    draw = random.Random(1)
    pairs = [([draw.gauss(1, 0.05) for _ in range(10)], [draw.gauss(1, 0.05) for _ in range(10)]) for _ in range(400)]

    claimed = sum(e.shows_change(0.01, rise=True) or e.shows_change(0.01, rise=False) for e in evidences(pairs))

    assert claimed <= 20


TIMES = st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=8)


@given(pairs=st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=4))
def test_evidence_does_not_depend_on_the_other_pairs(pairs):
    """Pairs are tested together as arrays; each is judged as it would be alone."""
    alone = [evidences([pair])[0] for pair in pairs]

    for one, among_others in zip(alone, evidences(pairs), strict=True):
        assert one.p == pytest.approx(among_others.p)
        assert (one.n, one.low, one.high) == (among_others.n, among_others.low, among_others.high)
        assert 0 <= one.p <= 1
        assert one.low <= one.high


@given(times=TIMES)
def test_a_run_held_against_itself_shows_no_change(times):
    """The same samples, whatever they are."""
    (evidence,) = evidences([(times, times)])

    assert not evidence.shows_change(0.0, rise=True)
    assert not evidence.shows_change(0.0, rise=False)


def test_so_many_samples_could_show_a_change():
    """4 and 4 have 2/70 at best, below 5 %; 3 and 4 have 2/35, and 3 and 3 have 2/20."""
    enough = {n: Evidence(n, 1.0, 1.0, 1.0).enough for n in [(3, 3), (3, 4), (4, 4), (2, 5), (2, 8), (1, 99)]}

    assert {(3, 3): False, (3, 4): False, (4, 4): True, (2, 5): False, (2, 8): True, (1, 99): True} == enough


@given(st.floats(1.05, 9), st.booleans())
def test_evidence_shows_a_change_in_its_own_direction_alone(factor, rise):
    """A cell's value may have risen where the median of all its samples fell; that shows neither."""
    ratio = factor if rise else 1 / factor
    evidence = Evidence((9, 9), 0.001, ratio * 0.999, ratio * 1.001)

    assert evidence.shows_change(0.01, rise)
    assert not evidence.shows_change(0.01, not rise)


def test_a_time_that_fell_is_not_worse_though_its_value_rose(compared):
    """The value of the cell and its samples disagree: noise."""
    before, after = a_timed_cell(samples(9)), a_timed_cell(samples(9, 0.5))
    claimed = replace(after.metrics["step_time_s"], value=2.0)

    (change,) = compared(before, changed(after, metrics={"step_time_s": claimed})).changes

    assert ("noise", 2.0) == (change.judgement, change.after)
