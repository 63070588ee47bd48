"""Values of a configuration that no model can have, and YAML that is no plan: one line with file, line and cure."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meftbench.catalogue.models import MODELS
from meftbench.errors import UserError
from meftbench.plan.config_values import check_values
from meftbench.plan.models import check_sequence_length
from meftbench.strict_yaml import Document, parse, read

AT = Document(Path("toy"), {}, {})


def the_line(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert 1 == len(str(caught.value).splitlines())
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("hidden_size", "abc", "toy: model.hidden_size: config hidden_size is 'abc'; write a whole number from 1"),
        ("num_attention_heads", 0, "config num_attention_heads is 0; write a whole number from 1"),
        ("num_hidden_layers", 2.0, "config num_hidden_layers is 2.0; write a whole number"),
        ("num_hidden_layers", True, "config num_hidden_layers is True"),
        ("layer_norm_eps", "1e-5x", "config layer_norm_eps is '1e-5x'; write a number, such as 1.0e-5"),
        ("rms_norm_eps", float("nan"), "config rms_norm_eps is nan"),
        ("hidden_dropout_prob", 1.5, "config hidden_dropout_prob is 1.5; write a number from 0 to 1"),
        ("attention_dropout", "none", "config attention_dropout is 'none'"),
        ("hidden_act", "geluu", "config hidden_act is 'geluu'; write 'gelu'"),
        ("return_dict", False, "config return_dict is False; write True, or leave it out"),
        ("use_return_dict", False, "config use_return_dict is False"),
        ("problem_type", "nonsense", "config problem_type is 'nonsense'; write 'regression' or 'single_label"),
        ("activation_function", 3, "config activation_function is 3; write the name of an activation"),
    ],
)
def test_a_value_of_the_wrong_kind(key, value, line):
    assert line in the_line(check_values, AT, ("model",), {key: value})


def test_heads_that_do_not_divide():
    line = the_line(check_values, AT, ("model",), {"hidden_size": 100, "num_attention_heads": 3})

    assert "config hidden_size 100 is no multiple of 3 heads" in line
    check_values(AT, ("model",), {"hidden_size": 100, "num_attention_heads": 3, "head_dim": 8})


@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_models_have_is_taken(name):
    check_values(AT, (name,), {key: value for key, value in MODELS[name].config.items() if key != "model_type"})


@given(
    st.sampled_from(["roberta", "vit", "bert"]),
    st.dictionaries(
        st.sampled_from(["max_position_embeddings", "pad_token_id", "image_size", "patch_size"]),
        st.one_of(st.none(), st.text(max_size=3), st.integers(-2, 600), st.floats(), st.lists(st.integers())),
    ),
)
@settings(max_examples=40)
def test_a_folder_may_say_anything_of_its_positions(kind, fields):
    """What is no number is left to transformers, which says it by the field's name; here nothing else is raised."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": kind} | fields))
        for length in (1, 128):
            with suppress(UserError):
                check_sequence_length("sequence_length", folder, {}, length)


@given(st.floats(allow_nan=False, allow_infinity=False, width=32), st.sampled_from(["{:e}", "{:.0e}", "{:g}", "{!r}"]))
def test_a_number_is_a_number_however_it_is_spelled(number, spelling):
    """1e-5 has no point; YAML 1.1 reads it as text."""
    written = spelling.format(number)

    assert float(written) == parse(written)


@pytest.mark.parametrize("text", ["1e5x", "e5", "0x1e5g", "1.2.3e4", "--1e5"])
def test_what_looks_like_a_number_stays_text(text):
    assert text == parse(text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("schema: 1\na: &a [*a]\n", "is nested too deeply, or refers to itself; write it without the alias"),
        ("schema: 1\na: &a {b: *a}\n", "is nested too deeply, or refers to itself"),
        ("schema: 1\na: " + "[" * 3000 + "]" * 3000 + "\n", "is nested too deeply"),
        ("schema: 1\na: " + "[" * 60 + "]" * 60 + "\n", "suite.yaml:2: is nested too deeply"),
    ],
)
def test_yaml_without_an_end(tmp_path, text, line):
    (tmp_path / "suite.yaml").write_text(text)

    assert line in the_line(read, tmp_path / "suite.yaml")
