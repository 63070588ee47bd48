"""The bar shows itself, the count and the remaining time at any width, on one line."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from builders import a_cell, a_record, counted
from meftbench.cli.progress import Bar, Plain
from meftbench.runner import Ended, Noted, Started
from meftbench.runner.duration import Expected, Remaining, total

LONG = "llama-3.2-1b@random(attention_probs_dropout_prob=0.0,num_hidden_layers=8)"


def a_sweep(display, cells=37, seconds=100.0):
    """Tell `display` of a run of which three cells have ended."""
    records = [
        a_record(
            "oom" if n == 1 else "ok", {"activation_peak_bytes": counted(2**20)}, repeat=n, model=LONG, wall_s=seconds
        )
        for n in range(3)
    ]
    expectations = {(records[0].cell_id, n): Expected(seconds, is_same=True) for n in range(cells)}
    display.begin(total(list(expectations.values())), Remaining(expectations))
    for done, record in enumerate(records, start=1):
        display(Started(a_cell(model=LONG), record.repeat, done - 1, cells))
        display(Ended(record, done, cells))


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_bar_count_and_remaining_time_fit_the_width(width):
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    bar = Bar(verbose=False, console=console)
    a_sweep(bar)

    with console.capture() as captured:
        console.print(bar.progress.get_renderable())
    (line,) = captured.get().splitlines()

    assert {"━", "╸"} & {*line}
    assert " 3/37" in line
    assert "about 57 min left" in line
    assert len(line) <= width
    assert width < 80 or "2 ok  1 oom" in line


@pytest.mark.parametrize(
    ("width", "left", "shown"),
    [
        (76, "", "  1 ok  …-exact(tiles=16)+chunked_loss/b8/s128"),
        (80, "", "  1 ok  meft1-exact(tiles=16)+chunked_loss/b8/s128"),
        (80, "about 57 min left", "about 57 min left 1 ok  …16)+chunked_loss/b8/s128"),
    ],
)
def test_the_running_cell_is_told_by_its_method_and_shape(monkeypatch, width, left, shown):
    """The model is that of all cells; of a long method the end stands, which the shape follows."""
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    bar = Bar(verbose=False, console=console)
    bar.begin(total([]), Remaining({}))
    monkeypatch.setattr(bar.remaining, "text", lambda: left)
    bar(Ended(a_record(model=LONG), 1, 37))
    cell = a_cell(model=LONG, method="meft1-exact", method_params={"tiles": 16}, levers={"chunked_loss": True})
    bar(Started(cell, 0, 1, 37))

    with console.capture() as captured:
        console.print(bar.progress.get_renderable())
    (line,) = captured.get().splitlines()

    assert line.rstrip().endswith(shown)
    assert LONG[:12] not in line


def test_the_bar_says_first_how_long_it_will_take():
    file = io.StringIO()
    a_sweep(Bar(verbose=False, console=Console(width=80, file=file, color_system=None)))

    assert file.getvalue().startswith("37 cells, about 1.0 h (from 37 like cells measured on this machine)")


def test_a_log_has_a_line_a_cell_with_what_is_left(capsys):
    a_sweep(Plain(verbose=False))
    first, *cells = capsys.readouterr().err.splitlines()

    assert first.startswith("37 cells, about 1.0 h")
    assert cells[0].startswith("[ 1/37] ok")
    assert cells[-1].endswith("about 57 min left")


def test_a_log_does_not_count_seconds(capsys):
    a_sweep(Plain(verbose=False), cells=4, seconds=0.1)

    assert "left" not in capsys.readouterr().err


def test_notes_are_shown(capsys):
    Plain(verbose=False)(Noted("look here"))

    assert capsys.readouterr().err == "note: look here\n"
