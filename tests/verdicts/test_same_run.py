"""A run held against itself never fails, whatever it holds: by its own budgets, as its own baseline, or compared."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import a_record, a_run
from meftbench.catalogue.metrics import METRICS, NOT_A_NUMBER
from meftbench.plan.budgets import load_budgets
from meftbench.records.record import Metric
from meftbench.records.store import load_run
from meftbench.verdicts.compare import compare
from meftbench.verdicts.compare import exit_code as comparison_code
from meftbench.verdicts.judge import exit_code, judge
from meftbench.verdicts.update import updated

REPORTS = Path(__file__).resolve().parents[2] / "reports"
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([math.nan, math.inf, -math.inf, 0, -1, 2**53 + 1])
)
NAMES = st.sampled_from(sorted(METRICS.keys() - NOT_A_NUMBER - {"collapse", "peak_buffers"}))
SOURCES = st.sampled_from(["measured", "counted", "predicted"])
TIMES = st.none() | st.lists(st.floats(1e-9, 1e9), max_size=6)
CELLS = st.lists(
    st.tuples(
        st.sampled_from(["ok", "ok", "ok", "oom", "error", "skipped"]),
        st.dictionaries(NAMES, st.builds(Metric, NUMBERS, SOURCES, samples=TIMES), max_size=5),
        st.integers(1, 2),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60)
@given(cells=CELLS, share=st.sampled_from(["0%", "1%", "0.0000001%"]))
def test_made_up_runs_never_fail_against_themselves(cells, share):
    """Nor is any number of theirs over its baseline, negative ones, NaN and those beyond 2^53 included."""
    with tempfile.TemporaryDirectory() as folder:
        records = [
            a_record(status, metrics, batch_size=index + 1, repeat=repeat)
            for index, (status, metrics, repeats) in enumerate(cells)
            for repeat in range(repeats)
        ]
        run = a_run(Path(folder) / "run", *records)
        names = sorted({name for _, metrics, _ in cells for name in metrics}) or ["ooms"]
        rows = "".join(f"  - {{match: '*', metric: {name}, baseline: true, max_increase: {share}}}\n" for name in names)
        file = Path(folder) / "b.yaml"
        file.write_text(f"schema: 1\nbudgets:\n{rows}")

        verdicts = judge(run, load_budgets(file), baseline=run)

        assert [] == [verdict.text() for verdict in verdicts if verdict.state == "over"]
        assert 0 == comparison_code(compare(run, load_run(run.path)), True)


@pytest.mark.parametrize("name", ["minilm-cpu", "smollm2-cpu", "best-levers", "quality-minilm"])
def test_committed_runs_never_fail_against_themselves(tmp_path, name):
    """With budgets on every peak, exact to the byte, and with every number compared."""
    run = load_run(REPORTS / name)
    file = tmp_path / "b.yaml"
    labels = dict.fromkeys(record.label for record in run.records if record.status == "ok")
    rows = "".join(f'  - {{match: "{label}", metric: peak_allocated_bytes, max: 1}}\n' for label in labels)
    file.write_text(f"default: {{missing: ignore}}\nschema: 1\nbudgets:\n{rows}")
    updated(run, load_budgets(file)).write()

    verdicts = judge(run, load_budgets(file))

    assert {"held"} == {verdict.state for verdict in verdicts if not verdict.silent or verdict.state == "held"}
    assert 0 == exit_code(verdicts)
    comparison = compare(run, load_run(REPORTS / name))
    assert {"same"} == {change.judgement for change in comparison.changes}
    assert ([], []) == (comparison.differs, comparison.grown)
