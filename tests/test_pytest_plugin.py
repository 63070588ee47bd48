"""The pytest plugin: budgets of one's own model, in the code or in a file; what a test without one is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import meftbench.own_model  # noqa: F401 - pytester forgets what its sessions import, and torch cannot be imported twice
from meftbench.catalogue.metrics import METRICS, NOT_A_NUMBER
from meftbench.errors import UserError
from meftbench.own_tests import metric_named, record_of, run_of, updated_file, verdicts_on
from meftbench.plan.budgets import load_budgets
from meftbench.records.record import Metric

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[1]
# 256 × 512 and 512 × 256 weights without biases are 1 MiB of fp32; 64 hidden states of 512 are 128 KiB.
MODEL = """
import pytest, torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(256, 512, bias=False), nn.Linear(512, 256, bias=False)

    def forward(self, x):
        return self.second(self.first(x).square()).square().mean()

BATCH = {"x": torch.ones(64, 256)}
"""


@pytest.fixture
def session(pytester, monkeypatch):
    """Run the tests of `code` in a session with our plugin and no other that is installed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    # Where xdist runs this test, the session below is none of its workers (pytest-benchmark would write nothing).
    # In CI pytest prints a failure whole in its summary, too.
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID", "CI", "BUILD_NUMBER"):
        monkeypatch.delenv(name, raising=False)

    def run(code, *arguments):
        if code:
            pytester.makepyfile(test_memory=MODEL + code)
        return pytester.runpytest_inprocess("-p", "meftbench.pytest_plugin", "-p", "no:cacheprovider", *arguments)

    return run


def test_it_is_installed_and_costs_nothing():
    """The entry point names the module, and importing it imports nothing of ours or of torch."""
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    assert {"meftbench": "meftbench.pytest_plugin"} == entry_points
    code = "import sys, pytest; before = {*sys.modules}; import meftbench.pytest_plugin; print({*sys.modules} - before)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert {"meftbench", "meftbench.pytest_plugin"} == set(eval(done.stdout))


def test_budgets_in_the_code_hold_to_the_byte(session):
    """Before a step with SGD: 1 MiB of weights and the batch; one byte less is exceeded."""
    outcome = session("""
def test_held(memory_budget):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters())
    bounds = {"baseline_allocated": 2**20 + 64 * 1024, "drift_bytes_per_step": 0}
    measurement = memory_budget(model, BATCH, optimizer=optimizer, **bounds)
    assert measurement["parameters_total"].value == 2 * 256 * 512

def test_exceeded(memory_budget):
    model = Model()
    memory_budget(model, BATCH, optimizer=torch.optim.SGD(model.parameters()), baseline_allocated=2**20 + 64 * 1024 - 1)
""")

    outcome.assert_outcomes(passed=1, failed=1)
    outcome.stdout.fnmatch_lines(
        "test_memory.py:23: test_memory.py::test_exceeded: baseline_allocated_bytes 1,114,112 B (counted) is over max "
        "1,114,111 B; over by 1 B (0.00%)"
    )
    before_the_step = outcome.stdout.str().partition("What is alive before the step:\n")[2].splitlines()[:3]
    assert before_the_step == [
        "  1.0 MiB (counted): parameters",
        "  64.0 KiB (counted): the batch",
        "The lists below are of the peak, which is later in the step.",
    ]


def test_what_is_kept_between_steps_is_told_from_what_the_step_makes(session):
    """The outputs of each step that the model keeps are in no category of what a step begins with."""
    outcome = session("""
class Keeping(Model):
    def forward(self, *arguments, **named):
        output = super().forward(*arguments, **named)
        self.kept = torch.ones(1024, 256)
        return output

def test_it(memory_budget):
    memory_budget(Keeping(), BATCH, baseline_allocated="1KiB")
""")

    outcome.assert_outcomes(failed=1)
    text = outcome.stdout.str()
    assert "1.0 MiB (counted): none of these: gradients, outputs or other tensors that are kept" in text
    assert text.index("What is alive before the step:") < text.index("What the peak consists of:")


