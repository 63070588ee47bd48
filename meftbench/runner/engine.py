"""What a sweep asks of an engine: where cells may run, that they are run there, and how each of them ended.

The sweep (runner/sweep.py) decides which cell is next, and is the only one to write into the run folder. An engine
starts processes: on this machine (runner/local_engine.py), or on others.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from meftbench.errors import NOT_COMPARABLE, UserError
from meftbench.plan.cell import Cell
from meftbench.plan.factories import calls_of
from meftbench.plan.protocol import Protocol as MeasuringProtocol
from meftbench.runner.job import Job, Machine, Outcome

COUNTED, CUDA = "counted", "cuda"


@dataclass(frozen=True)
class Slot:
    """A place in which one cell at a time may run.

    name: another for each slot of an engine.  kinds: cells of these kinds (`kind_of`) may run there.
    gpu: value of CUDA_VISIBLE_DEVICES for cells that run there, of several GPUs where ranks need one each; "": they
        see no GPU.
    threads: CPU threads of a cell.  memory_bytes: of the host, that a cell may take.
    """

    name: str
    kinds: frozenset[str]
    gpu: str = ""
    threads: int = 1
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Work:
    """What is about to be run, as far as places for it must be prepared.

    kinds: of all cells (`kind_of`).  trains: whether any of them is a training.
    calls: the user's own functions that cells name, with their arguments, as `plan.factories.calls_of` lists them.
    folder: from which these functions are imported.
    gpus: of a slot on CUDA: as many as the ranks of the cell that has most. A cell with fewer leaves some idle, so that
        no other cell is measured beside it.
    """

    kinds: frozenset[str]
    trains: bool
    protocol: MeasuringProtocol
    calls: Sequence[Any] = ()
    folder: str = ""
    gpus: int = 1

    @staticmethod
    def of(cells: Sequence[Cell], protocol: MeasuringProtocol) -> Work:
        """The work of running `cells`, with the functions that they name in the working folder."""
        return Work(
            frozenset(map(kind_of, cells)),
            any(cell.training for cell in cells),
            protocol,
            calls_of(cells),
            os.getcwd(),
            max((cell.world_size for cell in cells if kind_of(cell) != COUNTED), default=1),
        )


class Engine(Protocol):
    """Runs cells in processes of their own. The methods are called in the order in which they stand here."""

    def survey(self, work: Work) -> None:
        """Find places for `work`, before anything is written. Raises UserError (exit 4): there is none for a cell of
        it."""

    def data_answers(self, cells: Sequence[Cell]) -> Mapping[str, Mapping[str, dict[str, Any]]]:
        """By machine, what `runner.data_check.read_data` finds there of the data of trainings among `cells`."""

    def start(self, work: Work, logs: Path) -> Sequence[Machine]:
        """Be ready to run cells. Returns the machines that are known then, at least one.

        logs: folder for what the engine's own processes print. Raises UserError: the engine cannot start."""

    def slots(self) -> Sequence[Slot]:
        """The slots, busy and idle ones; those of a machine that was lost are not among them any more."""

    def give(self, job: Job, slot: Slot) -> None:
        """Have the job run in an idle slot."""

    def poll(self) -> Outcome | None:
        """Wait until a job ends and return its outcome; None where none is running, or once there are other slots than
        before. What the job printed is then in `job.log`.

        Raises UserError: jobs have no outcome, since a disk is full or no machine is left."""

    def close(self) -> None:
        """End everything that the engine has started; unfinished jobs have no outcome. Also called without, or in the
        middle of, a `start`, and more than once."""


def kind_of(cell: Cell) -> str:
    """The kind of device that the cell needs: `cuda`, `cuda:PROFILE`, or `counted` for whatever needs none."""
    return cell.device if cell.device.startswith(CUDA) else COUNTED


OTHER_GPUS = "choose others with --jobs or --gpus, leave cells out with --where, or use another --device"


def refuse_without_slot(
    kinds: Iterable[str], slots: Iterable[Collection[str]], has: str, cure: str = OTHER_GPUS
) -> None:
    """Raises UserError (exit 4): one of the `kinds` of cells has no slot.

    slots: the kinds of cells of each slot.  has: what there is, such as "this machine has NVIDIA A10"."""
    for kind in sorted({*kinds}.difference(*slots)):
        raise UserError(f"device {kind}", f"no place for such cells: {has}", cure, NOT_COMPARABLE)


def check_torch(work: Work, machine: Machine) -> None:
    """Raises UserError (exit 4) where cells need CUDA, and torch on the machine is built without it."""
    if work.kinds - {COUNTED} and machine.environment["torch"].get("torch_cuda", "unknown") is None:
        cure = "install a CUDA build of torch, or use `--device counted`"
        raise UserError("device cuda", "this torch is built without CUDA", cure, NOT_COMPARABLE)
