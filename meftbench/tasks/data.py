"""The splits of a task: which rows are used, where they came from, and what was left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from meftbench.catalogue.task import Task
from meftbench.errors import UserError
from meftbench.tasks.labels import class_names, label_kind
from meftbench.tasks.rows import Digest, rows_of
from meftbench.tasks.sources import Source, empty, source_of
from meftbench.tasks.text_files import TextTable

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Splits:
    """The rows of a task in one form, whatever they were read from.

    train, evaluations: columns are the task's texts (strings) and `label` (class id; a float where kind is regression);
        where kind is choices also `choices` (list of strings, of which label is the index of the correct one); for
        images the columns are `image` and `label`.
    labels: class names by id; None for regression and choices.
    origin: folder or hub id.  cuts: how the rows differ from the data as published, one line for each difference.
    digest: of the rows that are used, in their order.
    """

    train: Dataset
    evaluations: dict[str, Dataset]
    labels: tuple[str, ...] | None
    origin: str
    cuts: list[str]
    digest: str


def load_splits(
    task: Task,
    data: str | None,
    *,
    train_examples: int | None = None,
    evaluation_examples: int | None = None,
    seed: int = 0,
) -> Splits:
    """The training split and every labelled evaluation split of `task`.

    data: a data root, or the task's own folder; None: the folder that MEFTBENCH_DATA names, or else the hub.
    train_examples: how many rows of the training split are used at most.  evaluation_examples: the same of each
        evaluation split. Where a split has more, rows are drawn by `seed`.

    Raises UserError: when `datasets` is not installed, the folder does not exist, the hub cannot be reached, a file
    differs from SHA256SUMS or cannot be read, a column is missing, a label is no class, a split is empty, or an image
    is corrupt.
    """
    try:
        import datasets  # noqa: F401
    except ModuleNotFoundError:
        cure = "pip install 'meftbench[tasks]'"
        raise UserError(f"task {task.name}", "`datasets` is not installed", cure) from None
    source = source_of(task, data)
    raw = _read_splits(task, source)
    kind = label_kind(f"{source.origin}, train", task, raw["train"])
    labels = class_names(f"{source.origin}, train", task, raw["train"])
    digest, cuts, used = Digest(), [], {}
    for name, rows in raw.items():
        limit = train_examples if name == "train" else evaluation_examples
        if rows is None:
            cuts.append(f"{name}: not in {source.origin}")
            continue
        if not len(rows):
            raise empty(f"{source.origin}, {name}")
        label_kind(f"{source.origin}, {name}", task, rows, like=kind)
        used[name] = rows_of(
            f"{source.origin}, {name}",
            task,
            rows,
            _drawn_indices(len(rows), limit, seed),
            labels,
            digest,
            source.folders,
        )
        published = task.rows.get(task.train if name == "train" else task.evaluations[name], len(rows))
        if published != len(used[name]):
            cuts.append(_cut_line(name, len(used[name]), published))
    cuts += [task.departures[file] for file in source.digests if file in task.departures]
    train = used.pop("train")
    return Splits(train, used, labels, source.origin, cuts, digest.hexdigest())


def _read_splits(task: Task, source: Source) -> dict[str, Dataset | TextTable | None]:
    """The rows of each split as the source has them; None for an absent evaluation split other than the first.

    Raises UserError: when the source has no training split or no first evaluation split.
    """
    train = source.split(task, "train", task.train)
    evaluations = {name: source.split(task, name, hub_name) for name, hub_name in task.evaluations.items()}
    first_evaluation = next(iter(evaluations))
    for name, rows in (("train", train), (first_evaluation, evaluations[first_evaluation])):
        if rows is None:
            cure = f"put {name}.jsonl there (or json, csv, tsv, parquet, arrow, npz, or a folder of images)"
            raise UserError(source.origin, f"has no split {name!r}", cure)
    return {"train": train} | evaluations


def _drawn_indices(rows: int, limit: int | None, seed: int) -> list[int]:
    """The indices of the rows that are used: all in their order, or `limit` of them drawn by `seed`."""
    import numpy as np

    if limit is None or limit >= rows:
        return list(range(rows))
    return [int(index) for index in np.random.RandomState(seed).permutation(rows)[:limit]]


def _cut_line(name: str, used: int, published: int) -> str:
    """A line for `Splits.cuts`: how many rows of a split are used, and how many are published."""
    if used > published:
        return f"{name}: {used:,} rows, {published:,} are published"
    return f"{name}: {used:,} of {published:,} rows"
