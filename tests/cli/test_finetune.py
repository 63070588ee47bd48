"""`meftbench finetune`: one command from data to a score; what is wrong is one line, and nothing is lost."""

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest

from meftbench.records.store import load_run
from meftbench.runner import process
from stand_in import ENDLESS, FINE, WRONG
from sweeps import WORKER, alive, statuses, told, wait_until
from trainings import MODEL_DIR, NO_DROPOUT, TINY, a_classification, a_regression

ARGUMENTS = ("finetune", "bert-tiny@random", "lora")


@pytest.fixture
def real_worker(monkeypatch, worker_command):
    """Cells are trained indeed."""
    monkeypatch.setattr(process, "WORKER", worker_command)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def tiny(task, method="lora", *more):
    """The command line of a training that takes a second."""
    config = [part for key, value in (TINY | NO_DROPOUT).items() for part in ("--config", f"{key}={value}")]
    shape = ("--tokenizer", MODEL_DIR, "--batch-size", "4", "--max-steps", "2", "--evaluations", "1")
    return ("finetune", "minilm@random", method, task, *config, *shape, "--out", "run", *more)


# --- end to end ---


def test_from_data_to_a_score(cli, tmp_path, real_worker, monkeypatch):
    """It prints score, memory and time; `show` says how to train one of them again, and `check` holds it to a score."""
    monkeypatch.setenv("COLUMNS", "80")
    task = a_classification(tmp_path / "my mood")

    code, out, err = cli(*tiny(task, "meft1-exact", "--seed", "0,1", "--learning-rate", "1e-3", "--keep"))

    assert 0 == code, err
    said = " ".join(out.split())
    assert "Score: accuracy on validation, mean ± standard deviation over seeds 0, 1, measured." in said
    assert "2 cells: 2 ok" in out
    assert max(map(len, out.splitlines())) <= 80
    kept = [path.name for cell in (tmp_path / "run" / "cells").iterdir() for path in cell.iterdir()]
    assert ["best"] * 2 == kept

    code, out, err = cli("show", "run", "*0.001*seed1")
    said = " ".join(out.split())
    assert "The training score" in said
    assert "Validation during the training step 2" in said
    again = shlex.split(out.partition("again: meftbench ")[2])
    assert ["finetune", "minilm@random", "meft1-exact", task] == again[:4]
    assert ["--learning-rate", "0.001", "--seed", "1"] == again[-4:]

    (tmp_path / "budgets.yaml").write_text('schema: 1\nbudgets: [{match: "*", metric: score, min: 1.1}]\n')
    code, out, err = cli("check", "run", "--budget", "budgets.yaml")
    assert (1, True) == (code, "under min 1.1" in out)


# --- the sweep, by the stand-in ---


def test_json(cli, tmp_path):
    """One object on stdout, records and all."""
    code, out, _ = cli(*ARGUMENTS, a_classification(tmp_path / "mood"), "--json", "--learning-rate", "1e-3,1e-2")

    content = json.loads(out)
    assert (0, {"ok": 2}) == (code, content["counts"])
    assert ["counted", "counted"] == [record["cell"]["device"] for record in content["records"]]


def test_what_is_said_reaches_the_cell(cli, tmp_path):
    task = a_classification(tmp_path / "mood")
    options = "--epochs 2 --train-examples 8 --evaluation-examples 4 --evaluations 3 --patience 2 --micro-batch-size 2"

    cli(
        *ARGUMENTS,
        task,
        *options.split(),
        "--batch-size",
        8,
        "--set",
        "rank=4",
        "--precision",
        "bf16-autocast",
        "--out",
        "run",
    )

    (cell,) = (record.cell for record in load_run("run").records)
    said = {"epochs": 2.0, "train_examples": 8, "evaluation_examples": 4, "evaluations": 3, "patience": 2}
    assert said.items() <= cell["training"].items()
    assert (8, 2, "bf16-autocast", 16) == tuple(
        cell[name] for name in ("batch_size", "micro_batch_size", "precision", "sequence_length")
    )
    assert 4 == cell["method_params"]["rank"]


