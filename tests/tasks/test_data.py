"""Rows from files of every form, what was left out, and the line for each fault."""

import builtins
import hashlib

import datasets
import numpy as np
import pytest

from meftbench.errors import UserError
from meftbench.tasks.data import load_splits
from task_data import ROWS, a_choice_task, a_task, some_images, some_mail, some_pixels, write


def the_line(*args, **options):
    """What load_splits says, and that it is one line."""
    with pytest.raises(UserError) as caught:
        load_splits(*args, **options)
    assert 1 == len(str(caught.value).splitlines())
    return str(caught.value)


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "parquet", "arrow", "saved"])
def test_every_form_has_the_same_rows(tmp_path, form):
    """Quotation marks, umlauts and the text NA among them; the digest depends on the rows alone."""
    place = tmp_path / "a [strange] *place"
    write(place, "train", form=form)
    write(place, "valid", form=form)

    splits = load_splits(a_task(place), None)

    expected = [{"title": row["title"], "label": row["spam"]} for row in ROWS]
    assert expected == splits.train.to_list()
    assert expected == splits.evaluations["validation"].to_list()
    assert load_splits(some_mail(tmp_path / "jsonl"), None).digest == splits.digest
    assert [] == splits.cuts


def test_pieces_are_one_split(tmp_path):
    """A snapshot of the hub has train-00000-of-00002.parquet and so on."""
    for piece in range(2):
        write(tmp_path, f"train-0000{piece}-of-00002", ROWS[2 * piece : 2 * piece + 2], "parquet")
    write(tmp_path, "validation")

    assert [row["title"] for row in ROWS] == list(load_splits(a_task(tmp_path), None).train["title"])


