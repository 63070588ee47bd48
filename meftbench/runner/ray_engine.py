"""`--engine ray`: cells on the machines of a Ray cluster, which finds room for them and tells when a machine is lost.

A slot is an actor with one GPU or n CPUs on one machine. It has a worker of its own there (runner/node.py), and ends
with all its cells when it is killed, when its machine's Ray ends, and when this process ends, however that happens.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meftbench.errors import NOT_COMPARABLE, UserError, one_line
from meftbench.plan.cell import Cell
from meftbench.plan.training import CELL_FOLDER
from meftbench.runner import node
from meftbench.runner.data_check import DATA_SECONDS, distinct
from meftbench.runner.engine import COUNTED, Slot, Work, refuse_without_slot
from meftbench.runner.job import Job, Machine, Outcome
from meftbench.runner.process import IMPORT_SECONDS, START_SECONDS, utc_now
from meftbench.runner.ray_connection import DEFAULT_ADDRESS, connected
from meftbench.runner.same_versions import refuse_other_code, refuse_other_versions, version_reader

PROBE_SECONDS = 60.0
ROOM_SECONDS = 60.0  # for which other users of the cluster are waited for
LATE_SECONDS = 120.0  # after its own timeout, a cell that has not ended is on a machine that does not answer
_MESSAGE = 300  # characters of what Ray says that a message quotes
_OTHER_CELLS = "add machines to the cluster, leave cells out with --where, or use another --device"


@dataclass(frozen=True)
class _Place:
    """Where an actor is to be: a machine, by Ray's id of the node, and its share of it."""

    node_id: str
    host: str
    name: str
    gpu: bool
    cpus: int
    threads: int
    slots_of_node: int


@dataclass
class _Actor:
    """handle: of Ray.  slot, machine: known once it has begun."""

    place: _Place
    handle: Any
    slot: Slot | None = None
    machine: Machine | None = None


@dataclass(frozen=True)
class _Given:
    job: Job
    actor: _Actor
    started_at: str
    start: float
    deadline: float


