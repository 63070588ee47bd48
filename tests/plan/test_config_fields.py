"""Fields of a model's configuration: what is refused by the source of transformers is what transformers has not."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from meftbench.catalogue.backbones import BACKBONES
from meftbench.catalogue.models import MODELS
from meftbench.errors import UserError
from meftbench.plan import config_fields
from meftbench.plan.config_fields import check_fields
from meftbench.strict_yaml import Document

MODEL_OF = {MODELS[name].model_type: name for name in MODELS}


@cache
def of_transformers(model_type):
    return AutoConfig.for_model(model_type)


def check(model, **overrides):
    check_fields(Document(Path("suite"), {}, {}), ("config",), f"{model}@random", overrides)


def is_taken(model, **overrides):
    try:
        check(model, **overrides)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("model_type", sorted(BACKBONES))
def test_all_that_a_configuration_has_may_be_set(model_type):
    config = of_transformers(model_type)

    check(MODEL_OF[model_type], **dict.fromkeys({*config.to_dict(), *config.attribute_map, "num_labels"}))
    with pytest.raises(UserError) as refused:
        check(MODEL_OF[model_type], problem_typ=3)
    assert f"suite: config.problem_typ: unknown field of {model_type}'s configuration 'problem_typ'" in str(
        refused.value
    )
    assert str(refused.value).endswith("; did you mean 'problem_type'?")


@settings(max_examples=200, deadline=None)
@example("bert", "num_hiden_layers")
@example("opt", "hidden_act")
@given(st.sampled_from(sorted(BACKBONES)), st.text("abdehinors_0", min_size=1, max_size=8))
def test_what_transformers_has_is_never_refused(model_type, name):
    """What it has not may pass, such as the name of a function; then the cell refuses it."""
    try:
        check(MODEL_OF[model_type], **{name: 1})
    except UserError:
        assert not hasattr(of_transformers(model_type), name)


def test_a_field_of_the_models_own_configuration_file_may_be_set(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "own_field": 1}')

    assert is_taken(tmp_path, own_field=2)
    assert not is_taken(tmp_path, own_feild=2)


@pytest.mark.parametrize("model_type", ["no_such_model", "../bert", "a b", "", "bit", "None"])
def test_where_nothing_is_known_nothing_is_refused(tmp_path, model_type):
    """Models on the hub alone, classes that are not in transformers, and those that inherit from another model's."""
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')

    assert is_taken(tmp_path, num_hiden_layers=2)
    assert is_taken("some/model", num_hiden_layers=2)


def test_without_transformers_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(config_fields, "folder_of_package", lambda name: None)
    config_fields._fields_of.cache_clear()
    try:
        assert is_taken("bert-tiny", num_hiden_layers=2)
    finally:
        config_fields._fields_of.cache_clear()


def test_a_suite_is_refused_at_the_line_before_anything_is_run(cli, tmp_path):
    (tmp_path / "suite.yaml").write_text(
        "schema: 1\nname: toy\ngrid:\n  model:\n    name: bert-tiny@random\n    config:\n      num_hiden_layers: 3\n"
        "  method: full\n  batch_size: 2\n  sequence_length: 8\n"
    )

    code, out, err = cli("run", tmp_path / "suite.yaml", "--dry-run")

    place = f"{tmp_path}/suite.yaml:7: grid.model.config.num_hiden_layers"
    said = "unknown field of bert's configuration 'num_hiden_layers'; did you mean 'num_hidden_layers'?"
    assert (2, "", f"meftbench: {place}: {said}\n") == (code, out, err)
