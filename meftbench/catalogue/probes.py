"""Probes: the passes over a cell's training steps in which its metrics are taken."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Probe:
    """A pass of its own over a cell's training steps.

    usual: whether it is run where a suite names no passes.
    """

    home: str  # "module:function", from a probes.subject.Subject to metrics by name
    summary: str
    usual: bool = False


# In this order they are run; each has its own window.
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
