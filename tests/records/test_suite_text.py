"""The text of a run's suite: YAML and, for its cells, JSON as well."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from meftbench.records.suite_text import read_suite_text, suite_text

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def of_yaml(text):
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@given(
    cells=st.lists(st.dictionaries(texts, values, min_size=1, max_size=4), max_size=4),
    description=texts | st.just('cells:\n- {"a": 1}'),
)
@example(cells=[], description="\x85")
@example(cells=[], description="\u2028")
def test_what_is_written_is_read_as_yaml_and_as_json(cells, description):
    """Whatever texts and numbers it holds: 1e-05 is a number to YAML, too, and a text may look like the cells."""
    content = {"name": "a", "description": description, "cells": cells}
    text = suite_text(content)
    asked = []

    def read_yaml(part):
        asked.append(part)
        return of_yaml(part)

    assert content == of_yaml(text)
    assert content == read_suite_text(text, read_yaml)
    assert not cells or '- {"' not in asked[-1].splitlines()


def test_a_text_of_an_earlier_version_is_read():
    """In which each field of a cell has a line; and one in which a line is damaged is left to the reader of YAML."""
    content = {"name": "a", "cells": [{"label": "x", "rate": 1e-05}, {"label": "y"}]}

    assert content == read_suite_text(yaml.safe_dump(content, sort_keys=False), of_yaml)
    with pytest.raises(yaml.YAMLError):
        read_suite_text(suite_text(content)[:-4], of_yaml)


def test_lines_are_json():
    *_, line = suite_text({"cells": [{"rate": 1e-05, "name": "é\x9b"}]}).splitlines()

    assert {"rate": 1e-05, "name": "é\x9b"} == json.loads(line.removeprefix("- "))
    assert "\x9b" not in line
