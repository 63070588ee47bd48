"""`meftbench plan` and `meftbench.plan_for`: what is asked of the search, and how its answer ends."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

import meftbench
from meftbench.catalogue.profiles import PROFILES
from meftbench.errors import UserError
from meftbench.plan.cell import Cell
from meftbench.plan.suite import parse_suite
from meftbench.strict_yaml import read
from planned_rows import GiB, answering

CONTEXT = PROFILES["rtx4090"].context_bytes


@pytest.fixture
def asked(monkeypatch):
    """The requests that reach the search, which the stand-in answers."""
    requests = []

    def ask(verb, request, tell, allow_code, resume):
        requests.append({"verb": verb, "allow_code": allow_code, **json.loads(json.dumps(request))})
        return answering(requests[-1])

    monkeypatch.setattr("meftbench.planned.ask_kept", ask)
    return requests


def test_the_answer_is_printed_and_written(cli, asked):
    """Table on stdout, and with --out as files; the suite that is written is the answer's cell."""
    asks = ("--sequence-length", 4096, "--needs", "--map", "--explain", "--out", "found")
    code, out, err = cli("plan", "qwen2.5-1.5b@random", "--memory", "24GiB", "--profile", "rtx4090", *asks)

    assert (0, "plan") == (code, asked[0]["verb"])
    assert "is the fastest that fits NVIDIA GeForce RTX 4090, 24.0 GiB: micro-batch" in out.replace("\n", " ")
    assert "smallest shipped card" in out
    assert "what each lever saves here" in out
    assert "found: plan.md, plan.csv, answer.yaml, plan.png, plan.svg, map.png, map.svg written" in err
    (cell,) = parse_suite(read(Path("found/answer.yaml"))).cells
    assert cell.method_label in out.splitlines()[0]
    assert len(pd.read_csv("found/plan.csv")) == 2 * len(asked[0]["cells"])


def test_the_search_is_asked_once_for_every_candidate(cli, asked):
    """Cells of micro-batch 1, the card and the larger ones without their context, and what was typed."""
    cards = ("--profile", "rtx4090", "--memory", "24GiB", "--next", "40GiB", "--next", "80GiB")
    rules = ("--allocator", "expandable_segments:True", "--for-versions", "torch=2.10")
    rest = ("--batch-size", 16, "--jobs", 1, "--allow-code", "--explain", "--json")
    cli("plan", "qwen2.5-1.5b@random", *cards, *rules, *rest)
    (request,) = asked

    assert [size * GiB - CONTEXT for size in (24, 40, 80)] == request["capacities"]
    assert (16, 2048, 1, True) == tuple(request[key] for key in ("batch_size", "sequence_length", "jobs", "allow_code"))
    assert ("expandable_segments:True", "torch=2.10") == (request["allocator"], request["versions"])
    assert (False, False) == (request["needs"], request["map"])
    explained = [cell.pop("explain", False) for cell in request["cells"]]
    cells = [Cell(**cell) for cell in request["cells"]]
    assert {True, False} == set(explained)
    assert {(1, 2048, "bf16", "predicted:rtx4090")} == {
        (cell.batch_size, cell.sequence_length, cell.precision, cell.device) for cell in cells
    }
    assert "meft1-exact(reversible_layers=14)+chunked_loss" in {cell.method_label for cell in cells}


@pytest.mark.parametrize(
    ("model", "precision", "length", "larger"),
    [("qwen2.5-0.5b@random", "bf16", 2048, "b200"), ("bert-base@random", "fp32", 512, "b200")],
)
def test_defaults(asked, model, precision, length, larger):
    """bf16 and levers of the loss for language models alone; the model's longest; the profile's card and the next."""
    found = meftbench.plan_for(model)
    cells = [Cell(**cell) for cell in asked[0]["cells"]]

    assert ([precision], length) == (found.precisions, found.sequence_length)
    assert (precision == "bf16") == any("chunked_loss" in cell.method_label for cell in cells)
    assert [PROFILES["a100-80gb"].memory_bytes, PROFILES["h200"].memory_bytes] == found.cards
    assert PROFILES[larger].memory_bytes > found.cards[1]


