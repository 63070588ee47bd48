"""What Slurm says of jobs that leave no result, by stand-ins for its commands, and for submitit, whose jobs run in this
process. tests/engines/test_slurm_engine.py has a real Slurm."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from builders import a_cell
from meftbench.errors import NOT_COMPARABLE, UserError
from meftbench.runner import Noted, run_suite, slurm_engine, slurm_jobs
from meftbench.runner.slurm_engine import SlurmEngine
from sweeps import WORKER, a_suite, statuses


class Job:
    def __init__(self, number):
        self.job_id = f"7_{number}"

    def stderr(self):
        return "slurmstepd: error: ***\n"

    def cancel(self, check):
        raise AssertionError("a job that has ended is not cancelled")


class Executor:
    """states: how the next jobs of cells end; those that complete run here.  refusals: of the next submissions.
    arrays: their sizes.  parameters: all.  queue: the file that squeue prints."""

    states: list[str]
    refusals: list[str]
    arrays: list[int]
    parameters: list[dict]
    queue: Path

    def __init__(self, folder, cluster):
        assert "slurm" == cluster

    def update_parameters(self, **parameters):
        Executor.parameters.append(parameters)

    def submit_array(self, calls):
        if Executor.refusals:
            raise RuntimeError(Executor.refusals.pop(0))
        Executor.arrays.append(len(calls))
        return [self.ended(number, call) for number, call in enumerate(calls)]

    def ended(self, number, call):
        describes_node = len(Executor.arrays) == 1
        state = Executor.states.pop(0) if Executor.states and not describes_node else "COMPLETED"
        if state == "COMPLETED":
            call()
        Executor.queue.write_text(f"7_{number}|{state}\n")
        return Job(number)


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """A machine with Slurm's commands."""
    Executor.states, Executor.refusals, Executor.arrays, Executor.parameters = [], [], [], []
    Executor.queue = tmp_path / "queue.txt"
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=Executor))
    monkeypatch.setattr(slurm_jobs, "STATE_SECONDS", 0.0)
    monkeypatch.setattr(slurm_engine, "LOOK_SECONDS", 0.01)
    told = tmp_path / "scancel.txt"
    scripts = {
        "sbatch": "exit 1",
        "srun": "exit 1",
        "scancel": f'echo "$@" >> {told}',
        "squeue": f"cat {Executor.queue}",
    }
    commands(tmp_path / "bin", monkeypatch, **scripts)
    return told


def commands(folder, monkeypatch, **scripts):
    """Programs of these names that run lines of sh, before those that are installed."""
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def run_on(folder, suite, jobs=8, **options):
    events = []
    engine = SlurmEngine({"partition": "gpu", "cpus_per_task": "4"}, jobs, command=WORKER)
    return run_suite(suite, folder, engine=engine, on_event=events.append, **options), events


def test_all_that_is_given_is_one_array(slurm, tmp_path):
    """With the options of the user, and the time that the protocol allows."""
    suite = a_suite(*(a_cell(batch_size=n) for n in (1, 2, 3)), timeout=3600.0)

    run, _ = run_on(tmp_path / "run", suite)

    assert ["ok"] * 3 == statuses(run)
    assert [1, 3] == Executor.arrays
    given = Executor.parameters[-1]
    assert ({"partition": "gpu"}, 4) == (given["slurm_additional_parameters"], given["cpus_per_task"])
    assert 71 == Executor.parameters[-1]["timeout_min"]
    assert {4} == {record.cell["threads"] for record in run.records}
    assert slurm.read_text().startswith("--name=meftbench-")


def test_a_job_whose_node_failed_is_submitted_once_more(slurm, tmp_path):
    Executor.states = ["NODE_FAIL"]

    run, events = run_on(tmp_path / "run", a_suite())

    assert ["ok"] == statuses(run)
    assert "NodeLost" == run.records[0].status_detail["retried_after"]["type"]
    [note] = [event.text for event in events if isinstance(event, Noted)]
    assert "its Slurm job 7_0 ended as NODE_FAIL" in note


@pytest.mark.parametrize(
    ("state", "status", "kind"),
    [
        ("TIMEOUT", "timeout", "Timeout"),
        ("OUT_OF_MEMORY", "oom", "Killed"),
        ("CANCELLED by 1000", "error", "NoResult"),
        ("FAILED", "error", "NoResult"),
        ("COMPLETED ", "error", "NoResult"),
    ],
)
def test_how_slurm_ended_a_job_is_how_its_cell_ended(slurm, tmp_path, state, status, kind):
    Executor.states = [state]

    run, _ = run_on(tmp_path / "run", a_suite())

    [record] = run.records
    assert (status, kind) == (record.status, record.status_detail["type"])
    assert "slurmstepd: error: ***" in record.status_detail["message"]


def test_two_failures_of_nodes_are_recorded(slurm, tmp_path):
    Executor.states = ["NODE_FAIL", "BOOT_FAIL"]

    run, _ = run_on(tmp_path / "run", a_suite())

    assert ("error", "NodeLost") == (run.records[0].status, run.records[0].status_detail["type"])


def test_a_controller_that_is_away_is_waited_for_and_that_is_said_once(slurm, tmp_path, capsys):
    Executor.refusals = ["sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect)"] * 2

    run, _ = run_on(tmp_path / "run", a_suite())

    assert ["ok"] == statuses(run)
    assert "meftbench: waiting for Slurm's controller, which does not answer\n" == capsys.readouterr().err


