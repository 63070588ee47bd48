"""Pictures are written in full or not at all."""

import os

import pytest
from matplotlib.figure import Figure

from meftbench.report.figures.picture import Picture


def test_a_picture_that_could_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    """The disk is full while the PNG is written: the old PNG is there, and nothing half-written."""
    (tmp_path / "memory.png").write_bytes(b"old")
    full = iter([None])

    def fsync(_):
        if next(full, "full"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left on device"):
        Picture("memory", "Memory", "an empty figure", Figure).write(tmp_path)

    assert b"old" == (tmp_path / "memory.png").read_bytes()
    assert ["memory.png", "memory.svg"] == sorted(os.listdir(tmp_path))
