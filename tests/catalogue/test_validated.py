"""What the package carries of the measurements that predictions were held against."""

from __future__ import annotations

import pytest

from meftbench.catalogue.profiles import OwnCells, find_profile
from meftbench.catalogue.validated import (
    BETWEEN_STEPS,
    STEP_PEAKS,
    about_validation,
    errors_of,
    validated_figures,
)
from meftbench.report.views.published import figure_lines, published_lines


def test_a_card_that_was_measured_says_how_well():
    """Published steps with complete settings on an A100: of Mistral and Llama; and single operators."""
    said = about_validation(find_profile("a100-80gb"))
    peaks = errors_of(STEP_PEAKS, "a100-80gb")

    assert said.startswith("held against published measurements of NVIDIA A100-SXM4-80GB: ")
    assert f": {len(peaks)} peaks (worst error 0.0" in said
    assert f"{len(errors_of(BETWEEN_STEPS, 'a100-80gb'))} levels between steps (worst error 0." in said
    assert "operators (worst error 0.00%)" in said


def test_other_cards_say_so_and_name_those_that_were():
    said = about_validation(find_profile("rtx4090"))

    assert said.startswith("not validated on NVIDIA GeForce RTX 4090; rules held against published measurements on ")
    assert "A100, " in said
    assert "of reserved memory (median" in said
    assert said.endswith("; of language models, none by a MEFT method")
    assert "H100, L40S: " in said
    assert f"{len(errors_of(STEP_PEAKS))} peaks (worst error " in said


def test_cells_of_ones_own_come_first():
    own = OwnCells(cells=48, median=0.004, worst=0.02, torch="2.13.0")
    profile = find_profile("t4").model_copy(update={"validated": own})

    expected = "validated on 48 cells of Tesla T4: peak allocated, median error 0.40%, worst 2.00%"
    assert expected == about_validation(profile)


def test_the_lines_have_every_group_and_the_allocator():
    """Each source once a quantity, setting and rule set; a line of all where there are several."""
    content = validated_figures()
    text = "\n".join(published_lines(content))

    for group in content.groups:
        assert group.source in text
        assert f"rules of {group.rules.partition(' where ')[0]}" in text
    assert f"{content.allocations:,} of {content.allocations:,} allocations of {content.traces} real" in text
    assert "allocated between steps, complete settings" in text


def test_the_allocator_is_right_in_every_trace():
    content = validated_figures()
    assert content.allocations == content.equal_addresses
    assert 8 == content.traces
    assert 30_000 < content.allocations


def test_a_figure_without_a_prediction_says_so():
    """And one with it has its error."""
    from pandas import DataFrame

    row = {"id": "a", "setting": "complete", "quantity": "growth", "published_bytes": 2**20, "ratio": 1.5}
    table = DataFrame([row | {"predicted_bytes": 3 * 2**19}, row | {"id": "b", "predicted_bytes": None, "ratio": None}])

    lines = figure_lines(table.astype({"predicted_bytes": "Int64"}))

    assert "    measured 1.0 MiB, predicted 1.5 MiB, error +50.000%" in lines
    assert "    measured 1.0 MiB, not predicted" in lines


@pytest.mark.parametrize("quantity", ["allocated_after_step", "peak_allocated"])
def test_complete_figures_are_near(quantity):
    """The worst of all within 0.3 %."""
    errors = [
        error
        for group in validated_figures().groups
        if (group.quantity, group.setting) == (quantity, "complete")
        for error in group.errors
    ]
    assert max(map(abs, errors)) < 0.003
