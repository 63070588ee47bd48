"""The run folder: what was written is what is read, and a writer killed at any byte costs at most its last line."""

import copy
import errno
import json
import math
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import a_record, counted, measured
from meftbench.catalogue.metrics import METRICS, NOT_A_NUMBER
from meftbench.errors import UserError
from meftbench.escapes import visible
from meftbench.records.record import Metric, Record
from meftbench.records.store import (
    RECORDS,
    Run,
    load_run,
    read_records,
    warn_of_left_out,
    write_named,
    write_whole,
)
from meftbench.records.writer import writing
from meftbench.report.results import frame_of

numbers = st.one_of(st.integers(-(2**60), 2**60), st.floats(allow_nan=False))
values = st.one_of(numbers, st.text(max_size=5), st.lists(st.lists(st.floats(allow_nan=False), max_size=2), max_size=3))
spread = st.none() | st.floats(allow_nan=False)
metrics = st.one_of(
    st.builds(
        Metric,
        values.filter(lambda value: value not in ("Infinity", "-Infinity", "NaN")),
        st.sampled_from(["measured", "counted", "predicted"]),
        n=st.none() | st.integers(1, 9),
        min=spread,
        max=spread,
        samples=st.none() | st.lists(st.floats(allow_nan=False), max_size=3),
        phases=st.none() | st.dictionaries(st.sampled_from(["forward", "backward"]), st.integers(0)),
    ),
    st.builds(Metric, st.none(), st.just("measured"), absent=st.text(min_size=1)),
)
texts = st.text(max_size=8)
records = st.builds(
    lambda name, status, found, message, repeat: a_record(
        status, found, record_id=name, status_detail={"message": message}, repeat=repeat
    ),
    texts,
    st.sampled_from(["ok", "oom", "timeout", "error", "skipped"]),
    st.dictionaries(st.sampled_from(sorted(METRICS.keys() - NOT_A_NUMBER - {"collapse"})), metrics, max_size=4),
    texts,
    st.integers(0, 9),
)

BUFFER = {"bytes": 5, "count": 1, "shape": [5], "op": "mm", "category": "inputs", "dtype": "float32", "place": "a:b"}


@given(metrics)
def test_a_metric_comes_back_as_it_went(metric):
    line = json.dumps(metric.to_json("step_time_s"), allow_nan=False)

    assert metric == Metric.from_json(json.loads(line))


@given(st.lists(records, max_size=5))
@settings(max_examples=30, deadline=None)
def test_records_come_back_as_they_went(tmp_path_factory, written):
    """Whatever they say, line ends and quotes included: one line each, in order."""
    folder = tmp_path_factory.mktemp("run")
    with writing(folder) as writer:
        for record in written:
            writer.append(record)

    assert (written, False) == read_records(folder / RECORDS)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.inf, "Infinity"),
        (-math.inf, "-Infinity"),
        ([[1.0, math.inf], [-math.inf]], [[1.0, "Infinity"], ["-Infinity"]]),
    ],
)
def test_infinity_is_written_as_a_word_and_read_as_a_number(value, text):
    """JSON has no infinity; an error that has overflowed is infinite and not unknown."""
    metric = counted(value, min=-math.inf, max=math.inf, samples=[1.0, math.inf])

    content = json.loads(json.dumps(metric.to_json("reconstruction_rel"), allow_nan=False))

    assert text == content["value"]
    assert ("-Infinity", "Infinity", [1.0, "Infinity"]) == (content["min"], content["max"], content["samples"])
    assert metric == Metric.from_json(content)


def test_not_a_number_is_written_as_a_word_and_read_as_one():
    content = json.loads(json.dumps(counted(math.nan).to_json("reconstruction_rel_max"), allow_nan=False))

    assert "NaN" == content["value"]
    assert math.isnan(Metric.from_json(content).value)


def test_a_metric_has_a_value_or_a_reason():
    """Unknown is never a number."""
    for wrong in ({"value": None, "source": "counted"}, {"value": 1, "source": "counted", "absent": "why"}):
        with pytest.raises(ValueError, match="either a value or the reason"):
            Metric(**wrong)


def test_a_last_line_torn_at_any_byte_costs_that_line_alone(tmp_path):
    """Read: the whole lines, and the mark that one is torn. Written to again: the torn line is gone."""
    first, second, third = (a_record(record_id=f"r{n}", status_detail={"message": "µ"}) for n in range(3))
    with writing(tmp_path) as writer:
        writer.append(first)
        start = (tmp_path / RECORDS).stat().st_size
        writer.append(second)
    whole = (tmp_path / RECORDS).read_bytes()

    for cut in range(start, len(whole)):
        (tmp_path / RECORDS).write_bytes(whole[:cut])
        assert ([first], cut > start) == read_records(tmp_path / RECORDS)
        with writing(tmp_path) as writer:
            writer.append(third)
        assert ([first, third], False) == read_records(tmp_path / RECORDS)


