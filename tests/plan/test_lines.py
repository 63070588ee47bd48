"""The line that an error names is the line on which the bad key or value stands, however the file is written."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from meftbench.errors import UserError
from meftbench.plan.budgets import load_budgets
from meftbench.plan.suite import load_suite, shipped_suites
from meftbench.strict_yaml import read

HEAD = "# a comment\n\nschema: 1\nname: toy\n"
GRID = "grid:\n  model: bert-tiny@random\n  method: full\n  batch_size: 1\n  sequence_length: 16\n"
ROW = "budgets:\n  - match: '*'\n    metric: activation_peak_bytes\n    max: 3MiB\n"


def the_error(load, file, text):
    """One line, as `file:line: ...`."""
    file.write_bytes(text.encode())
    with pytest.raises(UserError) as caught:
        load(str(file))
    (line,) = str(caught.value).splitlines()
    return line


def line_in(error):
    return int(re.match(r"[^:]*:([0-9]+)", error)[1])


def marked(text):
    """Number of the line that ends in `#!`."""
    return next(number for number, line in enumerate(text.splitlines(), 1) if line.endswith("#!"))


def cases(file):
    """By name, what follows each line `=== name`; GRID and ROW stand for a good grid and a good row of budgets."""
    text = (Path(__file__).parents[1] / "data" / file).read_text(encoding="utf-8")
    parts = (part.partition("\n") for part in text.split("=== ")[1:])
    return {name: body.replace("GRID\n", GRID).replace("ROW\n", ROW) for name, _, body in parts}


SUITES = cases("faulty_suites.txt")


@pytest.mark.parametrize("case", SUITES)
def test_a_suite(tmp_path, case):
    """In lists, flow style, merged mappings; also what is found only when the grid is multiplied out."""
    text = HEAD + SUITES[case]

    assert marked(text) == line_in(the_error(load_suite, tmp_path / "toy.yaml", text))


@pytest.mark.parametrize("change", [lambda t: t.replace("\n", "\r\n"), lambda t: "\ufeff" + t, lambda t: "\n\n" + t])
def test_line_ends_a_byte_order_mark_and_empty_lines_change_nothing(tmp_path, change):
    text = change(HEAD + SUITES["list item name"])

    error = the_error(load_suite, tmp_path / "toy.yaml", text)

    assert (marked(text), True) == (line_in(error), "grid.method[1]: unknown method 'meft11'" in error)


BUDGETS = cases("faulty_budgets.txt")


@pytest.mark.parametrize("case", BUDGETS)
def test_a_budgets_file(tmp_path, case):
    """Of two values that do not go together, the line of the one that is there."""
    text = "# a comment\nschema: 1\n" + BUDGETS[case]

    assert marked(text) == line_in(the_error(load_budgets, tmp_path / "budgets.yaml", text))


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("tasks: rte\ntraining:\n  learning_rate: {full: [x]}\n", "training.learning_rate.full[0]: "),
        ("protocol: {passes: [memory, memry]}\n", "protocol.passes[1]: unknown pass 'memry'"),
        ("protocol: {allocator: {max_split_size_mb: x}}\n", "protocol.allocator.max_split_size_mb: "),
        ("seed: 1\n", ": seed: unknown key 'seed'"),
    ],
)
def test_a_path_has_the_keys_of_the_file_and_no_others(tmp_path, text, path):
    """pydantic's own, such as `list[float]`, mean nothing to the reader."""
    assert path in the_error(load_suite, tmp_path / "toy.yaml", HEAD + text + GRID)


@cache
def plain_values():
    """Of the suites of the package: the text, and where in it a plain value stands, from and to."""
    found = []

    def walk(node, text):
        if isinstance(node, yaml.MappingNode):
            for _, value in node.value:
                walk(value, text)
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                walk(value, text)
        elif node.style not in (">", "|"):
            found.append((text, node.start_mark.index, node.end_mark.index))

    for file in shipped_suites().values():
        text = file.read_text(encoding="utf-8")
        walk(yaml.compose(text, yaml.SafeLoader), text)
    return found


@given(st.data(), st.integers(0, 3))
@settings(max_examples=25)
def test_a_bad_value_anywhere_in_a_good_suite(tmp_path_factory, data, comments):
    """A mapping in place of any plain value of a shipped suite is refused on the line on which it was put."""
    text, start, end = data.draw(st.sampled_from(plain_values()))
    text = "# a comment\n" * comments + text[:start] + "{no_such: {thing: 1}}" + text[end:]
    line = text.count("\n", 0, start + 12 * comments) + 1

    file = tmp_path_factory.mktemp("suite") / "toy.yaml"

    assert line == line_in(the_error(load_suite, file, text))


def test_a_size_of_an_image_that_is_none_is_said_before_its_tokens_are_missed(tmp_path):
    """The length of an image's sequence follows from its sizes, so none is asked for."""
    text = Path(shipped_suites()["quality-images"]).read_text(encoding="utf-8")
    text = text.replace("image_size: 32", "image_size: {no_such: 1}")

    said = the_error(load_suite, tmp_path / "toy.yaml", text)

    assert text[: text.index("{no_such")].count("\n") + 1 == line_in(said)
    assert "image_size" in said


def test_the_line_of_an_alias_is_where_its_value_is_written(tmp_path):
    """Mended there, it is mended wherever it is used; what is written beside a merge key stands before it."""
    file = tmp_path / "a.yaml"
    file.write_text("a: &a\n  b: 1\n  c: 2\nd:\n  c: 3\n  <<: *a\ne:\n  - *a\n")

    document = read(file)

    assert {"b": 1, "c": 3} == document.content["d"]
    assert [2, 5, 2] == [document.lines[path] for path in (("d", "b"), ("d", "c"), ("e", 0, "b"))]
