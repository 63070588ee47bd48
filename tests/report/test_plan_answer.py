"""The answer of a plan: what is chosen from predicted rows, and how it is shown."""

from __future__ import annotations

import io

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.console import Console

from meftbench.catalogue.profiles import PROFILES
from meftbench.plan.planning import Candidate
from meftbench.plan.prices import Price
from meftbench.report.render.plan_files import plot_map, plot_plan, write_plan
from meftbench.report.views.plan import answer_lines, broken, larger_lines, markdown, notes, print_plan
from meftbench.report.views.plan_answer import on_frontier
from planned_rows import CONTEXT, GiB, a_plan, a_row, too_large

GOLDEN = """\
lora+checkpoint is the fastest that fits a card, 8.0 GiB: micro-batch 4 × 512 tokens, 6.5 GiB of 8.0
GiB predicted (headroom 1.5 GiB), 2,000 tokens/s predicted
  type: meftbench estimate qwen2.5-1.5b@random lora+checkpoint --batch-size 4 --sequence-length 512
--precision bf16 --profile rtx4090
smallest: meft1-exact: 1.5 GiB at micro-batch 1 × 512 tokens, predicted; at micro-batch 8 × 512
tokens 6.5 GiB, 1,000 tokens/s predicted
  type: meftbench estimate qwen2.5-1.5b@random meft1-exact --batch-size 8 --sequence-length 512
--precision bf16 --profile rtx4090

best lever set of each method, memory predicted
                        micro-        GiB                          run
method                   batch  GiB  at 1  tokens/s  arithmetic  again
lora+checkpoint              4  6.5   3.5     2,000        1.33    25%
meft1-exact                  8  6.5   1.5     1,000        1.00     0%
mezo (many more steps)       4  6.5   3.5     9,000        1.00     0%

Pareto set (no other is smaller and no slower): memory at micro-batch 1, predicted, against
predicted tokens/s
                 micro-        GiB                          run
method            batch  GiB  at 1  tokens/s  arithmetic  again
meft1-exact           8  6.5   1.5     1,000        1.00     0%
lora+checkpoint       4  6.5   3.5     2,000        1.33    25%

what each lever saves here: GiB at equal micro-batch, predicted, and arithmetic, counted
                     micro-
method        lever   batch  without  with  saves   arithmetic
lora    +checkpoint       4      7.5   6.5   1.00  1.00 → 1.33

a card of 16.0 GiB: lora, micro-batch 9 × 512 tokens, 3,000 tokens/s predicted (1.50 times the
speed); full, too large here, fit there
does not fit: full; its smallest, full, needs 9.0 GiB at micro-batch 1, 1.0 GiB too much, predicted
"""


def of_golden(**fields):
    return a_plan(
        a_row("lora", peak_reserved_bytes=7 * GiB, tokens_per_s=1500.0),
        a_row("lora+checkpoint", tokens_per_s=2000.0, relative_cost=1.33, recomputed_flops_share=0.25),
        a_row("meft1-exact", tokens_per_s=1000.0, smallest_reserved_bytes=GiB, micro_batch_size=8),
        a_row("mezo", tokens_per_s=9000.0),
        too_large("full", 9 * GiB, tokens_per_s=500.0),
        a_row("lora", tokens_per_s=3000.0, capacity_index=1, micro_batch_size=9),
        a_row("full", tokens_per_s=600.0, capacity_index=1, micro_batch_size=2),
        **fields,
    )


