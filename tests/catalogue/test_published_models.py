"""Published measurements: cells that a suite would take, amounts that add up, sources that can be looked up."""

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from meftbench.plan.suite import parse_suite
from meftbench.strict_yaml import Document, read
from meftbench.units import parse_bytes

FILE = Path(__file__).resolve().parents[2] / "reports" / "published" / "figures.yaml"
CONTENT = yaml.safe_load(FILE.read_text(encoding="utf-8"))
FIGURES = {row["id"]: row for row in CONTENT["figures"]}
KEYS = ["id", "source", "cell", "quantity", "value", "unit", "unit_bytes", "bytes", "setting", "notes"]
QUANTITIES = {"peak_allocated", "allocated_after_step", "held_after_forward", "reserved", "device_used"}


@pytest.mark.parametrize("figure", FIGURES.values(), ids=FIGURES)
def test_a_figure_names_a_cell_that_a_suite_would_take(figure):
    content = {"schema": 1, "name": "published", "include": [figure["cell"]]}

    (cell,) = parse_suite(Document(FILE, content, {})).cells

    assert cell.model.endswith("@random")


@pytest.mark.parametrize("figure", FIGURES.values(), ids=FIGURES)
def test_a_figure_has_its_amount_in_bytes_and_a_source(figure):
    """A unit is taken for the binary or the decimal one, or for a thousand MiB, as the code of MEFT and LST prints."""
    known = {"byte": {1}, "MiB": {2**20}, "MB": {2**20, 10**6}, "GiB": {2**30}, "GB": {2**30, 10**9, 1000 * 2**20}}

    assert KEYS == list(figure)
    assert figure["unit_bytes"] in known[figure["unit"]]
    assert figure["bytes"] == parse_bytes(round(figure["value"] * figure["unit_bytes"]))
    assert figure["quantity"] in QUANTITIES
    assert figure["setting"] in ("complete", "partial")
    assert figure["source"] in CONTENT["sources"]


def test_ids_are_unique_and_sources_are_used_and_can_be_looked_up():
    read(FILE)  # no key twice

    assert [] == [name for name, count in Counter(row["id"] for row in CONTENT["figures"]).items() if count > 1]
    assert set(CONTENT["sources"]) == {row["source"] for row in CONTENT["figures"]}
    assert all(source["url"].startswith("https://") and source["read"] for source in CONTENT["sources"].values())


def test_what_offloading_checkpoints_frees_is_one_input_a_layer():
    """So that MB in transformers' pull request 48444 is 2^20 bytes: layers x length x hidden x 2."""
    for shape, inputs in (("28x2048x32k", 28 * 32768 * 2048 * 2), ("8x1024x8k", 8 * 8192 * 1024 * 2)):
        held = [FIGURES[f"qwen3-{shape}-{kind}"]["bytes"] for kind in ("checkpoint", "offload")]

        assert inputs == pytest.approx(held[0] - held[1], rel=1e-6)


def test_the_step_of_adamw_sets_the_peak_of_full_fine_tuning():
    """Weights, gradients, two moments and the temporary of foreach: two bytes of each a parameter, ten in all."""
    parameters = 7_241_732_096

    assert 10 * parameters == pytest.approx(FIGURES["mistral-7b-full-b4-peak"]["bytes"], rel=0.01)


def test_what_the_reading_says_is_in_the_table():
    """Every figure with a decimal point, and every row that is named."""
    table, _, reading = (FILE.parent / "table.md").read_text(encoding="utf-8").partition("## Reading")
    said = set(re.findall(r"\d[\d,]*\.\d+", reading)) - {"3.1", "3.2"}  # of Llama

    assert (FILE.parent / "reading.md").read_text(encoding="utf-8") == "## Reading" + reading
    assert [] == sorted(number for number in said if not re.search(rf"\| [-+]?{re.escape(number)} \|", table))
    assert set(re.findall(r"`([^`]+)`", reading)) <= set(FIGURES)
