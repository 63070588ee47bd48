"""`meftbench inspect`: what it prints of snapshots, how it draws them, and what it says of files that are none."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from meftbench.prediction.allocator import AllocatorSettings, Event, snapshot
from meftbench.report.views.snapshot import plot_snapshot, snapshot_lines
from meftbench.snapshots.inspection import inspect
from snapshots import MiB, a_block, a_segment, a_snapshot, a_step, an_entry, written

STEP = """\
snapshot.pickle, device 0
6 entries in the trace, 2 segments at the end, 1 stream, measured
  peak allocated              20.0 MiB  replayed (whole blocks), entry 3
  peak requested              20.0 MiB  measured
  peak reserved               32.0 MiB  measured
  reserved at the end         32.0 MiB  measured
  fragmentation                  37.5%  replayed, at the peak of reserved memory
  addresses                     2 of 2  as torch chose them, replayed
reserved with other settings, peak and at the end, replayed
      32.0 MiB    32.0 MiB  as recorded
      20.0 MiB    20.0 MiB  expandable_segments:True
      32.0 MiB    32.0 MiB  max_split_size_mb:128
      32.0 MiB    32.0 MiB  roundup_power2_divisions:4
alive at the peak: 2 blocks, replayed; what they are, by simple rules
  forward                     12.0 MiB  in 1 block
  in the trace                 8.0 MiB  in 1 block
alive at the peak, replayed, by line of code: of the innermost forward, if any
      12.0 MiB  transformers/models/bert/modeling_bert.py:389 forward
       8.0 MiB  no stack
"""


def test_a_snapshot_is_told_on_one_page(tmp_path, cli):
    """Every number with its unit, and whether it was measured or replayed; progress goes to stderr."""
    written(tmp_path, a_step())

    code, out, err = cli("inspect", "snapshot.pickle")

    assert (0, STEP) == (code, out)
    assert "replaying 6 entries of the trace\n" == err.splitlines(keepends=True)[0]
    assert (0, STEP, "") == cli("inspect", "snapshot.pickle", "--quiet")


def test_the_same_as_json(tmp_path, cli):
    written(tmp_path, a_step())

    code, out, _ = cli("inspect", "snapshot.pickle", "--json", "--device", "0")

    found = json.loads(out)
    assert 0 == code
    assert (20 * MiB, 32 * MiB, 3) == (found["peak_allocated_bytes"], found["peak_reserved_bytes"], found["peak_at"])
    assert (2, 2, None) == (found["allocations"], found["allocations_agreeing"], found["first_difference"])
    assert {"name": "forward", "bytes": 12 * MiB, "blocks": 1} == found["by_category"][0]
    assert [None, "expandable_segments:True"] == [row["alloc_conf"] for row in found["other_settings"]][:2]


def test_what_if_the_settings_were_others(tmp_path, cli):
    """In the order in which they are asked for; "" is torch's defaults."""
    events = [Event("alloc", key, 15 * MiB) for key in range(3)] + [Event("free", 0, 0), Event("alloc", 3, 11 * MiB)]
    written(tmp_path, snapshot(events, AllocatorSettings(expandable_segments=True)))

    confs = ("--alloc-conf", "", "--alloc-conf", "max_split_size_mb:20")
    code, out, _ = cli("inspect", "snapshot.pickle", *confs)

    names = [line.rpartition("MiB  ")[2] for line in out.splitlines() if line.startswith("      ")]
    assert 0 == code
    assert ["as recorded", "torch's defaults", "max_split_size_mb:20"] == names[:3]
    assert "4 of 4" in out


def test_what_if_the_device_were_smaller(tmp_path, cli):
    """With expandable segments 20 MiB suffice; with segments of 12 and 20 MiB they do not."""
    written(tmp_path, a_step())

    _, out, _ = cli("inspect", "snapshot.pickle", "--memory", "30MiB")

    assert "reserved with other settings, peak and at the end, of 30.0 MiB, replayed" in out
    assert "as recorded: 1 retry, out of memory at entry 3\n" in out
    assert "      20.0 MiB    20.0 MiB  expandable_segments:True\n" in out
    assert "garbage_collection_threshold:0.8: 1 retry, out of memory at entry 3" in " ".join(out.split())


