"""The page: self-contained, escaped, complete."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import sys
from html.parser import HTMLParser

import pytest

from builders import a_measured_cell, a_record, a_run, a_sweep, an_exact_cell, measured
from meftbench.catalogue.metrics import METRICS, Kind
from meftbench.errors import UserError
from meftbench.report.figures.picture import Picture
from meftbench.report.render import report
from meftbench.report.render.report import write_report

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}'


NOISE = "what is recomputed is not what was computed, and the gradients of the lower adapters are noise"


class Parsed(HTMLParser):
    """Tags and ids of a page, and its text outside of scripts, styles and drawings."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.text = [], [], [], ""
        self._inside = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if tag == "a" and name == "href"]
        if tag in ("script", "style", "svg"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.text += data

    def all_text(self):
        return " ".join(self.text.split())


def unpacked(text, name):
    """What a compressed script element of the page holds."""
    packed = re.search(rf'<script type="text/plain" id="{name}">([A-Za-z0-9+/=]*)</script>', text)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def details_of(text):
    """Of each cell its repeats, as the page shows them below a row."""
    count = len(re.findall(r'id="details-\d+"', text))
    return [cell for number in range(count) for cell in unpacked(text, f"details-{number}")]


def page_of(tmp_path, *records, **suite):
    run = a_run(tmp_path / "run", *records, **suite)
    write_report([run], tmp_path / "out", {"html"})
    return (tmp_path / "out" / "report.html").read_text()


def test_the_page_states_where_its_numbers_come_from(tmp_path):
    """Machine, date, commit and whether it was dirty, how cells ended, what is counted and what measured."""
    records = [*a_sweep(["full", "meft1"], (1,), (16, 32)), a_record("oom", method="lora")]

    text = Parsed(page_of(tmp_path, *records, description="a sweep")).all_text()

    assert "5 cells: 4 ok, 1 oom. a CPU, 2 cores · 2026-11-24T04:00:00Z · commit 0123456789ab (dirty" in text
    said = "a clock, a CUDA allocator or the answers to a task said so"
    assert f"measured: {said}. counted: bytes of live tensors, counted on CPU under real arithmetic." in text
    assert "predicted:" not in text
    assert "a sweep" in text


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    """It works from file://, without a network: pictures stand in the page, and links lead into it, to files beside it,
    and to the home of the library that draws."""
    text = page_of(tmp_path, *a_sweep(["full"], (1, 8), (16, 32)))
    parsed = Parsed(text)

    sources = [attrs[name] for _, attrs in parsed.tags for name in ("src", "srcset", "data") if name in attrs]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not [tag for tag, _ in parsed.tags if tag in ("link", "iframe", "object")]
    assert "@import" not in text
    links = {link for link in parsed.links if not link.startswith(("#", "plots/"))}
    assert links == {"https://github.com/leeoniya/uPlot"}


def test_hostile_text_stays_text(tmp_path):
    """Labels, messages and names from a record are escaped, in text, attributes and drawings."""
    record = a_measured_cell("full", observed={"label": f"{HOSTILE}/full/b8/s128", "model": HOSTILE})
    failed = a_record("error", batch_size=1, status_detail={"message": HOSTILE, "traceback": HOSTILE, "type": HOSTILE})

    text = page_of(tmp_path, record, failed, name=HOSTILE, description=HOSTILE)

    parsed = Parsed(text)
    assert 1 == sum(tag == "script" and "type" not in attrs for tag, attrs in parsed.tags)
    assert not [tag for tag, attrs in parsed.tags if "onerror" in attrs or attrs.get("src", "data:").startswith("x")]
    assert HOSTILE in details_of(text)[-1][0]["traceback"] + details_of(text)[0][0]["traceback"]
    assert HOSTILE in unpacked(text, "data")["words"]["model"]["values"]
    assert "alert(1)" in parsed.all_text()
    assert "{{ 7*7 }}" in parsed.all_text()


def test_ids_are_unique_and_links_lead_somewhere(tmp_path):
    """Each row has the id that links to its cell name; each cell has a detail."""
    text = page_of(tmp_path, *a_sweep(["full", "meft1"], (1, 8), (16, 32)))
    parsed = Parsed(text)

    assert len(parsed.ids) == len(set(parsed.ids))
    assert {link[1:] for link in parsed.links if link.startswith("#")} <= set(parsed.ids)
    anchors = unpacked(text, "data")["words"]["anchor"]
    assert [anchors["values"][at] for at in anchors["at"]] == [name for name in parsed.ids if name.startswith("cell-")]
    assert 8 == len(details_of(text))


def test_every_picture_says_what_it_shows(tmp_path):
    """For who does not see it."""
    parsed = Parsed(page_of(tmp_path, *a_sweep(["full", "meft1"], (1, 8), (16, 32))))

    labels = [attrs["alt"] for tag, attrs in parsed.tags if tag == "img"]
    assert 5 == len(labels)
    assert all("full" in label or "meft1" in label for label in labels)


@pytest.mark.parametrize(
    ("metrics", "detail", "observed", "sentence"),
    [
        ({"device_shared": measured(1)}, {}, {}, "another process used the device"),
        ({"cpu_wait_share": measured(0.48)}, {}, {}, "its threads waited for a core 48% of the time while others held"),
        ({"throttle_reasons": ["thermal"]}, {}, {}, "the clocks were held down while timing (thermal)"),
        ({"alloc_retries": 2}, {}, {}, "the allocator had to free its cache and try again"),
        ({}, {"type": "lever-not-engaged", "message": "no forward was re-run"}, {}, "lever not engaged: no forward"),
        ({}, {}, {"attention_used": "eager"}, "attention sdpa was asked for, eager was used"),
        ({"reconstruction_rel_max": 0.14}, {}, {}, NOISE),
        ({"reconstruction_rel_max": float("nan")}, {}, {}, NOISE),
        ({"drift_bytes_per_step": 2048}, {}, {}, "memory grows by 2.0 KiB each step"),
    ],
)  # fmt: skip
def test_what_makes_numbers_doubtful_is_said(tmp_path, metrics, detail, observed, sentence):
    """Each with a link to its cell."""
    status = "error" if detail else "ok"
    record = a_record(status, metrics=metrics, status_detail=detail, observed=observed)

    parsed = Parsed(page_of(tmp_path, record))

    assert "Warnings 1 in all bert-base@random/full/b8/s128: " in parsed.all_text()
    assert sentence in parsed.all_text()


def test_a_good_run_has_no_warnings(tmp_path):
    """Warnings that are always there are not read."""
    fine = {"reconstruction_rel_max": 1e-4, "drift_bytes_per_step": 0, "alloc_retries": 0, "device_shared": 0}
    fine |= {"cpu_wait_share": measured(0.03)}

    assert "Warnings" not in Parsed(page_of(tmp_path, a_record(metrics=fine))).all_text()


def test_failures_have_their_message_and_the_command_to_run_them_again(tmp_path):
    """As in the terminal."""
    record = a_record("timeout", status_detail={"message": "after 600 s"})

    page = page_of(tmp_path, record, source="suites/ci.yaml")

    said = "Cells that did not end ok or have no score 1 in all bert-base@random/full/b8/s128: timeout (after 600 s)"
    assert said in Parsed(page).all_text()
    command = f"meftbench run suites/ci.yaml --where cell_id={record.cell_id} --device counted"
    assert command == details_of(page)[0][0]["command"]


def test_settings_that_differ_are_columns_and_a_warning_not_to_rank(tmp_path):
    """What all cells share is said once, what differs is a column."""
    text = Parsed(page_of(tmp_path, a_measured_cell(), a_measured_cell(precision="bf16"))).all_text()

    assert "All cells: bert-base@random, device counted, attention sdpa, optimizer adamw, seed 0." in text
    assert "do not rank across those settings" in text


def test_methods_are_compared_at_equal_batch_micro_batch_and_length(tmp_path):
    """The page and the Markdown say so; a share is of the `full` at the same micro-batch."""
    cells = [a_measured_cell(m, micro_batch_size=k, metrics={"activation_peak_bytes": v})
             for m, k, v in (("full", 8, 100), ("lora", 8, 50), ("full", 2, 25), ("lora", 2, 20))]  # fmt: skip
    run = a_run(tmp_path / "run", *cells)

    write_report([run], run.path, {"html", "md"})

    text = Parsed((run.path / "report.html").read_text()).all_text()
    assert "Methods are compared at equal batch, micro-batch and length" in text
    markdown = (run.path / "table.md").read_text()
    assert "Compared at equal batch, micro-batch and length. All cells: bert-base@random, device counted," in markdown
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if "| ok |" in line]
    assert [
        ("full", "8", "100.0%"),
        ("lora", "8", "50.0%"),
        ("full", "8 (mb 2)", "100.0%"),
        ("lora", "8 (mb 2)", "80.0%"),
    ] == [(row[0], row[1], row[5]) for row in rows]