def test_a_failure_says_what_is_alive_at_the_peak(session):
    """Budget, value, unit, source, by how much; the categories; the largest buffers with module and place; the largest
    modules; what to do."""
    outcome = session("""
@pytest.mark.memory_budget("8MiB", activation_peak="0.5MiB")
def test_step(memory_budget):
    memory_budget(Model(), BATCH)
""")

    outcome.assert_outcomes(failed=1)
    text = outcome.stdout.str()
    # A gradient of 512 KiB, five tensors of 128 KiB and two scalars, each in a block of 512 bytes.
    assert "activation_peak_bytes 1.1 MiB (counted) is over max 512.0 KiB; over by 641.0 KiB (125.20%)" in text
    assert 1 == text.count("is over max")  # the other budget is held
    assert "  640.0 KiB (counted): second, 53% of these buffers: gradients 512.0 KiB, temporaries 128.0 KiB" in text
    categories, buffers = text.split("What is alive at the peak of forward and backward:")
    assert "  1.0 MiB (counted), 18.0% of the peak: parameters_bytes, model parameters at the peak" in categories
    assert (
        "  512.0 KiB (counted): mm.default, gradients: 256 × 512 float32, of second, in step:forward_backward"
        in buffers
    )
    assert (
        "  128.0 KiB (counted): mm.default, activations: 64 × 512 float32, of first, in test_memory:forward" in buffers
    )
    assert "If the test is to take more, raise the bound." in buffers


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "@pytest.mark.memory_budget('1GiB')\ndef test_it(): pass",
            "has the marker memory_budget and measures nothing",
        ),
        ("def test_it(memory_budget): pass", "has the fixture memory_budget and measures nothing"),
        (
            "@pytest.mark.memory_budget('1GiB', '2GiB')\ndef test_it(memory_budget): memory_budget(Model(), BATCH)",
            "the marker has several bounds without a name; name the metric of each",
        ),
        (
            "def test_it(memory_budget): memory_budget(Model(), BATCH)",
            "has no memory budget: none is in the code, and there is no memory_budgets.yaml; give one, such as",
        ),
        (
            "def test_it(memory_budget): memory_budget(Model(), BATCH, peak_alocated='1GiB')",
            "unknown metric 'peak_alocated'; did you mean 'peak_allocated_bytes'?",
        ),
        (
            "def test_it(memory_budget): memory_budget(Model(), BATCH, peak_allocated='900 M')",
            "'900 M' is not an amount of memory; write 412MiB",
        ),
        (
            "def test_it(memory_budget): memory_budget(Model(), BATCH, peak_allocated=None)",
            'peak_allocated_bytes: None is not an amount; write "512MiB" or a number of bytes',
        ),
        (
            "def test_it(memory_budget): memory_budget(Model(), BATCH, peak_allocated=float('inf'))",
            "test_memory.py:13: peak_allocated_bytes: max: it is not a finite number, so that it bounds nothing;",
        ),
        (
            "def test_it(memory_budget): memory_budget(Model(), BATCH, limit=3)",
            "unknown metric 'limit'; write such as peak_allocated, activation_peak,",
        ),
        (
            "def test_it(memory_budget): memory_budget(Model(), BATCH, steps=0, peak_allocated='1GiB')",
            "test_memory.py:13: measure: steps is 0; write a whole number from 1",
        ),
        (
            "def test_it(memory_budget): memory_budget(Model(), BATCH, tokens_per_s=10)",
            "tokens_per_s not measured: the cell has no such metric",
        ),
    ],
)
def test_a_wrong_use_is_one_clear_message(session, code, message):
    """No traceback: it says what is wrong, and what to write."""
    outcome = session(code)

    outcome.assert_outcomes(failed=1)
    assert message in outcome.stdout.str()
    assert "Traceback" not in outcome.stdout.str()
    assert "During handling" not in outcome.stdout.str()


