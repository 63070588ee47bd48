"""Counts what a step that is traced without values would allocate on a CUDA device."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from meftbench.catalogue.profiles import Profile
from meftbench.catalogue.versions import NOW, Versions
from meftbench.measuring.step import Step
from meftbench.methods.levers.optimizer_in_backward import stepping
from meftbench.prediction.reductions import Multiprocessors, threads_of
from meftbench.prediction.remembered import Remembered
from meftbench.prediction.scratch import Gpu, Piece, Rule, scratch_rule
from meftbench.prediction.working_counter import WorkingCounter
from meftbench.probes.memory_counted import CountedStep
from meftbench.probes.sharded_tensors import DTensor
from meftbench.units import MiB

WORKSPACE = "workspace"
# Operators for which torch takes a cuBLAS handle (CUDABlas.cpp). One with a bias vector may take cuBLASLt's instead.
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "addr", "dot", "vdot", "_addmm_activation"}
# The function from which autograd's engine is called: an operator that it calls, no Python code stands between.
_ENGINE = torch.autograd.graph._engine_run_backward.__code__


class CudaCounter(WorkingCounter):
    """A storage counter that keeps a list of its events, and also counts what a trace does not allocate: scratch memory
    of kernels (scratch.py), and the workspaces of cuBLAS, which torch takes once for each thread and never gives back
    (the forward pass has one thread, the backward pass another; CublasHandlePool.cpp).

    Gradients are added in place where autograd does so on a device (see `_IN_PLACE`).
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and skipping the compiler takes longer than counting

    def __init__(self, device_type: str, remembered: Remembered, profile: Profile, versions: Versions = NOW) -> None:
        super().__init__(device_type, remembered)
        _of_engine_alone()  # worked out before the mode is entered
        self.live[WORKSPACE] = 0
        self._profile, self._versions = profile, versions
        capability = tuple(map(int, profile.compute_capability.split(".")))
        self._gpu = Gpu(capability, Multiprocessors(profile.multiprocessors, threads_of(capability)))
        self._workspaces: dict[tuple[str, bool], Tensor] = {}
        self._from_device = False  # whether the operator that runs reads what is on the device for sure
        self._known: dict[Any, tuple[Rule | None, bool]] = {}  # by operator: scratch memory, whether it is a product

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # it calls operators on its local part, which come here
        name = func.__name__
        result = None
        if name in _IN_PLACE and sys._getframe(1).f_code is _ENGINE and not torch.is_grad_enabled():
            result = _IN_PLACE[name](args)
            self._op = name  # of what its kernel allocates
            if result is not None:
                self.work.count(_in_place_of(func), args, {}, result)
        if result is None:
            result = self._call(func, args, kwargs)
            self._from_device = self._in_optimizer and self._reads_device(args)
            self.returned(name, result)
            self._from_device = False
            self.work.count(func, args, kwargs or {}, result, self._call.key)
        known = self._known.get(func)
        if known is None:
            known = self._known[func] = (scratch_rule(name), name.partition(".")[0] in _PRODUCTS)
        rule, is_product = known
        if rule is not None:
            self._use(rule(args, self._gpu))
        if is_product:
            self._take_workspace(name, args)
        return result

    def _use(self, pieces: list[Piece]) -> None:
        """Count scratch memory that a kernel allocates, and gives back when it ends or earlier."""
        held: dict[int, Tensor] = {}
        for number, piece in enumerate(pieces):
            for earlier in [earlier for earlier in held if pieces[earlier].until == number]:
                del held[earlier]
            held[number] = torch.empty(piece.nbytes, dtype=torch.uint8, device=self.device_type)
            self._see(held[number], "temporaries")

    def _take_workspace(self, name: str, args: tuple[Any, ...]) -> None:
        """Count the workspace of cuBLAS, or of cuBLASLt for a product with a bias vector, of the thread that runs."""
        with_bias = name == "addmm.default" and args[0].dim() == 1
        nbytes = self._profile.cublaslt_workspace_bytes if with_bias else self._profile.cublas_workspace_bytes
        if with_bias and self._versions.separate_cublaslt_workspace:
            nbytes = nbytes or 1 * MiB
        elif with_bias and not nbytes:
            with_bias, nbytes = False, self._profile.cublas_workspace_bytes  # cuBLASLt shares that of cuBLAS
        thread = "backward" if self.phase == "backward" else "forward"
        if (thread, with_bias) not in self._workspaces and nbytes and self._versions.cublas_in_allocator:
            workspace = torch.empty(nbytes, dtype=torch.uint8, device=self.device_type)
            self._workspaces[thread, with_bias] = workspace
            self._see(workspace, WORKSPACE)

    def _see(self, tensor: Tensor, category: str) -> None:
        if tensor.dim() == 0 and not self._from_device and self._in_optimizer:
            return  # optimizers keep their step count, a scalar, on the host
        super()._see(tensor, category)

    @property
    def _in_optimizer(self) -> bool:
        return self.phase == "optimizer" or stepping.get()

    def _reads_device(self, value: Any) -> bool:
        """Whether an operator's arguments have a tensor that is on the device for sure: one of a dimension or more, or
        a scalar that was made from one."""
        if isinstance(value, Tensor):
            return value.dim() > 0 or value.untyped_storage()._cdata in self._storages
        return isinstance(value, tuple | list) and any(self._reads_device(item) for item in value)


