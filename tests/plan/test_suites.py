"""From a suite file to its cells."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meftbench import installed
from meftbench.documents import json_object_of
from meftbench.errors import UserError
from meftbench.plan import models
from meftbench.plan.suite import load_suite, parse_suite, shipped_suites
from meftbench.strict_yaml import Document, read

GRID = {"model": "bert-tiny@random", "method": "full", "batch_size": 1, "sequence_length": 16}


def parsed(**content):
    return parse_suite(Document(Path("toy.yaml"), {"schema": 1, "name": "toy"} | content, {}))


def labels(suite):
    return [cell.label.removeprefix("bert-tiny@random/") for cell in suite.cells]


@given(
    st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True),
    st.lists(st.sampled_from(["full", "lora", "meft1"]), min_size=1, max_size=3, unique=True),
)
def test_a_grid_is_the_product_of_its_axes(sizes, methods):
    suite = parsed(grid=GRID | {"batch_size": sizes, "method": methods})

    assert {(m, b) for m in methods for b in sizes} == {(cell.method, cell.batch_size) for cell in suite.cells}
    assert len(suite.cells) == len(sizes) * len(methods)


def test_one_value_stands_for_a_list_of_one():
    assert labels(parsed(grid=GRID)) == labels(parsed(grid={key: [value] for key, value in GRID.items()}))


def test_include_adds_and_exclude_takes_away():
    """Excluded are cells of the grid that agree in every axis named; a cell named twice is run once."""
    suite = parsed(
        grid=GRID | {"method": ["full", "lora"], "batch_size": [1, 2]},
        exclude=[{"method": "full", "batch_size": 2}],
        include=[GRID | {"method": "lora+checkpoint"}, GRID],
    )

    assert ["full/b1/s16", "lora/b1/s16", "lora/b2/s16", "lora+checkpoint/b1/s16"] == labels(suite)


def test_defaults_hold_where_a_cell_says_nothing():
    suite = parsed(defaults={"precision": "bf16", "seed": 3}, grid=GRID | {"seed": 4}, include=[GRID])

    assert ["full/b1/s16/bf16/seed4", "full/b1/s16/bf16/seed3"] == labels(suite)


def test_a_method_with_settings_and_a_model_with_a_configuration_are_spelled_out():
    suite = parsed(
        grid=GRID
        | {
            "method": {"name": "meft1+checkpoint", "adapter_size": 8, "lambda": 0.125},
            "model": {"name": "bert-tiny@random", "config": {"num_hidden_layers": 3}},
        }
    )

    [cell] = suite.cells
    assert ({"adapter_size": 8, "lambda": 0.125}, ["checkpoint"]) == (cell.method_params, cell.levers.names())
    assert "bert-tiny@random(num_hidden_layers=3)/meft1(adapter_size=8,lambda=0.125)+checkpoint/b1/s16" == cell.label
    assert 8 == cell.recorded()["method_params"]["adapter_size"]


def test_a_setting_that_is_the_default_makes_no_other_cell():
    """Written out or left out, it is the same cell, and is run once."""
    assert ["meft1/b1/s16"] == labels(parsed(grid=GRID | {"method": ["meft1", {"name": "meft1", "adapter_size": 64}]}))


def test_the_order_of_cells_and_the_description_do_not_name_the_suite():
    one = parsed(grid=GRID | {"batch_size": [1, 2]})
    other = parsed(grid=GRID | {"batch_size": [2, 1]}, description="other")

    assert one.suite_id == other.suite_id
    assert one.suite_id != parsed(grid=GRID).suite_id


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"grid": GRID | {"micro_batch_size": 3, "batch_size": 8}}, "micro_batch_size 3 does not divide batch_size 8"),
        ({"grid": GRID | {"batch_size": list(range(1, 10_002))}}, "has 10,001 cells; at most 10,000"),
        ({"grid": GRID | {"batch_size": 10**30}}, "tokens are more than any device has held; write fewer"),
        ({"grid": GRID | {"seed": 10**30}}, "is no seed of torch; write at most 18,446,744,073,709,551,615"),
        ({"grid": GRID | {"precision": []}}, "grid.precision: names nothing; write a value, or leave the axis out"),
        ({"grid": {"model": "bert-tiny@random"}}, "method: is missing"),
        ({"grid": GRID | {"method": {"name": "lora", "rnak": 4}}}, "unknown key 'rnak'; did you mean 'rank'?"),
        ({"grid": GRID | {"method": {"name": "lora", "rank": "4"}}}, "YAML read '4' as text"),
        ({"grid": GRID | {"method": "lora+checkpoint+checkpoint"}}, "lever 'checkpoint' is named twice"),
        ({"grid": GRID | {"model": {"name": "bert-tiny@random", "layers": 2}}}, "unknown key 'layers'"),
        ({"grid": GRID | {"precision": "fp31"}}, "unknown precision 'fp31'; did you mean 'fp32'?"),
        ({"grid": GRID, "exclude": [{}]}, "names nothing"),
        (
            {"grid": GRID, "exclude": [{"model": "berrt"}]},
            "exclude[0].model: no cell of the suite has model 'berrt'; exclude what the grid",
        ),
        ({"grid": GRID, "exclude": [{"batch_size": 999}]}, "has batch_size 999"),
        ({"grid": GRID, "exclude": [{"attention": "eager"}]}, "no cell of the suite has attention 'eager'"),
        (
            {
                "grid": GRID | {"method": ["full", "lora"]},
                "include": [{"model": "bert-tiny@random", "method": "full", "batch_size": 9, "sequence_length": 16}],
                "exclude": [{"method": "full"}, {"method": "lora", "batch_size": 9}],
            },
            "exclude[1]: no cell of the suite has all of these values at once; leave the entry out",
        ),
        ({"grid": GRID, "protocol": {"timeout": "soon"}}, "'soon' is not a duration"),
        ({"grid": GRID, "protocol": {"allocator": {"max_split": 1}}}, "write `default`, `expandable`"),
        ({"grid": GRID, "protocol": {"memory_limit": "8"}}, "'8' is not an amount of memory"),
    ],
)
def test_what_makes_no_sense_is_refused(content, said):
    with pytest.raises(UserError) as raised:
        parsed(**content)

    assert said in str(raised.value)
    assert 2 == raised.value.exit_code


def test_roberta_counts_its_positions_from_the_padding_index():
    """514 positions carry 512 tokens."""
    grid = GRID | {"model": "roberta-base@random"}

    assert parsed(grid=grid | {"sequence_length": 512})
    with pytest.raises(UserError, match="longer than the 512 positions"):
        parsed(grid=grid | {"sequence_length": 513})


@pytest.mark.parametrize("name", sorted(shipped_suites()))
def test_shipped_suites_are_valid(name):
    assert load_suite(name).cells


def test_a_line_is_known_for_every_key(tmp_path):
    """Errors name the line on which a value stands, in lists within mappings too."""
    file = tmp_path / "a.yaml"
    file.write_text("a:\n  - b: 1\n    c: 2\n  - [3,\n     4]\n")

    document = read(file)

    assert {"a": [{"b": 1, "c": 2}, [3, 4]]} == document.content
    assert [1, 2, 3, 5] == [document.lines[path] for path in (("a",), ("a", 0, "b"), ("a", 0, "c"), ("a", 1, 1))]


@pytest.fixture
def model_folder(tmp_path):
    """A folder of a model that can be read as far as its configuration."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 64}')
    return folder