def printed(answer, width=100):
    stream = io.StringIO()
    print_plan(answer, Console(file=stream, width=width))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def test_the_terminal_says_the_answer_first():
    """Then tables, larger cards, what to type, and how the numbers were obtained."""
    text = printed(of_golden(explained=True, refused={"full+compile": "not predicted; leave it out"}))

    assert GOLDEN == text[: len(GOLDEN)]
    after = text[len(GOLDEN) :]
    assert after.index("in Python") < after.index("in axolotl") < after.index("qwen2.5-1.5b@random, bf16; predicted by")
    assert "not looked at: full+compile: not predicted; leave it out" in after
    assert after.endswith("9 candidates, 20 shapes traced, in 3.0 s, measured\n")


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12), st.booleans())
def test_the_pareto_set_is_what_nothing_dominates(points, timed):
    """No row of it is dominated, every other is; by time where every row has one, else by arithmetic."""
    rows = [
        a_row(smallest_reserved_bytes=memory * GiB, tokens_per_s=float(speed) if timed else None,
              relative_cost=1.0 if timed else 7.0 - speed)
        for memory, speed in points
    ]  # fmt: skip
    answer = a_plan(*rows, cards=[99 * GiB])

    for (memory, speed), row in zip(points, answer["rows"], strict=True):
        beaten = any(m <= memory and s >= speed and (m < memory or s > speed) for m, s in points)
        assert row["on_frontier"] == (not beaten)
    assert timed == answer["has_time"]
    assert on_frontier(answer["rows"]) == [row["on_frontier"] for row in answer["rows"]]


@given(st.lists(st.tuples(st.sampled_from(["full", "lora", "meft1-exact", "mezo"]), st.integers(1, 20),
                          st.integers(1, 99)), min_size=1, max_size=10))  # fmt: skip
def test_the_fastest_fits_and_no_other_that_fits_is_faster(drawn):
    """A method that needs many more steps is only the answer where no other fits."""
    rows = [a_row(method, peak_reserved_bytes=size * GiB, tokens_per_s=float(speed)) for method, size, speed in drawn]
    answer = a_plan(*rows)

    fitting = [(m, speed) for m, size, speed in drawn if size * GiB + CONTEXT <= 8 * GiB]
    with_backward = [(m, speed) for m, speed in fitting if m != "mezo"] or fitting
    if not fitting:
        assert answer["fastest"] is answer["smallest"] is None
    else:
        assert max(speed for _, speed in with_backward) == answer["fastest"]["tokens_per_s"]
        assert answer["fastest"]["headroom_bytes"] >= 0
        assert {m for m, _ in fitting} == {row["method"] for row in answer["best"]}


def test_where_nothing_fits_the_least_that_is_missing_is_said():
    answer = a_plan(too_large("full", 20 * GiB), too_large("lora", 10 * GiB), a_row("lora", micro_batch_size=0,
                    smallest_reserved_bytes=10 * GiB))  # fmt: skip

    (line,) = answer_lines(answer)
    assert "nothing fits a card, 8.0 GiB, at 512 tokens; lora needs least: 10.0 GiB at micro-batch 1, 2.0 GiB" in line
    assert ["full", "lora"] == [entry["method"] for entry in answer["too_large"]]
    assert "buys nothing" in larger_lines(answer)[0]
    assert "nothing fits" in markdown(answer)
    assert "nothing fits" in printed(answer)


def test_without_times_arithmetic_decides_and_that_is_said():
    answer = a_plan(a_row("lora+checkpoint", relative_cost=1.33), a_row("lora"), a_row("full", host_transfer_bytes=GiB))

    assert "lora takes the least arithmetic of all that fit" in answer_lines(answer)[0]
    assert "1.00 × the least arithmetic a token, counted" in answer_lines(answer)[0]
    assert any("no time is predicted" in note for note in notes(answer))
    assert "to host GiB" in markdown(answer)
    assert "tokens/s" not in printed(answer)


def test_only_a_method_that_needs_many_more_steps_fits():
    answer = a_plan(a_row("mezo", tokens_per_s=9.0), too_large("lora", 9 * GiB))

    assert "mezo is all that fits, and needs many more steps" in answer_lines(answer)[0]
    assert not any(row["on_frontier"] for row in answer["rows"])


