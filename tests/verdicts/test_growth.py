"""What grew at the peak of a cell, buffer by buffer, and how a verdict or a comparison names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import MiB, a_record, a_run, counted
from meftbench.errors import UserError
from meftbench.records.outcome import collect
from meftbench.records.record import Metric
from meftbench.records.store import load_run
from meftbench.verdicts.growth import grown_buffers, growth, largest_buffers

ACTIVATION = "activation_peak_bytes"


def a_buffer(
    op="mm.default", size=4 * MiB, shape=(4, 8), category="activations", place="layer.0", count=1, module=None
):
    """A row of `peak_buffers`; without a module as in older records."""
    return {
        "op": op, "bytes": size, "count": count, "shape": [*shape], "dtype": "float32", "category": category,
        "place": place,
    } | ({} if module is None else {"module": module})  # fmt: skip


def a_cell_with(*rows, **metrics):
    """A finished cell with these buffers at its peak, and an activation peak that is their sum."""
    listed = {"peak_buffers": Metric([*rows], "counted"), ACTIVATION: counted(sum(row["bytes"] for row in rows))}
    return collect([a_record(metrics=listed | metrics)])[0]


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ([], [a_buffer()], "new: mm.default 4 × 8 float32 (activations, in layer.0) 4.0 MiB"),
        ([a_buffer()], [], "gone: mm.default 4 × 8 float32 (activations, in layer.0) 4.0 MiB"),
        (
            [a_buffer()],
            [a_buffer(size=4 * MiB + 1)],
            "larger: mm.default 4 × 8 float32 (activations, in layer.0) 4,194,304 B -> 4,194,305 B (+1 B)",
        ),
        (
            [a_buffer(count=2)],
            [a_buffer(size=6 * MiB, count=3)],
            "larger: mm.default 4 × 8 float32 (3 of them, activations, in layer.0) 4.0 MiB -> 6.0 MiB "
            "(+2.0 MiB, 2 -> 3 of them)",
        ),
        (
            [a_buffer()],
            [a_buffer(size=8 * MiB, shape=(8, 8))],
            "larger: mm.default 8 × 8 float32 (activations, in layer.0) (was 4 × 8) 4.0 MiB -> 8.0 MiB (+4.0 MiB)",
        ),
        (
            [a_buffer(size=2 * MiB)],
            [a_buffer(size=MiB)],
            "smaller: mm.default 4 × 8 float32 (activations, in layer.0) 2.0 MiB -> 1.0 MiB (-1.0 MiB)",
        ),
    ],
)
def test_a_buffer_is_new_larger_smaller_or_gone(before, after, text):
    """With its operation, shape, category and place, and both sizes to the byte where they look alike."""
    assert [text] == [part.text() for part in grown_buffers(a_cell_with(*before), a_cell_with(*after))]


def test_a_buffer_whose_place_was_renamed_has_not_grown():
    """A function that has another name holds the same memory."""
    assert () == grown_buffers(a_cell_with(a_buffer()), a_cell_with(a_buffer(place="layer.renamed")))


def test_what_grew_is_named_with_its_module():
    """Of rows that differ in the module alone, each is held against that of its own; a module that was moved has not
    grown, whatever its new name."""
    query, key = a_buffer(module="layer.*.query"), a_buffer(module="layer.*.key")
    larger = key | {"bytes": 6 * MiB}

    (part,) = grown_buffers(a_cell_with(query, key), a_cell_with(larger, query))

    assert "layer.*.key" == part.module
    text = "larger: mm.default 4 × 8 float32 (activations, of layer.*.key, in layer.0) 4.0 MiB -> 6.0 MiB (+2.0 MiB)"
    assert text == part.text()
    assert () == grown_buffers(a_cell_with(query, key), a_cell_with(query, key | {"module": "layer.*.self.key"}))
    itself = a_cell_with(a_buffer(module=""))
    assert ["mm.default 4 × 8 float32 (activations, of the model itself, in layer.0) 4.0 MiB"] == largest_buffers(
        itself
    )


def test_a_record_without_modules_is_held_against_the_sum_over_modules():
    """Older records list buffers of one kind in one row."""
    old = a_cell_with(a_buffer(size=8 * MiB, count=2))
    rows = [a_buffer(module="query"), a_buffer(module="key")]

    assert () == grown_buffers(old, a_cell_with(*rows)) == grown_buffers(a_cell_with(*rows), old)
    (part,) = grown_buffers(old, a_cell_with(*rows, a_buffer(module="value")))
    assert (None, 4 * MiB, (2, 3)) == (part.module, part.delta, part.counts)


def test_the_growth_of_a_cell_is_its_peaks_categories_and_buffers():
    """And what no listed buffer accounts for is said."""
    before = a_cell_with(a_buffer(), peak_allocated_bytes=90 * MiB, gradients_bytes=5 * MiB)
    after = a_cell_with(
        a_buffer(size=5 * MiB), activation_peak_bytes=7 * MiB, peak_allocated_bytes=99 * MiB, gradients_bytes=6 * MiB
    )

    assert [
        "bert-base@random/full/b8/s128: activation_peak_bytes +3.0 MiB, peak_allocated_bytes +9.0 MiB",
        "  category larger: gradients 5.0 MiB -> 6.0 MiB (+1.0 MiB)",
        "  buffer larger: mm.default 4 × 8 float32 (activations, in layer.0) 4.0 MiB -> 5.0 MiB (+1.0 MiB)",
        "  +2.0 MiB is in buffers that are not listed (each below 1 % of the activation peak)",
    ] == growth(before, after).lines()


def test_cells_without_lists_of_buffers_have_no_growth_to_tell():
    """Their records are of an older version, or of a GPU."""
    cells = [collect([a_record(metrics={ACTIVATION: size})])[0] for size in (1, 2)]

    assert (None, None, []) == (grown_buffers(*cells), growth(*cells), largest_buffers(cells[0]))


ROWS = st.lists(
    st.builds(
        a_buffer,
        st.sampled_from(["mm", "gelu", "add"]),
        st.integers(1, 2**40),
        st.lists(st.integers(1, 9), max_size=2),
        st.sampled_from(["activations", "gradients"]),
        st.sampled_from(["a", "b"]),
        st.integers(1, 5),
        st.sampled_from([None, "", "layer.*.query"]),
    ),
    max_size=6,
)


@given(before=ROWS, after=ROWS)
def test_the_parts_add_up_to_the_change_of_the_whole(before, after):
    """No buffer is lost or counted twice, however the rows of both cells are matched; the largest growth is first."""
    parts = grown_buffers(a_cell_with(*before), a_cell_with(*after))

    assert sum(row["bytes"] for row in after) - sum(row["bytes"] for row in before) == sum(p.delta for p in parts)
    assert sorted((part.delta for part in parts), reverse=True) == [part.delta for part in parts]
    assert () == grown_buffers(a_cell_with(*before), a_cell_with(*reversed(before)))


# --- on a committed run ---

COMMITTED = Path(__file__).resolve().parents[2] / "reports" / "minilm-cpu"


@pytest.fixture
def planted(tmp_path):
    """A copy of a committed run in which one buffer of one cell is a byte larger; and that cell's label."""
    run = tmp_path / "planted"
    shutil.copytree(COMMITTED, run, ignore=shutil.ignore_patterns("plots", "*.html"))
    lines = (run / "records.jsonl").read_text().splitlines()
    record = json.loads(lines[7])
    record["metrics"][ACTIVATION]["value"] += 1
    record["metrics"]["peak_buffers"]["value"][1]["bytes"] += 1
    lines[7] = json.dumps(record)
    (run / "records.jsonl").write_text("\n".join(lines) + "\n")
    return run, record["cell"]["label"]