def test_numbers_go_into_junit_and_into_benchmarks(session, pytester):
    """With unit and source, under the name of the call; pytest-benchmark keeps them as extra_info."""
    outcome = session(
        """
def test_it(memory_budget, benchmark):
    memory_budget(Model(), BATCH, peak_allocated="1GiB")
    memory_budget(Model(), BATCH, name="again", peak_allocated="1GiB")
    benchmark(int)
""",
        *("-p", "pytest_benchmark.plugin", "--junitxml=junit.xml", "--benchmark-json=benchmark.json"),
        *("--benchmark-max-time=0.01", "--benchmark-min-rounds=1"),
    )

    outcome.assert_outcomes(passed=1)
    cases = ElementTree.parse(pytester.path / "junit.xml").iter("property")
    properties = {case.attrib["name"]: case.attrib["value"] for case in cases}
    value, unit, source = properties["again.peak_allocated_bytes"].split()
    assert ("byte", "(counted)") == (unit, source)
    extra = json.loads((pytester.path / "benchmark.json").read_text())["benchmarks"][0]["extra_info"]
    assert int(value) == extra["again.peak_allocated_bytes (counted)"] == extra["peak_allocated_bytes (counted)"]
    assert properties.keys() == {name.removesuffix(" (counted)") for name in extra}


IN_FILE = """
@pytest.mark.parametrize("rows", [64, 128])
def test_step(memory_budget, rows):
    memory_budget(Model(), {"x": torch.ones(rows, 256)})
"""


def test_budgets_in_a_file_are_written_then_held_then_exceeded(session, pytester):
    """A test without a row gets rows; comments and the rest stay; afterwards a byte more fails, with its line."""
    session(IN_FILE, "--memory-budgets-update").assert_outcomes(passed=2)
    file = pytester.path / "memory_budgets.yaml"
    rows = yaml.safe_load(file.read_text())["budgets"]
    assert ["test_memory.py::test_step[64]", "test_memory.py::test_step[128]"] == [row["match"] for row in rows[::2]]
    session("").assert_outcomes(passed=2)

    bound = rows[0]["max"]
    file.write_text(file.read_text().replace(f"max: {bound}}}", f"max: {bound - 1}}}  # tight"))
    outcome = session("")
    outcome.assert_outcomes(passed=1, failed=1)
    outcome.stdout.fnmatch_lines("memory_budgets.yaml:5: *test_step?64?: peak_allocated_bytes*over by 1 B*")
    outcome.stdout.fnmatch_lines("If the test is to take more: pytest --memory-budgets-update")

    update = session("", "--memory-budgets-update", "-k", "64")
    update.assert_outcomes(passed=1, deselected=1)
    row = f'match: "test_memory.py::test_step[64]", metric: peak_allocated_bytes, source: counted, max: {bound}'
    assert f"+  - {{{row}}}  # tight" in update.stdout.lines
    assert rows == yaml.safe_load(file.read_text())["budgets"]
    assert "nothing to update" in session("", "--memory-budgets-update").stdout.str()


def test_a_file_of_another_name_and_a_damaged_one(session, pytester):
    """The option comes before the ini value; a fault in the file is named with its line, before an update runs."""
    pytester.makeini("[pytest]\nmemory_budgets = limits/own.yaml\n")
    (pytester.path / "limits").mkdir()
    session(IN_FILE, "--memory-budgets-update").assert_outcomes(passed=2)
    assert (pytester.path / "limits" / "own.yaml").is_file()

    (pytester.path / "other.yaml").write_text("schema: 1\nbudgets:\n  - {match: '*', metric: peak_bytes, max: 1}\n")
    outcome = session("", "--memory-budgets", "other.yaml", "-k", "64")
    outcome.assert_outcomes(failed=1, deselected=1)
    assert "other.yaml:3: budgets[0].metric: unknown metric 'peak_bytes'" in outcome.stdout.str()
    outcome = session("", "--memory-budgets", "other.yaml", "--memory-budgets-update")
    assert pytest.ExitCode.USAGE_ERROR == outcome.ret
    assert "other.yaml:3: budgets[0].metric: unknown metric 'peak_bytes'" in outcome.stderr.str()


def test_an_update_needs_one_process(session):
    """What several processes measured is not in one of them."""
    outcome = session(IN_FILE, "-p", "xdist", "-n2", "--memory-budgets-update")
    assert pytest.ExitCode.USAGE_ERROR == outcome.ret
    assert "the tests run in several processes; add -n0" in outcome.stderr.str()


