"""Texts of records, files and messages are text wherever they are shown: in no output do they act on their reader."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from builders import a_record, a_run
from meftbench.cli.progress import ending, line
from meftbench.errors import UserError
from meftbench.escapes import json_text, single_line, spreadsheet_text, visible
from meftbench.records.store import load_run
from meftbench.report.render.comparisons import comparisons
from meftbench.report.render.markdown import markdown
from meftbench.report.render.terminal import print_summary
from meftbench.report.render.verdicts import render_verdicts
from meftbench.report.results import as_csv, frame_of
from meftbench.report.views.detail import print_records
from meftbench.runner import Ended
from meftbench.verdicts.change import Change
from meftbench.verdicts.compare import Comparison
from meftbench.verdicts.growth import Growth, Part
from meftbench.verdicts.judge import Verdict

HOSTILE = [
    "<script>alert('x')</script>",
    '"><img src=x onerror=alert(1)>',
    "\x1b[31mred\x1b]8;;http://evil\x07",
    "\u202egnp.exe\u2066\u200b",
    "\x9b31m\x00\x7f\r\nnext",
    "=cmd|' /C calc'!A0",
    "@SUM(1)",
    "a|b`c*d_e[f](g)",
    "::error::100%,x:y",
    "\ud800half",
    "\u2028line\u2029paragraph\u0085",
]
TEXTS = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(), max_size=20))


def acts(text):
    """The characters of a text that a terminal or browser acts on without showing them, but for line ends."""
    return [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t"]


@given(TEXTS)
def test_nothing_invisible_is_left(text):
    """And what can be seen is as it was."""
    shown = visible(text)

    assert [] == acts(shown)
    if text.isprintable():
        assert text == shown
    assert "\n" not in single_line(text)
    assert single_line(text) == single_line(single_line(text))


@given(st.recursive(st.none() | st.integers() | TEXTS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner)))
def test_json_is_the_same_with_invisible_characters_as_escapes(content):
    """Read back, it has what was written."""
    text = json_text(json.dumps(content, ensure_ascii=False, indent=1))

    assert [] == acts(text)
    assert content == json.loads(text)


@pytest.mark.parametrize("number", ["-5", "+1.5", "-1e9", "-inf", "7"])
def test_a_number_in_a_table_stays_a_number(number):
    """Negative ones, too."""
    assert number == spreadsheet_text(number)


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-x", "@SUM(1)", "\tx", "\rx", "-", "--1"])
def test_a_formula_in_a_table_is_text(text):
    """As OWASP advises."""
    assert f"'{text}" == spreadsheet_text(text)


def a_hostile_record(text, status="error", **fields):
    """A cell whose label, messages and observations hold `text`."""
    detail = {"type": text, "message": text, "traceback": f"Traceback\n{text}"}
    observed = {"label": f"m/{text}/b8/s128", "model": "m", "attention_used": text, "method": text}
    metrics = {"activation_peak_bytes": 5}
    return a_record(status, metrics, status_detail=detail, observed=observed, host=text, **fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A new folder for each example."""
    return lambda: tmp_path_factory.mktemp("run") / "run"


@given(text=TEXTS)
@example("\x1b[31m").via("an escape sequence")
def test_show_and_csv_hold_what_records_say_as_text(folder, text):
    """The table, a cell with its traceback, the lines of progress, and the CSV, which no spreadsheet calculates."""
    records = [a_hostile_record(text), a_hostile_record(text, "ok", batch_size=1, repeat=0)]
    run = a_run(folder(), *records)
    console = Console(file=io.StringIO(), width=100, force_terminal=False)

    print_summary(run, console)
    print_records(run, run.records, traceback=True, console=console)

    assert [] == acts(console.file.getvalue())
    for record in run.records:
        assert [] == acts(ending(record) + line(Ended(record, 1, 2)))
    for row in list(csv.reader(io.StringIO(as_csv(frame_of(run))), strict=True))[1:]:
        for field in row:
            assert [] == acts(field)
            assert spreadsheet_text(field) == field


def a_hostile_verdict(text):
    place = {"file": Path("b.yaml"), "line": 3, "metric": "activation_peak_bytes", "cell_id": "c", "source": "counted"}
    return Verdict(state="over", label=text, value=11, bound=10, limit="max", message=text, cause=text, **place)