def test_a_guard_in_ci_ends_with_1_where_nothing_fits(cli, asked):
    """With --needs and no --memory the question is another: which card."""
    base = ("plan", "qwen2.5-1.5b@random", "--profile", "rtx4090", "--methods", "full", "--levers", "none", "--quiet")
    code, out, _ = cli(*base, "--memory", "2GiB")
    assert 1 == code
    text = out.replace(" \n", " ")
    assert text.startswith("nothing fits NVIDIA GeForce RTX 4090, 2.0 GiB, at 2,048 tokens; full needs least: 3.4 GiB")

    assert 0 == cli(*base, "--memory", "4GiB")[0]
    assert 1 == cli(*base, "--memory", "2GiB", "--needs")[0]
    assert 0 == cli(*base, "--needs")[0]


def test_labels_are_accepted_as_they_are_printed(cli, asked):
    """Of several precisions each has its rows; a method that cannot be trained in one of them is left out there."""
    code, out, _ = cli("plan", "qwen2.5-1.5b@random", "--memory", "24GiB", "--methods",
                       "meft1-exact(tiles=16)+chunked_loss,lora(rank=4),full", "--levers", "checkpoint",
                       "--precision", "bf16,nf4", "--json")  # fmt: skip
    rows = json.loads(out)["rows"]
    found = {(row["method"], row["precision"]) for row in rows}

    assert 0 == code
    assert {("meft1-exact(tiles=16)+chunked_loss", name) for name in ("bf16", "nf4")} <= found
    assert ("lora(rank=4)+checkpoint", "nf4") in found
    assert ("full", "bf16") in found
    assert ("full", "nf4") not in found


def test_what_a_precision_refuses_is_a_note_where_another_takes_it(cli, asked):
    """And an error where none does, whatever the order of the levers that were typed."""
    base = ("plan", "qwen2.5-1.5b@random", "--methods", "full+chunked_loss+checkpoint", "--precision")
    code, out, err = cli(*base, "bf16,nf4")
    assert 0 == code
    assert "not looked at: full+checkpoint+chunked_loss: 4-bit weights cannot be trained" in out.replace(" \n", " ")
    assert "candidates: 1, of full\n" in err

    code, out, err = cli(*base, "nf4")
    assert (2, "") == (code, out)
    assert "plan: precision: 4-bit weights cannot be trained; choose another method, or precision: bf16" in err


def test_a_model_of_which_nothing_is_known_here_is_taken_for_a_language_model(asked):
    """A hub id: shares of layers cannot be told, levers of the loss are tried, and the search refuses what it must."""
    found = meftbench.plan_for("somebody/some-model", methods=["lora", "meft1-exact"])
    labels = {row["method"] for row in found.rows}

    assert ["bf16"] == found.precisions
    assert {"lora+checkpoint+chunked_loss", "meft1-exact+chunked_loss"} <= labels
    assert not any("layers=" in label for label in labels)


