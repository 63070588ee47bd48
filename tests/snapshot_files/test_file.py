"""Reading a user's snapshot: what torch writes is read, nothing in the file is run, whatever else it is is one line."""

from __future__ import annotations

import copy
import os
import pickle
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meftbench.errors import INVALID, UserError
from meftbench.prediction.allocator import AllocatorSettings, Event, snapshot
from meftbench.snapshots import file as snapshot_file
from meftbench.snapshots.file import read_device, read_snapshot
from meftbench.snapshots.inspection import inspect
from meftbench.snapshots.snapshot import Frame
from snapshots import BASE, FRAMES, MiB, a_block, a_segment, a_snapshot, a_step, an_entry, checked, written


def refused(file, device=None):
    """The line with which a file is refused, whose exit code is that of invalid input."""
    with pytest.raises(UserError) as caught:
        read_device(file, device)
    assert INVALID == caught.value.exit_code
    assert 1 == len(str(caught.value).splitlines())
    return str(caught.value)


def test_a_snapshot_is_read_as_it_was_written(tmp_path):
    found = read_snapshot(written(tmp_path, a_step()))

    first, second = found.segments
    assert [0] == found.devices
    assert ((BASE, 12 * MiB), (BASE + 32 * MiB, 20 * MiB)) == (
        (first.address, first.size),
        (second.address, second.size),
    )
    assert ("allocated", "free") == (first.blocks[0].state, second.blocks[0].state)
    assert ["segment_alloc", "alloc"] * 2 + ["free_requested", "free_completed"] == [e.action for e in found.traces[0]]
    assert Frame(*(FRAMES[0][key] for key in ("filename", "line", "name"))) == found.traces[0][1].frames[0]
    assert (8 * MiB, BASE + 32 * MiB, 0) == (
        found.traces[0][3].size,
        found.traces[0][3].address,
        found.traces[0][3].stream,
    )


def test_the_settings_are_those_of_the_recording():
    """By their own keys, and what torch has in the text alone; -1 is no limit."""
    conf = "large_segment_size_mb:32,max_non_split_rounding_mb:40,pinned_use_cuda_host_register:True"
    divisions = {str(1 << octave): 4 if octave else 8 for octave in range(16)}
    more = {"expandable_segments": True, "max_split_size": 64 * MiB, "garbage_collection_threshold": 0.5}

    found = checked(a_step(**more, roundup_power2_divisions=divisions, PYTORCH_CUDA_ALLOC_CONF=conf)).settings

    assert found == AllocatorSettings(True, 64 * MiB, 0.5, None, 32 * MiB, 40 * MiB, (8, *[4] * 15))
    assert AllocatorSettings() == checked(a_step(max_split_size=-1, garbage_collection_threshold=0)).settings


@pytest.mark.parametrize(
    "settings",
    [AllocatorSettings.parse(text) for text in ("", "expandable_segments:True", "roundup_power2_divisions:4")],
)
def test_our_own_snapshots_have_their_settings(settings):
    assert settings == checked(snapshot([Event("alloc", 1, 5)], settings)).settings


def test_older_snapshots_are_read():
    """torch 2.0 had no addresses of blocks, no pools and no expandable segments."""
    content = a_step()
    for segment in content["segments"]:
        del segment["segment_pool_id"], segment["is_expandable"]
        for block in segment["blocks"]:
            del block["address"]
    for entry in content["device_traces"][0]:
        del entry["frames"], entry["time_us"]

    assert [BASE, BASE + 32 * MiB] == [segment.blocks[0].address for segment in checked(content).segments]


