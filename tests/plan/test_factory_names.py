"""Names that mean a function of the user's own, and what a suite may say beside one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import a_cell
from meftbench.plan.factories import check_factory, is_factory
from meftbench.plan.models import check_model, folder_of
from meftbench.plan.suite import parse_suite
from meftbench.strict_yaml import read
from own_models import SHAPE, the_line, write_suite

# --- names ---


@pytest.mark.parametrize("name", ["a:b", "my_package.models:build", "a.b.c:D", "módulo:fábrica"])
def test_a_name_that_means_a_function(name, tmp_path, monkeypatch):
    """It does so whatever lies on the disk; the folder of that name is ./name."""
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()

    assert is_factory(name)
    assert folder_of(name) is None
    assert Path(f"./{name}") == folder_of(f"./{name}")
    assert "leave @random out" in the_line(check_model, "here", f"{name}@random", {})
    check_model("here", name, {})


@pytest.mark.parametrize(
    "name",
    ["a:b:c", ":b", "a:", ":", "a b:c", "a.:b", ".a:b.", "1a:b", "a:1b", "C:\\x", "C:/x", "my-models:build",
     "org/name:build", "a:b.c", "https://huggingface.co/org/name", "bert-tiny:build"],
)  # fmt: skip
def test_a_name_with_a_colon_that_means_nothing(name):
    """It is no name on the hub either: those have no colon."""
    assert not is_factory(name)
    assert re.search(
        r"^here: .*(module:function; write my_package|no model folder)", the_line(check_model, "here", name, {})
    )


@pytest.mark.parametrize("name", ["org/name", "bert-tiny@random", "bert-base", "some-user/bert.v2"])
def test_a_name_without_a_colon_means_no_function(name):
    assert not is_factory(name)
    check_model("here", name, {})


@pytest.mark.parametrize(
    ("name", "meant"), [("./models.py:build", "models:build"), ("src/nets/a.py:f", "src.nets.a:f"), ("a:b:c", "module")]
)
def test_a_file_is_written_as_python_imports_it(name, meant):
    assert meant in the_line(check_model, "here", name, {})


@given(st.text(alphabet="ab1_.:/\\@-é \n", min_size=1, max_size=8))
@settings(max_examples=300)
def test_a_name_means_a_function_or_something_else(name):
    """A function's name has one colon, no slash and nothing that Python has not in names; all others are refused as
    such in one line, or are none."""
    if is_factory(name):
        assert re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name)
        check_factory("here", name, "model")
    else:
        assert "not the name of a batch" in the_line(check_factory, "here", name, "batch").replace("\\n", " ")


def test_a_folder_with_a_colon_is_a_folder(tmp_path, monkeypatch):
    """Where its name is no function's, it needs no ./ before it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b-c").mkdir()
    (tmp_path / "a:b").mkdir()

    assert "has no config.json" in the_line(check_model, "here", "a:b-c", {})
    assert "has no config.json" in the_line(check_model, "here", "./a:b", {})


# --- suites ---


def cells_of(folder, *points, **more):
    return parse_suite(read(write_suite(folder, *points, **more))).cells


def test_the_cell_names_the_functions_as_written(tmp_path):
    """They are in its identity and its label; a cell without them has the identity it always had."""
    points = [{"model": {"name": "a.b:f", "config": {"depth": depth}}, "batch": "a.b:g"} for depth in (1, [2, "x"])]
    one, other = cells_of(tmp_path, *points)

    assert ("a.b:f", "a.b:g", {"depth": 1}) == (one.model, one.batch, one.model_config_overrides)
    assert "a.b:f(depth=1)/full/b2/s16/a.b:g" == one.label
    assert one.cell_id != other.cell_id
    assert ("own", "own") == (one.weights, one.recorded()["attention_requested"])
    assert a_cell().cell_id == a_cell(batch=None).cell_id != a_cell(batch="a.b:g").cell_id


@pytest.mark.parametrize(
    ("point", "more", "said"),
    [
        ({"model": "a:f", "batch": "org/g"}, {}, "include[0].batch: 'org/g' is not the name of a batch"),
        ({"model": "a:f", "head": "causal_lm"}, {}, "head: is what 'a:f' gives its model; leave it out"),
        ({"model": {"name": "a:f", "config": {1: 2}}}, {}, "{1: 2} is no mapping of fields to values"),
        ({"model": {"name": "bert-tiny@random", "config": 5}}, {}, "5 is no mapping of fields to values"),
        ({"model": "a:f", "batch": "a:g"}, {"protocol": {"padding": 0.5}}, "protocol.padding: is not for a batch"),
        ({"model": "a:f"}, {"tasks": ["rte"], "grid": {"seed": 0}}, None),
        ({"model": "a:f"}, {"allow_code": "yes please"}, "allow_code"),
    ],
)  # fmt: skip
def test_what_a_suite_cannot_say(point, more, said, tmp_path):
    """With file and line, before anything is imported."""
    if "tasks" in more:
        more |= {"defaults": {"method": "full", **SHAPE, **point}}
        assert "brings no tokenizer for 'rte'" in the_line(cells_of, tmp_path, **more)
        more |= {"defaults": more["defaults"] | {"batch": "a:g"}, "training": {"tokenizer": "x"}}
        said = "batch: is not for a task, whose rows make the batch"
    assert said in the_line(cells_of, tmp_path, point, **more)