class PredictedStep(CountedStep):
    """A step under a counter of what it would allocate on a CUDA device."""

    def __init__(self, step: Step, remembered: Remembered, profile: Profile, versions: Versions = NOW) -> None:
        super().__init__(step)
        self.counter: CudaCounter = CudaCounter(step.device.type, remembered, profile, versions)


# --- what autograd's engine does in place ---


def _added_by_engine(args: tuple[Any, ...]) -> Tensor | None:
    """The sum of two gradients that meet in autograd's engine, in the memory of one of them; None: in neither.

    On a device the engine adds to the first if it holds that alone, else to the second. Under a dispatch mode it does
    not, because it takes all tensors for subclasses. Source: torch/csrc/autograd/input_buffer.cpp,
    can_accumulate_inplace and accumulate.
    """
    for target, other in (args[:2], args[1::-1]):
        if _is_whole(target) and target.dtype == other.dtype and _references(target) == _of_engine_alone():
            return cast(Tensor, target.add_(other))
    return None


def _put_by_engine(args: tuple[Any, ...]) -> Tensor:
    """The gradient of a tensor that was read by indices: rows put into the zeros that were made for them. Under a
    dispatch mode they are put into a copy. Source: torch/csrc/autograd/FunctionsManual.cpp, index_backward."""
    return cast(Tensor, args[0].index_put_(*args[1:]))


def _scattered_by_engine(args: tuple[Any, ...]) -> Tensor:
    """The gradient of what `max`, `min` or `topk` of a dimension was taken from: put into the zeros that were made for
    it, under a dispatch mode into a copy. Source: FunctionsManual.cpp, value_selecting_reduction_backward."""
    return cast(Tensor, args[0].scatter_(*args[1:]))


def _gathered_back_by_engine(args: tuple[Any, ...]) -> Tensor:
    """The same of `gather`. Source: aten/src/ATen/native/TensorAdvancedIndexing.cpp, gather_backward."""
    return cast(Tensor, args[0].scatter_add_(*args[1:]))


_IN_PLACE = {
    "add.Tensor": _added_by_engine,
    "index_put.default": _put_by_engine,
    "scatter.src": _scattered_by_engine,
    "scatter_add.default": _gathered_back_by_engine,
}


@cache
def _in_place_of(func: Any) -> Any:
    """The operator that does in place what `func` does: aten::add_.Tensor for aten::add.Tensor."""
    name, _, overload = func.__name__.partition(".")
    return getattr(getattr(torch.ops.aten, f"{name}_"), overload)


def _is_whole(tensor: Tensor) -> bool:
    """Whether the tensor is its whole storage, and no element is read twice."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


def _references(tensor: Tensor) -> tuple[int, ...]:
    """How often the tensor is held, from Python and from C++, and its storage."""
    use_count = getattr(tensor, "_use_count", lambda: 0)()  # torch 2.6 has none
    return sys.getrefcount(tensor), use_count, torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


@cache
def _of_engine_alone() -> tuple[int, ...]:
    """`_references` of a gradient that nobody but the engine holds, in a dispatch mode that asks as `CudaCounter` does:
    beside the engine's, they are those of the call, which depend on the versions of Python and torch."""
    found: list[tuple[int, ...]] = []

    def asked(args: tuple[Any, ...]) -> None:
        for target, _other in (args[:2], args[1::-1]):
            found.append(_references(target))

    class Asking(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func.__name__ == "add.Tensor" and sys._getframe(1).f_code is _ENGINE:
                asked(args)
            return func(*args, **kwargs or {})

    with _disable_current_modes(), torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
        x = torch.empty(2, 3, device="meta", requires_grad=True)
        with Asking():  # type: ignore[no-untyped-call]
            (x.sin().cos() + x.cos().sin()).sum().backward()
    return found[0]
