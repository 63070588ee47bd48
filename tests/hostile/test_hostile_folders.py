"""Folders that somebody else made: adapters, models, data, snapshots and kept results are read or refused."""

from __future__ import annotations

import json
import os
import pickle
from copy import deepcopy

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification

from meftbench.backbones.build import build_model
from meftbench.errors import is_out_of_memory
from meftbench.memory_limit import memory_limit
from meftbench.methods import apply_method
from meftbench.methods.adapter_files import CONFIG, WEIGHTS
from meftbench.methods.saving import load_adapter, save_adapter
from meftbench.plan.suite import load_suite
from meftbench.prediction.pool import Kept
from meftbench.snapshots.file import read_device
from meftbench.tasks.data import load_splits
from mutations import SUITE, hostile, mutated, refused_or, watched
from snapshots import a_step
from task_data import ROWS, a_task

MiB = 2**20
TINY = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
CONFIGURATION = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "id2label": {"0": "a", "1": "b"},
}
IMAGES = CONFIGURATION | {"model_type": "vit", "image_size": 32, "patch_size": 8}


class Evil:
    """A pickle that runs a command where it is read."""

    def __reduce__(self):
        return os.system, ("touch PWNED",)


# --- adapters ---


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """The two files of an adapter written here, and of one written by peft, each with the model without it."""
    found = []
    for method in ("meft1-exact", "lora"):
        plain = BertForSequenceClassification(TINY)
        model = apply_method(deepcopy(plain), method)
        folder = tmp_path_factory.mktemp(method)
        save_adapter(model, folder)
        found.append((plain, json.loads((folder / CONFIG).read_text()), (folder / WEIGHTS).read_bytes()))
    return found


def loaded(folder, plain, config, weights):
    """Whatever was read; a model that refuses the adapter is as it was."""
    (folder / CONFIG).write_bytes(config)
    (folder / WEIGHTS).write_bytes(weights)
    model = deepcopy(plain)
    with watched(folder):
        refused_or(load_adapter, model, folder)


@hostile("configuration of an adapter")
@given(which=st.integers(0, 1), data=st.data())
def test_a_damaged_configuration_of_an_adapter_is_one_line(adapters, tmp_path, which, data):
    plain, config, weights = adapters[which]
    config = config | ({} if data.draw(st.booleans()) else {"weights_sha256": None})
    loaded(tmp_path, plain, data.draw(mutated(config, "json")), weights)


@hostile("weights of an adapter")
@given(which=st.integers(0, 1), data=st.data())
def test_damaged_weights_of_an_adapter_are_one_line(adapters, tmp_path, which, data):
    """The header of the file is JSON, behind its length."""
    plain, config, weights = adapters[which]
    length = int.from_bytes(weights[:8], "little")
    header = data.draw(mutated(json.loads(weights[8 : 8 + length]), "json"))
    config = {key: value for key, value in config.items() if key != "weights_sha256"}
    size = data.draw(st.sampled_from([len(header), len(header), 0, 2**63, 2**64 - 1, 10**8]))
    loaded(tmp_path, plain, json.dumps(config).encode(), size.to_bytes(8, "little") + header + weights[8 + length :])


# --- models ---


@hostile("configuration of a model")
@given(content=st.sampled_from([CONFIGURATION, IMAGES]).flatmap(lambda content: mutated(content, "json")))
def test_a_model_with_a_damaged_configuration_is_refused_or_planned(tmp_path, content):
    """By a suite that names its folder."""
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_bytes(content)
    suite = SUITE | {"include": [], "exclude": [], "grid": SUITE["grid"] | {"model": f"{tmp_path}/model@random"}}
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))

    with watched(tmp_path):
        refused_or(load_suite, str(tmp_path / "suite.yaml"))


