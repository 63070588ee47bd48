"""Stands in for an engine of several machines: no processes, and machines that are lost when a test says so."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from builders import ENVIRONMENT
from meftbench.errors import UserError
from meftbench.records.record import Metric
from meftbench.runner.engine import COUNTED, Slot, refuse_without_slot
from meftbench.runner.job import Machine, Outcome


def a_machine(name, **fields):
    environment = ENVIRONMENT | {"environment_id": f"e{ord(name[0]):x}", "host": {"bf16_products": None, "name": name}}
    return Machine(name, environment, **fields)


class Cluster:
    """machines: name of each, with the kinds of cells of its slots.

    losses: seeds of cells, by how often the machine (or, where `keeps` is set, the worker alone) is lost under them.
    data: what `read_data` finds on each machine.  code: digests of own functions.
    """

    def __init__(self, machines, losses=(), keeps=False, data=None, code=None):
        self.machines = {name: a_machine(name, code={"digests": (code or {}).get(name, {})}) for name in machines}
        self.places = {
            Slot(f"{name}{n}", frozenset({kind})): name for name in machines for n, kind in enumerate(machines[name])
        }
        self.losses, self.keeps, self.data = dict(losses), keeps, data or {}
        self.given, self.ran, self.closed = deque(), [], 0

    def survey(self, work):
        refuse_without_slot([COUNTED], [slot.kinds for slot in self.places], "this cluster has nothing")

    def data_answers(self, cells):
        return self.data

    def start(self, work, logs):
        return list(self.machines.values())

    def slots(self):
        return list(self.places)

    def give(self, job, slot):
        self.given.append((job, self.places[slot], slot))

    def poll(self):
        if not self.given:
            return None
        job, name, slot = self.given.popleft()
        self.ran.append((job.cell.cell_id, slot.name))
        outcome = Outcome(job, "ok", {}, {}, {}, 7, *["2026-11-24T04:00:00Z"] * 2, 1.0, self.machines[name])
        if self.losses.get(job.cell.seed, 0):
            self.losses[job.cell.seed] -= 1
            if not self.keeps:
                self.places = {slot: other for slot, other in self.places.items() if other != name}
            kind = "WorkerDied" if self.keeps else "NodeLost"
            return replace(outcome, status="error", detail={"type": kind, "message": f"{name} is gone"}, lost=True)
        metrics = {"activation_peak_bytes": Metric(1000 * job.cell.batch_size, "counted")}
        return replace(outcome, metrics=metrics, observed={"attention_used": "sdpa"})

    def close(self):
        self.closed += 1


class Interrupted(Cluster):
    """Ctrl-C comes while cells run."""

    def poll(self):
        raise KeyboardInterrupt


class Full(Cluster):
    def poll(self):
        raise UserError("n1: /tmp", "no space left", "make room")