@pytest.fixture
def exact(cli, tmp_path):
    """Budgets that are the committed run's own numbers, with the run that they are from."""
    labels = dict.fromkeys(
        json.loads(line)["cell"]["label"] for line in (COMMITTED / "records.jsonl").read_text().splitlines()
    )
    file = tmp_path / "exact.yaml"
    rows = "".join(f'  - {{match: "{label}", metric: {ACTIVATION}, max: 9GiB}}\n' for label in labels)
    file.write_text(f"schema: 1\nupdated_from: nowhere  # kept\nbudgets:\n{rows}")
    assert 0 == cli("check", COMMITTED, "--budget", file, "--update")[0]
    assert "# kept" in file.read_text()
    return file


GREW = (
    "larger: mm.default 384 × 1,536 float32 "
    "(6 of them, gradients, of bert.encoder.layer.*.output.dense, in step:forward_backward)"
)


@pytest.mark.parametrize("arguments", [["--baseline", COMMITTED], []])
def test_one_planted_byte_fails_the_check_and_is_named(cli, planted, exact, arguments):
    """Cell, bound, difference, and the buffer that grew: since --baseline, or since the run the budgets are from."""
    run, label = planted

    code, out, _ = cli("check", run, "--budget", exact, *arguments)

    assert 1 == code
    (line,) = [line for line in out.splitlines() if "is over max" in line]
    assert f"{label}: {ACTIVATION} " in line
    assert "over by 1 B" in line
    assert GREW in line
    assert line.endswith("14,155,776 B -> 14,155,777 B (+1 B)")


