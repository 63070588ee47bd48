"""What a counter of storages must know of tensors that are shared out among processes (FSDP2's weights, gradients and
optimizer states): which part is here, which operators compute shapes only, and when a storage is given back and taken
again, as fully_shard does with gathered weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

__all__ = ["GLOO", "DTensor", "followed", "local_part"]

GLOO = "gloo_of_one_thread"  # the backend of counted ranks (measuring/groups.py)


def local_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds; any other tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def is_collective(func: Any) -> bool:
    """Whether an operator lets processes exchange tensors. It returns these, and a work that can be waited for."""
    if func.namespace != "c10d":
        return False
    *tensors, work = [str(value.type) for value in func._schema.returns]
    return bool(tensors) and work.endswith("c10d.Work")


def done(tensors: Tensor | list[Tensor]) -> Any:
    """The work of a collective that has ended, as operators return it. tensors: its result."""
    future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
    future.set_result(tensors if isinstance(tensors, list) else [tensors])
    return torch._C._distributed_c10d._create_work_from_future(future).boxed()  # type: ignore[attr-defined]


class Settled(TorchDispatchMode):
    """Ends each collective of a group of `GLOO` before the next operator, also in the thread that runs collectives. The
    thread holds their tensors for a moment after it has said that it is done, and what is freed would be counted as
    alive for as long as that takes. There is one such thread, so that once it has run another collective, it has let
    go. A barrier will not do: it keeps what is in progress when it begins, to wait for it, until it is freed itself.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented
        result = func(*args, **kwargs or {})
        if not is_collective(func):
            return result
        dist.Work.unbox(result[-1]).wait()
        with _disable_current_modes():  # what is reduced here is no part of a step
            dist.all_reduce(torch.zeros(1))
        # Some works copy whenever they are waited for, from buffers of gloo's own that are no part of a step.
        return *result[:-1], done(result[0])


@contextmanager
def followed(resized: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Within it, `resized` is called with each storage whose size has been changed in place, which no operator tells;
    and operators by which torch works out the shape of a sharded result, on fake tensors of the whole shape, are not
    shown to any mode: they allocate nothing."""
    resize = torch.UntypedStorage.resize_
    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def told(storage: torch.UntypedStorage, nbytes: int) -> Any:
        result = resize(storage, nbytes)
        resized(storage)
        return result

    def unseen(*arguments: Any) -> Any:
        with _disable_current_modes():
            return propagate(*arguments)

    with (
        Settled() if dist.get_backend() == GLOO else nullcontext(),  # type: ignore[no-untyped-call]
        mock.patch.object(torch.UntypedStorage, "resize_", told),
        mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", unseen),
    ):
        yield