@pytest.mark.parametrize(
    ("pieces", "line"),
    [
        ([(0, 3), (2, 3)], "train: piece 00001 of 00003 is missing; put all pieces there"),
        ([(2, 4)], "train: piece 00000 of 00004 is missing, and 2 more"),
        ([(0, 1), (0, 2), (1, 2)], "lies beside pieces of 2 sets, of which each has another number"),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_piece_that_is_missing_is_a_line(tmp_path, pieces, line, ending):
    for number, count in pieces:
        write(tmp_path, f"train-{number:05d}-of-{count:05d}", ROWS[:2], ending)
    write(tmp_path, "validation")

    assert line in the_line(a_task(tmp_path), None)


@pytest.mark.parametrize("other", ["train.csv", "train.json", "train-00000-of-00001.jsonl", "train"])
def test_of_two_files_none_is_left_out(tmp_path, other):
    """Whichever were read, the rows of the other would be missing without a word."""
    for name in ("train", "validation"):
        write(tmp_path, name)
    if other == "train":
        (tmp_path / other).mkdir()
    else:
        (tmp_path / other).write_text("title,spam\na,1\n")

    line = the_line(a_task(tmp_path), None)
    assert f"{other} is there as well, and only one of them would be read; remove the other" in line


@pytest.mark.parametrize("other", ["val", "valid", "dev"])
def test_of_two_names_of_a_split_none_is_left_out(tmp_path, other):
    for name in ("train", "validation", other):
        write(tmp_path, name)

    assert f"validation: {other} is there as well, and only one of them" in the_line(a_task(tmp_path), None)


def test_a_data_root_or_the_tasks_own_folder(tmp_path, monkeypatch):
    """`data` may be either; without it MEFTBENCH_DATA is asked."""
    some_mail(tmp_path / "own" / "mail")
    task = a_task("own/mail")

    of_root, of_folder = load_splits(task, str(tmp_path)), load_splits(task, str(tmp_path / "own" / "mail"))
    monkeypatch.setenv("MEFTBENCH_DATA", str(tmp_path))

    assert of_root.digest == of_folder.digest == load_splits(task, None).digest
    assert str(tmp_path / "own" / "mail") == of_root.origin


def test_nothing_is_left_beside_the_data(tmp_path):
    some_mail(tmp_path)
    some_images(tmp_path / "images")
    before = sorted(tmp_path.rglob("*"))

    load_splits(a_task(tmp_path), None, train_examples=2)
    load_splits(some_images(tmp_path / "images"), None)

    assert before == sorted(tmp_path.rglob("*"))


def test_fewer_rows_are_drawn_by_the_seed(tmp_path):
    """The same for the same seed, others for another, and the cut is said."""
    task = some_mail(tmp_path, train=[{"title": f"mail {i}", "spam": i % 2} for i in range(1000)])

    one, again, other = (load_splits(task, None, train_examples=100, seed=seed) for seed in (1, 1, 2))

    assert one.digest == again.digest != other.digest
    assert ["train: 100 of 1,000 rows"] == one.cuts
    assert len(set(one.train["title"])) == 100
    assert len(ROWS) == len(one.evaluations["validation"])


def test_rows_that_are_not_as_published(tmp_path):
    some_mail(tmp_path)

    splits = load_splits(a_task(tmp_path, rows={"train": 67349, "validation": 3}), None)

    assert ["train: 4 of 67,349 rows", "validation: 4 rows, 3 are published"] == splits.cuts


def test_classes_come_from_the_training_rows(tmp_path):
    """Where the task names none; also of labels that are words, in the order of the alphabet."""
    words = [{"title": "t", "spam": word} for word in ("yes", "no", "maybe")]
    some_mail(tmp_path, train=words, validation=words[:1])

    splits = load_splits(a_task(tmp_path, labels=None), None)

    assert ("maybe", "no", "yes") == splits.labels
    assert [2, 1, 0] == list(splits.train["label"])
    assert [2] == list(splits.evaluations["validation"]["label"])


@pytest.mark.parametrize(
    ("row", "facts"),
    [
        ({"options": ["red", "blue"], "spam": 1}, {}),
        ({"options": {"text": ["red", "blue"], "label": ["1", "2"]}, "spam": "2"}, {}),
        ({"a": "red", "b": " blue ", "spam": 1}, {"choices": ("a", "b")}),
    ],
)
def test_choices_as_the_tasks_write_them(tmp_path, row, facts):
    """A list, the hub's texts with their letters, or a column each; the label counts from 0."""
    rows = [{"title": "sky?"} | row]
    some_mail(tmp_path, train=rows, validation=rows)

    train = load_splits(a_choice_task(tmp_path, **facts), None).train

    assert [{"title": "sky?", "choices": ["red", "blue"], "label": 1}] == train.to_list()


def test_the_correct_column_is_moved_by_the_row_itself(tmp_path):
    """Other rows around it, or another seed, leave a row's order of choices as it was."""
    rows = [{"title": f"q{i}", "right": "r", "x": "1", "y": "2", "z": "3"} for i in range(40)]
    some_mail(tmp_path, train=rows, validation=rows[5:9])
    task = a_choice_task(tmp_path, choices=("right", "x", "y", "z"), label="right")

    splits = load_splits(task, None, train_examples=30, seed=3)

    train = {row["title"]: row for row in splits.train}
    assert all("r" == row["choices"][row["label"]] for row in train.values())
    assert {0, 1, 2, 3} == {row["label"] for row in train.values()}
    assert all(row == train[row["title"]] for row in splits.evaluations["validation"] if row["title"] in train)


def test_images_of_a_folder_and_of_arrays_are_the_same(tmp_path):
    """npz has what the folder has: the classes' order is that of classes.json."""
    task = some_images(tmp_path / "folder")
    (tmp_path / "arrays").mkdir()
    for split in ("train", "validation"):
        np.savez(tmp_path / "arrays" / f"{split}.npz", images=some_pixels(), labels=np.arange(6) % 2)
    (tmp_path / "arrays" / "classes.json").write_text('["cats", "dogs"]')

    folder = load_splits(task, None)
    arrays = load_splits(a_task(tmp_path / "arrays", kind="images", texts=("image",), label="label", labels=None), None)

    assert ("cats", "dogs") == folder.labels == arrays.labels
    assert [0, 0, 0, 1, 1, 1] == list(folder.train["label"])
    assert [0, 1] * 3 == list(arrays.train["label"])
    order = [0, 2, 4, 1, 3, 5]  # a folder has its classes one after the other
    for split in (folder.train, folder.evaluations["validation"]):
        assert np.array_equal(some_pixels()[order], np.stack([np.asarray(image) for image in split["image"]]))
    assert np.array_equal(some_pixels(), np.stack([np.asarray(image) for image in arrays.train["image"]]))


def test_a_file_is_held_against_its_checksum(tmp_path):
    some_mail(tmp_path)
    digest = hashlib.sha256((tmp_path / "train.jsonl").read_bytes()).hexdigest()
    (tmp_path / "SHA256SUMS").write_text(
        f"{digest}  train.jsonl\n{'0' * 64}  validation.jsonl\n{digest}  other.jsonl\n"
    )

    line = the_line(a_task(tmp_path), None)

    assert line.startswith(f"{tmp_path / 'validation.jsonl'}: differs from {tmp_path / 'SHA256SUMS'}; ")


# --- faults ---


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([{"text": "a", "spam": 1}], ", train: has no column 'title'; its columns are text, spam: rename one"),
        (
            [*ROWS, {"title": "a", "spam": 2}],
            ", train, row 5: label 2 is none of the 2 classes; these are 0 ham, 1 spam",
        ),
        ([{"title": "a", "spam": -1}], ", train, row 1: label -1 is none of the 2 classes"),
        ([{"title": "a", "spam": "eggs"}], ", train, row 1: label 'eggs' is none of the 2 classes"),
        ([*ROWS, {"title": None, "spam": 1}], ", train, row 5: column 'title' is None, not a text; mend or remove"),
        ([], "train.jsonl: is an empty split; put rows there"),
    ],
)
def test_a_bad_row_is_a_line(tmp_path, rows, line):
    assert line in the_line(some_mail(tmp_path, train=rows), None)