def test_exact_is_zero_in_the_table_and_bit_identical_in_the_cell(tmp_path):
    """And the settings of a method stand below its name, so that a long label does not widen the table."""
    page = page_of(tmp_path, an_exact_cell(4, "centred"), a_measured_cell("meft1"))
    text = Parsed(page).all_text()

    assert "meft1-exactcoupling=centred, side_bits=4" in text
    # Reconstruction error, gradient error, starting-point shift.
    assert "0measured 4e-7measured 0.0625measured" in text
    rows = [row for cell in details_of(page) for _, lines in cell[0]["sections"] for row in lines]
    assert ["layer 0", "0 (bit-identical), 0 (bit-identical) (measured)", "first stream, second stream"] in rows
    assert "Exactly 0 means bit-identical." in text


def test_several_runs_are_one_page(tmp_path):
    """A row of the same cell for each run."""
    runs = [a_run(tmp_path / name, a_measured_cell(), name=name, run_id=name) for name in ("before", "after")]

    write_report(runs, tmp_path / "out", {"html"})

    text = (tmp_path / "out" / "report.html").read_text()
    parsed = Parsed(text)
    assert "before and after" in parsed.all_text()
    assert len(parsed.ids) == len(set(parsed.ids))
    assert 2 == sum(name.startswith("cell-") for name in parsed.ids) == len(details_of(text))
    assert "What differs" in parsed.all_text()


