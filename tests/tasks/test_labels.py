"""Texts and labels are what the files say, in every form, across splits; what could be read in two ways is a line."""

import csv
import json

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meftbench.errors import UserError
from meftbench.tasks.data import load_splits
from task_data import a_choice_task, a_task

FORMS = ["jsonl", "json", "csv", "tsv"]
# Without the ends of a line and a field of a tab-separated file, which cannot hold them.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\r\n"), min_size=1)
GUESSED_AT = [
    "007",
    "1e5",
    "1.50",
    "TRUE",
    "null",
    "NA",
    "2020-01-01",
    "2020-01-01T00:00:00Z",
    " x ",
    "1_000",
    '"',
    "-0",
]


def write_rows(folder, split, rows, form="jsonl"):
    """`rows` as they are: texts in csv and tsv, JSON's types in the others."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{split}.{form}"
    if form == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "json":
        file.write_text(json.dumps(rows))
    elif form == "csv":
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(rows[0])
            writer.writerows(row.values() for row in rows)
    elif form == "tsv":
        lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    else:
        datasets.Dataset.from_list(rows).to_parquet(file)


def rows_with(labels):
    return [{"title": f"mail {place}", "spam": label} for place, label in enumerate(labels)]


def loaded(folder, train, validation=None, forms=("jsonl", "jsonl"), **facts):
    write_rows(folder, "train", rows_with(train), forms[0])
    write_rows(folder, "validation", rows_with(validation or train), forms[1])
    return load_splits(a_task(folder, **({"labels": None} | facts)), None)


def the_line(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        loaded(*args, **kwargs)
    assert 1 == len(str(caught.value).splitlines())
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
@given(texts=st.lists(TEXTS, min_size=2, max_size=6))
def test_texts_are_what_the_file_says(tmp_path_factory, form, texts):
    """Any text, and those that a reader of tables takes for something else."""
    folder, texts = tmp_path_factory.mktemp("texts"), [*texts, *GUESSED_AT]
    rows = [{"title": text, "spam": place % 2} for place, text in enumerate(texts)]
    write_rows(folder, "train", rows, form)
    write_rows(folder, "validation", rows, form)

    assert texts == list(load_splits(a_task(folder), None).train["title"])


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_a_label_is_the_name_that_it_spells(tmp_path_factory, form, data):
    """Whatever the names look like: numbers in another order, truth values, words; across two forms."""
    names = data.draw(
        st.one_of(
            st.permutations(["0", "1", "2"]),
            st.permutations(["1", "2", "3"]),
            st.permutations(["True", "False"]),
            st.lists(TEXTS.filter(str.strip), min_size=2, max_size=4, unique=True),
        )
    )
    other = data.draw(st.sampled_from(FORMS))
    drawn = [*names, *data.draw(st.lists(st.sampled_from(names), max_size=6))]

    splits = loaded(tmp_path_factory.mktemp("labels"), drawn, forms=(form, other), labels=tuple(names))

    expected = [names.index(name) for name in drawn]
    assert expected == list(splits.train["label"]) == list(splits.evaluations["validation"]["label"])


@pytest.mark.parametrize(
    ("train", "validation", "forms", "names", "ids"),
    [
        (["1", "2", "3"], ["1", "2"], ("jsonl", "jsonl"), ("1", "2", "3"), [0, 1]),
        (["1", "2", "3"], ["1", "2"], ("jsonl", "csv"), ("1", "2", "3"), [0, 1]),
        ([0, 1, 2], [2, 1], ("jsonl", "csv"), ("0", "1", "2"), [2, 1]),
        ([0, 1, 2], [2.0, 1.0], ("jsonl", "jsonl"), ("0", "1", "2"), [2, 1]),
        ([0, 1], ["0", "1"], ("csv", "jsonl"), ("0", "1"), [0, 1]),
        ([True, False], [False, True], ("jsonl", "parquet"), ("false", "true"), [0, 1]),
        (["TRUE", "FALSE"], ["FALSE"], ("csv", "csv"), ("FALSE", "TRUE"), [0]),
        (["007", "7"], ["7"], ("csv", "csv"), ("007", "7"), [1]),
        (["NA", "none"], ["none", "NA"], ("tsv", "csv"), ("NA", "none"), [1, 0]),
    ],
)
def test_names_that_the_training_rows_have(tmp_path, train, validation, forms, names, ids):
    splits = loaded(tmp_path, train, validation, forms)

    assert names == splits.labels
    assert ids == list(splits.evaluations["validation"]["label"])


@pytest.mark.parametrize(
    ("labels", "value", "place"),
    [
        (("ham", "spam"), 1, 1),
        (("ham", "spam"), "1", 1),
        (("ham", "spam"), "spam", 1),
        (("1", "0"), 1, 0),
        (("1", "0"), 0.0, 1),
        (("True", "False"), True, 0),
        (("True", "False"), False, 1),
    ],
)
def test_named_labels_are_looked_up_as_texts_first(tmp_path, labels, value, place):
    """A number is a place among words, and never among numbers."""
    assert [place] == list(loaded(tmp_path, [value], labels=labels).train["label"])


@pytest.mark.parametrize(
    ("train", "validation", "forms", "facts", "line"),
    [
        (["good", "bad", ""], None, ("csv", "csv"), {}, ", train, row 3: has no label; fill it in, or remove the row"),
        (["good", "bad", " "], None, ("jsonl", "csv"), {}, ", train, row 3: has no label"),
        (["0", "1", ""], None, ("csv", "csv"), {"labels": ("ham", "spam")}, ", train, row 3: has no label"),
        ([1, 0, None], None, ("jsonl", "jsonl"), {}, ", train, row 3: has no label"),
        ([1, 0], [1, None], ("jsonl", "parquet"), {}, ", validation, row 2: has no label"),
        (
            ["good", "bad", "good "],
            None,
            ("csv", "csv"),
            {},
            ", train, row 3: label 'good ' differs from 'good' of row 1 by blanks or capitals alone; write them alike",
        ),
        (["Good", "bad", "good"], None, ("jsonl", "jsonl"), {}, "row 3: label 'good' differs from 'Good' of row 1 by"),
        (["good", "bad"], ["bad "], ("csv", "csv"), {}, ", validation, row 1: label 'bad ' is none of the 2 classes"),
        (
            ["1", "2"],
            [1],
            ("jsonl", "jsonl"),
            {},
            ", validation, row 1: label 1 is a number, those of the training rows",
        ),
        ([1, 0], [1, "0"], ("jsonl", "jsonl"), {}, ", validation, row 2: label '0' is a text, those of the training"),
        (
            [1, 0, "1"],
            None,
            ("jsonl", "jsonl"),
            {},
            ", train, row 3: label '1' is a text, that of rows before is a num",
        ),
        ([1, True], None, ("jsonl", "jsonl"), {}, ", train, row 2: label True is a truth value, that of rows before"),
        (["1", "2"], ["0"], ("jsonl", "csv"), {}, ", validation, row 1: label '0' is none of the 2 classes; these are"),
        ([[1], [0]], None, ("jsonl", "jsonl"), {}, ", train, row 1: label [1] is neither a text nor a number"),
        ([1, 2, 3], None, ("csv", "csv"), {}, "column 'spam' has the classes 1, 2, 3; number the classes from 0"),
        (["a", "a"], None, ("csv", "csv"), {}, "column 'spam' has one class only"),
        (["1_0"], None, ("csv", "csv"), {"kind": "regression"}, "row 1: label '1_0' is not a finite number"),
        ([True], None, ("jsonl", "jsonl"), {"kind": "regression"}, "row 1: label True is not a finite number"),
    ],
)
def test_what_could_be_read_in_two_ways_is_a_line(tmp_path, train, validation, forms, facts, line):
    assert line in the_line(tmp_path, train, validation, forms, **facts)


def test_names_that_the_file_has_count_before_ids(tmp_path):
    """Two parquet files that number the same classes in another order."""
    for split, names in (("train", ["ham", "spam"]), ("validation", ["spam", "ham"])):
        features = datasets.Features({"title": datasets.Value("string"), "spam": datasets.ClassLabel(names=names)})
        rows = {"title": ["a", "b"], "spam": [names.index("ham"), names.index("spam")]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")

    splits = load_splits(a_task(tmp_path, labels=None), None)

    assert [0, 1] == list(splits.train["label"]) == list(splits.evaluations["validation"]["label"])


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_answers_may_be_numbers(tmp_path, form):
    """As they are written; the label is a place, whether it is a number or spells one."""
    rows = [{"title": "2 + 2?", "a": 3, "b": 4, "spam": 1}, {"title": "0.5 * 3?", "a": 1.5, "b": 2, "spam": 0}]
    for split in ("train", "validation"):
        write_rows(tmp_path, split, rows, form)

    train = load_splits(a_choice_task(tmp_path, choices=("a", "b")), None).train

    assert [(["3", "4"], 1), (["1.5", "2"], 0)] == [(row["choices"], row["label"]) for row in train]
