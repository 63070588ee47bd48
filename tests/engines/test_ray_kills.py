"""kill -9 of the driver, an actor of Ray, its worker, a cell or a whole node at random: nothing lost, repeated, torn or
left."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from builders import a_cell
from meftbench.records.store import RECORDS, read_records
from meftbench.runner import run_suite
from stand_in import BRIEF
from sweeps import a_suite, alive, wait_until

pytest.importorskip("ray")

SUITE = a_suite(*(a_cell(batch_size=size, seed=BRIEF) for size in range(1, 41)))
VICTIMS = ("driver", "actor", "worker", "cell", "node")
DRIVER = """
import sys
from meftbench.runner import run_suite
from meftbench.runner.ray_engine import RayEngine
from sweeps import WORKER
from test_ray_kills import SUITE
run_suite(SUITE, sys.argv[2], engine=RayEngine(sys.argv[1], command=WORKER), resume=True)
"""


def begun(cluster, folder):
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    arguments = [sys.executable, "-c", DRIVER, cluster.address, str(folder)]
    return subprocess.Popen(arguments, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True)


def victims(seen):
    """The processes of the cluster, which this process has started, by what they are, apart from drivers and nodes.

    seen: takes all of them. Those that have gone in the meantime are left out.
    """
    found = {name: [] for name in VICTIMS}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            words = " ".join(process.cmdline())
            if words.startswith("ray::Node"):
                found["actor"].append(process)
            elif "--requests stand_in" in words and "import os, sys" not in words:
                parent = process.parent()
                of_worker = parent is not None and "import os, sys" not in " ".join(parent.cmdline())
                found["cell" if of_worker else "worker"].append(process)
    seen.update(process for processes in found.values() for process in processes)
    return found


def killed_often(cluster, tmp_path, seed, times):
    """How often each was killed. Each run is taken up until it has ended."""
    chance, counts, number = random.Random(seed), dict.fromkeys(VICTIMS, 0), 0
    seen = set()
    while sum(counts.values()) < times:
        folder = tmp_path / str(number)
        driver = begun(cluster, folder)
        before = read_records(folder / RECORDS)[0]
        victim, aimed = chance.choice(VICTIMS), None
        while driver.poll() is None and aimed is None:
            time.sleep(chance.uniform(0.0, 0.3))
            if len(read_records(folder / RECORDS)[0]) > len(before):  # the run goes on: some cells have ended
                nodes = sorted(cluster.worker_nodes, key=lambda node: node.node_id)
                chosen = {"driver": [driver], "node": nodes}.get(victim) or victims(seen)[victim]
                aimed = chance.choice(chosen) if chosen else None
        if aimed is not None and victim == "node":
            cluster.remove_node(aimed, allow_graceful=False)
            cluster.add_node(num_cpus=1)  # for the next run: this one goes on without
            counts[victim] += 1
        elif aimed is not None:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                os.kill(aimed.pid, signal.SIGKILL)
                counts[victim] += 1
        _, err = driver.communicate()
        assert driver.returncode == (-9 if victim == "driver" and aimed else 0), err
        found = read_records(folder / RECORDS)[0]
        assert before == found[: len(before)], "a finished record was lost, or changed"
        assert len(found) == len({record.cell_id for record in found}), "a cell has two records"
        statuses = [record.status for record in found]
        assert set(statuses) <= {"ok", "error"}
        # A cell that is killed itself is an error, as on one machine; whatever else is killed costs no cell.
        assert statuses.count("error") <= counts["cell"]
        if driver.returncode == 0:
            assert len(SUITE.cells) == len(found)
            run = run_suite(SUITE, folder, command=["false"], resume=True)
            assert len(SUITE.cells) == len(run.records)
            number += 1
    wait_until(lambda: not any(alive(process.pid) for process in seen))
    return counts


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_kills_at_random_moments_on_a_cluster(tmp_path, cluster):
    times = int(os.environ.get("KILLS", "6"))
    counts = killed_often(cluster, tmp_path, int(os.environ.get("KILLS_SEED", "7")), times)

    print(", ".join(f"{count} of {victim}" for victim, count in counts.items()))
    assert sum(counts.values()) >= times