@pytest.mark.parametrize(
    ("row", "facts", "line"),
    [
        ({"spam": "x"}, {"kind": "regression"}, "row 1: label 'x' is not a finite number; mend"),
        ({"spam": 5, "options": ["a", "b"]}, {}, "row 1: label 5 names none of its choices; these are 0 to 1"),
        (
            {"spam": "E", "options": {"text": ["a", "b"], "label": ["A", "B"]}},
            {},
            "label 'E' names none of its choices",
        ),
        ({"spam": 0, "options": ["a", " "]}, {}, "row 1: its choices are ['a', ' ']; give two or more"),
    ],
)
def test_a_bad_answer_is_a_line(tmp_path, row, facts, line):
    rows = [{"title": "q"} | row]
    some_mail(tmp_path, train=rows, validation=rows)
    task = a_task(tmp_path, labels=None, **facts) if facts else a_choice_task(tmp_path)

    assert line in the_line(task, None)


def test_numbers_with_a_gap_are_no_classes(tmp_path):
    """Otherwise stars from 1 to 5 would have a class 0, and an identifier a head of a million classes."""
    some_mail(tmp_path, train=[{"title": "a", "spam": 1}, {"title": "b", "spam": 10**6}])

    line = the_line(a_task(tmp_path, labels=None), None)

    assert ", train: column 'spam' has the classes 1, 1000000; number the classes from 0 without a gap" in line


def test_a_split_that_is_not_there(tmp_path):
    write(tmp_path, "train")

    assert f"{tmp_path}: has no split 'validation'; put validation.jsonl there" in the_line(a_task(tmp_path), None)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("train.jsonl", b'{"title": "a", "spam": 1}\n{"title": ', "train.jsonl, row 2: cannot be read ("),
        ("train.csv", b"title,spam\na,1\nb,1,2,3\n", "train.csv, row 2: has 4 fields, the header 2; mend the row"),
        ("train.csv", b"title,spam\na, b,1\nc, d,1\n", "train.csv, row 1: has 3 fields, the header 2; mend the row"),
        ("train.csv", b"title,spam\n", "train.csv: is an empty split; put rows there"),
        ("train.csv", b"title,spam\na\n", "train.csv, row 1: has 1 fields, the header 2"),
        ("train.csv", b"title,spam,spam\na,1,0\n", "train.csv: its header names column 'spam' twice; rename or"),
        ("train.csv", b"title,spam\na,1\ntitle,spam\nb,0\n", "train.csv, row 2: is the header once more; remove"),
        ("train.csv", b'title,spam\n"a,1\n', "train.csv, line 2: cannot be read (unexpected end of data)"),
        (
            "train.csv",
            "title,spam\nü,1\n".encode("latin-1"),
            "train.csv: cannot be read (byte 12 is not UTF-8); save it",
        ),
        ("train.tsv", b"title\tspam\na\t1\n\ntitle\tspam\n", "train.tsv, row 2: is the header once more"),
        ("train.jsonl", b'{"title": "a", "spam": 1, "spam": 0}\n', "train.jsonl, row 1: names 'spam' twice; rename"),
        ("train.jsonl", b'{"title": "a", "spam": NaN}\n', "train.jsonl, row 1: cannot be read (NaN is no JSON)"),
        ("train.jsonl", b'["a", 1]\n', "train.jsonl, row 1: is no JSON object but list"),
        ("train.jsonl", b'{"title": "\\ud800", "spam": 1}\n', "row 1: column 'title' holds half a character"),
        ("train.json", b'{"title": ["a", "b"], "spam": [1]}', "train.json: its columns are not of one length"),
        ("train.json", b"7", "train.json, row 1: is no JSON object but WrittenInt"),
        ("train.parquet", b"PAR0", "train.parquet: cannot be read ("),
        ("train.arrow", b"no", "train.arrow: cannot be read ("),
        ("train.npz", b"no", "train.npz: cannot be read ("),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, name, content, line):
    write(tmp_path, "validation")
    (tmp_path / name).write_bytes(content)

    assert line in the_line(a_task(tmp_path), None)