def test_what_sbatch_refuses_is_one_line(slurm, tmp_path):
    Executor.refusals = ["sbatch: error: invalid partition\nsbatch: error: Batch job submission failed"]

    with pytest.raises(UserError, match=r"sbatch refuses: invalid partition Batch job s") as refused:
        run_on(tmp_path / "run", a_suite())

    assert NOT_COMPARABLE == refused.value.exit_code
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["job_name", "output", "ntasks", "array"])
def test_what_jobs_are_found_by_is_not_the_users_to_give(slurm, tmp_path, name):
    """A resumed run would cancel all jobs of that name; results would be another's."""
    with pytest.raises(UserError, match=f"^--slurm: {name}: is meftbench's to set"):
        run_suite(a_suite(), tmp_path / "run", engine=SlurmEngine({name: "1"}, command=WORKER))


def test_options_are_those_of_sbatch(slurm, tmp_path):
    """Any that it has, not those alone that submitit knows; without a value, too."""
    options = {"reservation": "friday", "exclusive": "", "cpus_per_task": "2", "time": "30"}

    run_suite(a_suite(), tmp_path / "run", engine=SlurmEngine(options, command=WORKER))

    for given in Executor.parameters:
        assert 2 == given["cpus_per_task"]
        assert {"reservation": "friday", "exclusive": True, "time": "30"} == given["slurm_additional_parameters"]


def test_what_sbatch_warns_of_is_shown(slurm, tmp_path, monkeypatch, capsys):
    submit = Executor.submit_array
    warned = lambda *arguments: print("sbatch: warning: half used", file=sys.stderr) or submit(*arguments)  # noqa: E731
    monkeypatch.setattr(Executor, "submit_array", warned)

    run_on(tmp_path / "run", a_suite())

    assert "sbatch: warning: half used\n" in capsys.readouterr().err


def test_results_are_not_left_through_a_link(slurm, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "logs" / "slurm").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(UserError, match="slurm: is a symbolic link"):
        run_on(tmp_path / "run", a_suite())

    assert [] == os.listdir(tmp_path / "elsewhere")


@pytest.fixture
def leaves(slurm, monkeypatch):
    """Makes jobs of cells leave bytes in place of their results."""
    leave = slurm_engine._leave

    def make(content):
        def left(result, said):
            leave(result, said)
            if "answer" in said:
                Path(result).write_bytes(content)

        monkeypatch.setattr(slurm_engine, "_leave", left)

    return make


@pytest.mark.parametrize("content", [b"", b"null", b'{"begun": ', b"\xff", b"[" * 100_000])
def test_a_result_that_cannot_be_read_is_an_error_of_its_cell(leaves, tmp_path, content):
    """Whatever another program leaves in its place."""
    leaves(content)

    run, _ = run_on(tmp_path / "run", a_suite())

    assert [("error", "NoResult")] == [(r.status, r.status_detail["type"]) for r in run.records]


@pytest.mark.parametrize("content", [b"{}", b'{"begun": "{}", "host": 3}', b'{"begun": [], "answer": null}'])
def test_a_result_without_its_machine_ends_the_run(leaves, tmp_path, content):
    """Where it was made is not known."""
    leaves(content)

    with pytest.raises(UserError, match="its answer cannot be read") as ended:
        run_on(tmp_path / "run", a_suite())

    assert NOT_COMPARABLE == ended.value.exit_code


# --- clusters with and without accounts ---


@pytest.fixture
def slurm_says(tmp_path, monkeypatch):
    """Makes squeue and sacct print lines; None: they fail."""
    monkeypatch.setattr(slurm_jobs, "STATE_SECONDS", 0.0)

    def make(squeue, sacct=None):
        texts = {"squeue": squeue, "sacct": sacct}
        scripts = {name: "exit 1" if text is None else f"echo '{text}'" for name, text in texts.items()}
        commands(tmp_path / "bin", monkeypatch, **scripts)

    return make


JOB = SimpleNamespace(job_id="7_1")


@pytest.mark.parametrize(
    ("squeue", "sacct", "second"),
    [
        ("7_1|RUNNING", None, ""),
        ("7_1|PENDING", "7_1|CANCELLED by 0", ""),
        ("7_1|TIMEOUT", None, "TIMEOUT"),
        ("8|RUNNING", "7_1|CANCELLED by 1000\n7_1.batch|FAILED", "CANCELLED"),
        ("", "7_1|OUT_OF_MEMORY", "OUT_OF_MEMORY"),
        ("", "7_1|COMPLETING", ""),
        ("", None, "UNKNOWN"),
        (None, None, ""),
    ],
)
def test_a_job_is_over_where_slurm_says_so_twice(slurm_says, squeue, sacct, second):
    """squeue knows best; a job that neither command knows is lost; a controller that does not answer says nothing."""
    slurm_says(squeue, sacct)
    states = slurm_jobs.SlurmStates()

    assert ["", second] == [states.ended(JOB), states.ended(JOB)]


def test_a_preempted_job_that_is_queued_again_is_not_over(slurm_says):
    states, answers = slurm_jobs.SlurmStates(), []
    for state in ("PREEMPTED", "PENDING", "RUNNING", "PREEMPTED", "PREEMPTED"):
        slurm_says(f"7_1|{state}")
        answers.append(states.ended(JOB))

    assert ["", "", "", "", "PREEMPTED"] == answers


def test_a_machine_of_no_cluster_is_one_line(slurm, tmp_path):
    """As sbatch 22.05 says it where no file and no record of DNS names a cluster."""
    Executor.refusals = [
        "sbatch: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
        "sbatch: error: fetch_config: DNS SRV lookup failed\n"
        "sbatch: fatal: Could not establish a configuration source"
    ]

    with pytest.raises(UserError) as caught:
        run_on(tmp_path / "run", a_suite(a_cell()))

    said = "Slurm is not configured on this machine; run this on a login node of the cluster"
    assert f"--engine slurm: {said}" == str(caught.value)
    assert NOT_COMPARABLE == caught.value.exit_code
