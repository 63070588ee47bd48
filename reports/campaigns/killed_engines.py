"""What kills.py can kill of a run, by engine: processes of this machine, and nodes of clusters that it starts here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import psutil
from killed_run import ADDRESS

from meftbench.errors import INVALID, NOT_COMPARABLE

HERE = Path(__file__).resolve()
TESTS = HERE.parents[2] / "tests"
MARK = "MEFTBENCH_KILLED_RUN"  # variable: marks all processes of a run, or of a cluster, whoever their parent is
_APART = "import os, sys"  # what the process between a node and its worker runs (runner/node.py)


class Local:
    """Cells of this machine.

    victims: what there is to kill, by name.
    costly: those whose end may cost cells, `cell` one and the others all that run.
    refusals: exit codes with which a run may refuse to begin, in one line, since one of these was killed as it began.
    start_s, cell_s: seconds until the first cell, and that a cell takes, about: the span of random moments.
    most_between: records that are written between two kills, at most.
    outlived: whether cells outlive a runner that is killed, until it is resumed.
    """

    victims: ClassVar[tuple[str, ...]] = ("runner", "worker", "cell")
    costly: ClassVar[tuple[str, ...]] = ("worker", "cell")
    refusals: ClassVar[dict[str, set[int]]] = {"worker": {INVALID}}
    jobs: ClassVar[tuple[int, ...]] = (1, 2)
    start_s, cell_s, most_between, outlived = 0.5, 0.1, 6, False

    def begin(self, load: str, jobs: int, folder: Path) -> subprocess.Popen[str]:
        """Begin or resume a run of a load in a folder, as a process of its own."""
        name = type(self).__name__.lower()
        command = [sys.executable, str(HERE.with_name("killed_run.py")), name, load, str(jobs), str(folder)]
        paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {MARK: str(folder), "PYTHONPATH": os.pathsep.join(paths)}
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def there(self, runner: subprocess.Popen[str], folder: Path) -> dict[str, list[Any]]:
        """What there is to kill now, by name of victim."""
        found: dict[str, list[Any]] = {name: [] for name in self.victims}
        found["runner"] = [psutil.Process(runner.pid)] if runner.poll() is None else []
        for process in self.processes(folder):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if (name := self.what(process)) in found:
                    found[name].append(process)
        return found

    def what(self, process: psutil.Process) -> str:
        """Which victim a process of the run is; "" where it is none."""
        if not _is_worker(process):
            return ""
        parent = process.parent()
        return "cell" if parent is not None and _is_worker(parent) else "worker"

    def kill(self, victim: str, chosen: Any) -> bool:
        """Kill one of what `there` has found; False where it has ended by itself."""
        try:
            chosen.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            return False
        return True

    def processes(self, folder: Path) -> Iterator[psutil.Process]:
        """The processes of the run that have not ended."""
        return marked(str(folder))


class Slurm(Local):
    """Cells as jobs of a Slurm of two nodes. A job ends as its node does, which begins again at once."""

    victims = ("runner", "job", "worker", "cell", "node")
    costly = ("job", "worker", "cell", "node")
    refusals: ClassVar = {"job": {NOT_COMPARABLE}, "worker": {INVALID, NOT_COMPARABLE}, "node": {NOT_COMPARABLE}}
    jobs = (2, 4)
    start_s, cell_s, most_between, outlived = 4.0, 2.0, 3, True

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster

    def there(self, runner: subprocess.Popen[str], folder: Path) -> dict[str, list[Any]]:
        return super().there(runner, folder) | {"node": list(self._cluster.nodes)}

    def what(self, process: psutil.Process) -> str:
        return "job" if "submitit.core._submit" in process.cmdline() else super().what(process)

    def kill(self, victim: str, chosen: Any) -> bool:
        if victim != "node":
            return super().kill(victim, chosen)
        self._cluster.kill_node(chosen)
        self._cluster.start_node(chosen)
        return True


class Ray(Local):
    """Cells on a cluster of Ray of three nodes, whose head is not killed: it takes the runner with it. In place of a
    node that is killed another begins, for the runs to come."""

    victims = ("runner", "actor", "worker", "cell", "node")
    costly = ("actor", "worker", "cell", "node")
    refusals: ClassVar = {"actor": {NOT_COMPARABLE}, "worker": {INVALID, NOT_COMPARABLE}, "node": {NOT_COMPARABLE}}
    jobs = (1, 2, 3)
    start_s, cell_s = 3.0, 0.3

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster

    def there(self, runner: subprocess.Popen[str], folder: Path) -> dict[str, list[Any]]:
        nodes = sorted(self._cluster.worker_nodes, key=lambda node: node.node_id)
        return super().there(runner, folder) | {"node": nodes}

    def what(self, process: psutil.Process) -> str:
        return "actor" if " ".join(process.cmdline()).startswith("ray::Node") else super().what(process)

    def kill(self, victim: str, chosen: Any) -> bool:
        if victim != "node":
            return super().kill(victim, chosen)
        self._cluster.remove_node(chosen, allow_graceful=False)
        self._cluster.add_node(num_cpus=1)
        return True

    def processes(self, folder: Path) -> Iterator[psutil.Process]:
        """Actors, workers and cells: the other processes of the cluster stay."""
        for process in marked("ray"):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if self.what(process):
                    yield process
        yield from marked(str(folder))


def _is_worker(process: psutil.Process) -> bool:
    words = " ".join(process.cmdline())
    return "meftbench.worker" in words and _APART not in words


def marked(mark: str) -> Iterator[psutil.Process]:
    """The processes that run with the mark in their environment."""
    line = f"{MARK}={mark}\0".encode()
    for process in psutil.process_iter():
        with suppress(OSError, psutil.NoSuchProcess):
            content = Path(f"/proc/{process.pid}/environ").read_bytes()
            if line in content and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                yield process


ENGINES = ("local", "ray", "slurm")


@contextmanager
def engine_named(name: str, place: Path) -> Iterator[Local]:
    """The engine, with the cluster that it needs for as long as the block runs. place: a folder for its files."""
    with ExitStack() as stack:
        if name == "slurm":
            sys.path[:0] = [str(TESTS), str(TESTS / "engines")]
            from slurm_cluster import slurm_cluster

            yield Slurm(stack.enter_context(slurm_cluster(place / "slurm")))
        elif name == "ray":
            yield Ray(stack.enter_context(_ray_cluster()))
        else:
            yield Local()


@contextmanager
def _ray_cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    nodes_have = {MARK: "ray", "PYTHONPATH": os.pathsep.join(paths), "RAY_USAGE_STATS_ENABLED": "0"}
    before = dict(os.environ)
    os.environ.update(nodes_have)
    cluster = None
    try:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        os.environ[ADDRESS] = cluster.address
        yield cluster
    finally:
        os.environ.clear()
        os.environ.update(before)
        if cluster is not None:
            cluster.shutdown()