@hostile("configuration of a model, built")
@given(content=st.sampled_from([CONFIGURATION, IMAGES]).flatmap(lambda content: mutated(content, "json", False)))
def test_a_model_with_a_damaged_configuration_is_refused_or_built(tmp_path, content):
    """Where a suite may name it; it may need more memory than there is, too."""
    test_a_model_with_a_damaged_configuration_is_refused_or_planned.hypothesis.inner_test(tmp_path, content)
    if not isinstance(refused_or(load_suite, str(tmp_path / "suite.yaml")), Exception):
        with watched(tmp_path), memory_limit(256 * MiB):
            try:
                refused_or(build_model, f"{tmp_path}/model@random")
            except Exception as error:
                if not is_out_of_memory(error):
                    raise


# --- data ---


def read_data(folder, split, content, ending, **task):
    for name in ("train", "validation"):
        (folder / f"{name}.{ending}").write_bytes(content if name == split else SOUND[ending])
    with watched(folder):
        refused_or(lambda: load_splits(a_task(folder, **task), None))


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
SOUND = {"jsonl": LINES.encode(), "json": json.dumps(ROWS).encode(), "csv": b"title,spam\na,1\nb,0\n"}


@hostile("data: jsonl")
@given(line=mutated(ROWS[0], "json"), number=st.integers(0, 4))
def test_a_damaged_line_of_data_is_one_line(tmp_path, line, number):
    lines = [json.dumps(row).encode() for row in ROWS]
    read_data(tmp_path, "train", b"\n".join([*lines[:number], line, *lines[number:], b""]), "jsonl")


@hostile("data: json")
@given(content=st.sampled_from([ROWS, {"title": ["a", "b"], "spam": [0, 1]}]).flatmap(lambda c: mutated(c, "json")))
def test_a_damaged_file_of_data_is_one_line(tmp_path, content):
    read_data(tmp_path, "validation", content, "json")


@hostile("data: csv")
@given(
    content=st.lists(
        st.sampled_from([b"title", b"spam", b",", b"\n", b'"', b"\x00", b"1", b"0", b"\r", b"=1", b"\xff"])
    )
)
def test_damaged_separated_values_are_one_line(tmp_path, content):
    read_data(tmp_path, "train", b"title,spam\n" + b"".join(content), "csv")


@pytest.mark.parametrize("line", ["null", "[]", "1", '"a"', "true", "[" * 100_000, '{"title": null, "spam": null}'])
def test_a_line_of_data_that_is_no_row_is_one_line(tmp_path, line):
    """`null` ended the process once."""
    read_data(tmp_path, "train", f"{line}\n".encode(), "jsonl")


# --- snapshots and kept results ---


@hostile("memory snapshot")
@given(content=mutated(a_step(), "json", False))
def test_a_snapshot_of_other_content_is_one_line(tmp_path, content):
    try:
        pickled = pickle.dumps(json.loads(content))
    except (ValueError, RecursionError):
        reject()
    (tmp_path / "snapshot.pickle").write_bytes(pickled)
    with watched(tmp_path):
        refused_or(read_device, tmp_path / "snapshot.pickle")


@hostile("memory snapshot")
@given(place=st.integers(0, 2000), damage=st.binary(max_size=8), drop=st.integers(0, 8))
def test_a_damaged_pickle_is_one_line(tmp_path, place, damage, drop):
    content = pickle.dumps(a_step())
    (tmp_path / "snapshot.pickle").write_bytes(content[:place] + damage + content[place + drop :])
    with watched(tmp_path):
        refused_or(read_device, tmp_path / "snapshot.pickle")


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    (tmp_path / "snapshot.pickle").write_bytes(pickle.dumps(a_step() | {"segments": [Evil()]}))
    with watched(tmp_path):
        refused = refused_or(read_device, tmp_path / "snapshot.pickle")
    assert "which was not run" in str(refused)
    assert not (tmp_path / "PWNED").exists()


@hostile("kept results")
@given(content=mutated({"task": "a", "result": {"b": 1}}, "json"))
def test_damaged_kept_results_are_computed_again(tmp_path, content):
    (tmp_path / "kept.jsonl").write_bytes(content)
    with watched(tmp_path):
        kept = refused_or(Kept, str(tmp_path / "kept.jsonl"))
        assert kept.get({"another": "task"}) is None