class Calls:
    """Pickled, it has its reader call a function."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (lambda file: Calls(os.system, f"touch {file}"), "posix.system"),
        (lambda file: Calls(eval, f"open({str(file)!r}, 'w')"), "builtins.eval"),
        (lambda file: Calls(exec, f"open({str(file)!r}, 'w')"), "builtins.exec"),
    ],
)
@pytest.mark.parametrize("place", ["whole", "segment", "frame"])
def test_nothing_that_a_pickle_names_is_run(tmp_path, harm, name, place):
    """Wherever it stands: the function is named, and not called."""
    mark, content = tmp_path / "ran", a_step()
    bad = harm(mark)
    if place == "segment":
        content["segments"].append(bad)
    elif place == "frame":
        content["device_traces"][0][0]["frames"].append(bad)
    file = written(tmp_path, bad if place == "whole" else content)

    assert f"is not a plain snapshot: it names {name}, which was not run" in refused(file)
    assert not mark.exists()


def test_a_name_with_line_breaks_is_one_line(tmp_path):
    file = tmp_path / "snapshot.pickle"
    file.write_bytes(b"\x80\x04\x8c\x06a\nb\x1b[1\x8c\x03c\nd\x93.")

    assert r"it names a\nb\x1b[1.c\nd, which" in refused(file)


def test_a_persistent_id_is_refused(tmp_path):
    file = tmp_path / "snapshot.pickle"
    file.write_bytes(b"\x80\x02\x8c\x01xQ.")

    assert "it names a persistent id" in refused(file)


FILES = {
    b"": "is empty",
    b"no pickle": "is not a pickle",
    b"PK\x03\x04": "is not a pickle",
    b"\x80": "is cut off: the pickle has no end",
    b"\x80\x04": "is cut off: the pickle has no end",
    pickle.dumps(a_step())[:-1]: "is cut off: the pickle has no end",
    pickle.dumps(a_step())[:300]: "is cut off: the pickle has no end",
    b"\x80\x04K\x01": "is cut off: the pickle has no end",
    b"\x80\x04.": "is damaged: it cannot be unpickled",
    b"\x80\x63.": "is damaged: it cannot be unpickled (ValueError)",
    b"\x80\x04h\x05.": "is damaged: it cannot be unpickled",
    # An entry of the memo far behind all others, which would make the unpickler take 32 GiB.
    b"\x80\x04Nr\xff\xff\xff\x7f.": "is damaged: it cannot be unpickled (MemoryError)",
    b"\x80\x04\x8e" + struct.pack("<Q", 2**45): "is damaged: it cannot be unpickled (MemoryError)",
    b"\x80\x04\x82\x01.": "is damaged: it cannot be unpickled",
    b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".": "the pickle is a list, and not a dictionary",
    b"\x80\x04" + b"\x8c\x01k" * 1 + b"}" * 1 + b".": "is not a memory snapshot: it has no segments",
}


@pytest.mark.parametrize("content", FILES, ids=lambda content: repr(content[:12]))
def test_files_that_are_no_snapshots(tmp_path, content):
    """Other files, cut ones, and pickles made to take all memory or to nest without end."""
    file = tmp_path / "snapshot.pickle"
    file.write_bytes(content)

    assert FILES[content] in refused(file)


def test_a_file_that_is_not_there_a_folder_and_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")

    assert f"{tmp_path / 'none'}: does not exist; name a file that" in refused(tmp_path / "none")
    assert "is a folder; name the file" in refused(tmp_path)
    assert "is not a regular file" in refused(tmp_path / "pipe")


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot_file, "MAX_FILE_BYTES", 100)

    assert "and at most 100 B are read; record less, with max_entries" in refused(written(tmp_path, a_step()))


def changed(*path, to):
    """A snapshot in which one place has another value; `...` deletes it."""
    content = a_step()
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if to is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return content


def shared(levels):
    """A list of lists of lists, each with the same list ten times."""
    inner = [1]
    for _ in range(levels):
        inner = [inner] * 10
    return inner


SEGMENT, BLOCK, ENTRY = ("segments", 0), ("segments", 0, "blocks", 0), ("device_traces", 0, 1)
SHAPES = [
    ([], "the pickle is a list, and not a dictionary"),
    ({}, "it has no segments"),
    ({"segments": []}, "it has no device_traces"),
    (changed("segments", to=...), "it has no segments"),
    (changed("segments", to={}), "segments is a dictionary, and not a list"),
    (changed("segments", 0, to=5), "segment 0 is a number, and not a dictionary"),
    (changed("segments", 1, to=[]), "segment 1 is a list, and not a dictionary"),
    (changed(*SEGMENT, "address", to=-1), "segment 0 has a address of -1"),
    (changed(*SEGMENT, "address", to=1.5), "segment 0 has a fraction as address"),
    (changed(*SEGMENT, "address", to=float("nan")), "segment 0 has nan as address"),
    (changed(*SEGMENT, "total_size", to=...), "segment 0 has no total_size"),
    (changed(*SEGMENT, "total_size", to=5), "segment 0 has 5 bytes, and its blocks 12582912"),
    (changed(*SEGMENT, "total_size", to=True), "segment 0 has a truth value as total_size"),
    (changed(*SEGMENT, "total_size", to=10**5000), "segment 0 has a total_size out of range"),
    (changed(*SEGMENT, "segment_type", to="medium"), "segment 0 has a segment_type of 'medium'"),
    (changed(*SEGMENT, "segment_pool_id", to=(1,)), "segment 0 has a tuple as the id of its pool"),
    (changed(*SEGMENT, "is_expandable", to="yes"), "segment 0 has a text as is_expandable"),
    (changed(*SEGMENT, "device", to=5000), "segment 0 is of device 5000"),
    (changed(*SEGMENT, "blocks", to=None), "blocks of segment 0 is nothing, and not a list"),
    (changed(*BLOCK, "size", to=0), "block 0 of segment 0 has a size of 0"),
    (changed(*BLOCK, "size", to="12"), "block 0 of segment 0 has a text as size"),
    (changed(*BLOCK, "requested_size", to=2**40), "block 0 of segment 0 has 12582912 bytes for a request of"),
    (changed(*BLOCK, "address", to=3), "block 0 of segment 0 is at address 3, and the one before it ends at"),
    (changed(*BLOCK, "frames", to="x"), "block 0 of segment 0 has a text as frames"),
    (changed("device_traces", to=None), "device_traces is nothing, and not a list"),
    (changed("device_traces", to=[5]), "a trace is a number, and not a list"),
    (changed(*ENTRY, to=None), "entry 1 of device 0 is nothing, and not a dictionary"),
    (changed(*ENTRY, "action", to=...), "entry 1 of device 0 has no action"),
    (changed(*ENTRY, "addr", to=...), "entry 1 of device 0 has no addr"),
    (changed(*ENTRY, "size", to=-512), "entry 1 of device 0 has a size of -512"),
    (changed(*ENTRY, "time_us", to="now"), "entry 1 of device 0 has a text as time_us"),
    (changed("device_traces", 0, 0, "size", to=0), "entry 0 of device 0 has a size of 0"),
    (changed(*ENTRY, "frames", 0, to=7), "a frame of entry 1 of device 0 is a number"),
    (changed(*ENTRY, "frames", to=[{"filename": "a", "name": 1, "line": 2}]), "has a number as name"),
    (changed("allocator_settings", to=[]), "allocator_settings is a list, and not a dictionary"),
    (a_step(max_split_size="large"), "allocator_settings has a text as max_split_size"),
    (a_step(garbage_collection_threshold=float("nan")), "no share between 0 and 1 as garbage_collection_threshold"),
    (a_step(roundup_power2_divisions={"3": 4}), "roundup_power2_divisions that torch does not have"),
    (a_step(roundup_power2_divisions={(("deep",),): 4}), "roundup_power2_divisions that torch does not have"),
    (changed("segments", to=[a_segment(0, a_block(512))] * 2), "segment 1 occurs twice"),
    (changed("device_traces", to=[a_step()["device_traces"][0]] * 2), "a trace occurs twice"),
    (changed("segments", to=shared(12)), "segment 0 is a list, and not a dictionary"),
]


@pytest.mark.parametrize(("content", "what"), SHAPES, ids=[what[:40] for _, what in SHAPES])
def test_pickles_of_another_form_are_named_where_they_differ(tmp_path, content, what):
    line = refused(written(tmp_path, content))

    assert what in line
    assert "is not a memory snapshot" in line


def test_what_a_newer_torch_may_write_is_named(tmp_path):
    action = refused(written(tmp_path, changed(*ENTRY, "action", to="segment_move\n")))
    state = refused(written(tmp_path, changed(*BLOCK, "state", to="active_elsewhere")))

    assert (
        r"entry 1 of device 0 has the action 'segment_move\n', which is not known here; it may be from a newer"
        in action
    )
    assert "block 0 of segment 0 has the state 'active_elsewhere', which is not known here" in state


def test_segments_that_overlap_are_refused(tmp_path):
    segments = [a_segment(0, a_block(20 * MiB)), a_segment(2 * MiB, a_block(20 * MiB))]

    assert "is damaged: two segments overlap" in refused(written(tmp_path, a_snapshot(segments)))


def test_the_device_is_chosen_where_there_are_several(tmp_path):
    """A device has memory if it has a segment or a trace."""
    content = a_step()
    content["segments"].append(a_segment(2**30, a_block(20 * MiB), device=3))
    content["device_traces"] += [[], [an_entry("snapshot", 0, 0)]]
    file = written(tmp_path, content)

    assert "holds memory of the devices 0, 2, 3; choose one with --device N" in refused(file)
    assert "holds no memory of device 1; it has: 0, 2, 3" in refused(file, 1)
    assert (1, 0) == (len(read_device(file, 3).segments), len(read_device(file, 3).trace))
    assert "holds no memory of any CUDA device" in refused(written(tmp_path, a_snapshot(), "none.pickle"))


PICKLED = pickle.dumps(a_step())
ODD = st.one_of(
    st.none(), st.booleans(), st.floats(), st.integers(-(2**70), 2**70), st.text(max_size=3),
    st.sampled_from([[], {}, (), b"", "alloc", "free_completed", "segment_unmap", "oom", 512, 20 * MiB, BASE]),
)  # fmt: skip


def line_for(content, folder):
    """The line with which a pickle is refused, or "" if it is inspected. Any other error is raised."""
    file = folder / "snapshot.pickle"
    file.write_bytes(content)
    try:
        inspect({"file": str(file), "device": None, "alloc_confs": [""], "capacity": None}, lambda line: None)
    except UserError as error:
        return f"exit {error.exit_code}: {error}"
    return ""


def is_read_or_refused(content, folder):
    line = line_for(content, folder)
    return not line or (line.startswith(f"exit {INVALID}: {folder}") and len(line.splitlines()) == 1)


@given(st.lists(st.tuples(st.integers(0, len(PICKLED) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_pickle_with_other_bytes_is_read_or_refused_in_one_line(tmp_path_factory, changes):
    damaged = bytearray(PICKLED)
    for position, value in changes:
        damaged[position] = value

    assert is_read_or_refused(bytes(damaged), tmp_path_factory.mktemp("damaged"))


@given(st.integers(0, len(PICKLED) - 1))
def test_a_pickle_that_is_cut_off_is_refused(tmp_path_factory, length):
    assert f"exit {INVALID}: " in line_for(PICKLED[:length], tmp_path_factory.mktemp("cut"))


def places(content, path=()):
    """The paths of everything in nested dictionaries and lists."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


@given(st.data())
def test_a_snapshot_with_odd_values_is_read_or_refused_in_one_line(tmp_path_factory, data):
    """Values of any kind in any place, deleted ones, repeated ones and ones in another order."""
    content = copy.deepcopy(a_step())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(sorted(places(content), key=str)))
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        how = data.draw(st.sampled_from(["odd", "delete", "repeat", "reverse"]))
        if how == "delete":
            del inner[path[-1]]
        elif how == "repeat" and isinstance(inner, list):
            inner.append(copy.deepcopy(inner[path[-1]]))
        elif how == "reverse" and isinstance(inner, list):
            inner.reverse()
        else:
            inner[path[-1]] = data.draw(ODD)
        if not content:
            break

    assert is_read_or_refused(pickle.dumps(content), tmp_path_factory.mktemp("odd"))
