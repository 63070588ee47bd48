"""CONTRIBUTING.md holds: what it says can be added is added as it says, and works."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from meftbench.catalogue import metrics
from meftbench.catalogue.backbones import BACKBONES, Backbone
from meftbench.catalogue.methods import METHODS, Method
from meftbench.catalogue.models import MODELS, Model
from meftbench.catalogue.probes import PROBES, Probe
from meftbench.catalogue.settings import Settings
from meftbench.cli import listing
from meftbench.errors import UserError
from meftbench.measuring.measurers import measure_cell
from meftbench.plan.protocol import Protocol
from meftbench.plan.suite import parse_suite
from meftbench.records.record import Metric
from meftbench.strict_yaml import read
from tests import toys

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```\w+\n# (?P<file>meftbench/[\w/.]+)(?:, (?P<place>[^\n]+))?\n(?P<code>.*?)^```$", re.M | re.S)


def recipes():
    """(file, place in it or None, code) of each block of CONTRIBUTING.md that says where it goes."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return [(found["file"], found["place"], found["code"]) for found in BLOCK.finditer(text)]


def placed(content, place, code):
    """`content` with `code` at the place that CONTRIBUTING.md names in words."""
    if name := re.fullmatch(r"above class (\w+)", place):
        # With what stands on a class, its decorator.
        return re.sub(rf"(?m)^(?=(@.*\n)?class {name[1]}\b)", lambda _: f"{code}\n\n", content, count=1)
    if name := re.fullmatch(r"in (\w+)", place):
        begin, indent = re.search(rf"(?m)^{name[1]}\b[^=\n]*= [\[({{]\n", content), ""
    else:
        (function,) = re.fullmatch(r"in what (\w+) returns", place).groups()
        begin, indent = re.compile(r"    return \{\n").search(content, content.index(f"def {function}(")), "    "
    end = re.compile(rf"(?m)^{indent}[\])}}]").search(content, begin.end()).start()
    return content[:end] + code + content[end:]


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the package to which every recipe has been applied; and the files of each recipe."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "meftbench", folder / "meftbench", ignore=shutil.ignore_patterns("__pycache__"))
    for file, place, code in recipes():
        target = folder / file
        if place is None:
            assert not target.exists(), f"{file} is there already"
            target.write_text(code)
        else:
            before = target.read_text()
            target.write_text(placed(before, place, code))
            assert before != target.read_text()
    return folder


def run_in(folder, *command):
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout


MINIATURES = {
    "opt-125m@random": {"num_hidden_layers": 2, "hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 2,
                        "word_embed_proj_dim": 32, "vocab_size": 99},
    "llama-3.2-1b@random": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 99,
                            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    "bart-base@random": {"encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "encoder_ffn_dim": 64,
                         "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                         "vocab_size": 99},
    "bert-tiny@random": {},
}  # fmt: skip

CHECK = """
import json, sys
from meftbench.backbones.build import build_model
from meftbench.methods import prepare
import meftbench
assert meftbench.__file__.startswith(sys.argv[1]), meftbench.__file__
for name, config in json.loads(sys.argv[2]).items():
    model = build_model(name, config, head="classification")
    head = {key for key in dict(model.named_parameters()) if not key.startswith(model.base_model_prefix + ".")}
    trained = set(prepare(model, "bitfit").trained())
    assert head and head <= trained, (name, head - trained)
    assert {key for key in trained - head if not key.endswith(".bias")} == set(), name
    biases = {key for key in dict(model.named_parameters()) if key.endswith(".bias")}
    assert biases <= trained, name
"""


def test_the_recipes_are_as_short_as_they_say():
    """A method, a lever, a metric in the table and a backbone are two files each, a profile one."""
    files = {}
    for file, _, code in recipes():
        for name, sign in {
            "method": "BitFit", "lever": "Copied", "backbone": "STARCODER2", "metric": "largest_tensor_bytes",
            "probe": "steps_before", "profile": "mycard", "task": "imdb",
        }.items():  # fmt: skip
            if sign in code:
                files.setdefault(name, set()).add(file)
    counts = {name: len(found) for name, found in files.items()}
    assert {"method": 2, "lever": 2, "backbone": 2, "metric": 2, "probe": 3, "profile": 1, "task": 1} == counts


def test_the_recipe_of_a_method_trains_every_head(extended):
    """In a fresh process: heads and biases, whatever an architecture calls them, and nothing else."""
    run_in(extended, "-c", CHECK, str(extended), json.dumps(MINIATURES))


@pytest.mark.slow
def test_the_recipes_work_together(extended, tmp_path):
    """A run with the method, the lever, the backbone and both metrics; the table shows them; the profile predicts."""
    from transformers import Starcoder2Config

    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    Starcoder2Config(num_hidden_layers=2, vocab_size=99, **size).save_pretrained(tmp_path / "starcoder2")
    (tmp_path / "suite.yaml").write_text(
        "schema: 1\nname: recipes\nprotocol: {warmup: 1, steps: 1, passes: [memory, steps_before]}\n"
        "defaults: {batch_size: 2, sequence_length: 8}\ninclude:\n"
        "  - {model: bert-tiny@random, method: {name: bitfit, norms: true}}\n"
        "  - {model: bert-tiny@random, method: lora+copied}\n"
        f"  - {{model: {tmp_path / 'starcoder2'}@random, method: meft3-exact}}\n"
        "  - {model: bert-tiny@random, method: lora+copied, device: 'predicted:mycard'}\n"
    )
    run_in(extended, "-m", "meftbench", "run", str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "out"), "--quiet")
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]

    assert ["ok"] * 4 == [record["status"] for record in records]
    counted = [record["metrics"] for record in records if record["cell"]["device"] == "counted"]
    assert all(metrics["steps_before"] == {"value": 2, "unit": "count", "source": "counted"} for metrics in counted)
    assert all(metrics["largest_tensor_bytes"]["value"] > 0 for metrics in counted)
    shown = run_in(extended, "-m", "meftbench", "show", str(tmp_path / "out"))
    assert "largest" in shown
    assert "bitfit" in shown
    listed = run_in(extended, "-m", "meftbench", "list", "methods")
    assert {"bitfit", "+copied"} <= {line.split()[0] for line in listed.splitlines() if line.strip()}
    assert "imdb" in run_in(extended, "-m", "meftbench", "list", "tasks")
    colours = (
        "from meftbench.report.figures.style import COLOUR; assert COLOUR['bitfit'] not in [*COLOUR.values()][:-1]"
    )
    run_in(extended, "-c", colours)


