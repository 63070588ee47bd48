"""The committed grids and the published stack hold, and the grids see what does not."""

from __future__ import annotations

import csv

import pandas as pd
import pytest

from campaigns import ROOT, campaign

lever_grid, published_stack = campaign("lever_grid"), campaign("published_stack")
extrapolation = campaign("extrapolation")


@pytest.mark.parametrize("row", [row for row in published_stack.ROWS if row.name == "optimizer in backward"])
def test_a_row_of_the_published_stack_is_predicted_again(row):
    """To the byte of reports/published/stack.csv, and within 3 % of what was published."""
    with (ROOT / "reports" / "published" / "stack.csv").open(encoding="utf-8", newline="") as file:
        recorded = {line["added"]: int(line["predicted_bytes"]) for line in csv.DictReader(file)}

    assert recorded[row.name] == published_stack.predicted(row)
    assert recorded[row.name] == pytest.approx(row.gib * 2**30, rel=0.03)


def test_the_grid_of_levers_holds():
    """No cell of the committed grid ended in a fault, and every lever alone saves what it is for; one pair anew."""
    grid = lever_grid.read_grid(ROOT / "reports" / "lever-grid" / "grid.csv")
    case = lever_grid.Case("decoder (llama)", "lora", "checkpoint+chunked_loss")
    committed = grid[(grid.backbone == case.backbone) & (grid.method == case.method) & (grid.levers == case.levers)]

    assert [] == lever_grid.broken(grid)
    assert len(grid) == len(list(lever_grid.cases()))
    assert lever_grid.tried(case)["peak_allocated_bytes"] == int(committed.peak_allocated_bytes.iloc[0])


def test_the_grid_sees_what_does_not_save():
    """A lever that saves nothing, a pair that is worse than both, and a fault are each a sentence."""
    rows = [
        {"levers": "", "outcome": "runs", "peak": 100},
        {"levers": "checkpoint", "outcome": "runs", "peak": 100},
        {"levers": "tiled_mlp", "outcome": "runs", "peak": 80},
        {"levers": "checkpoint+tiled_mlp", "outcome": "runs", "peak": 120},
        {"levers": "offload", "outcome": "error", "peak": 0},
    ]
    numbers = ("peak_allocated_bytes", "activation_peak_bytes", "baseline_allocated_bytes", "optimizer_peak_bytes")
    grid = pd.DataFrame(
        {"backbone": "b", "method": "lora", "levers": row["levers"], "outcome": row["outcome"], "reason": "no"}
        | dict.fromkeys(numbers, row["peak"])
        for row in rows
    )

    assert ["b: lora+offload: no", "b: lora+checkpoint: activation", "b: lora+checkpoint+tiled_mlp: peak"] == [
        fault.split("_peak_bytes")[0].split(" 1")[0] for fault in lever_grid.broken(grid)
    ]


def test_few_layers_tell_what_all_layers_give():
    """Of every backbone of the catalogue, and every method on one of them at least, in both shapes; one case anew."""
    grid = extrapolation.read_grid(ROOT / "reports" / "extrapolation" / "grid.csv")
    case = extrapolation.Case("opt", "meft1-exact")
    committed = grid[(grid.backbone == case.backbone) & (grid.method == case.method)]
    known = {(row.backbone, row.method, row.shape) for row in grid.itertuples()}

    assert [] == extrapolation.broken(grid)
    assert {"same", "refused"} == set(grid.outcome)
    assert len(known) == len(grid)
    assert {one.backbone for one in extrapolation.cases()} == set(grid.backbone[grid.rule == "extrapolated"])
    assert {one.method for one in extrapolation.cases()} == set(grid.method)
    assert len(grid) == len(extrapolation.SHAPES) * len(list(extrapolation.cases()))
    again = extrapolation.tried(case)
    assert ["same", "same"] == [row["outcome"] for row in again]
    assert list(committed.events) == [row["events"] for row in again]


def test_the_grid_of_few_layers_sees_what_differs(monkeypatch):
    """A size that is told wrongly is a row that says what differs, and a sentence."""
    directly = extrapolation.WatchedTracer.directly

    def wrong(self, cell, *arguments):
        traced = directly(self, cell, *arguments)
        if cell.model_config_overrides["num_hidden_layers"] == 12:
            traced.trace.nbytes[traced.trace.nbytes > 0] += 512
        return traced

    monkeypatch.setattr(extrapolation.WatchedTracer, "directly", wrong)
    rows = extrapolation.tried(extrapolation.Case("bert", "lora"))

    assert ["different", "different"] == [row["outcome"] for row in rows]
    assert rows[0]["reason"].startswith("nbytes of the events")
    found = extrapolation.broken(pd.DataFrame(rows))
    assert found[0].startswith("bert: lora at 2x64: different: nbytes of the events")
