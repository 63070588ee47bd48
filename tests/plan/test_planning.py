"""The candidates of a plan, their order, and prices."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meftbench.asked import asked_cell
from meftbench.catalogue.combinations import check_together
from meftbench.catalogue.labels import read_label
from meftbench.catalogue.levers import LEVERS
from meftbench.errors import UserError
from meftbench.plan.planning import PLANNED_METHODS, candidates, name_in
from meftbench.plan.prices import price_of
from meftbench.plan.ranking import fastest_first
from planned_rows import a_row


def labels(*methods, **asked):
    return [candidate.label for candidate in candidates(methods or PLANNED_METHODS, **asked)]


@given(depth=st.none() | st.integers(1, 80), over=st.booleans(), explain=st.booleans(),
       levers=st.sampled_from(["all", "none"]) | st.lists(st.sampled_from(list(LEVERS)), min_size=1, max_size=3),
       precision=st.sampled_from(["bf16", "fp32", "nf4"]))  # fmt: skip
@settings(max_examples=40)
def test_candidates_are_what_the_catalogue_takes_and_none_comes_twice(depth, over, explain, levers, precision):
    """Every method of the default has a plain form, except where 4-bit weights cannot be trained."""
    found = candidates(levers=levers, precisions=[precision], depth=depth, over_vocabulary=over, explain=explain)

    plain = {candidate.label for candidate in found if not candidate.explain}
    whole = {"full", "mezo"} if precision == "nf4" else set()
    assert set(PLANNED_METHODS) - whole <= plain
    keys = [(candidate.label, candidate.optimizer) for candidate in found]
    assert len(keys) == len(set(keys))
    for candidate in found:
        (method, _), *given_levers = read_label("test", candidate.label)
        check_together("test", method, dict(given_levers))
        assert levers == "all" or {name for name, _ in given_levers} <= set(levers)


@pytest.mark.parametrize("model", ["qwen2.5-0.5b@random", "bert-base@random"])
def test_every_default_candidate_is_a_cell_under_its_own_label(model):
    """The label that comes back from the search, a cell's own, is the candidate's."""
    language = model.startswith("qwen")
    for candidate in candidates(depth=12, over_vocabulary=language, explain=True):
        shape = {"batch_size": 1, "sequence_length": 64, "precision": "bf16", "optimizer": candidate.optimizer}
        assert candidate.label == asked_cell("plan", model, candidate.label, "t4", None, None, **shape).method_label


def test_each_lever_is_open_to_every_method_that_takes_it():
    """Shares of the layers for checkpointing as for reversal; 8-bit states for full fine-tuning alone; offload last."""
    lora, meft, full = labels("lora", depth=28), labels("meft1-exact", depth=28), candidates(["full"], depth=28)

    assert {f"lora+checkpoint(layers={n})+chunked_loss" for n in (7, 14, 21)} <= set(lora)
    assert {f"meft1-exact(reversible_layers={n})+chunked_loss" for n in (7, 14, 21)} <= set(meft)
    assert {"adamw", "adamw-8bit"} == {candidate.optimizer for candidate in full}
    assert all("offload" in found[-1] for found in (lora, meft, [candidate.label for candidate in full]))
    assert "mezo" == name_in(labels(depth=28)[-1])


def test_what_the_user_restricts_is_kept():
    """Levers, methods with settings and with levers, the optimizer, several precisions."""
    assert ["lora(rank=4)"] == labels("lora(rank=4)", levers="none", depth=12)
    assert ["lora+checkpoint(every=2)+chunked_loss"] == labels("lora+chunked_loss+checkpoint(every=2)", depth=12)
    assert {"lora", "lora+cut_loss"} == set(labels("lora", levers=["cut_loss"], depth=12))
    assert not any("checkpoint" in label for label in labels("meft1-exact", levers=["checkpoint", "tiled_mlp"]))
    assert all("tiles=16" in label for label in labels("meft1-exact(tiles=16)", depth=12))
    chosen = candidates(["full", "lora"], precisions=["bf16", "nf4"], optimizer="lion")
    assert {"lion"} == {candidate.optimizer for candidate in chosen}
    assert ("full", "nf4") not in {(candidate.method, candidate.precision) for candidate in chosen}


def test_with_explain_each_lever_has_a_partner_without_it():
    """Those that are added for that alone are marked."""
    before, after = candidates(["lora"], depth=28), candidates(["lora"], depth=28, explain=True)
    names = {candidate.label for candidate in after}

    assert before == [candidate for candidate in after if not candidate.explain]
    assert {"lora+checkpoint+offload+chunked_loss", "lora+checkpoint+chunked_loss", "lora+offload+chunked_loss",
            "lora+checkpoint+offload"} <= names  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"methods": ["loora"]}, "unknown method 'loora'; did you mean 'lora'?"),
        ({"methods": ["lora+chekpoint"]}, "unknown lever 'chekpoint'; did you mean 'checkpoint'?"),
        ({"levers": ["chekpoint"]}, "unknown lever 'chekpoint'; did you mean 'checkpoint'?"),
        ({"precisions": ["bf61"]}, "unknown precision 'bf61'; did you mean 'bf16'?"),
        ({"methods": ["mezo+checkpoint"]}, "mezo has none"),
        ({"methods": ["full"], "precisions": ["nf4"]}, "leave nothing to look at"),
    ],
)
def test_what_is_wrong_is_one_line(asked, said):
    with pytest.raises(UserError, match=said.replace("?", r"\?")) as error:
        candidates(**asked)
    assert "\n" not in str(error.value)


def test_the_order_is_speed_then_transfers_then_the_larger_micro_batch():
    """By tokens per second where all have them, else by arithmetic; a method without a backward pass is last."""
    slow, quick = a_row("full", tokens_per_s=10.0), a_row("lora", tokens_per_s=20.0)
    mezo = a_row("mezo", tokens_per_s=90.0, relative_cost=0.1)
    assert ["lora", "full", "mezo"] == [row["method"] for row in fastest_first([mezo, slow, quick])]

    moved, small = a_row("parallel", host_transfer_bytes=1), a_row("full", micro_batch_size=2)
    dear, untimed = a_row("meft1-exact", relative_cost=1.4), a_row("lora", tokens_per_s=None)
    order = fastest_first([dear, moved, small, untimed | {"tokens_per_s": None}, mezo | {"tokens_per_s": None}])
    assert ["lora", "full", "parallel", "meft1-exact", "mezo"] == [row["method"] for row in order]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "schema: 1\ncards: {a: {per_hour: 1.5, currency: USD}}",
            "there is no price of t4 among a; add it: cards: {t4:",
        ),
        ("schema: 1\ncards: {t4: {per_hour: -1, currency: USD}}", ":2: cards.t4.per_hour: "),
        ("schema: 1\ncards: {t4: {per_hour: .inf, currency: USD}}", ":2: cards.t4.per_hour: "),
        ("schema: 1\ncards: {t4: {per_hour: 1.5}}", ":2: cards.t4.currency: is missing"),
        ("schema: 1\ncards: {t4: {per_hour: 1.5, currency: USD, per_day: 2}}", "unknown key 'per_day'"),
        ("schema: 2\ncards: {t4: {per_hour: 1.5, currency: USD}}", ":1: schema: "),
        ("schema: 1\ncards: {}", ":2: cards: "),
        ("- 1", "is not a mapping"),
    ],
)
def test_a_fault_in_a_price_list_is_one_line_with_its_place(tmp_path, text, said):
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        price_of(file, "t4")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_price_becomes_the_cost_of_a_million_tokens(tmp_path):
    """1,000 tokens a second are 3.6 million an hour: at 3.60 an hour, a million cost 1."""
    file = tmp_path / "prices.yaml"
    file.write_text("schema: 1\ncards:\n  t4: {per_hour: 3.60, currency: EUR}\n")
    price = price_of(file, "t4")

    assert "EUR" == price.currency
    assert pytest.approx(1.0) == price.per_million_tokens(1000.0)


def test_the_price_list_of_the_documentation_is_one(tmp_path):
    """The YAML block of docs/plan.md."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "plan.md").read_text()
    (block,) = re.findall(r"(?ms)^```yaml\n(schema: 1\ncards:.*?)^```$", page)
    file = tmp_path / "prices.yaml"
    file.write_text(block)

    assert price_of(file, "a100-80gb").per_hour > price_of(file, "rtx4090").per_hour > 0
