"""How much of a time the threads of a process waited for a core that others held."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meftbench.probes.cpu_wait import TASKS, CpuWait

BUSY = "while True: pass"


def written(folder: Path, threads):
    for thread, (ran, waited) in threads.items():
        (folder / thread).mkdir(parents=True, exist_ok=True)
        (folder / thread / "schedstat").write_text(f"{ran} {waited} 7\n")


def test_it_is_the_waiting_of_all_threads_since_the_start(tmp_path):
    written(tmp_path, {"1": (1000, 500), "2": (0, 0), "gone": (9, 9)})
    wait = CpuWait(tmp_path)
    (tmp_path / "gone" / "schedstat").unlink()
    written(tmp_path, {"1": (1600, 800), "2": (100, 0), "new": (200, 200)})

    assert wait.share().value == pytest.approx(500 / (900 + 500))


counts = st.tuples(st.integers(0, 10**12), st.integers(0, 10**12))


@given(st.dictionaries(st.sampled_from("abc"), counts), st.dictionaries(st.sampled_from("abc"), counts))
def test_it_is_a_share_or_absent(tmp_path_factory, before, grown):
    folder = tmp_path_factory.mktemp("tasks")
    written(folder, before)
    wait = CpuWait(folder)
    written(
        folder, {key: (before.get(key, (0, 0))[0] + r, before.get(key, (0, 0))[1] + w) for key, (r, w) in grown.items()}
    )

    share = wait.share()

    assert share.value is None or 0 <= share.value <= 1
    assert (share.value is None) == (share.absent is not None) == (sum(r for r, _ in grown.values()) == 0)


@pytest.mark.parametrize("content", ["", "1 2\n", "a b c\n"])
def test_what_a_system_does_not_say_is_absent(tmp_path, content):
    assert CpuWait(tmp_path / "none").share().value is None
    written(tmp_path, {"1": (1, 1)})
    (tmp_path / "1" / "schedstat").write_text(content)
    assert "does not say" in CpuWait(tmp_path).share().absent


@pytest.mark.skipif(not TASKS.is_dir() or not list(TASKS.glob("*/schedstat")), reason="no schedstat on this system")
def test_beside_busy_processes_on_one_core_most_of_the_time_is_waiting():
    """Held to one core with two others that never rest, the process gets about a third of it."""
    core, allowed = {min(os.sched_getaffinity(0))}, os.sched_getaffinity(0)
    found = []

    def work():
        os.sched_setaffinity(0, core)  # of this thread
        wait = CpuWait()
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        found.append(wait.share().value)

    others = [
        subprocess.Popen([sys.executable, "-c", BUSY], preexec_fn=lambda: os.sched_setaffinity(0, core)) for _ in "ab"
    ]
    try:
        time.sleep(0.2)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        for other in others:
            other.kill()
            other.wait()

    assert allowed == os.sched_getaffinity(0)
    assert found[0] > 0.3