def test_a_threshold_needs_the_memory_of_the_device(tmp_path, cli):
    written(tmp_path, a_step())

    _, out, _ = cli("inspect", "snapshot.pickle", "--alloc-conf", "garbage_collection_threshold:0.5")

    assert "garbage_collection_threshold:0.5: without effect" in out


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_the_figure_is_drawn_as_its_name_ends(tmp_path, cli, kind):
    written(tmp_path, a_step())

    code, _, err = cli("inspect", "snapshot.pickle", "-o", f"new/memory.{kind}")

    drawn = (tmp_path / "new" / f"memory.{kind}").read_bytes()
    assert 0 == code
    assert f"new/memory.{kind}: written" in err
    assert {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[kind] == drawn[: 5 if kind == "svg" else 4]


def an_answer(tmp_path, content):
    file = str(written(tmp_path, content))
    return inspect({"file": file, "device": None, "alloc_confs": None, "capacity": None}, lambda line: None)


def test_the_figure_shows_allocated_and_reserved_memory_over_the_trace(tmp_path):
    ax = Figure().add_subplot()

    plot_snapshot(an_answer(tmp_path, a_step()), ax)

    lines = {line.get_label(): line for line in ax.get_lines()}
    assert [0, 12, 12, 32, 32, 32, 32] == list(lines["reserved, measured"].get_ydata())
    assert ("entries of the trace", "allocated (MiB, replayed)") == (ax.get_xlabel(), ax.get_ylabel())
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert ["reserved, measured", "forward", "in the trace"] == texts


@pytest.mark.parametrize("settings", [AllocatorSettings(), AllocatorSettings(expandable_segments=True)])
def test_what_meftbench_predicted_is_not_called_measured(tmp_path, cli, settings):
    """A snapshot of `meftbench export`; its frames are operators and phases, and no lines of code."""
    events = [Event("phase", 0, 0, "forward"), Event("alloc", 1, 12 * MiB, "activations", "aten::mm")]
    written(tmp_path, snapshot(events, settings))

    code, out, _ = cli("inspect", "snapshot.pickle", "-q")

    assert 0 == code
    assert "measured" not in out
    assert "  peak requested              12.0 MiB  predicted\n" in out
    assert "as predicted by the same rules, replayed\n" in out
    assert "as torch chose them" not in out
    assert "  forward                     12.0 MiB  in 1 block\n" in out
    assert "no stack of what is alive at the peak has a line of Python outside of torch" in out


def test_a_snapshot_without_a_trace_says_so(tmp_path, cli):
    """What is there at the end is measured, and nothing is replayed."""
    written(tmp_path, a_snapshot([a_segment(0, a_block(12 * MiB, 11 * MiB + 5, "active_allocated"))]))

    code, out, _ = cli("inspect", "snapshot.pickle", "-q")

    text = " ".join(out.split())
    assert 0 == code
    assert "peak allocated 12.0 MiB measured, at the end" in text
    assert "there is no trace, so nothing is replayed" in text
    assert "no stacks are in the snapshot, so nothing is said of modules" in text
    assert "other settings" not in text
    assert "1,024.0 KiB of 1 request for 11.0 MiB, before the trace" in text


def test_what_is_not_modelled_is_said(tmp_path, cli):
    """Private pools; running out of memory; memory that was given back; other streams; blocks that wait at the end."""
    trace = [
        an_entry("segment_alloc", 0, 20 * MiB),
        an_entry("alloc", 0, 5 * MiB),
        an_entry("segment_free", 256 * MiB, 2 * MiB),
        an_entry("oom", 3 * MiB, 30 * MiB),
    ]
    graph = a_segment(0, a_block(5 * MiB, state="active_allocated"), a_block(15 * MiB), pool=(0, 1))
    waits = a_segment(128 * MiB, a_block(12 * MiB, state="active_awaiting_free"), stream=7)
    written(tmp_path, a_snapshot([graph, waits], trace))

    code, out, _ = cli("inspect", "snapshot.pickle", "-q")

    text = " ".join(out.split())
    assert 0 == code
    assert "MemPool) are not replayed: allocations in them 1, at the end 20.0 MiB, measured" in text
    assert "out of memory: 1, first for 30.0 MiB with 3.0 MiB free on the device, measured" in text
    assert "given back to the device: 1, measured; 0 taken for empty_cache()" in text
    assert "some blocks were freed and wait for another stream at the end; they count as free" in text
    assert "the trace begins with memory in use" in text
    assert "2 streams" in text


def test_where_the_rules_differ_is_said(tmp_path):
    trace = [an_entry("segment_alloc", 0, 20 * MiB), an_entry("alloc", 8 * MiB, 12 * MiB)]
    blocks = [a_block(8 * MiB), a_block(12 * MiB, state="active_allocated")]

    lines = snapshot_lines(an_answer(tmp_path, a_snapshot([a_segment(0, *blocks)], trace)))

    assert "  addresses                     0 of 1  as torch chose them, replayed" in lines
    assert "  the rules first differ from the device at entry 1" in lines


BAD = [
    (("none.pickle",), "none.pickle: does not exist; name a file that torch.cuda.memory._dump_snapshot wrote"),
    (("folder",), "folder: is a folder; name the file that torch.cuda.memory._dump_snapshot wrote"),
    (("text.pickle",), "text.pickle: is not a pickle; write it anew with torch.cuda.memory._dump_snapshot(FILE)"),
    (("cut.pickle",), "cut.pickle: is cut off: the pickle has no end; write it anew"),
    (("calls.pickle",), "calls.pickle: is not a plain snapshot: it names builtins.print, which was not run"),
    (("bomb.pickle",), "bomb.pickle: is damaged: it cannot be unpickled (MemoryError)"),
    (("list.pickle",), "list.pickle: is not a memory snapshot: the pickle is a list"),
    (
        ("newer.pickle",),
        "newer.pickle: entry 0 of device 0 has the action 'teleport', which is not known here; it may be",
    ),
    (
        ("gap.pickle",),
        "entry 0 of the trace (alloc at 0x7f0000000000) is in no segment: entries are missing",
    ),
    (("several.pickle",), "several.pickle: holds memory of the devices 0, 1; choose one with --device N"),
    (("good.pickle", "--device", "4"), "good.pickle: holds no memory of device 4; it has: 0"),
    (("good.pickle", "--alloc-conf", "expandable:True"), "unknown allocator setting 'expandable'"),
    (("good.pickle", "--memory", "24"), "--memory: '24' is not an amount of memory; write 412MiB"),
    (("good.pickle", "--memory", "0GiB"), "--memory: '0GiB' is no memory; write 24GiB"),
    (("good.pickle", "-o", "figure.gif"), "figure.gif: is not the name of a figure; end it in .png, .svg or .pdf"),
    (("good.pickle", "-o", "folder/a.png/b.svg"), "folder/a.png/b.svg: cannot be written"),
    (("good.pickle", "--device", "-1"), "--device"),
]


@pytest.mark.parametrize(("given", "line"), BAD, ids=[" ".join(given) for given, _ in BAD])
def test_what_is_wrong_is_one_line_and_exit_2(tmp_path, cli, given, line):
    """Whatever the file holds, no traceback."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_text("")
    (tmp_path / "text.pickle").write_text("a text")
    (tmp_path / "cut.pickle").write_bytes(pickle.dumps(a_step())[:200])
    (tmp_path / "calls.pickle").write_bytes(b"\x80\x02cbuiltins\nprint\n.")
    (tmp_path / "bomb.pickle").write_bytes(b"\x80\x04Nr\xff\xff\xff\x7f.")
    segment = a_segment(0, a_block(20 * MiB))
    written(tmp_path, [], "list.pickle")
    written(tmp_path, a_snapshot([], [an_entry("teleport", 0, 5)]), "newer.pickle")
    written(tmp_path, a_snapshot([], [an_entry("alloc", 0, 5)]), "gap.pickle")
    written(tmp_path, a_snapshot([segment, a_segment(0, a_block(20 * MiB), device=1)]), "several.pickle")
    written(tmp_path, a_step(), "good.pickle")

    code, out, err = cli("inspect", *given, "-q")

    assert 2 == code
    assert line in err
    assert 1 == len(err.splitlines())
    assert not out or "b.svg" in line


def test_nothing_of_it_imports_torch():
    """A snapshot is told in the time that it takes to read it."""
    modules = "meftbench.worker, meftbench.snapshots.inspection, meftbench.cli.inspect, meftbench.report.views.snapshot"
    code = f"import sys, {modules}; print(sorted({{'torch', 'pandas', 'matplotlib'}} & set(sys.modules)))"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "[]\n" == found.stdout
