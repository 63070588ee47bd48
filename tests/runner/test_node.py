"""What runs on a machine of a cluster, here in this process: jobs and outcomes as JSON, and nothing left behind."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from fake_nvml import FakeNvml

import stand_in
from builders import a_cell
from meftbench.catalogue.profiles import find_profile
from meftbench.errors import UserError
from meftbench.plan.protocol import Protocol
from meftbench.plan.training import CELL_FOLDER
from meftbench.runner import gpus, node
from meftbench.runner.engine import COUNTED, Work
from meftbench.runner.job import Job
from meftbench.runner.same_versions import refuse_other_versions, version_reader
from sweeps import WORKER, alive, wait_until

WORK = Work(frozenset({COUNTED}), False, Protocol(), (), os.getcwd())


def a_job(tmp_path, behaviour=stand_in.FINE, **fields):
    cell = a_cell(seed=behaviour)
    paths = {"result": tmp_path / "x.json", "log": tmp_path / "x.log"}
    return Job(cell, 0, Protocol(), **paths, timeout=60.0, **fields)


@pytest.fixture
def started(monkeypatch, tmp_path):
    """A node that has not begun. Its worker, if it has one, ends with the test."""
    folder = tmp_path / "node"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    here = node.Node(WORKER)
    yield here
    here.close()


@pytest.fixture
def a_node(started):
    """A node that has begun, with its machine and slot."""
    machine, slot = node.begun_from(started.begin(node.begin_request(WORK, False, 3, 2)), "n1", "n1 cpu 0")
    return started, machine, slot


def test_an_outcome_comes_back_whole(a_node, tmp_path):
    """Metrics, observations and the log; the driver's paths are not the node's."""
    here, machine, slot = a_node
    job = a_job(tmp_path, stand_in.SILENT)

    answer, files = here.run(node.job_request(job))
    outcome = node.outcome_from(answer, job, machine)

    assert ("n1 cpu 0", 3, {COUNTED}) == (slot.name, slot.threads, slot.kinds)
    assert ("error", "NoResult") == (outcome.status, outcome.detail["type"])
    assert "last words\n" == job.log.read_text()
    assert machine is outcome.machine
    assert not outcome.lost
    assert {} == files

    fine = a_job(tmp_path)
    outcome = node.outcome_from(here.run(node.job_request(fine))[0], fine, machine)
    assert ("ok", 8000, "sdpa") == (
        outcome.status,
        outcome.metrics["activation_peak_bytes"].value,
        outcome.observed["attention_used"],
    )


def test_a_worker_that_dies_is_a_loss(a_node, tmp_path):
    """The job may be run elsewhere; the next one has another worker."""
    here, machine, _ = a_node
    psutil.Process(here._worker._process.pid).children()[0].kill()
    job = a_job(tmp_path)

    outcome = node.outcome_from(here.run(node.job_request(job))[0], job, machine)

    assert ("WorkerDied", True) == (outcome.detail["type"], outcome.lost)
    assert "ok" == node.outcome_from(here.run(node.job_request(job))[0], job, machine).status


def test_an_error_of_the_node_names_it():
    error = {"where": "worker", "what": "no torch", "cure": "see to it", "exit_code": 2}

    with pytest.raises(UserError, match=r"^n1: worker: no torch; see to it"):
        node.begun_from(json.dumps({"user_error": error}), "n1", "")


def test_a_cell_for_another_card_is_refused_on_the_node(a_node, tmp_path):
    here, machine, _ = a_node
    job = a_job(tmp_path)
    job = replace(job, cell=job.cell.model_copy(update={"device": "cuda:h100"}))

    with pytest.raises(UserError, match="device cuda:h100: no place") as raised:
        node.outcome_from(here.run(node.job_request(job))[0], job, machine)

    assert 4 == raised.value.exit_code


@pytest.mark.parametrize(("visible", "uuid"), [("1", "GPU-11"), ("GPU-00", "GPU-00"), (None, "GPU-00")])
def test_a_slot_with_a_gpu_names_it_by_its_uuid(monkeypatch, started, tmp_path, visible, uuid):
    """Ray and Slurm say which by its number, as the driver counts. The card decides which cells may run there."""
    card = find_profile("h100")
    found = gpus.read(FakeNvml(card.device, card.device))
    monkeypatch.setattr(gpus, "read", lambda: found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    work = replace(WORK, kinds=frozenset({"cuda", "cuda:h100", "cuda:a10"}))

    machine, slot = node.begun_from(started.begin(node.begin_request(work, True, 2, 1)), "n1", "n1 gpu 0")
    cell = a_cell(device="cuda:h100")
    job = replace(a_job(tmp_path), cell=cell)
    outcome = node.outcome_from(started.run(node.job_request(job))[0], job, machine)

    assert (uuid, {"cuda", "cuda:h100"}, None) == (slot.gpu, slot.kinds, slot.memory_bytes)
    assert ("ok", uuid) == (outcome.status, outcome.observed["gpu"])


def test_a_gpu_that_others_use_is_refused_with_the_name_of_its_machine(monkeypatch, started):
    found = gpus.read(FakeNvml("NVIDIA A10", busy=(7,)))
    monkeypatch.setattr(gpus, "read", lambda: found)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    request = node.begin_request(replace(WORK, kinds=frozenset({"cuda"})), True, 2, 1)

    with pytest.raises(UserError, match=r"^n1: GPU 0 \(NVIDIA A10\): is in use by process 7") as raised:
        node.begun_from(started.begin(request), "n1", "")

    assert 4 == raised.value.exit_code


def test_the_folder_and_the_worker_end_with_the_process(tmp_path):
    """Also where that process is killed together with its children, as Ray does."""
    script = (
        "import os, sys, tempfile, psutil; from test_node import *; tempfile.tempdir = sys.argv[1]\n"
        "n = node.Node(WORKER); n.begin(node.begin_request(WORK, False, 1, 1))\n"
        "family = psutil.Process().children(recursive=True)\n"
        "print(*[p.pid for p in family], flush=True)\n"
        "[child.kill() for child in psutil.Process().children()]; os.kill(os.getpid(), 9)"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )

    family = [int(pid) for pid in done.stdout.split()]
    assert 4 == len(family), done.stderr
    wait_until(lambda: not any(map(alive, family)))
    wait_until(lambda: not list(tmp_path.glob("meftbench-node-*")))


def test_kept_files_stay_in_the_folder_of_their_cell(tmp_path):
    node.keep_files({"best/adapter.safetensors": b"x"}, tmp_path / "cell")
    assert b"x" == (tmp_path / "cell" / "best" / "adapter.safetensors").read_bytes()
    for name in ("../other", "/etc/x", "best/../../x"):
        with pytest.raises(UserError, match="is no file in the folder of its cell"):
            node.keep_files({name: b""}, tmp_path / "cell")
    (tmp_path / "cell" / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="link: is a symbolic link"):
        node.keep_files({"link/x": b""}, tmp_path / "cell")
    assert ["cell"] == [file.name for file in tmp_path.iterdir()]


def test_files_that_a_cell_keeps_come_back(a_node, tmp_path):
    """Under the paths that they have in its folder, which is then empty on the node."""
    here, _, _ = a_node
    job = a_job(tmp_path, environment={CELL_FOLDER: str(tmp_path / "run" / "cells" / "x")})
    kept = here._folder / "cells" / f"{job.cell.cell_id}-0"
    (kept / "best").mkdir(parents=True)
    (kept / "best" / "weights").write_bytes(b"123")

    _, files = here.run(node.job_request(job))

    assert {"best/weights": b"123"} == files
    assert not kept.exists()


def test_machines_with_other_versions_are_refused():
    """In one line that names both; builds of one version are the same."""
    here = version_reader()()
    refuse_other_versions([("n1", here), ("n2", here | {"torch": f"{here['torch'].partition('+')[0]}+cu130"})])
    others = {"torch": ("2.1.0", r"torch 2\.1\.0, and this machine "), "code": ("1234", "a meftbench .* digest 1234")}
    others["meftbench"] = (None, r"meftbench \(not installed\)")
    for name, (version, said) in others.items():
        with pytest.raises(UserError, match=f"^node n2: has {said}") as raised:
            refuse_other_versions([("n1", here), ("n2", here | {name: version})])
        assert 4 == raised.value.exit_code
