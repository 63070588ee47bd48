"""A real kill by the kernel, in a memory cgroup of its own: only root can make one."""

import multiprocessing
import os
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
            group.rmdir()
    pytest.skip("no memory cgroup can be made here")


def within(group, suite, folder):
    group.write_text(str(os.getpid()))
    host.available_bytes = lambda: 2**40  # so that the kernel, and not the limit of the cell, is what ends it
    run_suite(suite, folder, command=FAULTY)


def test_the_kernel_kills_a_cell_for_memory(small_group, tmp_path):
    """It is out of memory, by the kernel's count; larger cells are skipped, others run."""
    greedy = [a_cell(batch_size=size, seed=GREEDY) for size in (1, 2)]
    suite = a_suite(*greedy, a_cell(seed=FINE), on_oom="skip-larger")

    process = multiprocessing.get_context("fork").Process(target=within, args=(small_group, suite, tmp_path / "run"))
    process.start()
    process.join()

    records = load_run(tmp_path / "run").records
    assert ["oom", "skipped", "ok"] == [record.status for record in records]
    assert records[0].status_detail["message"].startswith("killed by the kernel because the memory")