def test_a_run_without_records_is_a_page_too(tmp_path):
    """It says so."""
    text = Parsed(page_of(tmp_path)).all_text()

    assert "no cell has finished" in text
    assert "No cell has numbers to plot." in text


def test_all_files_are_written(tmp_path):
    """The page first, then plots as PNG and SVG, the table as CSV and Markdown."""
    run = a_run(tmp_path / "run", *a_sweep(["full", "meft1"], (1, 8), (16, 32)))

    written = write_report([run], run.path, {"html", "csv", "md"})

    assert all(file.is_file() for file in written)
    assert "report.html" == written[0].name
    assert {".html", ".png", ".svg", ".csv", ".md"} == {file.suffix for file in written}
    assert b"\x89PNG" == (run.path / "plots" / "breakdown.png").read_bytes()[:4]


def test_an_output_folder_that_cannot_be_made_is_one_line(tmp_path):
    """Nothing is half written."""
    run = a_run(tmp_path / "run", a_measured_cell())
    (tmp_path / "file").write_text("")

    with pytest.raises(UserError, match="cannot be written"):
        write_report([run], tmp_path / "file" / "out", {"html"})


def rows_of_markdown(run):
    write_report([run], run.path, {"md"})
    lines = [line for line in (run.path / "table.md").read_text().splitlines() if line.startswith("| ")]
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_start_of_a_language_model_stands_in_page_and_markdown(tmp_path):
    """Loss at the start and of the pre-trained model, a column each; a start that is far away is a warning."""
    losses = {"pretrained_loss": measured(3.084), "starting_loss": measured(15.257)}
    run = a_run(tmp_path / "run", a_measured_cell("lora"), a_measured_cell("meft1", metrics=losses))

    lora, meft = rows_of_markdown(run)
    write_report([run], tmp_path / "out", {"html"})
    text = Parsed((tmp_path / "out" / "report.html").read_text()).all_text()

    assert ("-", "-") == (lora["start loss"], lora["pre-trained"])
    assert ("15.26 (measured)", "3.08 (measured)") == (meft["start loss"], meft["pre-trained"])
    assert "start loss 15.26 (3.08): before any training the model with the method is far from" in text
    assert "starting_loss [loss, lower is better]" in text


def test_gradients_within_the_activation_memory_stand_beside_it(tmp_path):
    """In MiB; older records have none."""
    new = a_measured_cell("meft1", metrics={"activation_gradients_bytes": 17 * 2**20})

    lora, meft = rows_of_markdown(a_run(tmp_path / "run", a_measured_cell("lora"), new))

    assert ("-", "17.0 (counted)") == (lora["of it gradients MiB"], meft["of it gradients MiB"])
    assert "70.2 (counted)" == meft["activation MiB"]