def test_levers_are_compared_at_equal_micro_batch():
    """Where both have a row of it; else at micro-batch 1, as where one of them does not fit."""
    same = [
        a_row("lora", micro_batch_size=2),
        a_row("lora+checkpoint", micro_batch_size=2, peak_reserved_bytes=4 * GiB),
    ]
    (pair,) = a_plan(*same)["levers"]
    assert ("checkpoint", 2, 2 * GiB) == (pair["lever"], pair["micro_batch_size"], pair["saves_bytes"])
    assert ("lora", "lora+checkpoint") == (pair["without"], pair["with"])

    other = [too_large("lora", 9 * GiB), a_row("lora+checkpoint", smallest_reserved_bytes=2 * GiB)]
    (pair,) = a_plan(*other)["levers"]
    assert (1, 9 * GiB, 2 * GiB + CONTEXT) == (pair["micro_batch_size"], pair["without_bytes"], pair["with_bytes"])

    unlike = [a_row("lora"), a_row("lora+checkpoint", optimizer="lion"), a_row("lora(rank=4)+checkpoint"),
              a_row("lora+checkpoint+offload")]  # fmt: skip
    assert [] == a_plan(*unlike)["levers"]


def test_what_is_predicted_for_a_comparison_alone_is_no_answer():
    alone = a_row("lora", tokens_per_s=900.0, relative_cost=0.5)
    rows = [alone, a_row("lora+checkpoint", tokens_per_s=9.0), alone | {"capacity_index": 1}]
    answer = a_plan(*rows, only_for_pairs=[Candidate("lora", "bf16", "adamw", explain=True)])

    assert "lora+checkpoint" == answer["fastest"]["method"] == answer["smallest"]["method"]
    assert [False, True, False] == [row["on_frontier"] for row in answer["rows"]]
    assert None is answer["larger"][0]["fastest"]
    assert "checkpoint" == answer["levers"][0]["lever"]


@example(12, 12)  # as much as the smallest card has, but for its context
@given(st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=30)
def test_the_smallest_card_has_room_and_no_smaller_one_has(one, other):
    """Of each method, by the least of its lever sets; None where no shipped card is large enough."""
    answer = a_plan(*(a_row("lora", smallest_reserved_bytes=size * GiB) for size in (one, other)), needs=True)
    (entry,) = answer["needs"]

    held = min(one, other) * GiB
    enough = {
        name: card.memory_bytes for name, card in PROFILES.items() if held + card.context_bytes <= card.memory_bytes
    }
    assert (entry["card"] is None) == (not enough)
    if enough:
        assert enough[entry["card"]] == min(enough.values()) == entry["memory_bytes"]


def test_gradients_taken_in_backward_are_not_summed_over_micro_batches():
    """With a batch of 8, a row of micro-batches of 4 is none that can be run."""
    row = a_row("full+optimizer_in_backward")

    assert None is a_plan(row, batch_size=8)["fastest"]
    assert [4, 4] == [a_plan(row, batch_size=size)["fastest"]["micro_batch_size"] for size in (4, None)]


def test_a_price_is_shown_beside_the_speed():
    rows = [a_row("lora", tokens_per_s=1000.0), a_row("full", tokens_per_s=500.0)]
    answer = a_plan(*rows, price=Price(per_hour=3.6, currency="EUR"))

    assert pytest.approx([1.0, 2.0]) == [row["cost_per_million_tokens"] for row in answer["rows"]]
    assert "1.000 EUR a million tokens predicted" in answer_lines(answer)[0]
    assert "EUR/M tokens" in markdown(answer)
    assert None is a_plan(a_row(), price=Price(per_hour=3.6, currency="EUR"))["fastest"]["cost_per_million_tokens"]


def test_precisions_and_other_optimizers_are_named():
    answer = a_plan(a_row("full", optimizer="adamw-8bit"), a_row("lora", precision="nf4"), precisions=["bf16", "nf4"])

    assert "| full, bf16, adamw-8bit |" in markdown(answer)
    assert "| lora, nf4 |" in markdown(answer)


_LONG = "meft1-exact(reversible_layers=7,tiles=16)+offload(what=checkpoints)+chunked_loss, nf4"


@given(st.sampled_from([_LONG, "lora"]), st.integers(8, 90))
def test_a_label_is_broken_at_its_levers_and_nothing_is_lost(label, width):
    lines = broken(label, width).split("\n")

    assert label.replace(" ", "") == "".join(lines).replace(" ", "")
    assert all(len(line) <= max(width, 30) for line in lines)


