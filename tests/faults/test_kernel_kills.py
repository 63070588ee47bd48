"""A real kill by the kernel, in a memory cgroup of its own: only root can make one."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from faulty import GREEDY

from builders import a_cell
from meftbench.records.store import load_run
from meftbench.runner import host, run_suite
from stand_in import FINE
from sweeps import WORKER, a_suite

FAULTY = (*WORKER[:-1], "faulty")
GROUPS = (("memory", "memory.limit_in_bytes"), ("", "memory.max"))  # of cgroup version 1, and 2


@pytest.fixture
def small_group():
    """The cgroup.procs file of a group whose processes may take 300 MiB together."""
    for controller, limit in GROUPS:
        group = Path("/sys/fs/cgroup", controller, f"meftbench-test-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(300 * 2**20))
            yield group / "cgroup.procs"
            return
        except OSError:
            continue
        finally:
            _removed(group)
    pytest.skip("no memory cgroup can be made here")


def _removed(group):
    """Remove the group, when what still runs in it has ended."""
    for _ in range(200):
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            return group.rmdir()
        except OSError:
            time.sleep(0.02)
    raise AssertionError(f"{group} is in use")


def within(group, folder):
    """Run cells of which the first two take all memory, in a process that has little itself."""
    group.write_text(str(os.getpid()))
    host.available_bytes = lambda: 2**40  # so that the kernel, and not the limit of the cell, is what ends it
    greedy = [a_cell(batch_size=size, seed=GREEDY) for size in (1, 2)]
    run_suite(a_suite(*greedy, a_cell(seed=FINE), on_oom="skip-larger"), folder, command=FAULTY)


def test_the_kernel_kills_a_cell_for_memory(small_group, tmp_path):
    """It is out of memory, by the kernel's count; larger cells are skipped, others run."""
    # Not a fork of this process: the memory of a test session may be more than the group has.
    code = "import sys, pathlib, test_kernel_kills as here; here.within(*map(pathlib.Path, sys.argv[1:]))"
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-c", code, str(small_group), str(tmp_path / "run")]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)

    assert 0 == ended.returncode, ended.stderr
    records = load_run(tmp_path / "run").records
    assert ["oom", "skipped", "ok"] == [record.status for record in records]
    assert records[0].status_detail["message"].startswith("killed by the kernel because the memory")
