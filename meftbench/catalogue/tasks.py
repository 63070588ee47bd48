"""The tasks by name: GLUE, question answering, images. A new one needs an entry here, and data in a data root or a hub.

Columns, label ids and split names are the hub's; row counts are as published there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meftbench.catalogue.task import IMAGE_COLUMN, Score, own_task
from meftbench.catalogue.task import Task as Task
from meftbench.errors import unknown

ENTAILED = ("entailment", "not_entailment")
PARAPHRASE = ("not_equivalent", "equivalent")
TESTED = {"validation": "validation", "test": "test"}
ARC_TEMPLATE = "Question: {question}\nAnswer:"


def _glue(name: str, summary: str, texts: tuple[str, ...], scores: tuple[Score, ...], **more: Any) -> Task:
    """A task of GLUE, a classification unless `more` has another kind."""
    facts: dict[str, Any] = {"kind": "classification", "licence": "of its source; GLUE itself states none"} | more
    return Task(
        name=name,
        family="glue",
        summary=summary,
        hub=("nyu-mll/glue", name),
        folder=f"glue/{name}",
        texts=texts,
        label="label",
        scores=scores,
        **facts,
    )


def _qa(name: str, summary: str, hub: tuple[str, str | None], texts: tuple[str, ...], **more: Any) -> Task:
    """A task of choices, judged by accuracy; the template is that of the paper's OPT experiments (docs/paper.md)."""
    return Task(
        name=name,
        family="qa",
        kind="choices",
        summary=summary,
        hub=hub,
        folder=f"qa/{name}",
        texts=texts,
        scores=("accuracy",),
        **more,
    )


def _images(name: str, summary: str, hub: str | None, column: str, labels: tuple[str, ...], **more: Any) -> Task:
    return Task(
        name=name,
        family="image",
        kind="images",
        summary=summary,
        hub=(hub, None) if hub else None,
        folder=f"vision/{name}",
        texts=(column,),
        label="label",
        labels=labels,
        scores=("accuracy",),
        sequence_length=None,
        **more,
    )


def _arc(name: str, summary: str, config: str, rows: dict[str, int]) -> Task:
    return _qa(
        name,
        summary,
        ("allenai/ai2_arc", config),
        ("question",),
        label="answerKey",
        choices=("choices",),
        template=ARC_TEMPLATE,
        evaluations=TESTED,
        rows=rows,
        licence="CC BY-SA 4.0",
    )