@given(st.integers(20, 130))
@settings(max_examples=15)
def test_at_any_width_numbers_are_whole(width):
    text = printed(of_golden(explained=True), width)
    assert {"2,000", "9,000", "1.33"} <= set(text.split())


def test_the_tables_stand_in_80_columns():
    """With the longest labels, all columns of numbers, and a card's price: labels take several lines."""
    long = "meft1-exact(reversible_layers=14)+chunked_loss+offload(what=checkpoints)"
    rows = [
        a_row("meft1-exact(reversible_layers=14)+chunked_loss", tokens_per_s=12_345.0, relative_cost=1.33),
        a_row(
            long, tokens_per_s=13_000.0, relative_cost=1.33, host_transfer_bytes=99 * GiB, peak_reserved_bytes=4 * GiB
        ),
    ]
    lines = printed(a_plan(*rows, explained=True, needs=True), 80).partition("in Python")[0].splitlines()

    assert [] == [line for line in lines if len(line) > 80]
    assert {"+offload", "12,345", "2.00"} <= set(" ".join(lines).split())


def test_the_files_have_every_row_and_what_to_type(tmp_path):
    """plan.md names the command of each method's best row; plan.csv has a line for each row."""
    grid = {"batch_sizes": [1, 2], "lengths": [256, 512], "process_device_bytes": [[GiB, None], [2 * GiB, 9 * GiB]]}
    answer = of_golden(map=grid)
    names = write_plan(answer, tmp_path / "out")
    frame = pd.read_csv(tmp_path / "out" / "plan.csv")
    text = (tmp_path / "out" / "plan.md").read_text()

    assert set(names) == {path.name for path in (tmp_path / "out").iterdir()}
    assert {"plan.png", "map.svg", "answer.yaml"} <= set(names)
    assert (7, {"predicted"}) == (len(frame), set(frame.source))
    assert {2 * GiB} == set(frame.breakdown_parameters)
    for row in answer["best"]:
        assert f"meftbench estimate qwen2.5-1.5b@random {row['method']} " in text
    assert "| 2 | 2.0 | 9.0 |" in text
    assert ["plan.md", "plan.csv"] == write_plan(a_plan(too_large("full", 9 * GiB)), tmp_path / "none")


@pytest.mark.parametrize("timed", [True, False])
def test_the_plot_joins_the_pareto_set_and_rings_the_answer(timed):
    """Memory at micro-batch 1 up, speed to the right; where no time is predicted, arithmetic to the left."""
    rows = [
        a_row("lora", tokens_per_s=20.0 if timed else None, smallest_reserved_bytes=4 * GiB),
        a_row("meft1-exact", tokens_per_s=10.0 if timed else None, relative_cost=2.0, smallest_reserved_bytes=GiB),
        a_row("full", tokens_per_s=5.0 if timed else None, relative_cost=3.0, smallest_reserved_bytes=5 * GiB),
    ]
    ax = Figure().add_subplot()
    plot_plan(a_plan(*rows), ax)

    drawn = {line.get_label().split(":")[0]: line for line in ax.get_lines()}
    assert ([10, 20] if timed else [2, 1], [1.5, 4.5]) == (
        list(drawn["Pareto set"].get_xdata()),
        list(drawn["Pareto set"].get_ydata()),
    )
    assert [4.5] == list(drawn["the answer"].get_ydata())
    assert {"lora", "meft1-exact", "full"} <= set(drawn)
    assert ax.xaxis_inverted() != timed


def test_the_map_brackets_what_does_not_fit():
    grid = {"batch_sizes": [1, 2], "lengths": [256, 512], "process_device_bytes": [[GiB, None], [2 * GiB, 9 * GiB]]}
    ax = Figure().add_subplot()
    plot_map(a_plan(a_row(), map=grid), ax)

    assert ["1.0", "-", "2.0", "(9.0)"] == [text.get_text() for text in ax.texts]
    assert ["256", "512"] == [label.get_text() for label in ax.get_xticklabels()]
