"""The engine of this machine: GPUs as slots, and cells that ask for a card by name."""

import pytest
from fake_nvml import FakeNvml

from builders import a_cell
from meftbench.catalogue.profiles import find_profile
from meftbench.errors import UserError
from meftbench.plan.point import parse_device
from sweeps import a_suite, statuses, sweep

H100, A10 = find_profile("h100").device, find_profile("a10").device


class Cards(FakeNvml):
    """Devices with the memory of their profiles."""

    def nvmlDeviceGetMemoryInfo(self, handle):
        info = super().nvmlDeviceGetMemoryInfo(handle)
        info.total = {H100: find_profile("h100"), A10: find_profile("a10")}[self.devices[handle]].memory_bytes
        return info


def used(run):
    """By device of the cell, the GPUs on which such cells ran."""
    gpus: dict[str, set[str]] = {}
    for record in run.records:
        gpus.setdefault(record.cell["device"], set()).add(record.cell["gpu"])
    return gpus


@pytest.fixture(autouse=True)
def _all_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def cells(*devices):
    return [a_cell(device=device, batch_size=1 + n) for n, device in enumerate(devices)]


def test_a_cell_that_names_a_card_runs_on_that_card_alone(tmp_path):
    """A cell of plain cuda runs on any."""
    suite = a_suite(*cells("cuda:h100", "cuda:a10", "cuda", "cuda:h100", "cuda:a10"), repeats=2)

    run = sweep(suite, tmp_path / "run", nvml=Cards(A10, H100), jobs=2)

    assert ["ok"] * 10 == statuses(run)
    assert ({"GPU-11"}, {"GPU-00"}) == (used(run)["cuda:h100"], used(run)["cuda:a10"])


def test_with_one_slot_the_card_that_is_named_is_chosen(tmp_path):
    run = sweep(a_suite(*cells("cuda:h100", "cuda"), repeats=1), tmp_path / "run", nvml=Cards(A10, H100))

    assert {"cuda:h100": {"GPU-11"}, "cuda": {"GPU-11"}} == used(run)


def test_a_card_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^device cuda:h100: no place .* this machine has NVIDIA A10; ") as raised:
        sweep(a_suite(*cells("cuda", "cuda:h100")), tmp_path / "run", nvml=Cards(A10, A10), jobs=2)

    assert 4 == raised.value.exit_code
    assert not (tmp_path / "run").exists()


def test_a_card_of_that_name_with_other_memory_is_another(tmp_path):
    """FakeNvml has 80 GiB in every device."""
    with pytest.raises(UserError, match="no place"):
        sweep(a_suite(*cells("cuda:a10")), tmp_path / "run", nvml=FakeNvml(A10))


def test_the_card_is_checked_where_the_suite_is_read():
    assert "cuda:h100" == parse_device("x.yaml", "cuda:h100")
    with pytest.raises(UserError, match=r"x\.yaml: unknown profile 'h10'; did you mean"):
        parse_device("x.yaml", "cuda:h10")


def test_repeats_are_those_of_cuda_and_ids_of_other_cells_stay():
    suite = a_suite(*cells("cuda:h100"))

    assert 3 == suite.protocol.repeats_on("cuda:h100")
    assert len({cell.cell_id for cell in cells("cuda", "cuda", "cuda:h100")}) == 3


def a_cell_of_ranks(ranks, device="cuda"):
    return a_cell(device=device, world_size=ranks, parallelism="ddp")


def test_ranks_have_a_gpu_each_and_no_other_cell_beside_them(tmp_path):
    """A slot has as many GPUs as the cell with most ranks needs; one that is left over is not used."""
    suite = a_suite(a_cell_of_ranks(2), *cells("cuda", "cuda"), repeats=1)

    run = sweep(suite, tmp_path / "run", nvml=Cards(H100, H100, H100, H100, H100), jobs=4)

    assert {"GPU-00,GPU-11", "GPU-22,GPU-33"} == used(run)["cuda"]


def test_ranks_are_on_cards_of_one_kind_where_a_cell_names_one(tmp_path):
    run = sweep(a_suite(a_cell_of_ranks(2, "cuda:h100"), repeats=1), tmp_path / "run", nvml=Cards(H100, A10, H100))

    assert {"cuda:h100": {"GPU-00,GPU-22"}} == used(run)


def test_more_ranks_than_gpus_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"no place for such cells: .*, and a cell needs 4 of a kind") as raised:
        sweep(a_suite(a_cell_of_ranks(4)), tmp_path / "run", nvml=Cards(H100, H100))

    assert 4 == raised.value.exit_code
    assert not (tmp_path / "run").exists()


def test_a_gpu_of_a_group_that_is_busy_is_refused(tmp_path):
    with pytest.raises(UserError, match="is in use by process"):
        sweep(a_suite(a_cell_of_ranks(2)), tmp_path / "run", nvml=Cards(H100, H100, busy={1}))