def test_a_line_that_is_no_record_in_the_middle_is_an_error_with_its_place(tmp_path):
    """Only the last line may be torn; anything else was damaged, and nobody guesses."""
    with writing(tmp_path) as writer:
        writer.append(a_record())
    content = (tmp_path / RECORDS).read_bytes()

    for damage in (b"{}\n", b"not json\n", b'{"schema": 1, "metrics": {}}\n'):
        (tmp_path / RECORDS).write_bytes(damage + content)
        with pytest.raises(UserError, match=f"{RECORDS}:1: is not a record"):
            read_records(tmp_path / RECORDS)


def test_a_record_of_a_newer_schema_is_refused(tmp_path):
    (tmp_path / RECORDS).write_text(json.dumps(a_record().to_json() | {"schema": 2}) + "\n")

    with pytest.raises(UserError, match="record of schema 2; update meftbench"):
        read_records(tmp_path / RECORDS)


def test_a_field_of_a_later_version_is_passed_over():
    """Fields may be added within a schema."""
    content = a_record(metrics={"step_time_s": 1}).to_json()
    content["metrics"]["step_time_s"]["kurtosis"] = 3

    assert a_record(metrics={"step_time_s": 1}) == Record.from_json(content | {"mood": "good"})


def test_of_a_cell_tried_again_the_last_record_counts(tmp_path):
    with writing(tmp_path) as writer:
        for record in (a_record("error", record_id="1"), a_record(batch_size=2), a_record(record_id="2")):
            writer.append(record)
        writer.write("suite.yaml", "name: toy\nrun_id: r\n")
        writer.write("environment.json", "{}")

    assert ["2", a_record(batch_size=2).record_id] == [record.record_id for record in load_run(tmp_path).records]


def test_one_folder_has_one_writer(tmp_path):
    with writing(tmp_path), pytest.raises(UserError, match="another run writes here"), writing(tmp_path):
        pass


def test_a_file_is_there_in_full_or_not_at_all(tmp_path, monkeypatch):
    """The disk is full while writing: the old content stays, and no scrap is taken for the file."""
    file = tmp_path / "suite.yaml"
    write_whole(file, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written \\(No space left on device\\)"):
        write_whole(file, "new and longer")

    assert "old" == file.read_text()
    assert [file] == list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path, make):
    """A folder, a device or a pipe of that name stays, and nothing is left beside it."""
    make(tmp_path / "suite.yaml")

    with pytest.raises(UserError, match=r"cannot be written \(suite.yaml is not a regular file\)"):
        write_whole(tmp_path / "suite.yaml", "text")

    assert ["suite.yaml"] == os.listdir(tmp_path)
    assert not (tmp_path / "suite.yaml").is_file()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "is not a run folder"),
        ({"suite.yaml": "name: a\nrun_id: b"}, "is not a run folder"),
        ({"suite.yaml": "[1", "environment.json": "{}"}, "is damaged"),
        ({"suite.yaml": "name: a", "environment.json": "{}"}, "is damaged"),
        ({"suite.yaml": "name: a\nrun_id: b", "environment.json": "{"}, "is damaged"),
        ({"suite.yaml": "name: a\nrun_id: b", "environment.json": "[]"}, "is damaged"),
    ],
)
def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    with pytest.raises(UserError, match=said):
        load_run(tmp_path)


def test_a_folder_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        load_run(tmp_path / "nowhere")


def test_half_a_character_does_not_cost_the_record(tmp_path):
    """The message of somebody's exception may hold one."""
    with writing(tmp_path) as writer:
        writer.append(a_record("error", status_detail={"message": "\udcff bad"}))

    ([record], _) = read_records(tmp_path / RECORDS)
    assert "\ufffd bad" == record.status_detail["message"]


def test_the_metrics_of_a_record_that_was_read_are_those_that_were_written(tmp_path):
    """As a mapping that is equal to the dictionary, looks like it, and can be copied and pickled."""
    record = a_record(metrics={"step_time_s": measured(0.5, samples=[0.5]), "ooms": 3})
    with writing(tmp_path) as writer:
        writer.append(record)

    (read,) = read_records(tmp_path / RECORDS)[0]

    assert record == read
    assert repr(record.metrics) == repr(read.metrics)
    assert record.metrics == pickle.loads(pickle.dumps(copy.deepcopy(read.metrics))) == dict(read.metrics)
    assert ("ooms" in read.metrics, "alloc_retries" in read.metrics) == (True, False)
    assert read.metrics.get("alloc_retries") is None
    assert (3, "counted", None, None) == read.metrics.plain("ooms")
    assert read.metrics.plain("alloc_retries") is None