def suite_of(tmp_path, model, method, passes="[memory]"):
    file = tmp_path / "toy.yaml"
    file.write_text(
        f"schema: 1\nname: toy\nprotocol: {{warmup: 1, steps: 1, passes: {passes}}}\n"
        f"grid: {{model: {model}, method: {method}, batch_size: 2, sequence_length: 8}}\n"
    )
    return parse_suite(read(file))


def test_a_method_is_added(tmp_path, monkeypatch):
    """BitFit: its function and settings in one file, one entry, and a suite may name it with its settings."""
    entry = Method(toys.BitFit, "tests.toys:apply_bitfit", "biases only")
    monkeypatch.setitem(METHODS, "bitfit", entry)
    (cell,) = suite_of(tmp_path, "bert-tiny@random", "{name: bitfit, head: false}").cells

    found = measure_cell(cell, Protocol(warmup=1, steps=1)).metrics

    # per layer 4 + 1 + 1 projections of the hidden size, one intermediate, two norms; embedding norm, pooler, head
    assert 2 * (4 * 128 + 512 + 128 + 2 * 128) + 128 + 128 + 2 == found["parameters_trainable"].value
    assert found["activation_peak_bytes"].value > 0


@pytest.mark.parametrize("method", ["full", "lora+checkpoint", "pfeiffer", "meft1", "meft3"])
def test_a_backbone_is_added(tmp_path, monkeypatch, method):
    """ELECTRA: a layout in one file, one entry for the type, one for the size; every method works on it."""
    monkeypatch.setitem(BACKBONES, "electra", Backbone("tests.toys:ELECTRA", "as BERT"))
    size = {"num_hidden_layers": 2, "hidden_size": 32, "embedding_size": 32, "num_attention_heads": 4, "vocab_size": 99}
    model = Model("electra", "google/electra-small-discriminator", size, "toy")
    monkeypatch.setitem(MODELS, "electra-toy", model)
    (cell,) = suite_of(tmp_path, "electra-toy@random", f'"{method}"').cells

    found = measure_cell(cell, Protocol(warmup=1, steps=1)).metrics

    assert found["activation_peak_bytes"].value > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps_before": Metric(1, "counted"), "peak_allocated_bytes": Metric(1, "counted")}, "peak_allocated_bytes"),
        ({"nobodys": Metric(1, "counted")}, "nobodys: is no metric"),
    ],
)
def test_a_pass_that_gives_what_it_may_not_is_one_line(tmp_path, monkeypatch, given, said):
    """A number that another pass has given, or one that nobody has entered."""
    monkeypatch.setattr(toys, "count_steps", lambda subject: given)
    monkeypatch.setitem(PROBES, "steps", Probe("tests.toys:count_steps", "a toy"))
    monkeypatch.setitem(metrics.METRICS, "steps_before", metrics.Kind("count", "neither", "steps run before"))
    suite = suite_of(tmp_path, "bert-tiny@random", "lora", passes="[memory, steps]")

    def written():
        return [metric.to_json(name) for name, metric in measure_cell(suite.cells[0], suite.protocol).metrics.items()]

    with pytest.raises(UserError, match=said):
        written()


def test_a_source_that_is_none_is_refused():
    with pytest.raises(ValueError, match="a metric is measured, counted, predicted, not 'guessed'"):
        Metric(1, "guessed")


def test_a_setting_that_must_be_said_is_listed(monkeypatch):
    """And the method without it is one line."""

    class Needy(Settings):
        need: int
        other: int = 2

    monkeypatch.setitem(METHODS, "needy", Method(Needy, "tests.toys:apply_bitfit", "a toy"))
    assert {"need": "required", "other": 2} == listing.methods()["needy"]["settings"]


def test_a_pass_is_run_where_a_suite_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(PROBES, "steps", Probe("tests.toys:count_steps", "a toy"))
    assert ("memory", "throughput", "reconstruction") == Protocol().passes


def test_a_probe_is_added(tmp_path, monkeypatch):
    """A pass of one's own: its function in one file, one entry, one row for the number's unit and meaning."""
    monkeypatch.setitem(PROBES, "steps", Probe("tests.toys:count_steps", "a toy"))
    monkeypatch.setitem(metrics.METRICS, "steps_before", metrics.Kind("count", "neither", "steps run before"))
    suite = suite_of(tmp_path, "bert-tiny@random", "lora", passes="[memory, steps]")

    found = measure_cell(suite.cells[0], suite.protocol).metrics

    assert {"value": 2, "unit": "count", "source": "counted"} == found["steps_before"].to_json("steps_before")
