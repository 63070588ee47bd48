"""Carries out many predictions in parallel processes; results come as they are ready, and are kept in a file."""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

from meftbench.documents import bytes_of
from meftbench.units import GiB

MOST_BYTES = GiB  # of the file of kept results
Task = dict[str, Any]


class Kept:
    """Results in a file of JSON lines, each as long as its task is the same. file: None: nothing is kept."""

    def __init__(self, file: str | None) -> None:
        self._file = None if file is None else Path(file)
        self._known: dict[str, Any] = {}
        if self._file is not None and self._file.is_file():
            for line in bytes_of(self._file, MOST_BYTES).splitlines():
                # The last line of a process that was killed while it wrote is cut off; other damage, too, is left out.
                with suppress(ValueError, KeyError, TypeError, RecursionError):
                    entry = json.loads(line)
                    self._known[entry["task"]] = entry["result"]

    def get(self, task: Task) -> Any:
        """The result of a task that was carried out before; None: it was not."""
        return self._known.get(_digest(task))

    def add(self, task: Task, result: Any) -> None:
        if self._file is None:
            return
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"task": _digest(task), "result": result}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def _digest(task: Task) -> str:
    return hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()


class Pool:
    """Processes that are forked before any backward pass ran, so that autograd has no threads yet. Use as a context
    manager.

    jobs: how many run at a time.  kept: results of earlier processes, to which new ones are added.
    """

    def __init__(self, jobs: int, kept: Kept) -> None:
        gc.collect()
        gc.freeze()  # so that no collection goes through what was imported
        self._kept = kept
        self._processes = ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), initializer=gc.disable)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self._processes.shutdown(cancel_futures=True)

    def results(self, function: Callable[[Task], Any], tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
        """The number of each task and its result, as it is ready; tasks begin in the order given."""
        futures = {}
        for number, task in enumerate(tasks):
            if (known := self._kept.get(task)) is not None:
                yield number, known
            else:
                futures[self._processes.submit(function, task)] = number
        for future in as_completed(futures):
            number = futures[future]
            result = future.result()
            self._kept.add(tasks[number], result)
            yield number, result
