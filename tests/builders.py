"""Records and run folders made by hand, in the real schema, with defaults: a test says only what it is about."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from meftbench.plan.cell import Cell
from meftbench.records.record import Metric, Record
from meftbench.records.store import Run, load_run
from meftbench.records.writer import writing

MiB = 2**20


def a_cell(**fields: Any) -> Cell:
    """bert-base@random, full, 8 × 128; `method="lora+checkpoint"` sets the levers too."""
    given = {"method": "full", "model": "bert-base@random", "batch_size": 8, "sequence_length": 128}
    return Cell.of(**(given | fields))


def counted(value: int | float, **fields: Any) -> Metric:
    return Metric(value, "counted", **fields)


def measured(value: int | float, **fields: Any) -> Metric:
    return Metric(value, "measured", **fields)


def step_time(seconds: float, spread: float = 0.01) -> Metric:
    """Median and quartiles `spread` around it."""
    low, high = seconds * (1 - spread), seconds * (1 + spread)
    return Metric(seconds, "measured", n=5, min=low, max=high, samples=[low, seconds, seconds, seconds, high])


def a_record(status: str = "ok", metrics: dict[str, Any] | None = None, **fields: Any) -> Record:
    """One finished cell. metrics: Metric or a number (counted) by name.

    fields: those of a Record (`repeat`, `status_detail` ...); the rest go to `a_cell`. `observed` is laid over the
    recorded cell.
    """
    own = {name: fields.pop(name) for name in list(fields) if name in Record.__dataclass_fields__}
    observed = fields.pop("observed", {})
    cell = a_cell(**fields)
    taken = {name: value if isinstance(value, Metric) else counted(value) for name, value in (metrics or {}).items()}
    defaults = {
        "record_id": f"r-{cell.cell_id}-{own.get('repeat', 0)}",
        "run_id": "run-1",
        "cell_id": cell.cell_id,
        "repeat": 0,
        "protocol_id": "protocol-1",
        "environment_id": "environment-1",
        "meftbench_version": "0.1.0",
        "code_digest": "c0de",
        "started_at": "2026-11-24T04:00:00Z",
        "finished_at": "2026-11-24T04:00:05Z",
        "host": "machine",
        "worker_pid": 7,
        "cell": cell.recorded() | {"attention_used": cell.attention_requested} | observed,
        "status": status,
        "wall_s": 5.0,
        "metrics": taken,
    }
    return Record(**(defaults | own))


ENVIRONMENT: dict[str, Any] = {
    "schema": 1,
    "environment_id": "environment-1",
    "comparable": {"machine": "x86_64", "cpu": "a CPU", "cores": 2, "packages": {"torch": "2.13.0"}, "gpus": []},
    "taken_at": "2026-11-24T04:00:00Z",
    "meftbench": {
        "version": "0.1.0",
        "code_digest": "c0de",
        "git": {"sha": "0123456789abcdef", "branch": "main", "dirty": True, "diff_digest": "d1ff"},
    },
    "host": {"name": "machine", "cpu": "a CPU", "cores": 2, "machine": "x86_64", "python": "3.11.9"},
    "gpus": {"devices": [], "driver": None, "absent": "no NVIDIA driver answers"},
    "torch": {"version": "2.13.0"},
    "packages": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
}


def a_run(folder: Path, *records: Record, environment: dict[str, Any] | None = None, **suite: Any) -> Run:
    """A run folder on disk, written by the real writer and read back."""
    content = {"schema": 1, "name": "toy", "run_id": "run-1", "protocol": {"warmup": 2, "steps": 5}} | suite
    with writing(folder) as writer:
        writer.write("suite.yaml", yaml.safe_dump(content))
        writer.write("environment.json", json.dumps(ENVIRONMENT | (environment or {})))
        for record in records:
            writer.append(record)
    return load_run(folder)


def tear_last_line(run: Run) -> None:
    """As if the runner had been killed while it wrote a record."""
    with (run.path / "records.jsonl").open("a") as stream:
        stream.write('{"schema": 1, "record_id"')


# --- a whole sweep, with numbers of a plausible shape ---

STREAMS = {
    "full": 204.5,
    "lora": 150.0,
    "lora+checkpoint": 32.8,
    "houlsby": 160.0,
    "pfeiffer": 155.0,
    "parallel": 152.0,
    "meft1": 23.4,
    "meft2": 23.9,
    "meft3": 21.0,
}
_BREAKDOWN = {
    "parameters_bytes": 109 * 4 * MiB,
    "buffers_bytes": MiB,
    "gradients_bytes": 12 * MiB,
    "optimizer_bytes": 24 * MiB,
    "temporaries_bytes": 9 * MiB,
    "inputs_bytes": 64 * 2**10,
    "workspace_bytes": 0,
    "other_bytes": 0,
}


def a_measured_cell(method: str = "full", batch_size: int = 8, sequence_length: int = 128, **fields: Any) -> Record:
    """A finished cell with every metric that a counted run of our worker takes."""
    streams = STREAMS.get(method, 100.0)
    activation = int(streams * batch_size * sequence_length * 768 * 4)
    full = method.startswith("full")
    trained = 109_000_000 if full else 600_000
    breakdown = _BREAKDOWN | {"activations_bytes": activation}
    if full:
        breakdown |= {"gradients_bytes": 109 * 4 * MiB, "optimizer_bytes": 109 * 8 * MiB}
    peak = sum(breakdown.values())
    seconds = batch_size * sequence_length * (1.3 if "checkpoint" in method or "meft" in method else 1.0) / 8000
    metrics: dict[str, Any] = {
        **breakdown,
        "activation_peak_bytes": activation,
        "peak_allocated_bytes": counted(
            peak, phases={"forward": peak - 5 * MiB, "backward": peak, "optimizer": peak - 9 * MiB, "step": peak}
        ),
        "peak_requested_bytes": peak - 4000,
        "baseline_allocated_bytes": peak - activation,
        "saved_bytes": activation // 2,
        "peak_phase": Metric("backward", "counted"),
        "drift_bytes_per_step": 0,
        "step_time_s": step_time(seconds),
        "tokens_per_s": measured(batch_size * sequence_length / seconds),
        "parameters_total": 109_000_000 + (0 if full else trained),
        "parameters_trainable": trained,
        "build_s": measured(1.5),
    }
    if "meft" in method:
        growth = {"1": 10.0, "2": 8.0, "3": 40.0}[method[4]]
        layers = [[3e-8 * growth**depth, 2e-8 * growth**depth] for depth in reversed(range(6))]
        metrics |= {
            "reconstruction_rel": Metric(layers, "measured"),
            "reconstruction_rel_max": measured(layers[0][0]),
            "gradient_rel_max": measured(layers[0][0] * 2),
            "gradient_cosine_min": measured(0.98),
        }
    metrics |= fields.pop("metrics", {})
    return a_record(method=method, batch_size=batch_size, sequence_length=sequence_length, metrics=metrics, **fields)


def a_sweep(
    methods: list[str] = [*STREAMS][:5],
    batches: tuple[int, ...] = (1, 8),
    lengths: tuple[int, ...] = (128, 512),
    **fields: Any,
) -> list[Record]:
    """The records of methods × batches × lengths."""
    return [a_measured_cell(m, b, s, **fields) for b in batches for s in lengths for m in methods]


def changed(record: Record, **fields: Any) -> Record:
    return replace(record, **fields)


def an_exact_cell(
    side_bits: int | None = 3, coupling: str = "paper", output: str = "mean", method: str = "meft1-exact", **fields: Any
) -> Record:
    """A finished cell of an exact method: nothing is lost, the shift is twice the factor, a bit costs 0.1 MiB."""
    m = side_bits or 3
    params = {"side_bits": side_bits, "coupling": coupling, "output": output} | fields.pop("method_params", {})
    defaults = {"coupling": "paper", "output": "mean"}
    said = {key: value for key, value in params.items() if value is not None and defaults.get(key) != value}
    metrics = {
        "activation_peak_bytes": int((28 + 0.1 * m) * MiB),
        "peak_allocated_bytes": int((128 + 0.1 * m) * MiB),
        "step_time_s": step_time(0.5 + 0.001 * m),
        "tokens_per_s": measured(2000 - m),
        "starting_point_shift": measured(2 * 2.0**-m * (0.5 if coupling == "centred" else 1)),
        "reconstruction_rel": Metric([[0.0, 0.0]] * 6, "measured"),
        "reconstruction_rel_max": measured(0.0),
        "gradient_rel_max": measured(4e-7),
    }
    record = a_record(method=method, method_params=said, metrics=metrics | fields.pop("metrics", {}), **fields)
    record.cell["method_params"] |= params  # a record of the time when these were the defaults, as its label says
    return record


def a_side_bits_sweep(
    bits: tuple[int, ...] = (1, 2, 3), couplings: tuple[str, ...] = ("paper", "centred"), **fields: Any
) -> list[Record]:
    """Exact cells over side bits for each coupling and output, and the two methods that they are held against."""
    swept = [an_exact_cell(m, c, o, **fields) for c in couplings for o in ("mean", "last") for m in bits]
    checkpointed = a_measured_cell("lora+checkpoint", metrics={"starting_point_shift": measured(0.0)})
    return [checkpointed, a_measured_cell("meft1", metrics={"starting_point_shift": measured(1.08)}), *swept]
