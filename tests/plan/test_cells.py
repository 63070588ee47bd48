"""Cells and their ids: the same content has the same name on every machine and in every version."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builders import a_cell
from meftbench.errors import UserError
from meftbench.plan.cell import Cell
from meftbench.plan.identity import canonical, digest, uuid7
from meftbench.plan.protocol import Protocol
from meftbench.plan.training import Training
from meftbench.plan.where import parse_where

# Ids are written into records and baselines: a change here makes every one of them unfindable.
GOLDEN = {
    "b748abf2f31c7e04": a_cell(),
    "578227fff6c207e1": a_cell(method="lora+checkpoint", batch_size=32, micro_batch_size=8, precision="bf16-autocast"),
    "693b0686120bd846": a_cell(method="meft1", method_params={"adapter_size": 8, "lambda": 0.125}),
}


@pytest.mark.parametrize("cell_id", GOLDEN)
def test_a_cell_keeps_its_id(cell_id):
    assert cell_id == GOLDEN[cell_id].cell_id


def test_the_protocol_keeps_its_id():
    assert "84effc1d40626f7a" == Protocol().protocol_id


cells = st.builds(
    a_cell,
    method=st.sampled_from(["full", "lora", "lora+checkpoint", "meft1", "meft3+offload"]),
    batch_size=st.integers(1, 64),
    sequence_length=st.integers(1, 512),
    precision=st.sampled_from(["fp32", "bf16"]),
    seed=st.integers(0, 3),
)


@given(cells)
def test_a_cell_survives_json_with_its_id(cell):
    """It goes through the door to the worker, and into the suite.yaml of a run."""
    assert cell.cell_id == Cell.model_validate_json(json.dumps(cell.model_dump(mode="json"))).cell_id


@given(cells, cells)
def test_different_cells_have_different_ids_and_labels(one, other):
    assert (one == other) == (one.cell_id == other.cell_id) == (one.label == other.label)


def test_a_value_that_is_the_default_does_not_change_the_id():
    """So a field that is added later, with a default, leaves old ids as they are."""
    assert a_cell().cell_id == a_cell(seed=0, precision="fp32", method_params={}).cell_id


@given(st.dictionaries(st.text(), st.integers() | st.text(), max_size=5))
def test_order_does_not_matter_to_a_digest(content):
    assert digest(content) == digest(dict(reversed(content.items())))
    assert content == json.loads(canonical(content))


def test_record_ids_are_ordered_by_time():
    """UUIDs of version 7, all different."""
    ids = [uuid7() for _ in range(2000)]

    assert len(ids) == len(set(ids))
    assert [name[:13] for name in ids] == sorted(name[:13] for name in ids)
    assert {"7"} == {name[14] for name in ids}
    assert {*"89ab"} >= {name[19] for name in ids}


@pytest.mark.parametrize(
    ("condition", "chosen"),
    [
        ("method=lora", True),
        ("method=lora+checkpoint", True),
        ("method=full", False),
        ("model=bert-*", True),
        ("levers=checkpoint", True),
        ("levers=offload", False),
        ("batch_size=8,sequence_length=128", True),
        ("batch_size=8,sequence_length=64", False),
        ("batch_size=?", True),
        ("attention=sdpa, device=counted", True),
    ],
)
def test_where_matches_fields_by_globs(condition, chosen):
    assert chosen == parse_where([condition])(a_cell(method="lora+checkpoint"))


def test_where_takes_a_label_with_brackets_and_commas_as_it_stands():
    """It can be copied out of a table."""
    cell = a_cell(method="meft1", method_params={"adapter_size": 8, "beta": 0.5})

    assert "meft1(adapter_size=8,beta=0.5)" == cell.method_label
    assert parse_where([f"method={cell.method_label},batch_size=8"])(cell)
    assert not parse_where([f"method={cell.method_label},batch_size=9"])(cell)


def test_no_condition_chooses_everything():
    assert parse_where([])(a_cell())


@pytest.mark.parametrize("wrong", ["batch_size", "", "bacht_size=8", "batch_size=8,"])
def test_a_condition_with_a_fault_is_refused(wrong):
    with pytest.raises(UserError, match="--where"):
        parse_where([wrong])


# --- where a model or a task lies ---

SPELLINGS = ["./models/mine", "models/mine", "models//mine/", "./models/../models/mine", "{here}/models/mine", "link"]


def spelled(folder, spelling):
    return spelling.format(here=folder)


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@given(st.sampled_from(SPELLINGS), st.sampled_from(SPELLINGS), st.sampled_from(["", "@random"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_a_folder_is_one_cell_however_it_is_spelled(here, one, other, weights):
    """A model's and a task's. What was written is what the record and the label say."""
    shape = {"batch_size": 1, "sequence_length": 8}
    cells = [Cell.of("lora", model=spelled(here, name) + weights, **shape) for name in (one, other)]
    trained = [
        cell.model_copy(update={"training": Training(task=spelled(here, name), learning_rate=0.1)})
        for cell, name in zip(cells, (one, other), strict=True)
    ]

    assert cells[0].cell_id == cells[1].cell_id
    assert trained[0].cell_id == trained[1].cell_id
    assert spelled(here, one) + weights == cells[0].model


def test_the_folder_of_a_copied_repository_is_the_same_cell(tmp_path, monkeypatch):
    """From the working folder on it is the same; a folder elsewhere is another, and so is another folder."""
    found = []
    for copy in ("a", "b"):
        (tmp_path / copy / "mine").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / copy)
        found += [Cell.of("lora", model=name, batch_size=1, sequence_length=8).cell_id for name in ("./mine", "mine")]
    elsewhere = Cell.of("lora", model=str(tmp_path / "a" / "mine"), batch_size=1, sequence_length=8).cell_id

    assert 1 == len(set(found))
    assert elsewhere not in found


def test_a_name_is_no_folder(here):
    """Of the catalogue, though a folder is called so."""
    (here / "minilm").mkdir()
    inside = Cell.of("lora", model="minilm", batch_size=1, sequence_length=8).cell_id
    (here / "minilm").rmdir()

    assert inside == Cell.of("lora", model="minilm", batch_size=1, sequence_length=8).cell_id
