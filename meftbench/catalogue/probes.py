"""Probes: passes over a cell's training steps, each of which measures some of its metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Probe:
    """A pass over a cell's training steps.

    usual: whether it is run if a suite names no passes.
    """

    home: str  # "module:function", from a probes.subject.Subject to metrics by name
    summary: str
    usual: bool = False


# They are run in this order, each over steps of its own.
PROBES: dict[str, Probe] = {
    "memory": Probe(
        "meftbench.probes.memory:probe",
        "peaks by phase and the breakdown: counted on CPU, measured on CUDA",
        usual=True,
    ),
    "throughput": Probe(
        "meftbench.probes.speed:probe", "time of a step and its phases, tokens and samples a second", usual=True
    ),
    "reconstruction": Probe(
        "meftbench.probes.fidelity:probe",
        "reconstruction and gradient error, and the starting-point shift",
        usual=True,
    ),
}
