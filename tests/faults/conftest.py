import os
import subprocess
from pathlib import Path

import pytest

from sweeps import path_for_workers


@pytest.fixture(autouse=True)
def _workers_find_what_is_faulty(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), path_for_workers()]))


@pytest.fixture
def told_file(tmp_path, monkeypatch):
    """Where cells tell which process measures them."""
    file = tmp_path / "told.txt"
    monkeypatch.setenv("STAND_IN_TOLD", str(file))
    return file


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of so many KiB at a folder, which only root can."""
    mounted = []

    def mount(kib: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