@pytest.mark.parametrize(("gpu", "state"), [("NVIDIA H200", "over"), ("NVIDIA A10", "elsewhere")])
def test_measured_numbers_are_held_to_rows_on_them(tmp_path, gpu, state):
    """On a GPU, rows on counted bytes do not apply, and those of another environment are not judged."""
    file = tmp_path / "budgets.yaml"
    rows = ["source: counted, max: 1", "source: measured, environment: h200, max: 98"]
    lines = [f"  - {{match: 'test_*', metric: peak_allocated_bytes, {row}}}\n" for row in rows]
    file.write_text("schema: 1\nbudgets:\n" + "".join(lines))
    record = record_of("test_memory.py::test_step", {"peak_allocated_bytes": Metric(100, "measured")})
    run = run_of([record], {"gpus": {"devices": [{"name": gpu}]}, "torch": {"cuda": "13.0"}})

    assert [(4, state)] == [(verdict.line, verdict.state) for verdict in verdicts_on(run, load_budgets(file))]


@given(st.sampled_from(sorted(METRICS)))
def test_metrics_are_named_in_full_or_without_bytes(metric):
    if metric in NOT_A_NUMBER or METRICS[metric].unit in ("buffers", "text"):
        with pytest.raises(UserError, match="unknown metric"):
            metric_named("here", metric)
    else:
        assert metric == metric_named("here", metric)
        assert metric == metric_named("here", metric.removesuffix("_bytes"))


labels = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12)


@given(
    known=st.lists(labels, min_size=1, max_size=4, unique=True),
    new=st.lists(labels, max_size=4, unique=True),
    indent=st.sampled_from(["", "  ", "    "]),
    tail=st.sampled_from(["", "\n", "  # last\n", "\n\n# end\ndefault: {tolerance: 0}\n"]),
    ends=st.sampled_from(["\n", "\r\n"]),
)
@settings(max_examples=60)
def test_rows_are_added_after_the_last_and_the_rest_stays(known, new, indent, tail, ends):
    """Whatever the tests are called, and however the file is laid out."""
    rows = [
        f"{indent}- {{match: {json.dumps(name, ensure_ascii=False)}, metric: peak_allocated_bytes, max: 7}}"
        for name in known
    ]
    text = ends.join(["# größer → 🙂", "schema: 1", "budgets:", *rows]) + tail.replace("\n", ends)
    measured = {name: {"peak_allocated_bytes": Metric(7, "counted")} for name in [*known, *new]}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "budgets.yaml"
        file.write_bytes(text.encode())

        update = updated_file(file, run_of([record_of(name, metrics) for name, metrics in measured.items()], {}))
        update.write()

        budgets = load_budgets(file)
        text_after = file.read_bytes().decode()
    added = [row.match for row in budgets.rows[len(known) :]]
    globs = budgets.rows[: len(known)]
    assert known == [row.match for row in globs]
    assert set(added) <= set(new) - set(known)
    assert all(name in added or any(row._pattern.fullmatch(name) for row in globs) for name in new)
    lines, lines_after = text.splitlines(), text_after.splitlines()
    assert lines == list(filter(lines.__contains__, lines_after))


@pytest.mark.parametrize("calls", ['name="2"', 'name="again"'])
def test_two_budgets_of_one_name_are_refused_and_nothing_is_written(session, pytester, calls):
    """The second call without a name is named 2. One row of the file could not hold both."""
    first = "" if calls == 'name="2"' else calls
    code = f"""
def test_it(memory_budget):
    memory_budget(Model(), BATCH, {calls})
    memory_budget(Model(), BATCH, {first})

def test_other(memory_budget):
    memory_budget(Model(), BATCH)
"""
    outcome = session(code, "--memory-budgets-update")

    outcome.assert_outcomes(passed=1, failed=1)
    what = "test_memory.py:*: memory_budget: two calls of test_memory.py::test_it have the name '*'; give each a name*"
    outcome.stdout.fnmatch_lines([what, f"not written: {what}"])
    assert not (pytester.path / "memory_budgets.yaml").exists()