def test_a_fault_is_a_line_and_resume_tries_again(cli, tmp_path, told_by_cells):
    """Exit 3, without a traceback; what ended well is not done again, and another run does not go into its folder."""
    task = a_classification(tmp_path / "mood")
    line = (*ARGUMENTS, task, "--seed", f"{FINE},{WRONG}", "--out", "run")

    code, out, err = cli(*line)
    codes = [cli(*line)[0], cli(*line, "--resume")[0]]

    assert [3, 2, 3] == [code, *codes]
    assert "seed5: error (model: has no weights; download it)" in " ".join(out.split())
    assert "Traceback" not in out + err
    assert 3 == len(told_by_cells())


@pytest.fixture
def told_by_cells(tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN_TOLD", str(tmp_path / "told.txt"))
    return lambda: told(tmp_path / "told.txt")


def test_an_interrupted_training_says_how_to_go_on(tmp_path):
    """Ctrl-C: exit 130, and a line that does what it says when it is pasted."""
    task = a_regression(tmp_path / "a mood's")
    line = [*ARGUMENTS, task, "--seed", f"{FINE},{ENDLESS}", "--learning-rate", "1e-3", "--out", "the run", "--quiet"]
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    program += f"from meftbench.runner import process; process.WORKER = {WORKER!r};"
    program += "from meftbench.cli import main; main(sys.argv[1:])"
    environment = os.environ | {"STAND_IN_TOLD": str(tmp_path / "told.txt")}
    started = subprocess.Popen(
        [sys.executable, "-c", program, *line], env=environment, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: len(told(tmp_path / "told.txt")) == 2)

    started.send_signal(signal.SIGINT)
    _, err = started.communicate()

    assert 130 == started.returncode
    assert err.endswith(" goes on\n")
    assert 1 == err.count("\n")
    pasted = shlex.split(err.partition("`")[2].partition("`")[0])
    assert sorted(["meftbench", *line, "--resume"]) == sorted(pasted)
    assert ["meftbench", *ARGUMENTS, task] == pasted[:5]
    assert ["ok"] == statuses(load_run("the run"))
    wait_until(lambda: not any(alive(int(pid)) for _, pid in told(tmp_path / "told.txt")))


# --- bad input: one line, exit 2, nothing written ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("lora", "rt"), "unknown task 'rt'; did you mean 'rte'?"),
        (("lora", "./nowhere"), "no task folder 'nowhere'; check the path"),
        (("lora", "."), "has no task.yaml and no images; write kind, texts and label into a task.yaml there"),
        (("houlsbi", "rte"), "unknown method 'houlsbi'; did you mean 'houlsby'?"),
        (("lora", "mnist"), "needs a head image_classification, and bert has none"),
        (("lora", "rte", "--seed", "x"), "--seed: 'x' is not a list of numbers; write 0 or 0,1,2"),
        (("lora", "rte", "--seed", "-1"), "--seed: '-1' is not a list of numbers"),
        (("lora", "rte", "--learning-rate", ""), "--learning-rate: '' is not a list of numbers; write 5e-4"),
        (("lora", "rte", "--learning-rate", "0"), "input should be greater than 0"),
        (("lora", "rte", "--learning-rate", "inf"), "input should be a finite number"),
        (("lora", "rte", "--epochs", "0"), "training.epochs: input should be greater than 0"),
        (("lora", "rte", "--micro-batch-size", "5"), "micro_batch_size 5 does not divide batch_size 16"),
        (("lora", "rte", "--sequence-length", "9999"), "is longer than the 512 positions"),
        (("lora", "rte", "--precision", "fp8"), "unknown precision 'fp8'"),
        (("lora", "rte", "--device", "predicted:h100"), "a training cannot be predicted"),
        (("lora", "rte", "--timeout", "soon"), "timeout"),
        (("lora", "rte", "--config", "layers"), "--config"),
    ],
)
def test_bad_input(cli, tmp_path, arguments, said):
    code, out, err = cli("finetune", "bert-tiny@random", *arguments)

    assert (2, "", 1) == (code, out, err.count("\n")), err
    assert said in err
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["we ird, na=me/größe", "-x"])
def test_folders_of_any_name(cli, tmp_path, name):
    """The name of a task is a path, whatever is in it."""
    a_classification(tmp_path / name)

    code, out, err = cli(*ARGUMENTS, f"./{name}", "--learning-rate", "1e-3,1e-2", "--seed", "0,1", "--out", "run")

    assert 0 == code, err
    assert "0.001 of 2" in out
