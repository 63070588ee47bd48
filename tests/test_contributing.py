"""CONTRIBUTING.md holds: a method, a backbone or a probe is one file and one entry."""

from __future__ import annotations

import pytest

from meftbench.measurement import measure_cell
from meftbench.plan import catalogue
from meftbench.plan.protocol import Protocol
from meftbench.plan.strict_yaml import read
from meftbench.plan.suite import parse_suite
from meftbench.records import metrics
from tests import toys


def suite_of(tmp_path, model, method, passes="[memory]"):
    file = tmp_path / "toy.yaml"
    file.write_text(
        f"schema: 1\nname: toy\nprotocol: {{warmup: 1, steps: 1, passes: {passes}}}\n"
        f"grid: {{model: {model}, method: {method}, batch_size: 2, sequence_length: 8}}\n"
    )
    return parse_suite(read(file))


def test_a_method_is_added(tmp_path, monkeypatch):
    """BitFit: its function and settings in one file, one entry, and a suite may name it with its settings."""
    entry = catalogue.Method(toys.BitFit, "tests.toys:apply_bitfit", "biases only")
    monkeypatch.setitem(catalogue.METHODS, "bitfit", entry)
    (cell,) = suite_of(tmp_path, "bert-tiny@random", "{name: bitfit, head: false}").cells

    found = measure_cell(cell, Protocol(warmup=1, steps=1)).metrics

    # per layer 4 + 1 + 1 projections of the hidden size, one intermediate, two norms; embedding norm, pooler, head
    assert 2 * (4 * 128 + 512 + 128 + 2 * 128) + 128 + 128 + 2 == found["parameters_trainable"].value
    assert found["activation_peak_bytes"].value > 0


@pytest.mark.parametrize("method", ["full", "lora+checkpoint", "pfeiffer", "meft1", "meft3"])
def test_a_backbone_is_added(tmp_path, monkeypatch, method):
    """ELECTRA: a layout in one file, one entry for the type, one for the size; every method works on it."""
    monkeypatch.setitem(catalogue.BACKBONES, "electra", catalogue.Backbone("tests.toys:ELECTRA", "as BERT"))
    size = {"num_hidden_layers": 2, "hidden_size": 32, "embedding_size": 32, "num_attention_heads": 4, "vocab_size": 99}
    model = catalogue.Model("electra", "google/electra-small-discriminator", size, "toy")
    monkeypatch.setitem(catalogue.MODELS, "electra-toy", model)
    (cell,) = suite_of(tmp_path, "electra-toy@random", f'"{method}"').cells

    found = measure_cell(cell, Protocol(warmup=1, steps=1)).metrics

    assert found["activation_peak_bytes"].value > 0


def test_a_probe_is_added(tmp_path, monkeypatch):
    """A pass of one's own: its function in one file, one entry, one row for the number's unit and meaning."""
    monkeypatch.setitem(catalogue.PROBES, "steps", catalogue.Probe("tests.toys:count_steps", "a toy"))
    monkeypatch.setitem(metrics.METRICS, "steps_before", metrics.Kind("count", "neither", "steps run before"))
    suite = suite_of(tmp_path, "bert-tiny@random", "lora", passes="[memory, steps]")

    found = measure_cell(suite.cells[0], suite.protocol).metrics

    assert {"value": 2, "unit": "count", "source": "counted"} == found["steps_before"].to_json("steps_before")
