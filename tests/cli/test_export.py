"""`meftbench export`: a predicted step as torch's memory snapshot, and as a figure."""

from __future__ import annotations

import pickle

import pytest

from meftbench.plan.cell import Cell
from meftbench.plan.profiles import find_profile
from meftbench.report.timeline import timeline_picture

TINY = {"model": "bert-tiny@random", "batch_size": 2, "sequence_length": 16}
SHAPE = ("--batch-size", "2", "--sequence-length", "16", "--profile", "t4")


def test_the_snapshot_is_what_the_viewer_of_torch_reads(tmp_path, cli):
    """torch's own reader turns it into a page; the segments at the end are those of the allocator."""
    from torch.cuda import _memory_viz

    file = tmp_path / "new" / "cell.pickle"

    code, out, err = cli("export", "bert-tiny@random", "lora", *SHAPE, "-o", file)

    assert (0, f"{file}: drop it on https://pytorch.org/memory_viz\n") == (code, out)
    assert "predicting bert-tiny@random/lora/b2/s16 on Tesla T4" in err
    found = pickle.loads(file.read_bytes())
    assert {"alloc", "free_completed"} <= {entry["action"] for entry in found["device_traces"][0]}
    assert sum(segment["total_size"] for segment in found["segments"]) > 2**20
    assert "<html" in _memory_viz.trace_plot(found)


def test_the_figure_is_written_twice(tmp_path, cli):
    """As PNG and SVG beside each other, whatever ending the name has."""
    code, out, _ = cli(
        "export", "bert-tiny@random", "meft1", *SHAPE, "--format", "timeline", "-o", tmp_path / "step.png", "-q"
    )

    assert (0, f"{tmp_path / 'step.png'} and step.svg: written\n") == (code, out)
    assert (tmp_path / "step.png").stat().st_size > 1000
    assert "<svg" in (tmp_path / "step.svg").read_text()


@pytest.mark.parametrize("method", ["full", "lora", "meft1-exact"])
def test_the_timeline_is_the_counters_step(method):
    """Peak, level between steps, gradients and the optimizer's state, to the byte; points change no peak."""
    from meftbench.prediction.predict import predict
    from meftbench.prediction.timeline import timeline_of

    found = predict(Cell.of(method, **TINY), find_profile("t4"))
    observed = found.measured[-1]

    for points in (10**6, 50):
        told = timeline_of(found.events, found.step_from, points)
        totals = [sum(level) for level in zip(*told["levels"].values(), strict=True)]
        assert observed.peak.total == max(totals)
        assert ["forward", "backward", "optimizer", "end"] == [name for name, _ in told["phases"]]
    at_peak = {kind: levels[totals.index(max(totals))] for kind, levels in told["levels"].items()}
    assert observed.peak.breakdown["optimizer"] == at_peak["optimizer"]
    assert observed.peak.breakdown["parameters"] == at_peak["parameters"]
    assert 52 >= len(told["at"])


def test_the_figure_stacks_what_is_alive():
    """Categories without bytes are left out, the peak and the phases are named."""
    told = {
        "at": [0, 1, 2],
        "levels": {"parameters": [4, 4, 4], "activations": [0, 8, 0], "gradients": [0, 0, 0], "buffers": [0] * 3}
        | {name: [0] * 3 for name in ("inputs", "other", "optimizer", "temporaries")},
        "phases": [["forward", 0], ["backward", 1], ["end", 2]],
    }
    answer = {"label": "m/lora/b1/s1", "device": "a GPU", "peak_allocated_bytes": 12, "timeline": told}

    picture = timeline_picture(answer)

    (ax,) = picture.figure.axes
    assert ["parameters", "activations"] == [text.get_text() for text in ax.get_legend().get_texts()]
    assert {"forward", "backward"} < {text.get_text() for text in ax.texts}
    assert "on a GPU, predicted" in picture.alt
