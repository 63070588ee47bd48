"""Scores against values worked out by hand, and the choice that likelihoods make."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meftbench.catalogue.tasks import TASKS
from meftbench.tasks.scores import choose, constant_score, scores_of
from task_data import a_task


def test_accuracy_and_f1():
    """Of 5 are 3 right; of class 1: 2 found, 1 missed, 1 wrongly: 2·2 / (2·2 + 1 + 1)."""
    scores = scores_of(TASKS["mrpc"], np.array([1, 1, 0, 1, 0]), np.array([1, 1, 1, 0, 0]))

    assert {"accuracy": pytest.approx(3 / 5), "f1": pytest.approx(4 / 6)} == scores
    assert ["f1", "accuracy"] == list(scores_of(TASKS["qqp"], np.array([1]), np.array([1])))


def test_matthews():
    """(TP·TN - FP·FN) / √((TP+FP)(TP+FN)(TN+FP)(TN+FN)) = (2·1 - 1·1) / √(3·3·2·2)."""
    scores = scores_of(TASKS["cola"], np.array([1, 1, 0, 1, 0]), np.array([1, 1, 1, 0, 0]))

    assert {"matthews": pytest.approx(1 / 6)} == scores


def test_correlations():
    """Ranks agree but for one swap of four: 1 - 6·2 / (4·15); Pearson's from its definition."""
    predictions, labels = np.array([0.0, 1.0, 3.0, 2.0]), np.array([0.0, 1.0, 2.0, 5.0])

    scores = scores_of(TASKS["stsb"], predictions, labels)

    assert pytest.approx(0.8) == scores["spearman"]
    assert pytest.approx(5 / math.sqrt(5 * 14)) == scores["pearson"]


def test_predictions_that_do_not_vary():
    """No skill is 0; a correlation with a constant does not exist, and is not called 0."""
    labels = np.array([0, 1, 1])

    assert {"matthews": 0.0} == scores_of(TASKS["cola"], np.array([1, 1, 1]), labels)
    assert {"accuracy": 1 / 3, "f1": 0.0} == scores_of(TASKS["mrpc"], np.array([0, 0, 0]), labels)
    nothing = {"pearson": None, "spearman": None}
    assert nothing == scores_of(TASKS["stsb"], np.array([2.0, 2.0, 2.0]), labels)
    assert nothing == scores_of(TASKS["stsb"], np.array([2.0, np.nan, 1.0]), labels)


def test_the_best_constant_answer():
    """Of four labels three are 1: accuracy 3/4; F1 of always 1 is 2·3 / (2·3 + 1); a correlation has none."""
    labels = np.array([1, 0, 1, 1])

    assert [3 / 4, 0.0, None] == [constant_score(TASKS[name], labels) for name in ("rte", "cola", "stsb")]
    assert pytest.approx(6 / 7) == constant_score(TASKS["qqp"], labels)


def test_f1_of_more_classes_is_their_mean():
    task = a_task("own", labels=("a", "b", "c"), scores=("f1",))

    scores = scores_of(task, np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]))

    assert {"f1": pytest.approx((1 + 2 / 3 + 2 / 3) / 3)} == scores


def test_f1_is_of_the_classes_that_training_has():
    """A class that an evaluation has not, and nobody predicts, counts 0: no prediction changes what is measured."""
    task = a_task("own", labels=("a", "b", "c"), scores=("f1",))

    scores = scores_of(task, np.array([0, 1]), np.array([0, 1]))

    assert {"f1": pytest.approx(2 / 3)} == scores


def test_scores_are_of_as_many_labels():
    for predictions, labels in (([1], [1, 0]), ([], []), ([[1]], [[1]])):
        with pytest.raises(ValueError, match=r"\(N,\) predictions and labels"):
            scores_of(TASKS["rte"], np.array(predictions), np.array(labels))


def test_the_likeliest_choice():
    """By the sum a short answer wins, by the mean over its tokens a long one may; padding never does."""
    likelihoods, lengths = np.array([[-2.0, -3.0, 0.0], [-4.0, -1.0, 0.0]]), np.array([[1, 3, 1], [2, 2, 2]])
    there = np.array([[True, True, False], [True, True, False]])

    assert [0, 1] == choose(likelihoods, lengths, there, normalised=False).tolist()
    assert [1, 1] == choose(likelihoods, lengths, there, normalised=True).tolist()


def test_a_likelihood_that_is_not_a_number_loses():
    choice = choose(
        np.array([[np.nan, -5.0], [np.nan, np.nan]]), np.ones((2, 2)), np.ones((2, 2), bool), normalised=False
    )

    assert [1, 0] == choice.tolist()
    there = np.array([[False, True]])
    assert [1] == choose(np.array([[0.0, np.nan]]), np.ones((1, 2)), there, normalised=False).tolist()


@given(st.data(), st.integers(1, 5), st.integers(1, 5))
def test_padding_changes_no_choice(data, rows, choices):
    """Columns that the mask leaves out, whatever is in them, are as if they were not there."""
    floats = st.lists(st.floats(-100, 0), min_size=choices, max_size=choices)
    real = np.array(data.draw(st.lists(floats, min_size=rows, max_size=rows)))
    padding = np.full((rows, 2), data.draw(st.sampled_from([0.0, np.inf, np.nan, -1e30])))
    mask = np.concatenate([np.ones_like(real, bool), np.zeros_like(padding, bool)], axis=1)

    wide = choose(np.concatenate([real, padding], axis=1), np.ones(mask.shape), mask, normalised=True)

    assert real.argmax(axis=1).tolist() == wide.tolist()
