"""A step traced with tensors that have shapes and no values: the storage counter sees every allocation, nothing is run.

Without a profile it counts the CPU step, byte for byte (tests/prediction/test_trace.py), in seconds and without the
memory: 48 layers, or 65,536 tokens. With one it allocates as that device does (overlay.py). The model is built on
torch's meta device: weights take no memory either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode, UnsupportedFakeTensorException
from transformers import masking_utils

from meftbench.backbones.own import transformers_part
from meftbench.errors import UserError
from meftbench.measuring.build import batch_of, built_model, is_own, step_on, with_method
from meftbench.measuring.step import Mark, OwnStep, Step
from meftbench.methods import Applied
from meftbench.own_code import blamed, load
from meftbench.plan.cell import Cell
from meftbench.plan.factories import calls_of, is_factory
from meftbench.plan.models import RANDOM, split_name
from meftbench.probes.memory_counted import CountedStep, Observed


def count_uncomputed(cell: Cell, warmup: int = 1) -> Observed:
    """A step of `cell` on the CPU after `warmup` others, traced; no sequence has padding.

    Without warm-up there is no optimizer state yet, which activation memory does not contain.

    Raises UserError where the cell cannot be built, as `build_step` does, or where its forward looks at values.
    """
    step, mode = uncomputed_step(cell)
    with blamed_step(cell), named_refusals(cell), mode, CountedStep(step) as counted:
        for _ in range(warmup):
            counted.run()
        return counted.run()


@contextmanager
def _without_packing() -> Iterator[None]:
    """transformers asks position ids whether several texts are packed into a sequence; here none are, and a trace has
    no values to be asked (fake tensors it takes for packed ones, and makes a mask)."""
    with ExitStack() as stack:
        if hasattr(masking_utils, "find_packed_sequence_indices"):
            # Not a Mock: it would keep what it was called with.
            stack.enter_context(mock.patch.object(masking_utils, "find_packed_sequence_indices", _none_packed))
        yield


def _none_packed(position_ids: Tensor) -> None:
    return None


@contextmanager
def blamed_step(cell: Cell) -> Iterator[None]:
    """To trace within: what a step of the user's own raises becomes a UserError."""
    if not is_own(cell):
        yield
        return
    with blamed([name for name, _ in calls_of([cell])], "its training step raised", always=True):
        yield


