"""`meftbench doctor --calibrate`: what it writes, that estimate takes it, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from meftbench.catalogue.operations import Operation, Operator, Work
from meftbench.catalogue.profiles import PROFILES, CpuProfile, find_device, find_profile
from meftbench.catalogue.speeds import Speeds
from meftbench.cli.estimate import lines, times
from meftbench.errors import UserError
from meftbench.prediction import calibration
from meftbench.prediction.calibration import measured_speeds
from meftbench.prediction.estimate import time_of

SPEEDS = {
    "calibrated": True,
    "threads": 2,
    "matrix": {"float32": {"rate": 1e11, "half": [4.0, 4.0, 8.0]}},
    "memory": {"elementwise": [[16384.0, 3e10], [1048576.0, 5e10]], "softmax": [[16384.0, 1e10]]},
    "fresh_bytes_per_s": 2e9,
    "launch_s": 1e-5,
    "asynchronous": False,
    "sources": ["all: measured by meftbench doctor --calibrate"],
}
H200 = {"device": "NVIDIA H200", "memory_bytes": 150_000_000_000, "compute_capability": "9.0", "multiprocessors": 132}


@pytest.fixture
def measuring(monkeypatch):
    """Answers in place of a worker that measures."""

    def answer(**fields):
        monkeypatch.setattr(
            "meftbench.runner.calibrate.ask", lambda *_, **__: {"device": "cpu", "speeds": SPEEDS} | fields
        )

    return answer


def test_what_is_measured_is_what_a_profile_takes(monkeypatch):
    """On this CPU, with few and small measurements."""
    monkeypatch.setattr(calibration, "_PRODUCTS", [(64, 64, 64), (64, 8, 64), (128, 64, 32)])
    monkeypatch.setattr(calibration, "_ATTENTIONS", [(1, 2, 16, 16), (1, 2, 32, 16)])
    monkeypatch.setattr(calibration, "_SIZES", [2**15, 2**17])
    monkeypatch.setattr(calibration, "_RING", 2**20)
    monkeypatch.setattr(calibration, "_FRESH_FROM", 2**21)
    lines = []

    found = measured_speeds(torch.device("cpu"), lines.append, budget=0.2)
    speeds = Speeds.model_validate(found)

    kinds = {
        "elementwise",
        "in place",
        "permuted",
        "reduction",
        "random",
        "normal",
        "gather",
        "softmax",
        "norm",
        "activation",
    }
    assert kinds == speeds.memory.keys()
    assert {"float32", "bfloat16", "float64"} == speeds.matrix.keys()
    assert torch.get_num_threads() == speeds.threads
    assert speeds.launch_s > 0
    assert 3 == len(lines)


def test_a_profile_of_this_cpu_is_written_and_predicts_a_step(cli, measuring):
    """Memory is that of the step's tensors, and time adds up; nothing in the file names a folder of this machine."""
    measuring()

    code, out, _ = cli("doctor", "--calibrate", "--out", "here.yaml", "--quiet")
    profile = find_device(str(Path("here.yaml").absolute()))
    shape = ("--batch-size", "2", "--sequence-length", "16", "--profile", "./here.yaml")
    estimated, answer, _ = cli("estimate", "bert-tiny@random", "lora+checkpoint", *shape, "--json")
    found = json.loads(answer)

    assert (0, 0) == (code, estimated)
    assert "100 GFLOP/s" in out
    assert isinstance(profile, CpuProfile)
    assert str(Path.cwd()) not in Path("here.yaml").read_text(encoding="utf-8")
    assert found["step_s"] == pytest.approx(sum(found["time_parts"].values()))
    assert found["tokens_per_s"] == pytest.approx(2 * 16 / found["step_s"])
    assert found["peak_allocated_bytes"] == sum(found["breakdown"].values())
    assert found["peak_reserved_bytes"] is found["process_device_bytes"] is None
    assert 0.2 < found["recomputed_flops_share"] < 0.4
    text = " ".join(lines(found))
    assert "tokens a second" in text
    assert "not validated there" in text
    assert "peak reserved" not in text


def test_the_profile_of_a_card_is_the_shipped_one_with_what_was_measured(cli, measuring):
    gpu = SPEEDS | {"asynchronous": True}
    measuring(device="cuda", facts=H200, speeds=gpu)

    assert 0 == cli("doctor", "--calibrate", "--out", "card.yaml", "-q")[0]
    written = find_profile(str(Path("card.yaml").absolute()))

    shipped = PROFILES["h200"].model_dump(exclude={"speeds", "name"})
    assert shipped == written.model_dump(exclude={"speeds", "name"})
    assert Speeds.model_validate(gpu) == written.speeds


def test_a_card_that_is_not_known_takes_what_depends_on_its_generation(cli, measuring):
    measuring(device="cuda", facts=H200 | {"device": "NVIDIA H200 NVL"}, speeds=SPEEDS | {"asynchronous": True})

    assert 0 == cli("doctor", "--calibrate", "--out", "card.yaml", "-q")[0]
    written = find_profile(str(Path("card.yaml").absolute()))

    assert ("h200-nvl", 132, False) == (written.name, written.multiprocessors, written.verified)
    same = [each.cublas_workspace_bytes for each in PROFILES.values() if each.compute_capability == "9.0"]
    assert written.cublas_workspace_bytes in same


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--calibrate", "--out", "nowhere/here.yaml"), "nowhere"),
        (("--calibrate", "--out", "here.txt"), "name it here.yaml"),
        (("--calibrate", "--device", "tpu"), "unknown device 'tpu'"),
        (("--device", "cpu"), "add --calibrate"),
    ],
)
def test_what_cannot_be_done_is_one_line(cli, measuring, options, says):
    measuring()

    code, out, err = cli("doctor", *options)

    assert (2, "") == (code, out)
    assert says in err
    assert 1 == len(err.splitlines())


def test_nothing_is_left_where_measuring_fails(cli, monkeypatch):
    def refused(*_, **__):
        raise UserError("doctor --calibrate", "no CUDA device is available", "take --device cpu", 4)

    monkeypatch.setattr("meftbench.runner.calibrate.ask", refused)

    assert 4 == cli("doctor", "--calibrate", "--device", "cuda", "--out", "here.yaml", "-q")[0]
    assert not Path("here.yaml").exists()


def test_a_cpus_profile_is_no_cards(cli, measuring):
    """fit and suites predict for GPUs, and say so."""
    measuring()
    cli("doctor", "--calibrate", "--out", "here.yaml", "-q")

    code, _, err = cli("fit", "bert-tiny@random", "--profile", "./here.yaml")

    assert 2 == code
    assert "is the profile of a CPU" in err


def test_where_no_time_can_be_predicted_the_answer_says_what_runs_twice():
    """A profile without speeds, or without a speed for the precision."""
    again = Operation(Operator("mm", "matrix", "float32", (1, 8, 8, 8), 100, 0, 0, 1.0), "backward", True, "device")
    once = again._replace(phase="forward", recomputed=False)
    work = Work({again: 1, once: 3})
    halves = Speeds.model_validate(SPEEDS | {"matrix": {"bfloat16": {"rate": 1e11}}})

    for speeds, reason in ((None, "the profile has no speeds"), (halves, "the profile has no speed for float32")):
        found = time_of(work, speeds, tokens=8)
        assert found["step_s"] is found["time_parts"] is None
        assert 0.25 == found["recomputed_flops_share"]
        assert reason == found["time_absent"]
        text = " ".join(times(found | {"time_validation": ""}))
        assert f"not predicted: {reason}" in text
        assert "25.0% of operations" in text