def test_a_configuration_is_read_once_for_all_cells_and_again_when_it_changes(model_folder, monkeypatch):
    """However many cells there are; a file that has changed since is not taken for the one that was read."""
    reads = []
    monkeypatch.setattr(models, "json_object_of", lambda file, **options: reads.append(file) or json_object_of(file))
    grid = GRID | {"model": f"{model_folder}@random", "batch_size": list(range(1, 50))}

    parsed(grid=grid | {"sequence_length": 64})
    assert [model_folder / "config.json"] == reads

    (model_folder / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 32}')
    with pytest.raises(UserError, match="32"):
        parsed(grid=grid | {"sequence_length": 64})


@pytest.mark.parametrize("model", ["minilm", "smollm2"])
def test_a_package_is_looked_for_once_for_all_cells(model, monkeypatch):
    """A search goes through all of sys.path, which takes longer than all else that a cell needs."""
    searches = []
    for name in ("version", "files"):
        found = getattr(installed.metadata, name)
        monkeypatch.setattr(
            installed.metadata, name, lambda package, found=found: searches.append(package) or found(package)
        )
    find = installed.importlib.util.find_spec
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: searches.append(name) or find(name))
    for kept in (installed.version_of, installed.file_of, installed.folder_of_package):
        kept.cache_clear()

    parsed(grid=GRID | {"model": f"{model}@random", "batch_size": list(range(1, 50))})

    assert searches
    assert len(searches) == len(set(searches))