def test_without_a_run_to_hold_against_the_largest_buffers_are_named(cli, planted, exact):
    """The budgets do not say which run they are from."""
    run, _ = planted
    exact.write_text("".join(line for line in exact.read_text().splitlines(True) if "updated_from" not in line))

    code, out, _ = cli("check", run, "--budget", exact)

    assert 1 == code
    assert "; largest at the peak of forward and backward: embedding_dense_backward.default 30,522 × 384" in out


def test_a_comparison_names_the_planted_byte_in_every_format(cli, planted):
    """Text, JSON, annotations and Markdown."""
    run, label = planted

    def printed(format_):
        code, out, _ = cli("compare", COMMITTED, run, "--only-changed", "--fail-on", "regression", "--format", format_)
        assert 1 == code
        return out

    short = label.partition("/")[2]
    assert f"grew: {short}: {ACTIVATION} +1 B\n  buffer {GREW}" in printed("text")
    (cell,) = json.loads(printed("json"))["grown"]
    assert [("larger", 1, "gradients")] == [(row["kind"], row["delta"], row["category"]) for row in cell["buffers"]]
    assert GREW in printed("github")
    assert "- buffer larger: mm.default 384 × 1,536 float32" in printed("markdown")


def test_a_committed_run_held_against_itself_never_fails(cli, exact):
    """Neither by its own budgets nor by a comparison, times and errors included."""
    assert 0 == cli("check", COMMITTED, "--budget", exact)[0]
    assert 0 == cli("compare", COMMITTED, COMMITTED, "--fail-on", "regression")[0]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_peak_that_is_no_number_has_not_grown(cli, tmp_path, value):
    """It is compared all the same, and written as JSON."""
    finite = {"peak_allocated_bytes": 5, "gradients_bytes": 5, "peak_buffers": Metric([a_buffer()], "counted")}
    broken = {name: counted(value) for name in finite if name != "peak_buffers"}
    broken |= {"peak_buffers": Metric([a_buffer(size=9)], "counted")}
    runs = [a_run(tmp_path / name, a_record(metrics=of)).path for name, of in (("a", finite), ("b", broken))]

    code, out, _ = cli("compare", *runs, "--json")

    assert 0 == code
    assert [] == json.loads(out)["grown"]


@pytest.mark.parametrize("row", [a_buffer(size="NaN"), {"op": "damaged"}, 7, a_buffer(module=7)])
def test_buffers_that_are_damaged_are_refused_with_their_line(tmp_path, row):
    """A growth could not be told from them."""
    record = a_record(metrics={"peak_buffers": Metric([row], "counted")})
    (a_run(tmp_path / "a").path / "records.jsonl").write_text(json.dumps(record.to_json()) + "\n")

    with pytest.raises(UserError, match=r"records\.jsonl:1: is not a record \(the value of peak_buffers is "):
        load_run(tmp_path / "a")