class named_refusals:  # noqa: N801 - used as a function
    """To trace within: what a trace cannot follow becomes a UserError that names it."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.packing = cell, _without_packing()

    def __enter__(self) -> None:
        self.packing.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.packing.__exit__(None, None, None)
        on_meta = isinstance(error, RuntimeError) and "cannot be called on meta tensors" in str(error)
        if isinstance(error, DynamicOutputShapeException) or on_meta:
            operator = getattr(error, "func", "its forward")
            what = f"{operator} looks at values, which a trace has not"
            cure = "count it" if is_own(self.cell) else "choose another head (BART: seq2seq_lm), or count it"
            raise UserError(self.cell.label, what, cure) from None
        # The meta device says it by a NotImplementedError that names its backend; any other is a bug, and stays one.
        missing = isinstance(error, NotImplementedError) and "'Meta' backend" in str(error)
        if missing or isinstance(error, UnsupportedFakeTensorException):
            what = f"an operator has no fake implementation ({' '.join(str(error).split())[:200]})"
            raise UserError(
                self.cell.label, what, "register one with torch.library.register_fake, or count it"
            ) from None


def uncomputed_model(cell: Cell) -> Applied:
    """The model of `cell` under its method on torch's meta device; shapes of batches are no part of it.

    Raises UserError as `uncomputed_step` does.
    """
    if cell.precision == "nf4":
        raise UserError(cell.label, "4-bit weights cannot be traced", "use another precision, or measure it")
    own = is_factory(cell.model)
    if own:
        load(cell.model)  # the module itself may make tensors, which are to have values
    name = cell.model if own else split_name(cell.model)[0] + RANDOM
    with torch.device("meta"):
        try:
            model = built_model(cell, name)
        except UserError as error:
            if own and isinstance(error.__cause__, Exception):  # raised by the function itself
                what = f"{error.what} (its model was to be made without values, on torch's meta device)"
                cure = "let it make the model from a configuration (from_config), or count or measure it"
                raise UserError(error.where, what, cure) from None
            raise
        if own:
            model.to("meta")  # what it has made elsewhere
        return with_method(cell, model)


def uncomputed_step(
    cell: Cell, *, foreach: bool | None = None, on_meta: bool = False, applied: Applied | None = None
) -> tuple[Step, AbstractContextManager[object]]:
    """The step of `cell` with fake tensors on the CPU, and the mode to enter around it.

    foreach: the optimizer's implementation where the cell names none; None: torch's choice for the CPU.
    on_meta: with tensors on torch's meta device instead, which is ten times faster and knows no autocast, and whose
        operators are nobody's in particular: for who replaces those that differ (overlay.py).
    applied: of `uncomputed_model`, perhaps traced before in another shape on_meta; None: it is built.
    Raises UserError: the model cannot be built, the method does not fit it, 4-bit weights.
    """
    applied = applied or uncomputed_model(cell)
    model = applied.model
    mode: AbstractContextManager[object] = ExitStack()
    if not on_meta:
        mode = fake = FakeTensorMode()
        _fill(applied.model, fake)
    # Of one sample with values; all of them might not fit this machine.
    sample, more = batch_of(cell, model, 1, torch.device("cpu"))
    _check_unpadded(cell, model, sample)
    with mode:
        batch = {
            name: torch.empty(
                (cell.batch_size, *tensor.shape[1:]), dtype=tensor.dtype, device="meta" if on_meta else "cpu"
            )
            for name, tensor in sample.items()
        }
    if on_meta and "constants" in more:
        on = {name: held.to("meta") if isinstance(held, Tensor) else held for name, held in more["constants"].items()}
        more = {"constants": on}
    device, kind = torch.device("meta" if on_meta else "cpu"), _UncomputedOwn if is_own(cell) else _Uncomputed
    return step_on(cell, applied, batch, device, kind=kind, foreach=foreach, scaled=False, **more), mode


def _check_unpadded(cell: Cell, model: nn.Module, sample: dict[str, Tensor]) -> None:
    mask = sample.get("attention_mask")
    if cell.batch is not None and mask is not None and transformers_part(model) is model and not bool(mask.all()):
        what = "its attention_mask has zeros, and padding cannot be predicted"
        raise UserError(cell.batch, what, "give a batch without padding, or count or measure it")


def _fill(model: nn.Module, mode: FakeTensorMode) -> None:
    """Fake CPU tensors in place of the model's; what is shared stays shared."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                found = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            trained = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(found, requires_grad=tensor.requires_grad) if trained else found
        return made[id(tensor)]

    kept = []  # an id is not to be given again meanwhile
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    kept.append(tensor)
                    tensors[name] = fake(tensor)  # type: ignore[assignment]


class _Uncomputed(Step):
    def run(self, mark: Mark = lambda phase: None) -> float:
        loss = self.forward_backward(mark)
        self._enter("optimizer", mark)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._enter("end", mark)
        del loss
        return 0.0  # it has no value

    def _samples(self, start: int, stop: int) -> dict[str, Tensor]:
        # transformers drops a mask of ones after a look at its values, which are not there to be looked at.
        return {name: t for name, t in super()._samples(start, stop).items() if name != "attention_mask"}


class _UncomputedOwn(_Uncomputed, OwnStep):
    def _samples(self, start: int, stop: int) -> dict[str, Tensor]:
        # What a module of one's own does with its mask is not known; it may not do without.
        of_transformers = transformers_part(self.model) is getattr(self.model, "get_base_model", lambda: self.model)()
        return super()._samples(start, stop) if of_transformers else Step._samples(self, start, stop)