# --- damaged records ---


def a_line():
    """The JSON of a finished training with every kind of metric that has a form of its own."""
    found = {
        "step_time_s": measured(1.0, min=0.9, max=1.1, samples=[0.9, 1.1]),
        "peak_allocated_bytes": counted(5, phases={"forward": 5}),
        "peak_buffers": counted([BUFFER]),
        "learning_curve": measured([[1, 0.5, None]]),
        "reconstruction_rel": measured([[0.5, math.inf]]),
        "peak_phase": counted("forward"),
    }
    content = a_record(metrics=found).to_json()
    content["cell"]["training"] = {"task": "rte", "learning_rate": 0.1}
    return content


def paths_in(content, path=()):
    for key, value in content.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from paths_in(value, (*path, key))


def write_lines(folder, *contents):
    (folder / RECORDS).write_text("".join(json.dumps(content) + "\n" for content in contents))
    return folder / RECORDS


@pytest.mark.parametrize("layers", [[[0.5, 0.1], [0.5]], [[0.5], []], [[]], [["a"]]])
def test_errors_of_reconstruction_are_as_many_for_each_layer(tmp_path, layers):
    """A picture draws a line for each stream through all layers."""
    content = a_line()
    content["metrics"]["reconstruction_rel"]["value"] = layers

    with pytest.raises(UserError, match=r"reconstruction_rel is .*, not as many numbers for each layer"):
        read_records(write_lines(tmp_path, content))


@pytest.mark.parametrize("step", [math.inf, math.nan, "Infinity", "NaN", None])
def test_the_steps_of_a_learning_curve_are_finite(tmp_path, step):
    content = a_line()
    content["metrics"]["learning_curve"]["value"] = [[step, 0.5, 0.5]]

    with pytest.raises(UserError, match="learning_curve"):
        read_records(write_lines(tmp_path, content))


@pytest.mark.parametrize("seed", [None, ...])
def test_a_training_has_a_seed(tmp_path, seed):
    """By which its scores are averaged; ...: the field is missing."""
    content = a_line()
    content["cell"]["seed"] = seed
    if seed is ...:
        del content["cell"]["seed"]

    with pytest.raises(UserError, match=r"cell\.seed of a training is null, not a whole number"):
        read_records(write_lines(tmp_path, content))


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-1, 3), st.just(10**400), st.floats(), st.text(max_size=2),
    st.just([]), st.just([1]), st.just({}), st.just({"a": 1}), st.just([[1]]),
)  # fmt: skip


@given(st.sampled_from(sorted(paths_in(a_line()))), ANYTHING)
@settings(deadline=None, max_examples=100)
def test_whatever_stands_in_a_field_the_record_is_read_or_refused_with_its_place(tmp_path_factory, path, value):
    """A line is a record that can be tabulated, or one line that names the file and the line; nothing in between."""
    content = a_line()
    *above, key = path
    place = content
    for name in above:
        place = place[name]
    place[key] = value
    file = write_lines(tmp_path_factory.mktemp("run"), content)

    record, refusal = None, None
    try:
        ((record,), _) = read_records(file)
    except UserError as error:
        refusal = error

    if record:
        frame = frame_of(Run(file.parent, {"name": "toy", "run_id": "run-1"}, {}, [record]))
        assert [visible(record.label)] == list(frame["label"])
    else:
        assert (f"{file}:1", 2) == (refusal.where, refusal.exit_code)
        assert "\n" not in str(refusal)


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        (("status",), "weird", 'status is "weird", not one of ok, oom, timeout, error, skipped'),
        (("wall_s",), "x", 'wall_s is "x", not a whole number or a number'),
        (("wall_s",), math.inf, "wall_s is inf, not a finite number of seconds"),
        (("metrics",), None, "metrics is null, not a mapping"),
        (("repeat",), 10**400, "repeat is a number of more than 300 digits"),
        (("cell",), {"a": 1}, "cell.label is missing"),
        (("cell", "batch_size"), "8", 'cell.batch_size is "8", not a whole number'),
        (("cell", "batch_size"), 0, "are not all 1 or more"),
        (("cell", "model_config"), True, "cell.model_config is true, not a mapping"),
        (("cell", "training"), {"epochs": 1}, "cell.training.task: Field required"),
        (("cell", "cuts"), [1], "cell.cuts is [1], not a list of texts"),
        (("cell", "method_params"), {"side_bits": "x"}, 'cell.method_params.side_bits is "x", not a whole number'),
        (("status_detail",), {"requested_bytes": "x"}, 'status_detail.requested_bytes is "x", not a whole number'),
        (("metrics", "step_time_s", "samples"), [1, {}], "samples of step_time_s is [1, {}], not a list of numbers"),
        (("metrics", "peak_allocated_bytes", "phases"), 7, "phases of peak_allocated_bytes is 7, not bytes by phase"),
        (("metrics", "peak_allocated_bytes", "value"), {}, "the value of peak_allocated_bytes is {}, not a number or"),
    ],
)
def test_a_field_of_another_type_is_named(tmp_path, path, value, why):
    content = a_line()
    place = content
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value

    with pytest.raises(UserError) as refused:
        read_records(write_lines(tmp_path, content))

    assert why in str(refused.value)


