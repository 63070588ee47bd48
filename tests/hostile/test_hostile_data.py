"""Data that name files: only regular files of the data's own folder are opened, and none of them is waited for."""

from __future__ import annotations

import json
import os
import sys
import time

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meftbench.errors import UserError
from meftbench.runner import data_check
from meftbench.tasks.data import load_splits
from task_data import ROWS, a_task, some_images, some_mail, write

GiB = 2**30


def images_by_name(folder, names):
    """A task whose rows name image files, which are not in the rows."""
    features = Features({"image": Image(decode=False), "label": Value("string")})
    rows = {"image": [{"bytes": None, "path": name} for name in names], "label": ["a", "b"] * (len(names) // 2)}
    for split in ("train", "validation"):
        # Not by `to_parquet`, which puts the images themselves into the file.
        pq.write_table(Dataset.from_dict(rows, features=features).data.table, folder / f"{split}.parquet")
    return a_task(folder, kind="images", texts=("image",), label="label", labels=None)


def refusal(task):
    """The one line by which the task's data are refused, at once."""
    began = time.perf_counter()
    with pytest.raises(UserError) as caught:
        load_splits(task, None)
    assert time.perf_counter() - began < 10
    assert "\n" not in str(caught.value)
    return str(caught.value)


def a_pipe(file):
    os.mkfifo(file)


def a_device(file):
    file.symlink_to("/dev/zero")


def a_sparse_file(file):
    with file.open("wb") as stream:
        stream.truncate(200 * GiB)


def nothing(file):
    pass


PUT = [a_pipe, a_device, a_sparse_file, nothing]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", PUT)
def test_an_image_that_is_no_file_is_refused_at_once(tmp_path, put):
    put(tmp_path / "1.png")

    line = refusal(images_by_name(tmp_path, ["1.png", "1.png"]))

    assert line.startswith(f"{tmp_path}/1.png: ")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["/etc/passwd", "../1.png", "a/../../1.png", "/dev/zero", "/dev/stdin"])
def test_an_image_elsewhere_is_not_opened(tmp_path, name):
    (tmp_path / "data").mkdir()
    a_pipe(tmp_path / "1.png")

    assert "which is not below" in refusal(images_by_name(tmp_path / "data", [name, name]))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.lists(st.sampled_from(["..", ".", "a", "", "1.png", "\x00", "é", "http:", "~"]), max_size=6).map("/".join)
)
def test_no_name_of_an_image_leads_out_of_the_data(tmp_path, name):
    """Whatever it is made of: the data are refused, in one line, and a file outside of them is never the cause."""
    (tmp_path / "data").mkdir(exist_ok=True)

    line = refusal(images_by_name(tmp_path / "data", [name, name]))

    assert line.startswith(f"{tmp_path}/data")


def test_images_named_from_the_data_folder_are_read(tmp_path, monkeypatch):
    """Wherever the command is run; a link there to an image in a store of large files is followed."""
    some_images(tmp_path / "images")
    (tmp_path / "data").mkdir()
    originals = sorted((tmp_path / "images" / "train").rglob("*.png"))[:2]
    for number, original in enumerate(originals):
        (tmp_path / "data" / f"{number}.png").symlink_to(original)
    monkeypatch.chdir(tmp_path)

    splits = load_splits(images_by_name(tmp_path / "data", ["0.png", f"{tmp_path}/data/1.png"]), None)

    assert [(8, 8), (8, 8)] == [image.size for image in splits.train["image"]]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", PUT[:3])
def test_in_a_folder_of_images_all_are_regular_files(tmp_path, put):
    task = some_images(tmp_path)
    put(tmp_path / "train" / "metadata.csv")

    assert refusal(task).startswith(f"{tmp_path}/train/metadata.csv: ")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["/dev/zero", "../pipe", "pipe", "..", "", 7, None, "a" * 5000])
def test_saved_data_name_files_of_their_own_folder(tmp_path, name):
    task = some_mail(tmp_path / "data")
    (tmp_path / "data" / "train.jsonl").unlink()
    write(tmp_path / "data", "train", ROWS, "saved")
    a_pipe(tmp_path / "data" / "pipe")
    state = tmp_path / "data" / "train" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_data_files": [{"filename": name}]}))

    assert refusal(task).startswith(f"{state}: names the file {repr(name)[:100]}")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
@pytest.mark.parametrize("put", PUT[:3])
def test_what_saved_data_say_of_themselves_is_a_file(tmp_path, name, put):
    task = some_mail(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    write(tmp_path, "train", ROWS, "saved")
    (tmp_path / "train" / name).unlink()
    put(tmp_path / "train" / name)

    assert refusal(task).startswith(f"{tmp_path}/train/{name}: ")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train-0-of-999999999999.csv", "piece 00001 of 999999999999 is missing, and 999,999,999,997 more"),
        ("train-7-of-3.csv", "piece 00000 of 00003 is missing, and 2 more"),
        (f"train-0-of-{'9' * 200}.csv", "says a number of pieces that no data have"),
    ],
)
def test_a_number_of_pieces_is_not_counted_up_to(tmp_path, name, said):
    task = some_mail(tmp_path)
    (tmp_path / "train.jsonl").rename(tmp_path / name)

    assert said in refusal(task)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", PUT[:2])
def test_a_piece_that_is_no_file_is_refused(tmp_path, put):
    task = some_mail(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    put(tmp_path / "train-0-of-1.parquet")

    assert refusal(task).startswith(f"{tmp_path}/train-0-of-1.parquet: is not a regular file")


@pytest.mark.timeout(60)
def test_a_reader_of_data_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(data_check, "DATA_SECONDS", 0.6)

    with pytest.raises(UserError, match=r"^data: the process that reads them has not ended in 0\.01 minutes; "):
        data_check._answers([{}], (sys.executable, "-c", "import time; time.sleep(600)"))