class RayEngine:
    """The cells of a sweep on a Ray cluster.

    address: HOST:PORT of its head; `auto`: that of this machine, or of RAY_ADDRESS.
    jobs: at most so many slots with a GPU, and so many without; None: as many as there are.  A slot without a GPU has
    the CPUs that the protocol's `threads` says, or all of a machine.
    command: replaces the worker.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, jobs: int | None = None, command: Sequence[str] | None = None
    ) -> None:
        self._address, self._jobs, self._command = address, jobs, command
        self._ray: Any = None
        self._actors: dict[str, _Actor] = {}  # by the name of the place
        self._beginning: dict[Future[Any], _Actor] = {}
        self._running: dict[Future[Any], _Given] = {}

    def survey(self, work: Work) -> None:
        """Connect, and have an actor begin in each place.

        Raises UserError (exit 4): there is no cluster, it has no room for a cell, or a machine has another version of
        meftbench or torch."""
        self._ray, self._work = connected(self._address), work
        alive = [found for found in self._ray.nodes() if found["Alive"]]
        wanted, alive = self._found_places(alive)
        has_room = {self._begin(place): place for place in wanted}
        wait(has_room, ROOM_SECONDS)
        present = {place.name for future, place in has_room.items() if future.done()}
        # An actor that has no room yet, since others use the cluster, becomes a slot when it has.
        begun, _ = wait([f for f, actor in self._beginning.items() if actor.place.name in present], IMPORT_SECONDS)
        for future in begun:
            self._has_begun(future)
        kinds_of_slots = [slot.kinds for slot in self.slots()]
        counted_has_none = COUNTED in work.kinds.difference(*kinds_of_slots)
        refuse_without_slot(work.kinds, kinds_of_slots, _what_there_is(alive, work, counted_has_none), _OTHER_CELLS)

    def data_answers(self, cells: Sequence[Cell]) -> Mapping[str, Mapping[str, dict[str, Any]]]:
        """The data as they are on each machine that has a slot."""
        trainings = [cell.model_dump(mode="json") for cell in distinct(cells)]
        if self._command or not trainings:
            return {}
        hosts = {actor.place.node_id: actor.place.host for actor in self._actors.values() if actor.slot}
        answers = self._on_nodes(hosts, node.data_answers, json.dumps(trainings), seconds=DATA_SECONDS)
        return {f"{hosts[node_id]} ({node_id[:8]})": json.loads(answer) for node_id, answer in answers.items()}

    def start(self, work: Work, logs: Path) -> list[Machine]:
        """The machines of all slots; what is started was started by `survey`."""
        machines = [actor.machine for actor in self._actors.values() if actor.machine is not None]
        return list({(machine.host, machine.environment_id): machine for machine in machines}.values())

    def slots(self) -> list[Slot]:
        return [actor.slot for actor in self._actors.values() if actor.slot is not None]

    def give(self, job: Job, slot: Slot) -> None:
        for stale in (job.result, job.log):
            stale.unlink(missing_ok=True)
        actor, now = self._actors[slot.name], time.monotonic()
        future = actor.handle.run.remote(node.job_request(job)).future()
        self._running[future] = _Given(job, actor, utc_now(), now, now + job.timeout + START_SECONDS + LATE_SECONDS)

    def poll(self) -> Outcome | None:
        before = self.slots()
        while self._running or self._beginning:
            due = min((given.deadline for given in self._running.values()), default=time.monotonic() + IMPORT_SECONDS)
            seconds = max(0.0, due - time.monotonic())
            done, _ = wait([*self._running, *self._beginning], seconds, return_when=FIRST_COMPLETED)
            for future in done & self._beginning.keys():
                self._has_begun(future)
            for future in done & self._running.keys():
                return self._ended(future, self._running.pop(future))
            if self.slots() != before:
                return None
            for future, given in list(self._running.items()):
                if time.monotonic() >= given.deadline:
                    del self._running[future]
                    return self._lost(given, f"did not answer {LATE_SECONDS:g} s after the cell's time was over")
            if not done and not self._running:
                return None
        return None

    def close(self) -> None:
        if self._ray is None:
            return
        for actor in self._actors.values():
            self._ray.kill(actor.handle)
        self._actors.clear()
        self._beginning.clear()
        self._running.clear()
        self._ray.shutdown()
        self._ray = None

    def _found_places(self, alive: list[Mapping[str, Any]]) -> tuple[list[_Place], list[Mapping[str, Any]]]:
        """Where actors are to be, and the machines without those that are lost, which Ray lists for some seconds more.

        Raises UserError, as `_check_versions` does."""
        while True:
            wanted = places(alive, self._work, self._jobs)
            asked = {place.node_id: place.host for place in wanted}
            lost = asked.keys() - self._check_versions(asked)
            if not lost:
                return wanted, alive
            alive = [found for found in alive if found["NodeID"] not in lost]

    # --- actors ---

    def _begin(self, place: _Place) -> Future[Any]:
        """Ask for an actor in the place, which then starts its worker. The future is done when there is room for it."""
        options = {"num_gpus": self._work.gpus, "num_cpus": 0} if place.gpu else {"num_gpus": 0, "num_cpus": place.cpus}
        actor_class = self._ray.remote(node.Node).options(**options, max_restarts=0, **self._affinity(place.node_id))
        actor = self._actors[place.name] = _Actor(place, actor_class.remote(self._command))
        request = node.begin_request(self._work, place.gpu, place.threads, place.slots_of_node)
        self._beginning[actor.handle.begin.remote(request).future()] = actor
        future: Future[Any] = actor.handle.__ray_ready__.remote().future()
        return future

    def _has_begun(self, future: Future[Any]) -> None:
        actor = self._beginning.pop(future)
        try:
            answer = future.result()
        except self._ray.exceptions.RayError:  # its machine was lost meanwhile
            self._actors.pop(actor.place.name, None)
            return
        machine, actor.slot = node.begun_from(answer, actor.place.host, actor.place.name)
        refuse_other_code(machine)
        actor.machine = machine

    def _ended(self, future: Future[Any], given: _Given) -> Outcome:
        try:
            answer, files = future.result()
        except self._ray.exceptions.RayError as error:
            return self._lost(given, first_sentence(error))
        assert given.actor.machine is not None
        outcome = node.outcome_from(answer, given.job, given.actor.machine)
        if files:
            node.keep_files(files, Path(given.job.environment[CELL_FOLDER]))
        return outcome

    def _lost(self, given: _Given, why: str) -> Outcome:
        """The actor is gone. Where its machine is still there, another begins in its place."""
        place = given.actor.place
        self._actors.pop(place.name, None)
        self._ray.kill(given.actor.handle)
        alive = self._answers(place)
        if alive:
            self._begin(place)
        what = "the worker on" if alive else "machine"
        message = f"{what} {place.host} ({place.node_id[:8]}) was lost: {why}"
        return Outcome(
            given.job,
            "error",
            {"type": "WorkerDied" if alive else "NodeLost", "message": message},
            {},
            {},
            None,
            given.started_at,
            utc_now(),
            time.monotonic() - given.start,
            given.actor.machine,
            lost=True,
        )

    # --- machines ---

    def _affinity(self, node_id: str) -> dict[str, Any]:
        strategies = self._ray.util.scheduling_strategies
        return {"scheduling_strategy": strategies.NodeAffinitySchedulingStrategy(node_id, soft=False)}

    def _on_nodes(
        self, hosts: Mapping[str, str], function: Callable[..., Any], *arguments: Any, seconds: float
    ) -> dict[str, Any]:
        """What `function` returns on each of the machines, which are given by Ray's id with their names; of those that
        are lost, nothing.

        Raises UserError (exit 4): a machine does not answer, or the function fails there."""
        task = self._ray.remote(function)
        futures = {}
        for node_id in hosts:
            options = {"num_cpus": 0, "max_retries": 0} | self._affinity(node_id)
            futures[node_id] = task.options(**options).remote(*arguments).future()
        answers = {}
        for node_id, future in futures.items():
            try:
                answers[node_id] = future.result(seconds)
            except _lost_with_machine(self._ray):
                continue
            except (self._ray.exceptions.RayError, TimeoutError) as error:
                what = f"does not answer ({one_line(error)[:_MESSAGE]})"
                cure = "see `ray status`, and that meftbench is installed on every machine"
                raise UserError(f"node {hosts[node_id]}", what, cure, NOT_COMPARABLE) from None
        return answers

    def _answers(self, place: _Place) -> bool:
        """Whether the machine is there. For some seconds after its end Ray lists it as alive, so it is asked."""
        try:
            return bool(self._on_nodes({place.node_id: place.host}, version_reader(), seconds=PROBE_SECONDS))
        except UserError:
            return False

    def _check_versions(self, hosts: Mapping[str, str]) -> set[str]:
        """The machines that are there. Raises UserError (exit 4): one has another meftbench, torch, transformers or
        peft than this one."""
        answers = self._on_nodes(hosts, version_reader(), seconds=PROBE_SECONDS)
        refuse_other_versions([(f"{hosts[node_id]} ({node_id[:8]})", answer) for node_id, answer in answers.items()])
        return {*answers}


def _lost_with_machine(ray: Any) -> tuple[type[Exception], ...]:
    """What Ray raises of a task on a machine that is no longer there."""
    return ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError


def places(nodes: Iterable[Mapping[str, Any]], work: Work, jobs: int | None) -> list[_Place]:
    """Where actors are to be, at most `jobs` with a GPU and `jobs` without. nodes: as `ray.nodes` lists them."""
    with_gpu, without = [], []
    for found in nodes:
        node_id, host = str(found["NodeID"]), str(found["NodeManagerHostname"])
        cpus, cards = (int(found["Resources"].get(name, 0)) for name in ("CPU", "GPU"))
        cpus_of_cell = work.protocol.threads or max(1, cpus)
        cards = cards // work.gpus if work.kinds - {COUNTED} else 0  # slots: each has as many as ranks need
        slots = cpus // cpus_of_cell if COUNTED in work.kinds else 0
        threads_beside_card = work.protocol.threads or max(1, cpus // max(1, cards))
        for number in range(cards):
            name = f"{host} {node_id[:8]} gpu {number}"
            with_gpu.append(_Place(node_id, host, name, True, 0, threads_beside_card, cards + slots))
        for number in range(slots):
            name = f"{host} {node_id[:8]} cpu {number}"
            without.append(_Place(node_id, host, name, False, cpus_of_cell, cpus_of_cell, cards + slots))
    return with_gpu[:jobs] + without[:jobs]


def first_sentence(error: BaseException) -> str:
    """What Ray says first of an error: the ids and addresses of its parts that follow say nothing to users. Of an error
    that Ray quotes with its traceback, the last line, which is the error itself."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[-1 if "Traceback (most recent call last)" in str(error) else 0]
    return " ".join(re.split(r"(?<=[.!?])\s", line.strip())[0].split())[:_MESSAGE].rstrip(".")


def _what_there_is(nodes: Iterable[Mapping[str, Any]], work: Work, counted_has_none: bool) -> str:
    """What the cluster has, for the message that it is too little. `threads` decide where cells without a GPU fit."""
    resources = [found["Resources"] for found in nodes]
    sizes = "; ".join(f"{size.get('CPU', 0):g} CPUs and {size.get('GPU', 0):g} GPUs" for size in resources)
    asked = f", and `threads` is {work.protocol.threads}" if work.protocol.threads and counted_has_none else ""
    return f"the machines of the cluster have {sizes} (others may use them){asked}"
