"""The process group of a distributed cell: gloo between processes on a CPU, NCCL between GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from meftbench.measuring.sharing import Rank
from meftbench.probes.sharded_tensors import GLOO

# A rank that waits for the others this long fails; long before that, the cell's own timeout ends it.
_PATIENCE = timedelta(days=1)


@contextmanager
def in_group(rank: Rank, meeting: str, device: torch.device) -> Iterator[None]:
    """Within it, this process is `rank` of the default group. meeting: URL of the place where the ranks find each
    other, such as file:///folder/file.

    After an exception the group is left by the end of the process, which tells first why it ends: once it has left, the
    other ranks fail."""
    if device.type == "cpu" and GLOO not in dist.Backend.backend_list:
        dist.Backend.register_backend(GLOO, _gloo_of_one_thread, devices=["cpu"])
    dist.init_process_group(
        GLOO if device.type == "cpu" else "nccl",
        init_method=meeting,
        rank=rank.number,
        world_size=rank.world_size,
        timeout=_PATIENCE,
    )
    yield
    dist.destroy_process_group()


def _gloo_of_one_thread(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """gloo with one thread that runs collectives, as `Settled` needs it; torch's own has two."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_default_device()]
    options._threads, options._timeout = 1, timeout
    return dist.ProcessGroupGloo(store, rank, size, options)
