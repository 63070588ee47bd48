"""Verdicts for machines: escaping and limits of each format."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from meftbench.errors import UserError
from meftbench.report.render import verdicts as verdict_formats
from meftbench.report.render.comparisons import comparison_github
from meftbench.verdicts.change import Change
from meftbench.verdicts.compare import Comparison
from meftbench.verdicts.judge import Verdict

HOSTILE = "a|b/<script>alert('x')</script>/100%,y:\n::error::/b1/s1"


def a_verdict(state="over", value=11, bound=10, **fields):
    given = {"label": "m/full/b1/s1", "message": f"{value} B (counted) is over max {bound} B", "limit": "max"}
    given |= {"file": Path("b.yaml"), "line": 4, "metric": "activation_peak_bytes", "source": "counted"}
    return Verdict(state=state, value=value, bound=bound, **(given | fields))


def test_github_annotations_are_ten_at_most():
    """GitHub shows ten of a kind: the tenth says how many more there are."""
    lines = verdict_formats.verdicts_github([a_verdict(value=30 - i) for i in range(12)]).splitlines()

    assert 11 == len(lines)
    assert (
        "::error file=b.yaml,line=4,title=over budget::"
        "b.yaml:4: m/full/b1/s1: activation_peak_bytes 30 B (counted) is over max 10 B"
    ) == lines[0]
    assert "::error file=b.yaml,line=1,title=budgets::and 3 more, see the summary" == lines[9]
    assert "12 verdicts: 12 over" == lines[10]


def test_markdown_says_where_the_memory_is():
    """As text, JSON, annotations and JUnit do; of twenty cells at most, without markup of its own."""
    grew = "grew since runs/a: larger: mm.default 8 × 9 float32 (+1 B)"
    text = verdict_formats.verdicts_markdown([a_verdict(cause=grew), a_verdict(cause="")])
    many = verdict_formats.verdicts_markdown([a_verdict(cause="<b>")] * 23)

    assert text.endswith(f"|\n\nWhere the memory is:\n\n- m/full/b1/s1: activation\\_peak\\_bytes: {grew}")
    assert 20 == many.count("- m/full/b1/s1: activation\\_peak\\_bytes: &lt;b&gt;")
    assert many.endswith("\n- and 3 more")
    assert "Where the memory is" not in verdict_formats.verdicts_markdown([a_verdict()])


def test_github_annotations_cannot_be_broken_out_of():
    """A label with a line end may not start a command of its own; properties escape `:` and `,` too."""
    text = verdict_formats.verdicts_github([a_verdict(label=HOSTILE, file=Path("a,b:c%\n.yaml"))])

    assert 2 == len(text.splitlines())
    assert text.startswith("::error file=a%2Cb%3Ac%25%0A.yaml,line=4,")
    assert "100%25,y: ::error::" in text


def test_warnings_are_warnings():
    """What does not fail is not an error."""
    assert verdict_formats.verdicts_github([a_verdict("warned")]).startswith("::warning file=b.yaml")


def test_held_verdicts_are_counted_with_the_least_headroom():
    """The summary says how close the next failure is."""
    verdicts = [a_verdict("held", 9, 10, message=""), a_verdict("held", 50, 100, message="", label="other")]

    assert "2 verdicts: 2 held; least headroom 1 B (10.0%, counted) in activation_peak_bytes of m/full/b1/s1" == (
        verdict_formats.verdicts_text(verdicts)
    )


def test_json_holds_every_field_and_stays_json():
    """inf and nan are the words that records use."""
    content = json.loads(verdict_formats.verdicts_json([a_verdict(value=float("inf"))]), parse_constant=pytest.fail)

    assert ("over", "Infinity", "-Infinity", "byte", True) == tuple(
        content[0][key] for key in ("state", "value", "headroom", "unit", "fails")
    )


def test_junit_sorts_verdicts_into_failures_errors_and_skipped():
    """Over is a failure, a failed cell an error, a waived row skipped."""
    states = ("over", "failed", "waived", "held")
    verdicts = [a_verdict(state, label=f"{HOSTILE}\x00{state}", wall_s=2.0) for state in states]

    root = ElementTree.fromstring(verdict_formats.verdicts_junit(verdicts, "toy"))

    assert ("4", "1", "1", "1") == tuple(root.attrib[name] for name in ("tests", "failures", "errors", "skipped"))
    assert ["failure", "error", "skipped", None] == [
        next((child.tag for child in case if child.tag != "properties"), None) for case in root
    ]
    assert "2.000" == root[0].attrib["time"]
    assert {"value": "11", "bound": "10", "headroom": "-1", "source": "counted", "unit": "byte"} == {
        p.attrib["name"]: p.attrib["value"] for p in root[0].find("properties")
    }


def test_markdown_cells_cannot_end_the_table_or_become_markup():
    """Pipes, line ends and tags are text."""
    row = verdict_formats.verdicts_markdown([a_verdict(label=HOSTILE)]).splitlines()[-1]

    assert "<script>" not in row
    assert 8 == row.replace("\\|", "").count("|")


def test_the_step_summary_is_cut_at_a_line_below_the_limit(tmp_path, monkeypatch):
    """GitHub refuses a summary above 1 MiB as a whole; what stands there already counts."""
    file = tmp_path / "summary.md"
    file.write_text("x" * 999_900)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(file))

    verdict_formats.append_step_summary("\n".join(["y" * 49] * 100), "t")

    added = file.read_text()[999_900:]
    assert "## t\n\n" + ("y" * 49 + "\n") == added


def test_no_summary_file_no_summary(monkeypatch):
    """Outside of GitHub nothing is written."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)

    assert verdict_formats.append_step_summary("text", "t") is None


def test_a_step_summary_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    """The variable names a folder."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))

    with pytest.raises(UserError, match=r"GITHUB_STEP_SUMMARY: the step summary .* cannot be written"):
        verdict_formats.append_step_summary("text", "t")


def test_ten_annotations_need_no_rest():
    """GitHub shows all of them; of eleven nine are shown, and that there are two more."""
    ten, eleven = (verdict_formats.verdicts_github([a_verdict()] * count).splitlines() for count in (10, 11))

    assert (11, 11) == (len(ten), len(eleven))
    assert "more" not in "".join(ten)
    assert eleven[9].endswith("::and 2 more, see the summary")


def test_a_table_of_many_rows_shows_the_worst_200():
    """A summary that nobody can read is none."""
    table = verdict_formats.markdown_table(("a",), [(str(i),) for i in range(250)])

    assert table.endswith("| 199 |\n\nand 50 more")


def test_comparison_annotations_name_only_what_is_worse():
    """A better number needs no annotation."""
    changes = [Change("m", "c", "activation_peak_bytes", j, "counted", 1, 2) for j in ("worse", "better")]

    text = comparison_github(Comparison(changes, [], [], 1, []))

    assert [
        "::error title=regressed::worse: m: activation_peak_bytes 1 B -> 2 B counted (+1 B, +100.00%25)",
        "1 cell in both runs: 1 worse, 1 better",
    ] == text.splitlines()
