"""What a process prints is kept in a file that stays small while it prints, and ends with its last words."""

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meftbench import kept_output
from meftbench.kept_output import ROOM, KeptOutput


def printed_to(output, *parts):
    """Print each part, and take it as a server does; then end as a process does. The sizes the file had."""
    sizes = []
    for part in parts:
        while part:
            part = part[os.write(output.write_end, part[:50_000]) :]
            assert output.take()
            sizes.append(os.fstat(output._file).st_size)
    output.begun()
    return sizes


def test_a_short_output_is_kept_whole(tmp_path):
    output = KeptOutput(str(tmp_path / "logs" / "a.log"))

    printed_to(output, b"first\n", b"last words\n")

    assert not output.take()
    output.end()
    assert b"first\nlast words\n" == (tmp_path / "logs" / "a.log").read_bytes()


def test_the_file_is_cut_while_the_process_prints(tmp_path):
    """It never has more than twice what is kept, and holds at least the last mebibyte."""
    lines = b"".join(b"%09d\n" % number for number in range(5 * ROOM // 10))
    output = KeptOutput(str(tmp_path / "a.log"))

    sizes = printed_to(output, lines)

    output.end()
    assert max(sizes) <= 2 * ROOM
    content = (tmp_path / "a.log").read_bytes()
    assert len(content) >= ROOM
    assert lines.endswith(content)


@given(parts=st.lists(st.binary(max_size=40), max_size=30), room=st.integers(1, 50))
def test_however_it_is_printed_the_file_is_the_end_of_it(tmp_path_factory, parts, room):
    """Of any size, also where it is cut again and again."""
    log = tmp_path_factory.mktemp("logs") / "a.log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_output, "ROOM", room)
        output = KeptOutput(str(log))
        sizes = printed_to(output, *parts)
        output.end()

    everything = b"".join(parts)
    assert everything.endswith(log.read_bytes())
    assert log.stat().st_size >= min(room, len(everything))
    assert all(size <= 2 * room for size in sizes)


def test_what_was_printed_before_the_end_is_kept_and_later_words_are_not_waited_for(tmp_path):
    """A process that the cell has started may hold the pipe open for ever."""
    output = KeptOutput(str(tmp_path / "a.log"))
    os.write(output.write_end, b"last words")

    output.end()

    assert b"last words" == (tmp_path / "a.log").read_bytes()
    with pytest.raises(BrokenPipeError):
        os.write(output.write_end, b"more")
    output.begun()


@pytest.mark.parametrize("place", ["link", "folder"])
def test_a_file_that_cannot_be_opened_costs_the_output_alone(tmp_path, place, capsys):
    """It is said, and nothing is written through a link."""
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "folder").mkdir()
    output = KeptOutput(str(tmp_path / place))

    printed_to(output, b"x" * 100)

    assert stat.S_ISCHR(os.fstat(output._file).st_mode)
    output.end()
    assert b"precious" == (tmp_path / "precious").read_bytes()
    assert f"{tmp_path / place}: cannot be written" in capsys.readouterr().err
