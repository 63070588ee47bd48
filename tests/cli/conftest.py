import pytest

from meftbench.runner import process
from sweeps import WORKER, path_for_workers


@pytest.fixture(autouse=True)
def _the_stand_in_measures(tmp_path, monkeypatch):
    """Cells are measured by the stand-in, and the current folder is the test's own."""
    monkeypatch.setenv("PYTHONPATH", path_for_workers())
    monkeypatch.setattr(process, "WORKER", WORKER)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cli(capfd):
    """Run the command line in this process: exit code, stdout, stderr."""
    from meftbench.cli import main

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return ended.value.code, captured.out, captured.err

    return run