def test_columns_that_no_cell_has_are_not_there(tmp_path):
    """Classifiers, whose head is new, and runs of before."""
    run = a_run(tmp_path / "run", a_measured_cell("lora"))
    (row,) = rows_of_markdown(run)
    write_report([run], tmp_path / "out", {"html"})
    text = Parsed((tmp_path / "out" / "report.html").read_text()).all_text()

    assert not {"start loss", "pre-trained", "of it gradients MiB"} & row.keys()
    assert "activation_gradients_bytes" not in text
    assert "starting_loss" not in text


@pytest.mark.parametrize(("start", "warned"), [(3.3, False), (3.4, True), (float("nan"), True), (2.9, False)])
def test_a_start_that_is_ten_percent_worse_is_a_warning(tmp_path, start, warned):
    """NaN too."""
    losses = {"pretrained_loss": measured(3.0 + 1e-9), "starting_loss": measured(start)}

    text = Parsed(page_of(tmp_path, a_measured_cell("meft1", metrics=losses))).all_text()

    assert warned == ("before any training the model with the method is far from" in text)


def test_a_metric_that_names_a_column_has_it_in_every_table(tmp_path, monkeypatch):
    """Page and Markdown, where a run has it."""
    monkeypatch.setitem(METRICS, "swap_peak_bytes", Kind("byte", "lower", "of a stranger", column="swap"))
    run = a_run(tmp_path / "run", a_measured_cell("lora", metrics={"swap_peak_bytes": 3 * 2**20}))

    (row,) = rows_of_markdown(run)
    text = page_of(tmp_path / "page", a_measured_cell("lora", metrics={"swap_peak_bytes": 3 * 2**20}))

    assert "3.00 (counted)" == row["swap MiB"]
    assert "swap" in [column["heading"] for column in unpacked(text, "data")["tables"][0]["columns"]]


def test_pictures_drawn_by_another_process_are_the_same(tmp_path, monkeypatch):
    """As they are for a run of many cells; and where that process fails, this one draws."""
    records = a_sweep(["full", "meft1"], (1, 8), (16, 32))
    here = page_of(tmp_path, *records)
    monkeypatch.setattr(report, "MANY", 1)
    beside = page_of(tmp_path / "beside", *records)
    me, write = os.getpid(), Picture.write
    monkeypatch.setattr(Picture, "write", lambda picture, to: write(picture, to) if os.getpid() == me else sys.exit(1))
    failed = page_of(tmp_path / "failed", *records)

    def pictures(text):
        return re.findall(r"data:image/png;base64,[^\"]+", text)

    assert 5 == len(pictures(here))
    assert pictures(here) == pictures(beside) == pictures(failed)


def test_runs_whose_names_differ_in_a_sign_have_rows_of_their_own(tmp_path):
    """A link to a cell leads to the run that it names."""
    runs = [a_run(tmp_path / name, a_measured_cell(), name=name, run_id=name) for name in ("r_1", "r-1", "r 1", "r.1")]
    write_report(runs, tmp_path / "out", {"html"})

    rows = [name for name in Parsed((tmp_path / "out" / "report.html").read_text()).ids if name.startswith("cell-")]
    assert 4 == len(set(rows))


def test_a_batch_of_ones_own_is_no_batch_size(tmp_path):
    """Cells may differ in it; the column of the batch size stays that of the batch size."""
    records = [a_measured_cell(), a_measured_cell(batch="mine:batch")]
    data = unpacked(page_of(tmp_path, *records), "data")

    def words(key):
        return [data["words"][key]["values"][at] for at in data["words"][key]["at"]]

    keys = {column["heading"]: column["key"] for column in data["tables"][0]["columns"]}
    headings = [column["heading"] for column in data["tables"][0]["columns"]]
    assert 2 == headings.count("batch")
    assert ["8", "8"] == words("text batch_size")
    assert {"default", "mine:batch"} == set(words("setting batch"))
    assert keys["tokens"] == "text sequence_length"


def test_each_cell_has_its_environment(tmp_path):
    """Also where a run was resumed in another."""
    record = a_measured_cell()
    text = page_of(tmp_path, record)
    data = unpacked(text, "data")

    [cell] = details_of(text)
    facts = dict(data["environments"][cell[0]["environment"]])
    assert "a CPU" == facts["host.cpu"]
    assert not [name for name in facts if name.startswith("comparable")]
