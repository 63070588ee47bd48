"""`meftbench fit`: what fits which card."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.console import Console

from meftbench.report.views.fit import as_answer, markdown, notes, plot_fit, print_fit

MiB, GiB = 2**20, 2**30
ABOUT = {"model": "opt", "precision": "bf16", "profile": "a100-80gb", "device": "A100", "verified": False}
ABOUT |= {"validation": "not validated on this card", "rules": "torch 2.13"}
ABOUT |= {"context_bytes": GiB, "default_profile": True, "cards": [8 * GiB, 80 * GiB], "positions": 2048}


def an_entry(method="full", refused=None, **largest):
    lines = [{"axis": axis, "at": 8, "limit": 2048, "largest": sizes} for axis, sizes in largest.items()]
    parts = [{"name": name, "settings": {}} for name in method.split("+")]
    return {"method": method, "parts": parts, "lines": lines, "refused": refused, "traced": 3, "seconds": 1.0}


def test_the_largest_batch_and_the_longest_sequence_of_each_method(cli):
    """A table on stdout, progress on stderr, and with --out the same as CSV and Markdown, and a picture."""
    asked = ("--memory", "550MiB 700MiB", "--methods", "full,lora", "--precision", "bf16")
    shape = ("--sequence-lengths", "512", "--batch-sizes", "2")
    code, out, err = cli("fit", "bert-tiny@random", *asked, *shape, "--out", "found", "--json")
    answer = json.loads(out)
    by = {(r["method"], r["asked"], r["memory_bytes"]): r["largest"] for r in answer["rows"]}
    frame = pd.read_csv("found/fit.csv")

    assert 0 == code
    assert 2 == len([line for line in err.splitlines() if "tokens at a batch of 2, predicted in" in line])
    assert 8 == len(by) == len(frame)
    assert 0 < by["full", "batch_size", 550 * MiB] <= by["lora", "batch_size", 550 * MiB]
    assert by["lora", "batch_size", 550 * MiB] < by["lora", "batch_size", 700 * MiB]
    assert 512 == by["lora", "sequence_length", 700 * MiB]
    assert "≥ 512 (all positions)" in Path("found/fit.md").read_text()
    assert Path("found/fit.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in Path("found/fit.svg").read_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("bert-tiny@random", "--methods", "full,loora"), "fit: method: unknown method 'loora'; did you mean 'lora'?"),
        (("bert-tiny@random", "--memory", "24"), "'24' is not an amount of memory; write"),
        (("bert-tiny@random", "--memory", "100MiB"), "is no more than the context"),
        (("bert-tiny@random", "--batch-sizes", "0"), "--batch-sizes: '0' is not a list of sizes; write 512,2048"),
        (("bert-tiny@random", "--batch-sizes", "8,100000000"), "batch_sizes: 100,000,000 is more than is looked at"),
        (("bert-tiny@random", "--sequence-lengths", "64,4096"), "4096 is longer than the 512 positions"),
        (("bert-tyny",), "fit: model: unknown model 'bert-tyny'"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_predicted(cli, given, said):
    code, out, err = cli("fit", *given)

    assert (2, "") == (code, out)
    assert said in err
    assert 1 == len(err.splitlines())


def test_a_method_that_does_not_apply_is_a_note_and_an_error_where_none_does(cli, monkeypatch):
    def answering(*entries):
        monkeypatch.setattr("meftbench.estimates.ask_kept", lambda *_: {"methods": entries, "seconds": 3})
        return cli("fit", "bert-tiny@random", "--methods", "full,lora+chunked_loss", "--memory", "8GiB")

    bad = an_entry("lora+chunked_loss", refused="bert: needs a head over a vocabulary; leave it out")
    code, out, _ = answering(an_entry(batch_size=[5]), bad)
    assert 0 == code
    assert "needs a head over a vocabulary" in out
    assert out.rstrip().endswith("cells predicted in 3.0 s, measured")

    code, out, err = answering(bad)
    assert (2, "") == (code, out)
    assert err.strip().endswith("bert: needs a head over a vocabulary; leave it out")


def test_the_limits_are_said():
    """Nothing fits: "-"; all positions; more than was looked at."""
    entries = [an_entry(batch_size=[0, 2048], sequence_length=[17, 2048])]
    text = markdown(as_answer(ABOUT, entries))

    assert "| full | - | ≥ 2,048 |" in text
    assert "| full | 17 | ≥ 2,048 (all positions) |" in text
    assert "not validated on this card" in text
    assert "rules of torch 2.13" in text
    assert "a context of 1.0 GiB" in " ".join(notes(as_answer(ABOUT, entries)))


@given(st.integers(8, 90), st.lists(st.integers(1, 2**24), min_size=1, max_size=4))
@settings(max_examples=25)
def test_at_any_width_a_row_has_its_method_and_whole_numbers(width, sizes):
    """Cards that do not fit beside each other stand below, each with the methods again."""
    methods = ["full", "meft1-exact+chunked_loss"]
    cards = [8 * GiB * 2**n for n in range(len(sizes))]
    answer = as_answer(ABOUT | {"cards": cards, "predict_s": 1.0}, [an_entry(m, batch_size=sizes) for m in methods])
    stream = io.StringIO()

    print_fit(answer, Console(file=stream, width=width))

    lines = stream.getvalue().splitlines()
    tables = [index for index, line in enumerate(lines) if line.startswith("method")]
    rows = [line for line in lines if line.startswith(("full ", "meft1-ex"))]
    assert 2 * len(tables) == len(rows)
    words = stream.getvalue().split()
    assert all(words.count(f"{size:,}") >= 2 for size in sizes)


def test_the_plot_draws_sizes_against_gibibytes_and_rings_the_limits():
    rows = as_answer(ABOUT, [an_entry(batch_size=[16, 2048]), an_entry("lora", batch_size=[0, 0])])["rows"]
    ax = Figure().add_subplot()

    plot_fit(rows, ax)

    drawn = {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}
    assert {"full", "lora: nothing fits"} == set(drawn)
    assert ([8, 80], [16, 2048]) == (list(drawn["full"].get_xdata()), list(drawn["full"].get_ydata()))
    assert [[80]] == [
        list(ln.get_xdata()) for ln in ax.get_lines() if ln.get_label() == "_limit" and len(ln.get_xdata())
    ]


def test_lines_at_the_same_places_are_all_seen():
    """The one that is drawn first is the widest."""
    same = [an_entry(method, sequence_length=[512, 2048]) for method in ("full", "lora", "meft1")]
    ax = Figure().add_subplot()

    plot_fit(as_answer(ABOUT, [*same, an_entry("meft3", sequence_length=[511, 2048])])["rows"], ax)

    widths = [line.get_linewidth() for line in ax.get_lines() if not line.get_label().startswith("_")]
    assert widths[0] > widths[1] > widths[2] == widths[3]