def test_prices_of_ones_own(cli, asked):
    Path("prices.yaml").write_text("schema: 1\ncards: {rtx4090: {per_hour: 0.36, currency: EUR}}\n")
    base = ("plan", "qwen2.5-1.5b@random", "--memory", "24GiB", "--methods", "lora", "--levers", "none", "--json")

    code, out, _ = cli(*base, "--profile", "rtx4090", "--price", "prices.yaml")
    assert 0 == code
    assert pytest.approx(0.36 / 3600 / 900 * 1e6) == json.loads(out)["fastest"]["cost_per_million_tokens"]

    code, out, err = cli(*base, "--price", "prices.yaml")
    assert (2, "", 1) == (code, out, len(err.splitlines()))
    assert "prices.yaml:2: cards: there is no price of a100-80gb among rtx4090; add it: cards: {a100-80gb: " in err
    assert 1 == len(asked)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("qwen2.5-1.5b@random", "--methods", "loora"), "unknown method 'loora'; did you mean 'lora'?"),
        (("qwen2.5-1.5b@random", "--methods", "lora(rnk=4)"), "unknown key 'rnk'; did you mean 'rank'?"),
        (("qwen2.5-1.5b@random", "--levers", "chekpoint"), "unknown lever 'chekpoint'; did you mean 'checkpoint'?"),
        (("qwen2.5-1.5b@random", "--memory", "24"), "'24' is not an amount of memory"),
        (("qwen2.5-1.5b@random", "--memory", "100MiB"), "is no more than the context"),
        (("qwen2.5-1.5b@random", "--memory", "24GiB", "--next", "12GiB"), "next: a next card has no more memory than"),
        (("qwen2.5-1.5b@random", "--sequence-length", "999999"), "is longer than the 32768 positions"),
        (("qwen2.5-1.5b@random", "--precision", "bf61"), "unknown precision 'bf61'; did you mean 'bf16'?"),
        (("qwen2.5-1.5b@random", "--optimizer", "adamm"), "unknown optimizer 'adamm'; did you mean 'adamw'?"),
        (("qwen2.5-1.5b@random", "--profile", "rtx409"), "did you mean 'rtx4090'?"),
        (("qwen2.5-1.5b@random", "--price", "none.yaml"), "none.yaml: no such file; check the path"),
        (("qwen2.5-1.5b@random", "--for-versions", "torch=9.9"), "the rules of torch 9.9 are not known"),
        (("qwen2.5-1.5b@randm",), "unknown model 'qwen2.5-1.5b@randm'"),
        (("mine.models:net",), "--allow-code"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_predicted(cli, asked, given, said):
    code, out, err = cli("plan", *given)

    assert (2, "", []) == (code, out, asked)
    assert said in err
    assert 1 == len(err.splitlines())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 0}, "batch_size: 0 is no number of samples"),
        ({"batch_size": True}, "batch_size: True"),
        ({"jobs": 0}, "jobs"),
        ({"memory": 2.0**35}, "not an amount of memory"),
        ({"packing": True}, "unknown argument 'packing'"),
        ({"levers": ["checkpoint", "nothing"]}, "unknown lever 'nothing'"),
    ],
)
def test_a_wrong_argument_is_one_line(asked, changes, said):
    with pytest.raises(UserError, match=said):
        meftbench.plan_for("qwen2.5-1.5b@random", **changes)
    assert [] == asked


def test_a_method_that_the_search_refuses_is_a_note_and_an_error_where_all_are(cli, monkeypatch):
    def ask(verb, request, tell, allow_code, resume):
        answer = answering(request)
        kept = [row for row in answer["rows"] if row["method"].startswith("lora")]
        return answer | {"rows": kept, "refused": {"full": "needs what is not there; leave it out"}}

    monkeypatch.setattr("meftbench.planned.ask_kept", ask)
    base = ("plan", "qwen2.5-1.5b@random", "--levers", "none", "--methods")
    code, out, _ = cli(*base, "full,lora")
    assert 0 == code
    assert "not looked at: full: needs what is not there; leave it out" in out

    code, out, err = cli(*base, "full")
    assert (2, "") == (code, out)
    assert err.strip().endswith("needs what is not there; leave it out")


def test_from_python_the_rows_are_a_table(asked):
    """The same numbers as the command line's, one row a candidate and card."""
    found = meftbench.plan_for("qwen2.5-1.5b@random", memory="24GiB", methods=["lora", "meft1-exact"], levers="none",
                               larger=["48GiB"], profile="rtx4090")  # fmt: skip
    frame = found.to_frame()

    assert (4, {"predicted"}) == (len(frame), set(frame.source))
    assert {24 * GiB, 48 * GiB} == set(frame.memory_bytes)
    assert (frame.headroom_bytes >= 0).all()
    assert found.to_json()["fastest"]["method"] == found.fastest["method"] == "lora"
    assert "meft1-exact" == found.smallest["method"]
