"""Device profiles: what ships, and what is said of a user's own file."""

import subprocess
import sys

import pytest
import yaml

from meftbench.catalogue.profiles import PROFILES, find_profile
from meftbench.errors import UserError
from meftbench.plan.point import parse_device
from meftbench.units import KiB, MiB

MINE = {
    "schema": 1,
    "name": "mine",
    "device": "A card of mine",
    "memory_bytes": "8GiB",
    "compute_capability": "8.6",
    "multiprocessors": 20,
    "context_bytes": "300MiB",
    "cublas_workspace_bytes": 8320 * KiB,
    "cublaslt_workspace_bytes": 0,
    "verified": False,
    "sources": ["nvidia-smi on my desk"],
}


def a_file(folder, **changes):
    file = folder / "mine.yaml"
    content = {key: value for key, value in (MINE | changes).items() if value is not None}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("name", PROFILES)
def test_a_shipped_profile_is_called_as_its_file_and_says_where_its_figures_are_from(name):
    profile = find_profile(name)
    sourced = {line.partition(":")[0] for line in profile.sources}

    assert name == profile.name
    assert not profile.verified
    assert (profile.usable_bytes or 0) <= profile.memory_bytes
    assert {"memory_bytes", "multiprocessors", "context_bytes", "cublas_workspace_bytes"} <= sourced
    assert sourced <= set(type(profile).model_fields)
    assert "estimated" in next(line for line in profile.sources if line.startswith("context_bytes"))


@pytest.mark.parametrize("name", [name for name, profile in PROFILES.items() if profile.device.startswith("NVIDIA")])
def test_cublas_has_32_mib_from_hopper_on_and_two_big_and_eight_small_buffers_before(name):
    """CublasHandlePool.cpp of pytorch: :4096:2:16:8, in KiB."""
    profile = PROFILES[name]
    hopper_or_later = float(profile.compute_capability) >= 9

    assert (32 * MiB if hopper_or_later else (2 * 4096 + 8 * 16) * KiB) == profile.cublas_workspace_bytes


def test_the_cards_that_people_have_are_there():
    assert {"t4", "v100-16gb", "rtx4090", "a100-80gb", "l4", "a6000", "h100", "b200", "mi300x"} <= set(PROFILES)
    assert 81559 * MiB == PROFILES["h100"].memory_bytes
    assert "8.9" == PROFILES["rtx4090"].compute_capability


def test_a_profile_of_ones_own(tmp_path):
    profile = find_profile(a_file(tmp_path))

    assert ("A card of mine", 8192 * MiB, None) == (profile.device, profile.memory_bytes, profile.usable_bytes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory": 8}, "unknown key 'memory'; did you mean 'memory_bytes'?"),
        ({"memory_bytes": "8"}, "write 412MiB, 24GiB (2^30) or 24GB (10^9)"),
        ({"memory_bytes": 0}, "memory_bytes: input should be greater than or equal to 1"),
        ({"context_bytes": True}, "context_bytes: input should be a valid integer"),
        ({"compute_capability": 8.6}, 'compute_capability: is a number: write it in quotes, "8.6"'),
        ({"compute_capability": "sm_86"}, "compute_capability: string should match pattern"),
        ({"multiprocessors": None}, "multiprocessors: is missing; add it"),
        ({"sources": []}, "sources: list should have at least 1 item"),
        ({"schema": 2}, "schema: input should be 1"),
    ],
)
def test_a_fault_in_a_profile_is_one_line_with_its_place(tmp_path, changes, said):
    with pytest.raises(UserError) as error:
        find_profile(a_file(tmp_path, **changes))

    assert said in str(error.value)
    assert str(error.value).startswith(f"{tmp_path}/mine.yaml:")
    assert 1 == len(str(error.value).splitlines())


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("predicted:rtx4080", "--device: unknown profile 'rtx4080'; did you mean 'rtx4090'?"),
        ("predicted:", "--device: unknown profile ''; one of: a10, a100-40gb"),
        ("predicted:none/mine.yaml", "none/mine.yaml: no such file; check the path"),
        ("predictd:h100", "--device: unknown device 'predictd:h100'; did you mean 'predicted:PROFILE'?"),
    ],
)
def test_a_device_that_is_none_is_refused(device, said):
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        parse_device("--device", device)

    assert said in str(error.value)


def test_a_predicted_device_keeps_its_name(tmp_path):
    mine = f"predicted:{a_file(tmp_path)}"

    assert ["predicted:h100", mine] == [parse_device("", "predicted:h100"), parse_device("", mine)]


def test_profiles_are_read_when_they_are_asked_for_and_need_no_torch():
    program = (
        "import sys; from meftbench.catalogue import profiles; profiles.find_profile('h100'); "
        "print(profiles._read.cache_info().currsize, 'torch' in sys.modules)"
    )

    assert "1 False" == subprocess.check_output([sys.executable, "-c", program], text=True).strip()
