"""Made-up trainings, in the real schema: 8 methods, seeds and rates, with scores that differ by method."""

from __future__ import annotations

import math
from typing import Any

from builders import MiB, a_record, counted, measured
from meftbench.plan.training import NOT_CHOSEN, Training
from meftbench.records.record import Metric, Record

# Score at the better rate, activation (MiB), seconds of the training, trained weights.
METHODS: dict[str, tuple[float, float, float, int]] = {
    "full": (0.712, 96.0, 61.0, 22_713_986),
    "lora": (0.681, 74.0, 55.0, 74_498),
    "houlsby": (0.694, 71.0, 52.0, 304_898),
    "parallel": (0.688, 69.0, 50.0, 303_362),
    "meft1": (0.655, 13.0, 74.0, 303_362),
    "meft3": (0.661, 12.6, 71.0, 303_362),
    "meft1-exact": (0.690, 14.4, 98.0, 303_362),
    "meft3-exact": (0.686, 14.1, 95.0, 303_362),
}
RATES = (2e-3, 4e-3)


def a_score(
    method: str = "full",
    score: float | None = 0.7,
    rate: float = 1e-3,
    seed: int = 0,
    task: str = "rte",
    metrics: dict[str, Any] | None = None,
    **fields: Any,
) -> Record:
    """A finished training. fields: of the record, its cell, or `training=` for what is trained otherwise."""
    _, held, seconds, weights = METHODS[method.partition("+")[0]]
    training = Training(task=task, learning_rate=rate, **fields.pop("training", {}))
    curve = [[step, 0.7 - step / 500, None if score is None else score * (1 - math.exp(-step / 20))]
             for step in (25, 50, 75, 100)]  # fmt: skip
    taken = {
        "activation_peak_bytes": counted(int(held * MiB)),
        "peak_allocated_bytes": counted(int((held + 90) * MiB)),
        "parameters_total": counted(22_713_986),
        "parameters_trainable": counted(weights),
        "score": Metric(score, "measured", absent="undefined: the labels are constant" if score is None else None),
        "validation_loss": measured(0.6),
        "training_loss": Metric(0.5, "measured", n=100, samples=[0.7 - i / 500 for i in range(100)]),
        "learning_curve": Metric(curve, "measured"),
        "best_step": measured(75),
        "training_steps": counted(100),
        "training_tokens": counted(61_440),
        "training_time_s": measured(seconds + seed),
        "training_tokens_per_s": measured(61_440 / seconds),
    }
    observed = {"scored_by": "accuracy", "cuts": [], "inputs": task} | fields.pop("observed", {})
    cell = {"model": "minilm", "batch_size": 16, "sequence_length": 48, "seed": seed, "training": training}
    return a_record(method=method, metrics=taken | (metrics or {}), observed=observed, **(cell | fields))


def scored_run(
    tasks: tuple[str, ...] = ("rte", "mrpc"),
    seeds: tuple[int, ...] = (0, 1, 2),
    methods: tuple[str, ...] = tuple(METHODS),
    **fields: Any,
) -> list[Record]:
    """Every method with the first seed at both rates; the lower is the worse one, and left out of other seeds."""
    records = []
    for place, task in enumerate(tasks):
        for seed in seeds:
            for number, method in enumerate(methods):
                about = 0.01 * math.sin(3 * seed + number + place)
                best = METHODS[method][0] + 0.08 * place + about
                low, high = RATES
                made = a_score(method, best - 0.05, low, seed, task, **fields)
                if seed:
                    why = {"type": NOT_CHOSEN, "message": "another did better"}
                    made = a_score(method, best, low, seed, task, status="skipped", status_detail=why, **fields)
                records += [made, a_score(method, best, high, seed, task, **fields)]
    return records
