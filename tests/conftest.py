"""For all tests: hypothesis judges answers, not seconds; processes that share the cores take one share of them each."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from meftbench.plan.factories import FOLDER
from own_models import MODELS

if "PYTEST_XDIST_WORKER" in os.environ:
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

settings.register_profile("meftbench", deadline=None)
settings.load_profile("meftbench")


@pytest.fixture(scope="session", autouse=True)
def few_collections():
    """Where many tests run, what torch and transformers have made on import is exempt from garbage collections, and
    these are rarer: they go through all of it many times while a step is traced."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import meftbench.measuring.requests  # noqa: F401 - torch and transformers

        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="session", autouse=True)
def worker_command(tmp_path_factory):
    """The command of the worker. Where many tests run, it asks for one that is forked from a process that has imported
    torch and transformers (prestarted.py). With `-n0` each is started as a user's is.
    """
    from meftbench.plan.protocol import Protocol
    from meftbench.runner import predictions, process

    if "PYTEST_XDIST_WORKER" not in os.environ or not hasattr(os, "pidfd_open"):  # of Linux
        yield process.WORKER
        return
    program, place = Path(__file__).with_name("prestarted.py"), tmp_path_factory.mktemp("workers") / "socket"
    environment = process.worker_environment(Protocol(), 1, os.environ)
    command = (sys.executable, "-I", str(program), "client", str(place))
    with (
        subprocess.Popen([sys.executable, str(program), "serve", str(place)], stdin=subprocess.PIPE, env=environment),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(process, "WORKER", command)
        patch.setattr(predictions, "ONCE", (*command, "--once"))
        yield command


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


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder, with the package `mine` in it; what is imported from it is forgotten afterwards."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("")
    (tmp_path / "mine" / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), [*sys.path]
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def allowed(here, monkeypatch):
    """As a worker is told."""
    monkeypatch.setenv(FOLDER, str(here))
    return here
