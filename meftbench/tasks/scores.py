"""The scores of tasks, and the choice of an answer by its likelihood."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from meftbench.catalogue.task import Task

Array = np.ndarray[Any, np.dtype[Any]]


def scores_of(task: Task, predictions: Array, labels: Array) -> dict[str, float | None]:
    """The task's scores by name, in its order; None: undefined, as is a correlation with constants.

    predictions, labels: (N,) class ids, indices of choices, or the numbers of a regression. F1 is that of class 1 where
    there are two classes, else the mean over classes; a class that no sample has, nor is predicted to have, counts 0.

    Raises ValueError: when the two differ in length, or are empty.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(f"scores are of (N,) predictions and labels, not of {predictions.shape} and {labels.shape}")
    return {name: _score(name, predictions, labels, task.labels) for name in task.scores}


def constant_score(task: Task, labels: Array) -> float | None:
    """The first score of the best constant answer, the same for every sample; None for a regression.

    labels: (N,) as in `scores_of`.
    """
    if task.kind == "regression":
        return None
    name = task.scores[0]
    scores = (scores_of(task, np.full_like(labels, answer), labels)[name] for answer in np.unique(labels))
    return max((score for score in scores if score is not None), default=None)


def _score(name: str, predictions: Array, labels: Array, class_names: tuple[str, ...] | None) -> float | None:
    from scipy import stats
    from sklearn import metrics

    match name:
        case "accuracy":
            return float(metrics.accuracy_score(labels, predictions))
        case "f1":
            classes = len(class_names) if class_names else int(max(predictions.max(), labels.max())) + 1
            averaging = {"average": "binary"} if classes == 2 else {"average": "macro", "labels": range(classes)}
            return float(metrics.f1_score(labels, predictions, zero_division=0, **averaging))
        case "matthews":
            # It is 0.0, no better than chance, where the predictions or the labels are all of one class.
            return float(metrics.matthews_corrcoef(labels, predictions))
        case "pearson" | "spearman":
            if len(labels) < 2 or not np.isfinite(predictions).all():
                return None
            correlation = stats.pearsonr if name == "pearson" else stats.spearmanr
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the score is None instead
                value = float(correlation(predictions, labels).statistic)
            return value if math.isfinite(value) else None
    raise ValueError(f"no score is called {name!r}")


def choose(log_likelihoods: Array, lengths: Array, choice_mask: Array, *, normalised: bool) -> Array:
    """The likeliest choice of each question (N,); the first of those that are equally likely.

    log_likelihoods: (N, C), summed over the tokens of a choice.  lengths: (N, C), how many tokens these are.
    normalised: divide the sums by the lengths.  choice_mask: (N, C), False where a question has no such choice.
    """
    scores = np.asarray(log_likelihoods, dtype=np.float64)
    if normalised:
        scores = scores / np.maximum(lengths, 1)
    # NaN ranks below every other likelihood, and a choice that does not exist ranks below NaN.
    scores = np.where(np.isnan(scores), -np.finfo(np.float64).max, scores)
    chosen: Array = np.where(choice_mask, scores, -np.inf).argmax(axis=1)
    return chosen
