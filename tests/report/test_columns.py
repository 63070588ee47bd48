"""What numbers are called, and in which groups they are offered, where they stand alone."""

from __future__ import annotations

from meftbench.catalogue.metrics import METRICS
from meftbench.report.columns import COLUMNS, heading_of, in_groups
from meftbench.report.views.steps import SHARE

NUMBERS = ["batch_size", "sequence_length", "learning_rate", SHARE, *METRICS]


def test_every_number_is_in_one_group_under_a_heading_of_its_own():
    """No two metrics have the same words, and none the underscores of its name."""
    groups = in_groups(NUMBERS)

    assert ["shape", "memory", "speed", "exactness", "scores", "other"] == [group for group, _ in groups]
    assert sorted(NUMBERS) == sorted(name for _, names in groups for name in names)
    headings = [heading_of(name) for name in NUMBERS]
    assert len(headings) == len(set(headings))
    assert [] == [heading for heading in headings if "_" in heading]


def test_a_group_follows_from_the_unit_or_is_declared():
    """Sizes are memory, times and rates speed; what recomputation loses is exactness; scores and losses are scores."""
    group_of = {name: group for group, names in in_groups(NUMBERS) for name in names}

    assert {"memory"} == {group_of[name] for name in METRICS if METRICS[name].unit == "byte"}
    expected = {
        "alloc_retries": "memory", SHARE: "memory", "tokens_per_s": "speed", "training_time_s": "speed",
        "mismatched_elements": "exactness", "gradient_cosine_min": "exactness", "starting_point_shift": "exactness",
        "f1": "scores", "pretrained_loss": "scores", "learning_rate": "other", "build_s": "other", "power_w": "other",
    }  # fmt: skip
    assert expected == {name: group_of[name] for name in expected}


def test_columns_of_tables_come_first_in_their_order():
    """What the tables show is what charts are mostly drawn of."""
    declared = [column.metric for column in COLUMNS]

    (_, names), *_ = in_groups([*reversed(METRICS)])

    shown = [name for name in names if name in declared]
    assert shown == names[: len(shown)] == [name for name in declared if name in names]
    assert ("trained parameters", "step time") == (heading_of("parameters_trainable"), heading_of("step_time_s"))
    assert ("samples per second", "drift per step") == (heading_of("samples_per_s"), heading_of("drift_bytes_per_step"))
