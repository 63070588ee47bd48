"""What stands in place of a file: every reader refuses a pipe, a folder, a circle of links or 1 GB of zeros at once."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from builders import a_measured_cell, a_run
from meftbench.catalogue.profiles import find_device
from meftbench.catalogue.task import own_task
from meftbench.documents import bytes_of, check_depth, guarded, json_of, text_of
from meftbench.errors import UserError
from meftbench.methods.adapter_files import CONFIG, WEIGHTS, read
from meftbench.plan.budgets import glob, load_budgets
from meftbench.plan.suite import load_suite
from meftbench.records.store import load_run
from meftbench.snapshots.file import read_device
from meftbench.strict_yaml import parse
from meftbench.tasks.data import load_splits
from meftbench.verdicts.validation import saved
from mutations import SUITE, command, refused_or, watched
from task_data import some_mail

GiB = 2**30


def a_pipe(file):
    os.mkfifo(file)


def a_folder(file):
    file.mkdir()


def a_circle(file):
    file.symlink_to(file.name)


def zeros(file):
    """1 GB that takes no room on the disk."""
    with file.open("wb") as stream:
        stream.truncate(GiB)


def a_device(file):
    file.symlink_to("/dev/zero")


def nothing(file):
    file.touch()


def binary(file):
    file.write_bytes(bytes(range(256)) * 40)


# Each makes what is sound in a folder, and gives the file to replace and what reads it.


def of_suite(folder):
    return folder / "suite.yaml", lambda: load_suite(str(folder / "suite.yaml"))


def of_budgets(folder):
    return folder / "budgets.yaml", lambda: load_budgets(folder / "budgets.yaml")


def of_profile(folder):
    return folder / "gpu.yaml", lambda: find_device(str(folder / "gpu.yaml"))


def of_task(folder):
    return folder / "task.yaml", lambda: own_task("here", folder)


def of_data(folder):
    task = some_mail(folder)
    return folder / "train.jsonl", lambda: load_splits(task, None)


def of_run(name):
    def made(folder):
        run = a_run(folder / "run", a_measured_cell())
        return folder / "run" / name, lambda: saved(run) if name == "validation.json" else load_run(folder / "run")

    return made


def of_adapter(name):
    def made(folder):
        (folder / CONFIG).write_text('{"peft_type": "LORA"}')
        (folder / WEIGHTS).write_bytes((2).to_bytes(8, "little") + b"{}")
        return folder / name, lambda: read(folder)

    return made


def of_model(folder):
    (folder / "model").mkdir()
    suite = SUITE | {"include": [], "exclude": [], "grid": SUITE["grid"] | {"model": f"{folder}/model@random"}}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return folder / "model" / "config.json", lambda: load_suite(str(folder / "suite.yaml"))


def of_snapshot(folder):
    return folder / "snapshot.pickle", lambda: read_device(folder / "snapshot.pickle")


READERS = {
    "suite": of_suite,
    "budgets": of_budgets,
    "profile": of_profile,
    "task": of_task,
    "data": of_data,
    "records": of_run("records.jsonl"),
    "environment": of_run("environment.json"),
    "suite of a run": of_run("suite.yaml"),
    "validation": of_run("validation.json"),
    "configuration of an adapter": of_adapter(CONFIG),
    "weights of an adapter": of_adapter(WEIGHTS),
    "configuration of a model": of_model,
    "snapshot": of_snapshot,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("put", [a_pipe, a_folder, a_circle, zeros, a_device, nothing, binary])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_refused_at_once(tmp_path, reader, put):
    """In one line. No records at all are no fault: the run was ended before its first cell."""
    file, reading = READERS[reader](tmp_path)
    if file.exists():
        file.unlink()
    put(file)

    began = time.perf_counter()
    with watched(tmp_path):
        refused = refused_or(reading)

    assert isinstance(refused, UserError) or (reader, put) == ("records", nothing)
    assert time.perf_counter() - began < 10
    if isinstance(refused, UserError):
        assert "\n" not in str(refused)


def test_limits_and_nesting(tmp_path):
    """A file as large as the limit is read, one byte more is not; 100 levels are read, more are not."""
    file = tmp_path / "a.json"
    file.write_bytes(b'"abc"')

    assert "abc" == json_of(file, limit=5)
    with pytest.raises(UserError, match="has 5 B, and at most 4 B are read"):
        bytes_of(file, limit=4)
    with pytest.raises(UserError, match="no such file; check the path"):
        bytes_of(tmp_path / "b")
    file.write_bytes(b"\xef\xbb\xbfa\r\nb\rc")
    assert "a\nb\nc" == text_of(file)
    check_depth("here", _nested(99))
    with pytest.raises(UserError, match="here: is nested too deeply"):
        check_depth("here", _nested(100))
    with pytest.raises(UserError, match="here: holds a number of more than 300 digits"):
        check_depth("here", {"a": [10**300]})


def _nested(levels):
    content = 1
    for _ in range(levels):
        content = [content]
    return content


@pytest.mark.parametrize("error", [RecursionError(), MemoryError(), OverflowError("x"), OSError(40, "loop", "/a")])
def test_what_parsers_raise_is_one_line(error):
    """And other errors, which are faults of the program, are not hidden."""
    with pytest.raises(UserError, match=r"^here: "), guarded("here"):
        raise error
    with pytest.raises(KeyError), guarded("here"):
        raise KeyError


# --- inputs that took minutes or for ever ---


@pytest.mark.parametrize(
    ("pattern", "label", "matches"),
    [
        ("a*" * 400, "a" * 5000, True),
        ("a*" * 400 + "b", "a" * 5000, False),
        ("*a" * 400 + "?", "a" * 5000, True),
        ("*" * 400 + "b", "a" * 5000, False),
        ("*ab*ab", "abab", True),
        ("*ab*ab", "ab", False),
        ("a?c*", "abc", True),
        ("*/full/*", "m@r/full/b8/s128", True),
        ("[a]", "a", False),
        ("*\n*", "a\nb", True),
    ],
)
def test_a_glob_answers_at_once(tmp_path, pattern, label, matches):
    """However many stars it has; it took a time exponential in their number once."""
    with watched(tmp_path):
        assert matches == bool(glob(pattern).fullmatch(label))


ENDLESS = {
    "protocol: {timeout: .inf}": "timeout",
    "protocol: {timeout: 1.0e+300}": "timeout",
    "protocol: {steps: 100000000000000000000}": "steps",
    "protocol: {repeats: 1000000000}": "repeats",
    "grid: {method: {name: lora, rank: 10000000}}": "rank",
    "grid: {method: {name: houlsby, adapter_size: 1000000000000}}": "adapter_size",
    "grid: {model: {name: bert-tiny@random, config: {num_labels: 1000000000}}}": "num_labels",
    "grid: {model: {name: bert-tiny@random, config: {num_hidden_layers: 100000}}}": "num_hidden_layers",
}


@pytest.mark.parametrize("part", ENDLESS)
def test_what_would_never_end_is_refused(tmp_path, part):
    """The message names the key."""
    ((key, value),) = yaml.safe_load(part).items()
    suite = {key: content for key, content in SUITE.items() if key not in ("include", "exclude")}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite | {key: suite[key] | value}))

    with watched(tmp_path):
        code, out, err = command("run", tmp_path / "suite.yaml", "--dry-run")

    assert (2, "", 1) == (code, out, err.count("\n"))
    assert ENDLESS[part] in err


def test_more_points_than_a_grid_may_have_are_refused_beside_it_too(tmp_path):
    """12,000 entries of `include` took minutes."""
    rows = "".join(f"- {{model: bert-tiny@random, method: full, batch_size: {size}}}\n" for size in range(1, 12_001))
    (tmp_path / "suite.yaml").write_text(f"schema: 1\nname: toy\ninclude:\n{rows}")

    with pytest.raises(UserError, match="include: has 12,000 entries; at most 10,000 cells are run"):
        load_suite(str(tmp_path / "suite.yaml"))


@pytest.mark.parametrize("verb", ["run", "fit", "plan", "finetune"])
def test_a_number_of_processes_that_no_machine_has_is_refused(tmp_path, verb):
    for jobs in (10**29, 10**6):
        with watched(tmp_path):
            code, out, err = command(verb, "x", "y", "--jobs", jobs)
        assert (2, "", 1) == (code, out, err.count("\n"))


@pytest.mark.parametrize("name", ["b", "<<"])
def test_aliases_that_multiply_are_refused(tmp_path, name):
    """Nine of nine of nine, thirty times, as values and as keys that are merged."""
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, 30):
        repeated = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} {{{name}: [{repeated}]}}")
    (tmp_path / "suite.yaml").write_text("\n".join(lines))

    with watched(tmp_path):
        refused = refused_or(load_suite, str(tmp_path / "suite.yaml"))
        with pytest.raises(yaml.YAMLError, match="values, with what its aliases repeat"):
            parse("\n".join(lines))

    assert "has more than 500,000 values" in str(refused)


def test_a_pipe_that_the_shell_hands_over_is_read(tmp_path):
    """`--budget <(command)`: somebody writes at its other end, also more than a pipe holds; up to the limit of size."""
    for count, expected in ((3, None), (20_000, "at most 97.7 KiB are read")):
        read_end, write_end = os.pipe()
        writer = threading.Thread(target=_written, args=(write_end, b"12345\n" * count))
        writer.start()
        try:
            if expected is None:
                assert b"12345\n" * count == bytes_of(Path(f"/dev/fd/{read_end}"), 100_000)
            else:
                with pytest.raises(UserError, match=expected):
                    bytes_of(Path(f"/dev/fd/{read_end}"), 100_000)
        finally:
            os.close(read_end)
            writer.join()


def _written(handle, content):
    with suppress(BrokenPipeError), os.fdopen(handle, "wb") as stream:
        stream.write(content)
