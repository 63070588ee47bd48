"""A rank of a distributed cell that is traced in one process: torch's fake process group in place of the other ranks.

DDP and fully_shard run as they are, so that buckets, shards and gathered weights are those of torch. Of the largest
rank: that is rank 0, since torch's shards of a tensor are never smaller in a rank than in a later one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from meftbench.measuring.sharing import Rank, preparing
from meftbench.plan.cell import Cell
from meftbench.probes.sharded_tensors import DTensor, done, is_collective


@contextmanager
def fake_rank(cell: Cell, number: int = 0) -> Iterator[Rank | None]:
    """Within it, this process is rank `number` of the cell's. Yields None where the cell has one process."""
    if cell.parallelism is None:
        yield None
        return
    dist.init_process_group("fake", store=FakeStore(), rank=number, world_size=cell.world_size)
    try:
        yield Rank(number, cell.world_size, cell.parallelism)
    finally:
        dist.destroy_process_group()


class Unsent(TorchDispatchMode):
    """Collectives of tensors without values: what would be sent stays as it is.

    Before DDP makes its buckets anew, the ranks agree on the order of gradients in them, by small whole numbers that
    torch reads. These have values here, and it is this rank's order that all agree on, as it is of rank 0's.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented
        kwargs = kwargs or {}
        if is_collective(func):
            return (*[args[0]] * (len(func._schema.returns) - 1), done(args[0]))
        if preparing.get():
            if func is torch.ops.aten.empty.memory_format and kwargs.get("dtype") == torch.int32:
                with _disable_current_modes():
                    return func(*args, **(kwargs | {"device": "cpu"}))
            if func is torch.ops.aten.copy_.default and args[0].dtype == torch.int32:
                with _disable_current_modes():
                    return func(*args, **kwargs)
        return func(*args, **kwargs)
