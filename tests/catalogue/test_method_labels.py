"""Labels of methods with settings and levers are read back as they were written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meftbench.catalogue.labels import (
    Part,
    joined,
    label_of,
    parts_from,
    parts_of_older,
    read_label,
    split_label,
    split_list,
)
from meftbench.errors import UserError

NAMES = st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True)
TEXTS = st.from_regex(r"[a-zA-Z][a-z+]{0,6}", fullmatch=True).filter(lambda text: text not in ("true", "false", "null"))
VALUES = st.one_of(
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
    TEXTS.filter(lambda text: text not in ("None", "True", "False")),
    st.lists(TEXTS, max_size=3),
)
SETTINGS = st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), VALUES, max_size=3)
PARTS = st.builds(Part, NAMES, SETTINGS)


@given(st.lists(PARTS, min_size=1, max_size=4))
def test_what_is_written_is_read(parts):
    label = "+".join(label_of(*part) for part in parts)
    assert read_label("here", label) == [(name, settings) for name, settings in parts]
    assert [part.name for part in split_label(label)] == [name for name, _ in parts]
    assert split_list(f"{label}, {label}") == [label, label]


@given(st.lists(PARTS, min_size=1, max_size=4))
def test_parts_are_those_that_their_label_has(parts):
    """As records hold them, and as they are taken from the labels of older ones."""
    assert tuple(parts) == parts_from([part.recorded() for part in parts])
    assert tuple(parts) == parts_of_older(joined(parts))


@given(st.one_of(st.text(), st.from_regex(r"[a-c](\([a-c]=[0-9A-Za-z'.,]*\))?(\+[a-c])?", fullmatch=True)))
def test_whatever_an_older_label_is_its_parts_give_it_again(label):
    assert label == joined(parts_of_older(label))


@pytest.mark.parametrize(
    ("label", "parts"),
    [
        (
            "lora(rank=2,targets=['a', 'b'])+offload",
            (Part("lora", {"rank": 2, "targets": ["a", "b"]}), Part("offload", {})),
        ),
        ("offload(what=all)", (Part("offload", {"what": "all"}),)),
        ("meft1(lambda=1e-05,x=1e-5)", (Part("meft1", {"lambda": 1e-05, "x": "1e-5"}),)),
        ("lora(rank=2", (Part("lora(rank=2", {}),)),
        ("lora(4)", (Part("lora(4)", {}),)),
        ("lora(b=1,a=1)", (Part("lora(b=1,a=1)", {}),)),
    ],
)
def test_what_no_version_has_written_stays_in_the_name(label, parts):
    assert parts == parts_of_older(label)


@pytest.mark.parametrize(
    ("label", "what"),
    [
        ("lora(4)", "'4' in 'lora(4)' is no setting"),
        ("lora+checkpoint(=2)", "'=2' in 'lora+checkpoint(=2)' is no setting"),
        ("lora(rank=4,rank=8)", "rank is named twice"),
        ("lora(rank=4", "'lora(rank=4' has a bracket that is not closed"),
    ],
)
def test_what_is_no_setting_is_refused(label, what):
    with pytest.raises(UserError, match="here") as refused:
        read_label("here", label)
    assert what in str(refused.value)


@pytest.mark.parametrize(
    ("label", "name"), [("lora(rank=4", "lora(rank=4"), ("lora(rank=4)x", "lora(rank=4)x"), ("", "")]
)
def test_what_is_not_closed_stays_in_the_name(label, name):
    assert split_label(label)[0].name == name
