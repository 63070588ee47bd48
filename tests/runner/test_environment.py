"""environment.json, the host and the devices: facts where they are to be had, reasons where they are not."""

import json
import subprocess

import pytest
from fake_nvml import FakeNvml

from meftbench.errors import UserError
from meftbench.runner import gpus, host
from meftbench.runner.environment import code_digest, environment, git_facts, redacted, versions


def test_devices_are_described_by_the_driver():
    found = gpus.read(FakeNvml("H200", "A100"))

    assert ("580.1", None) == (found.driver, found.absent)
    assert {
        "index": 1,
        "uuid": "GPU-11",
        "name": "A100",
        "memory_bytes": 80 * 2**30,
        "compute_capability": "9.0",
        "power_limit_w": 700.0,
        "ecc": True,
        "persistence": True,
        "mig": False,
        "processes": [],
    } == found.devices[1]


def test_a_question_that_the_driver_refuses_costs_its_answer_alone():
    """As in containers and on MIG slices: None and the reason, and never a zero."""
    [device] = gpus.read(FakeNvml("H200", refuses=("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMigMode"))).devices

    assert ("H200", None, None) == (device["name"], device["memory_bytes"], device["mig"])
    assert {"memory_bytes": "Not Supported", "mig": "Not Supported"} == device["refused"]


@pytest.mark.parametrize(
    "nvml", [FakeNvml(refuses=("nvmlInit",)), FakeNvml(), FakeNvml(refuses=("nvmlDeviceGetCount",))]
)
def test_no_device_is_a_reason(nvml):
    found = gpus.read(nvml)

    assert [] == found.devices
    assert found.absent


def test_slots_are_uuids_of_the_devices_asked_for():
    """CUDA may count devices in another order than the driver."""
    found = gpus.read(FakeNvml("A", "B", "C"))

    assert ["GPU-22", "GPU-00"] == gpus.slots(found, (2, 0), 1, {})
    assert ["GPU-00", "GPU-11"] == gpus.slots(found, (), 2, {})
    assert ["MIG-7"] == gpus.slots(found, (), 1, {"CUDA_VISIBLE_DEVICES": "MIG-7, 3"})


@pytest.mark.parametrize(
    ("asked", "variables", "said"),
    [((3,), {}, "there is no GPU 3"), ((), {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES is ''")],
)
def test_devices_that_are_not_there_are_refused(asked, variables, said):
    with pytest.raises(UserError, match=said) as raised:
        gpus.slots(gpus.read(FakeNvml("A")), asked, 1, variables)

    assert 4 == raised.value.exit_code


def test_the_environment_id_names_what_makes_numbers_comparable():
    """Another GPU or driver is another environment; another time, shell or torch backend report is not."""
    here = environment(gpus.read(FakeNvml("A")), {"seen": 1}, {"OMP_PROC_BIND": "true"})
    again = environment(gpus.read(FakeNvml("A", busy=(7,))), {"seen": 2}, {})
    elsewhere = environment(gpus.read(FakeNvml("B")), {"seen": 1}, {})

    assert here["environment_id"] == again["environment_id"] != elsewhere["environment_id"]
    assert {"OMP_PROC_BIND": "true"} == here["variables"]
    assert json.dumps(here, allow_nan=False)


def test_secrets_and_home_folders_stay_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))

    found = redacted(
        {"HF_TOKEN": "hf_abc", "HF_HOME": f"{tmp_path}/.cache", "WANDB_API_KEY": "x", "OMP_NUM_THREADS": "2"}
    )

    assert {
        "HF_TOKEN": "<redacted>",
        "HF_HOME": "~/.cache",
        "WANDB_API_KEY": "<redacted>",
        "OMP_NUM_THREADS": "2",
    } == found


def test_a_package_that_is_missing_has_no_version():
    assert {"no-such-package-at-all": None} == versions(("no-such-package-at-all",))


def test_git_facts_are_those_of_the_checkout(tmp_path):
    """A change that is not committed shows, and which one it is."""

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-b", "topic")
    (tmp_path / "__init__.py").write_text("")
    assert {"absent": "not run from a git checkout"} == git_facts(tmp_path)
    git("add", ".")
    git("commit", "-m", "first")
    clean = git_facts(tmp_path)
    (tmp_path / "__init__.py").write_text("changed")
    changed = git_facts(tmp_path)

    assert ("topic", False, None) == (clean["branch"], clean["dirty"], clean["diff_digest"])
    assert (clean["sha"], True) == (changed["sha"], changed["dirty"])
    assert changed["diff_digest"]


def test_without_git_there_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))

    assert {"absent": "git is not installed"} == git_facts()


def test_the_code_has_a_digest():
    assert 16 == len(code_digest())


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "1000\n", "memory.current": "400\n"}, (1000, 400)),
        ({"memory.max": "max\n", "memory.current": "400\n"}, None),
        ({"memory/memory.limit_in_bytes": "1000", "memory/memory.usage_in_bytes": "1"}, (1000, 1)),
        ({"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "1"}, None),
        ({}, None),
    ],
)
def test_the_limit_of_the_container_is_found_in_both_versions(tmp_path, files, expected):
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    assert expected == host.cgroup_memory(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: A\nflags\t\t: fpu avx2 avx512_bf16\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx2 fma\n", False),
        ("", None),
        (None, None),
    ],
)
def test_whether_the_processor_multiplies_in_bf16(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)

    assert host.bf16_products(tmp_path / "cpuinfo") is expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "200000 100000\n"}, 2.0),
        ({"cpu.max": "50000 100000\n"}, 0.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": ""}, None),
        ({}, None),
    ],
)
def test_the_cores_of_the_container_are_found_in_both_versions(tmp_path, monkeypatch, files, expected):
    """No more threads than it has cores for, and one at least: more would be held back in every period."""
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    assert expected == host.cgroup_cores(tmp_path)
    assert (8 if expected is None else max(1, int(expected))) == host.cores(tmp_path)


def test_a_cell_gets_no_more_than_its_container_has_left(tmp_path):
    """With a reserve for the rest of the machine."""
    (tmp_path / "memory.max").write_text("1000000")
    (tmp_path / "memory.current").write_text("400000")

    assert 570_000 == host.available_bytes(tmp_path)
    assert 10**6 < host.available_bytes(tmp_path / "nowhere")
