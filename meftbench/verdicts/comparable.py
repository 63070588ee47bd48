"""Whether two runs may be compared: what is refused, what keeps measured values apart, and in what the runs differ."""

from __future__ import annotations

from collections import Counter
from typing import Any

from meftbench.catalogue.metrics import METRICS, SHARED_CORES
from meftbench.errors import NOT_COMPARABLE, UserError
from meftbench.records.outcome import Outcome
from meftbench.records.store import Run
from meftbench.verdicts.environment import checkout, differences, machine

# Units of metrics that are times or are computed from times.
TIME_UNITS = ("second", "token/second", "sample/second")
ENVIRONMENT = "environment"
# What was observed in a cell while it ran; everything else in a cell is part of its identity.
_OBSERVED = ("weights", "model_revision", "attention_used", "threads", "inputs", "layers")


def check_comparable(first: Run, second: Run, pairs: list[tuple[Outcome, Outcome]]) -> None:
    """Raises UserError (exit 4) where the records of a cell differ in schema or protocol."""
    runs = f"{first.path}, {second.path}"
    for left, right in pairs:
        schemas = left.records[-1].schema, right.records[-1].schema
        if schemas[0] != schemas[1]:
            what = f"records of schema {schemas[0]} and {schemas[1]}"
            raise UserError(runs, what, "rerun the older one", NOT_COMPARABLE)
        if left.records[-1].protocol_id != right.records[-1].protocol_id:
            protocols: list[dict[str, Any]] = [run.suite.get("protocol") or {} for run in (first, second)]
            why = "; ".join(differences(*protocols)[:5]) or "protocol_id differs"
            cure = "rerun one of them with the other's protocol"
            raise UserError(runs, f"measured with different protocols ({why})", cure, NOT_COMPARABLE)


def obstacles(left: Outcome, right: Outcome) -> list[str]:
    """What keeps measured values of the two from being compared: different environments, different numbers of CPU
    threads, or cores that other processes used while times were measured."""
    environments = {record.environment_id for record in (*left.records, *right.records)}
    found = [ENVIRONMENT] if len(environments) > 1 else []
    threads = [_threads(outcome) for outcome in (left, right)]
    if threads[0] != threads[1] and all(threads):
        found.append(f"CPU threads differ ({threads[0]} | {threads[1]})")
    waited = [outcome.figure("cpu_wait_share") for outcome in (left, right)]
    if any(share is not None and share.value > SHARED_CORES for share in waited):
        # The text is the same for every cell, since what is left out is counted by it.
        found.append(f"cores were shared while timing (threads waited more than {SHARED_CORES:.0%} of the time)")
    return found


def applies(obstacle: str, metric: str) -> bool:
    """Whether an obstacle affects a measured metric: threads and shared cores affect times only."""
    return obstacle == ENVIRONMENT or METRICS[metric].unit in TIME_UNITS


def _threads(outcome: Outcome) -> str:
    """The numbers of CPU threads in a cell's records, as text; empty where older records lack them."""
    counts = {str(record.cell["threads"]) for record in outcome.records if record.cell.get("threads")}
    return next(iter(counts)) if len(counts) == 1 else ", ".join(sorted(counts))


def differing(first: Run, second: Run, pairs: list[tuple[Outcome, Outcome]]) -> list[str]:
    """In what the two runs differ beside their numbers, each as `what: before | after`: machine and software, the
    commit and version of meftbench, and what was observed of cells (with how many cells it concerns)."""
    facts = [
        ("machine", *(machine(run.environment) for run in (first, second))),
        ("commit", *(checkout(run.environment) for run in (first, second))),
    ]
    lines = [f"{name}: {left} | {right}" for name, left, right in facts if left != right]
    lines += [f"environment {text}" for text in differences(first.environment, second.environment)]
    own = Counter((left.records[-1].meftbench_version, right.records[-1].meftbench_version) for left, right in pairs)
    lines += [f"meftbench: {left} | {right}" for left, right in own if left != right]
    seen: Counter[tuple[str, str, str]] = Counter()
    for left, right in pairs:
        left_cell, right_cell = left.cell, right.cell
        for name in _OBSERVED:
            before, after = left_cell.get(name), right_cell.get(name)
            if before != after:
                seen[name, str(before), str(after)] += 1
    total = len(pairs)
    lines += [f"{name}: {before} | {after} ({n} of {total} cells)" for (name, before, after), n in seen.items()]
    return lines