def test_a_corrupt_image_is_named(tmp_path):
    task = some_images(tmp_path)
    broken = tmp_path / "train" / "cats" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])

    assert f"{broken}: is not an image that can be decoded (" in the_line(task, None)


def test_arrays_of_another_shape(tmp_path):
    np.savez(tmp_path / "train.npz", images=some_pixels().astype(np.float32), labels=np.zeros(6, int))

    line = the_line(a_task(tmp_path, kind="images", texts=("image",), label="label"), None)

    assert "train.npz: images are float32 (6, 8, 8, 3), labels int64 (6,); store images as uint8" in line


def test_a_column_without_images(tmp_path):
    some_mail(tmp_path)

    assert "column 'title' holds no images" in the_line(a_task(tmp_path, kind="images"), None)


def test_folders_that_are_not_there(tmp_path, monkeypatch):
    assert "task mail: data root is '/nowhere', where no folder is; check the path" in the_line(
        a_task("own/mail"), "/nowhere"
    )
    assert f"task mail: data root '{tmp_path}' has no folder own/mail; " in the_line(a_task("own/mail"), str(tmp_path))
    monkeypatch.setenv("MEFTBENCH_DATA", "/elsewhere")
    assert "task mail: MEFTBENCH_DATA is '/elsewhere', where no folder is" in the_line(a_task("own/mail"), None)


def test_neither_data_nor_hub(monkeypatch):
    """Both cures are named: the network, and a folder."""
    monkeypatch.delenv("MEFTBENCH_DATA", raising=False)

    def out_of_reach(*_, **__):
        raise ConnectionError("Couldn't reach 'some/mail' on the Hub (LocalEntryNotFoundError)\nmore")

    monkeypatch.setattr(datasets, "load_dataset", out_of_reach)

    line = the_line(a_task("own/mail", hub=("some/mail", None)), None)

    assert "task mail: 'some/mail' cannot be read from the hub (Couldn't reach 'some/mail' on the Hub" in line
    assert line.endswith("; connect to it, or name a data root that has own/mail (or set MEFTBENCH_DATA)")
    assert "task mail: is not on the hub, and no data root is named; name" in the_line(a_task("own/mail"), None)


def test_what_the_hub_is_asked_for(monkeypatch):
    """Path, configuration, revision, and the split's name there."""
    asked = []

    def hub(path, config, *, split, revision):
        asked.append((path, config, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.delenv("MEFTBENCH_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    task = a_task("own/mail", hub=("some/mail", "en"), evaluations={"validation": "validation_matched"}, revision="r")

    splits = load_splits(task, None)

    assert [("some/mail", "en", "train", "r"), ("some/mail", "en", "validation_matched", "r")] == asked
    assert "hub some/mail/en" == splits.origin
    assert ["validation"] == list(splits.evaluations)


def test_without_datasets(tmp_path, monkeypatch):
    imported = builtins.__import__

    def missing(name, *args, **options):
        if name == "datasets":
            raise ModuleNotFoundError(name)
        return imported(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)

    assert "task mail: `datasets` is not installed; pip install 'meftbench[tasks]'" == the_line(a_task(tmp_path), None)
