import pytest

from meftbench.runner import process
from sweeps import WORKER, path_for_workers


@pytest.fixture(autouse=True)
def _the_stand_in_measures(tmp_path, monkeypatch):
    """Cells are measured by the stand-in, and the current folder is the test's own."""
    monkeypatch.setenv("PYTHONPATH", path_for_workers())
    monkeypatch.setattr(process, "WORKER", WORKER)
    monkeypatch.chdir(tmp_path)
