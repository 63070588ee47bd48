"""Every task, as far as its data lie in ../shared/data or MEFTBENCH_DATA, whose README says what was cut."""

import pytest

from meftbench.catalogue.tasks import TASKS
from meftbench.tasks.data import load_splits
from task_data import DATA

# Rows by split, from the README there.
THERE = {
    "rte": {"train": 2490, "validation": 277},
    "mrpc": {"train": 3668, "validation": 408},
    "cola": {"train": 8551, "validation": 1043},
    "stsb": {"train": 5749, "validation": 1500},
    "sst2": {"train": 20000, "validation": 872},
    "qnli": {"train": 9999, "validation": 5000},
    "qqp": {"train": 9999, "validation": 5000},
    "mnli": {"train": 9999, "validation": 5000},
    "openbookqa": {"train": 4957, "validation": 500, "test": 500},
    "piqa": {"train": 16113, "validation": 1838},
    "arc_easy": {"train": 2251, "validation": 570, "test": 2376},
    "arc_challenge": {"train": 1119, "validation": 299, "test": 1172},
    "sciq": {"train": 11679, "validation": 1000, "test": 1000},
    "cifar10": {"train": 5000, "test": 1000},
    "mnist": {"train": 2000, "test": 500},
    "hymenoptera": {"train": 245, "validation": 153},
}
CUTS = {
    "sst2": ["train: 20,000 of 67,349 rows"],
    "qnli": ["train: 9,999 of 104,743 rows", "validation: 5,000 of 5,463 rows"],
    "qqp": [
        "train: 9,999 of 363,846 rows",
        "validation: 5,000 of 40,430 rows",
        "validation: of Quora's release as Stanford's CS 224N split it, not GLUE's",
    ],
    "mnli": [
        "train: 9,999 of 392,702 rows",
        "validation: 5,000 of 9,815 rows",
        f"validation_mismatched: not in {DATA / 'glue/mnli'}",
    ],
    "cifar10": [
        "train: 5,000 of 50,000 rows",
        "test: 1,000 of 10,000 rows",
        "train: JPEG re-encodings",
        "test: JPEG re-encodings",
    ],
    "mnist": ["train: 2,000 of 60,000 rows", "test: 500 of 10,000 rows"],
}
# How often each label is in training, from the README.
COUNTED = {
    "rte": [1249, 1241],
    "mrpc": [1194, 2474],
    "mnli": [3408, 3313, 3278],
    "piqa": [8053, 8060],
    "cifar10": [500] * 10,
    "hymenoptera": [124, 121],
}


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_a_task_loads_from_the_data_root(task):
    """All of the rows that lie there, and a line for each split that is not as published."""
    if not (DATA / task.folder).is_dir():
        pytest.skip(f"no {DATA / task.folder}; set MEFTBENCH_DATA to where the tasks' data lie")

    splits = load_splits(task, str(DATA))

    rows = {"train": splits.train} | splits.evaluations
    assert THERE[task.name] == {name: len(split) for name, split in rows.items()}
    assert CUTS.get(task.name, []) == splits.cuts
    assert task.labels == splits.labels
    labels = list(splits.train["label"])
    if task.kind != "regression":
        assert max(labels) < (len(task.labels) if task.labels else max(map(len, splits.train["choices"])))
    if task.name in COUNTED:
        assert COUNTED[task.name] == [labels.count(i) for i in range(len(COUNTED[task.name]))]


def test_the_correct_answer_of_sciq_is_everywhere():
    """It is stored first; used so, a model would learn the place."""
    if not (DATA / "qa/sciq").is_dir():
        pytest.skip(f"no {DATA / 'qa/sciq'}; set MEFTBENCH_DATA to where the tasks' data lie")

    labels = list(load_splits(TASKS["sciq"], str(DATA)).train["label"])

    assert all(0.23 < labels.count(place) / len(labels) < 0.27 for place in range(4))
