"""From an attempt at a cell to its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meftbench.plan.factories import calls_of
from meftbench.plan.identity import uuid7
from meftbench.plan.suite import Suite
from meftbench.plan.training import NOT_CHOSEN
from meftbench.records.record import Record
from meftbench.runner.job import Machine, Outcome
from meftbench.runner.process import utc_now
from meftbench.runner.schedule import Attempt, Plan


def identity(suite: Suite, run_id: str, machine: Machine) -> dict[str, Any]:
    """The fields that all records of a run share that were made on the same machine."""
    return {
        "run_id": run_id,
        "protocol_id": suite.protocol.protocol_id,
        "environment_id": machine.environment_id,
        "meftbench_version": machine.environment["meftbench"]["version"],
        "code_digest": machine.environment["meftbench"]["code_digest"],
        "host": machine.host,
    }


def record_of(identity: dict[str, Any], attempt: Attempt, outcome: Outcome, code: Mapping[str, str | None]) -> Record:
    """The record of an attempt that has ended. identity: what `identity` returns.  code: digests of the user's own
    functions by name."""
    own_code = {name: code[name] for name, _ in calls_of([attempt.cell]) if name in code}
    return Record(
        record_id=uuid7(),
        cell_id=attempt.cell.cell_id,
        repeat=attempt.repeat,
        started_at=outcome.started_at,
        finished_at=outcome.finished_at,
        worker_pid=outcome.pid,
        cell=attempt.cell.recorded()
        | ({"own_code": own_code} if own_code else {})
        | outcome.observed
        | {"threads": outcome.job.threads},
        status=outcome.status,
        status_detail=outcome.detail,
        wall_s=outcome.wall_s,
        metrics=outcome.metrics,
        **identity,
    )


def record_of_nothing(identity: dict[str, Any], attempt: Attempt, outcome: Outcome, why: str) -> Record:
    """The record, an error, of an attempt that has ended with what is no result, since no record can hold it.

    why: what is wrong with it."""
    now = utc_now()
    message = f"what the process left is no result: {why[:_MOST]}"
    nothing = Outcome(
        outcome.job, "error", {"type": "NoResult", "message": message}, {}, {}, None, now, now, 0.0, outcome.machine
    )
    return record_of(identity, attempt, nothing, {})


_MOST = 400  # characters of a reason


def skipped_record(identity: dict[str, Any], attempt: Attempt, plan: Plan) -> Record:
    """The record of an attempt that is skipped, with the cell because of which it is."""
    cause = next(cell for cell in plan.cells if cell.cell_id in (attempt.dominated_by, attempt.beaten_by))
    why: dict[str, Any]
    if attempt.beaten_by is not None:
        why = {"type": NOT_CHOSEN, "message": f"{cause.label} did better", "beaten_by": attempt.beaten_by}
    else:
        message = f"needs at least what {cause.label} needs, which was out of memory"
        why = {"type": "Dominated", "message": message, "dominated_by": attempt.dominated_by}
    now = utc_now()
    return Record(
        record_id=uuid7(),
        cell_id=attempt.cell.cell_id,
        repeat=attempt.repeat,
        started_at=now,
        finished_at=now,
        worker_pid=None,
        cell=attempt.cell.recorded(),
        status="skipped",
        status_detail=why,
        **identity,
    )