@pytest.mark.parametrize(
    ("name", "field", "value", "why"),
    [
        ("step_time_s", "source", "guessed", "a metric is measured, counted, predicted, not 'guessed'"),
        ("step_time_s", "samples", [0.9, "1.1"], 'samples of step_time_s is [0.9, "1.1"], not a list of numbers'),
        ("peak_allocated_bytes", "value", 10**400, "the value of peak_allocated_bytes is a number of more than 300"),
        ("peak_allocated_bytes", "n", -(10**400), "n of peak_allocated_bytes is a number of more than 300 digits"),
        ("peak_allocated_bytes", "phases", {"forward": "5"}, 'phases of peak_allocated_bytes is {"forward": "5"}, not'),
        (
            "peak_buffers",
            "value",
            [{"bytes": 0.5}],
            'the value of peak_buffers is [{"bytes": 0.5}], not a list of',
        ),
        ("step_time_s", "min", "fast", 'min of step_time_s is "fast", not a number'),
    ],
)
def test_a_metric_that_is_wrong_after_one_of_the_same_form_is_named(tmp_path, name, field, value, why):
    """Records whose metrics have the same names, fields and types are checked faster, but for the same."""
    good, bad = a_line(), a_line()
    good["metrics"]["peak_allocated_bytes"]["n"] = bad["metrics"]["peak_allocated_bytes"]["n"] = 3
    good["metrics"]["step_time_s"]["min"] = "-Infinity" if field == "min" else 0.9
    bad["metrics"][name][field] = value

    with pytest.raises(UserError) as refused:
        read_records(write_lines(tmp_path, good, good, bad))

    assert f"{tmp_path / RECORDS}:3" == refused.value.where
    assert why in str(refused.value)


def test_a_metric_that_is_no_mapping_is_named(tmp_path):
    content = a_line()
    content["metrics"]["step_time_s"] = [1]

    with pytest.raises(UserError, match=r"the metric step_time_s is \[1\], not a mapping"):
        read_records(write_lines(tmp_path, content))


def test_half_a_character_is_read(tmp_path):
    """JSON may have it as an escape, whoever wrote it."""
    content = a_line() | {"host": "\udcff"}

    ((record,), _) = read_records(write_lines(tmp_path, content))

    assert "\udcff" == record.host


def test_a_record_nested_without_end_is_refused(tmp_path):
    (tmp_path / RECORDS).write_text("[" * 100_000 + "\n")

    with pytest.raises(UserError, match="is not a record"):
        read_records(tmp_path / RECORDS)


def test_a_metric_of_a_later_version_is_kept_as_it_stands(tmp_path, capsys):
    """It is written with its unit and fields as it was read; that tables lack it is said once."""
    of_later = {"value": 5, "unit": "furlong", "source": "measured", "of_later": [1]}
    content = a_line()
    content["metrics"] |= {"zz_future": of_later}
    write_lines(tmp_path, content)
    run = Run(tmp_path, {"name": "toy", "run_id": "run-1"}, {}, read_records(tmp_path / RECORDS)[0])

    warn_of_left_out(run)

    assert of_later == run.records[0].to_json()["metrics"]["zz_future"]
    said = "records.jsonl: 1 metric is unknown to this version and left out (zz_future); update meftbench, or read"
    assert 1 == capsys.readouterr().err.count(said)


def test_a_file_that_the_user_named_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A link stays one, and its target is replaced; on a full disk the old content stays, with nothing beside it; a
    device takes what it is given."""
    target, link = tmp_path / "target.csv", tmp_path / "link.csv"
    target.write_text("old")
    link.symlink_to(target)

    write_named(link, b"new")
    write_named(Path(os.devnull), b"anything")

    assert link.is_symlink()
    assert "new" == target.read_text()
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        write_named(link, b"newer")
    assert "new" == target.read_text()
    assert {target, link} == set(tmp_path.iterdir())