_ALL = [
    _glue(
        "rte",
        "does the second sentence follow from the first?",
        ("sentence1", "sentence2"),
        ("accuracy",),
        labels=ENTAILED,
        rows={"train": 2490, "validation": 277},
        sequence_length=256,
    ),
    _glue(
        "mrpc",
        "do two sentences of news say the same?",
        ("sentence1", "sentence2"),
        ("accuracy", "f1"),
        labels=PARAPHRASE,
        rows={"train": 3668, "validation": 408},
    ),
    _glue(
        "cola",
        "is it an English sentence?",
        ("sentence",),
        ("matthews",),
        labels=("unacceptable", "acceptable"),
        rows={"train": 8551, "validation": 1043},
    ),
    _glue(
        "stsb",
        "how similar are two sentences, from 0 to 5?",
        ("sentence1", "sentence2"),
        ("pearson", "spearman"),
        kind="regression",
        rows={"train": 5749, "validation": 1500},
        licence="CC BY-SA 4.0 (scores); texts of their sources",
    ),
    _glue(
        "sst2",
        "is a phrase of a film review positive?",
        ("sentence",),
        ("accuracy",),
        labels=("negative", "positive"),
        rows={"train": 67349, "validation": 872},
    ),
    _glue(
        "qnli",
        "does the sentence answer the question?",
        ("question", "sentence"),
        ("accuracy",),
        labels=ENTAILED,
        rows={"train": 104743, "validation": 5463},
    ),
    _glue(
        "qqp",
        "do two questions ask the same?",
        ("question1", "question2"),
        ("f1", "accuracy"),
        labels=("not_duplicate", "duplicate"),
        rows={"train": 363846, "validation": 40430},
        departures={
            "4974b671c08a1fb9cc04954e0f51344ece96fc5ebe8853d58b0a9dbcd9508730": (
                "validation: of Quora's release as Stanford's CS 224N split it, not GLUE's"
            ),
        },
    ),
    _glue(
        "mnli",
        "entailment, neutral or contradiction, over ten genres",
        ("premise", "hypothesis"),
        ("accuracy",),
        labels=("entailment", "neutral", "contradiction"),
        evaluations={"validation": "validation_matched", "validation_mismatched": "validation_mismatched"},
        rows={"train": 392702, "validation_matched": 9815, "validation_mismatched": 9832},
    ),
    _qa(
        "openbookqa",
        "school science with four choices; the prompt is the bare stem",
        ("allenai/openbookqa", "main"),
        ("question_stem",),
        label="answerKey",
        choices=("choices",),
        template="{question_stem}",
        evaluations=TESTED,
        rows={"train": 4957, "validation": 500, "test": 500},
        licence="Apache-2.0",
    ),
    # The hub's main branch has a script, which datasets 4 and later do not run. The test split has no labels.
    _qa(
        "piqa",
        "which of two ways reaches an everyday goal?",
        ("ybisk/piqa", None),
        ("goal",),
        revision="refs/convert/parquet",
        label="label",
        choices=("sol1", "sol2"),
        template="Question: {goal} Answer:",
        rows={"train": 16113, "validation": 1838},
        licence="AFL-3.0",
    ),
    _arc(
        "arc_easy", "school science, the easy questions", "ARC-Easy", {"train": 2251, "validation": 570, "test": 2376}
    ),
    _arc(
        "arc_challenge",
        "school science, the questions that retrieval gets wrong",
        "ARC-Challenge",
        {"train": 1119, "validation": 299, "test": 1172},
    ),
    _qa(
        "sciq",
        "science with four choices and a passage in support",
        ("allenai/sciq", None),
        ("question", "support"),
        label="correct_answer",
        choices=("correct_answer", "distractor1", "distractor2", "distractor3"),
        template="{support}\nQuestion: {question}\nAnswer:",
        evaluations=TESTED,
        rows={"train": 11679, "validation": 1000, "test": 1000},
        licence="CC BY-NC 3.0",
    ),
    _images(
        "cifar10",
        "32 x 32 colour photographs of ten kinds",
        "uoft-cs/cifar10",
        "img",
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        evaluations={"test": "test"},
        rows={"train": 50000, "test": 10000},
        departures={
            "731b3993b5deb44bf2e653fb2d8045cc81c057c755e2460c37723c535d99094d": "train: JPEG re-encodings",
            "4f46a5725328f25ce91992b47b0b24a07908548fa789a9dd997ec26135d398bd": "test: JPEG re-encodings",
        },
        licence="none stated",
    ),
    _images(
        "mnist",
        "28 x 28 grey handwritten digits",
        "ylecun/mnist",
        IMAGE_COLUMN,
        tuple("0123456789"),
        evaluations={"test": "test"},
        rows={"train": 60000, "test": 10000},
        licence="none stated",
    ),
    _images(
        "hymenoptera",
        "photographs of ants and bees; not on the hub",
        None,
        IMAGE_COLUMN,
        ("ants", "bees"),
        rows={"train": 245, "validation": 153},
        licence="none stated",
    ),
]

TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def is_own(name: str) -> bool:
    """Whether `name` is the path of a user's own folder, not the name of a task."""
    return name not in TASKS and (name.startswith((".", "/", "~")) or Path(name).is_dir())


def find_task(where: str, name: str) -> Task:
    """The task called `name`, or that of the user's own folder at the path `name`.

    Raises UserError: when there is neither, or the folder does not describe a task.
    """
    if name in TASKS:
        return TASKS[name]
    if is_own(name):
        return own_task(where, Path(name).expanduser())
    raise unknown(where, "task", name, TASKS)