def a_hostile_comparison(text):
    change = Change(text, "c", "activation_peak_bytes", "worse", "counted", 1, 2)
    part = Part(text, "activations", 1, 2)
    grown = Growth(text, "c", {"activation_peak_bytes": (1, 2)}, (part,), (part,))
    return Comparison([change], [text], [text], 1, [text], text, text, [text], [grown])


@given(text=TEXTS)
@example(text="\x7f")
def test_verdicts_hold_labels_and_messages_as_text(text):
    """In text, JSON, JUnit, annotations and Markdown."""
    verdicts = [a_hostile_verdict(text)]

    shown = {name: render_verdicts(verdicts, name, text) for name in ("text", "json", "junit", "github", "markdown")}

    _check_formats(shown)
    assert text == json.loads(shown["json"])[0]["label"]
    (case,) = ElementTree.fromstring(shown["junit"].encode()).findall("testcase")
    assert ["properties", "failure"] == [child.tag for child in case]
    assert 2 == len(shown["text"].splitlines())


@given(text=TEXTS)
def test_comparisons_hold_labels_as_text(text):
    """Of two runs and of several."""
    result = a_hostile_comparison(text)

    for results in ([result], [result, result]):
        shown = {name: comparisons(name, results) for name in ("text", "json", "github", "markdown")}

        _check_formats(shown)
        content = json.loads(shown["json"])
        first = content["comparisons"][0] if "comparisons" in content else content
        assert [text] * 4 == [first["first"], *first["only_first"], *first["notes"], first["changes"][0]["label"]]


def _check_formats(shown):
    """No output acts on its reader: no control characters, no command within an annotation, no markup."""
    for text in shown.values():
        assert [] == acts(text)
        assert text.encode()
    for command in shown["github"].splitlines():
        kind, _, rest = command.partition("title=")
        assert not command.startswith("::") or kind.startswith(("::error ", "::notice "))
        assert "\r" not in rest
    rows = shown["markdown"].splitlines()
    assert not any("<" in row for row in rows)
    # A pipe behind an even number of backslashes ends a cell: all rows have as many cells as the heading.
    cells = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows if row.startswith("|")}
    assert 1 == len(cells)


@pytest.mark.parametrize("text", HOSTILE[:5])
def test_an_error_line_is_one_line_of_text(cli, monkeypatch, text):
    """Also where the message quotes what the user, or a file, says."""

    def refuse(_):
        raise UserError(text, text, text)

    monkeypatch.setattr("meftbench.records.store.load_run", refuse)

    code, out, err = cli("show", "anything")

    assert (2, "", 1) == (code, out, err.count("\n"))
    assert [] == acts(err)


def test_a_folder_with_a_hostile_name_is_named_visibly(cli, tmp_path):
    """Names of files are texts of strangers, too."""
    name = tmp_path / "\x1b[31mred\u202e"
    run = a_run(name, a_record(metrics={"activation_peak_bytes": 5}))

    assert load_run(name).records == run.records
    for arguments in (("check", name), ("compare", name, name), ("show", name)):
        _, out, err = cli(*arguments)
        assert [] == acts(out + err)


@pytest.mark.parametrize(
    "name", ["<img src=x>", "[a](http://evil)", "![a](b)", "# heading", "- list", "1. list", "---", "`code`", "*a* _b_",
             "===", "$x$", "~~a~~", "| a |", "&lt;", "    code"],
)  # fmt: skip
def test_texts_of_a_run_are_no_markup_in_its_markdown(tmp_path, name):
    """Beside the tables, too: the name of a run is shown as it is, and makes no heading, list, link or image."""
    run = a_run(tmp_path / "run", a_record(metrics={"peak_allocated_bytes": 5}), name=name)
    plain = a_run(tmp_path / "plain", a_record(metrics={"peak_allocated_bytes": 5}), name="plain")

    read, expected = (MarkdownIt().enable("table").parse(markdown([one], frame_of(one))) for one in (run, plain))

    assert kinds_of(expected) == kinds_of(read)
    assert any(token.content.startswith(f"{name.strip()}: a CPU") for token in texts_of(read))


def texts_of(tokens):
    return [inline for token in tokens for inline in [*(token.children or [])] if inline.type == "text"]


def kinds_of(tokens):
    """What a text is made of, but for how many pieces of plain text."""
    return [token.type for token in tokens] + [c.type for t in tokens for c in t.children or () if c.type != "text"]
