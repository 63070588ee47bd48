"""A step traced with tensors that have shapes and no values: the storage counter sees every allocation, and nothing is
computed.

Without a device profile the trace counts the step on a CPU, byte for byte (tests/prediction/test_trace.py), in seconds
and without the memory that the step takes, even of 48 layers or 65,536 tokens. With a profile it allocates as that
device does (overlay.py). The model is built on torch's meta device, so that its weights take no memory either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode, UnsupportedFakeTensorException
from transformers import masking_utils

from meftbench.backbones.own import transformers_part
from meftbench.backbones.quantize import STATISTICS, pack_without_values
from meftbench.catalogue.methods import METHODS, Lora
from meftbench.catalogue.peft_methods import PEFT_METHODS
from meftbench.errors import UserError, one_line
from meftbench.measuring.build import batch_of, built_model, is_own, kind_of_step, step_on, with_method
from meftbench.measuring.optimizers import tables_without_values
from meftbench.measuring.packing import STARTS, PackedStep
from meftbench.measuring.sharing import Rank, shared
from meftbench.measuring.step import Mark, OwnStep, Step
from meftbench.methods import Applied
from meftbench.own_code import blamed, load
from meftbench.plan.cell import Cell
from meftbench.plan.factories import calls_of, is_factory
from meftbench.plan.models import RANDOM, split_name
from meftbench.prediction.experts import EXPERTS, products_of_groups
from meftbench.prediction.fake_ranks import Unsent, fake_rank
from meftbench.prediction.four_bit import unfused_products
from meftbench.prediction.peft_shapes import peft_without_values
from meftbench.probes.memory_counted import CountedStep, Observed


def count_uncomputed(cell: Cell, warmup: int = 1, padding: float = 0.0, rank: int = 0) -> Observed:
    """What a trace of a step of `cell` on the CPU counts, after `warmup` other steps; no sequence has padding.

    padding: of a packed cell, the share of each sequence that is left out.  rank: of a distributed cell, which of its
    processes.
    Without warm-up there is no optimizer state yet, which is no part of activation memory.

    Raises UserError where the cell cannot be built, as `build_step` does, or where its forward reads tensors' values.
    """
    with fake_rank(cell, rank) as fake:
        step, mode = uncomputed_step(cell, padding=padding, rank=fake)
        with blamed_step(cell), named_refusals(cell), mode, CountedStep(step) as counted:
            for _ in range(warmup):
                counted.run()
            return counted.run()


@contextmanager
def _without_packing() -> Iterator[None]:
    """Within it, transformers does not read from position ids whether several texts are packed into a sequence: a trace
    has no values to read (it would take fake tensors for packed texts, and make a mask). Where a cell is packed,
    attention is told the lengths instead (backbones/packed.py)."""
    with ExitStack() as stack:
        if hasattr(masking_utils, "find_packed_sequence_indices"):
            # Not a Mock, which would keep the tensors that it was called with.
            stack.enter_context(mock.patch.object(masking_utils, "find_packed_sequence_indices", _none_packed))
        yield


def _none_packed(position_ids: Tensor) -> None:
    return None


@contextmanager
def blamed_step(cell: Cell) -> Iterator[None]:
    """Within it, an exception from a step of the user's own model or batch becomes a UserError."""
    if not is_own(cell):
        yield
        return
    with blamed([name for name, _ in calls_of([cell])], "its training step raised", always=True):
        yield


_READS_VALUES = ("cannot be called on meta tensors", "register_meta function for torch.nonzero()")


class named_refusals:  # noqa: N801 - used as a function
    """Within it, an error about what a trace cannot follow becomes a UserError that says what it is."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.packing = cell, _without_packing()

    def __enter__(self) -> None:
        self.packing.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.packing.__exit__(None, None, None)
        # NotImplementedError is a RuntimeError: torch.nonzero and others raise it for tensors without values.
        on_meta = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _READS_VALUES)
        if isinstance(error, DynamicOutputShapeException) or on_meta:
            operator = getattr(error, "func", "its forward")
            what = f"{operator} looks at values, which a trace has not"
            other = "try another head (BART: seq2seq_lm), --attention eager, or count it"
            if EXPERTS in self.cell.model_config_overrides:
                other = f"leave {EXPERTS} out (eager runs each expert on the tokens it gets), or count it"
            cure = "count it" if is_own(self.cell) else other
            raise UserError(self.cell.label, what, cure) from None
        # An operator without a meta implementation raises one that names the backend; any other is a bug.
        missing = isinstance(error, NotImplementedError) and "'Meta' backend" in str(error)
        if missing or isinstance(error, UnsupportedFakeTensorException):
            what = f"an operator has no fake implementation ({' '.join(str(error).split())[:200]})"
            raise UserError(
                self.cell.label, what, "register one with torch.library.register_fake, or count it"
            ) from None


def uncomputed_model(cell: Cell) -> Applied:
    """The model of `cell` with its method, on torch's meta device. It does not depend on the shape of the batch.

    Raises UserError as `uncomputed_step` does.
    """
    from_function = is_factory(cell.model)
    if from_function:
        load(cell.model)  # not on the meta device: tensors that the module makes when imported must have values
    name = cell.model if from_function else split_name(cell.model)[0] + RANDOM
    with torch.device("meta"), _values_of_peft(cell):
        try:
            model = built_model(cell, name)
        except UserError as error:
            if from_function and isinstance(error.__cause__, Exception):  # raised by the user's function
                what = f"{error.what} (its model was to be made without values, on torch's meta device)"
                cure = "let it make the model from a configuration (from_config), or count or measure it"
                raise UserError(error.where, what, cure) from None
            raise
        if from_function:
            model.to("meta")  # what the function made on another device
        try:
            applied = with_method(cell, model)
        except RuntimeError as error:  # NotImplementedError is one of them
            if "meta tensor" not in str(error):
                raise
            what = f"{cell.method} looks at values when it is applied, which a prediction has not ({one_line(error)})"
            raise UserError(cell.label, what, "change its settings, or count or measure it") from None
    pack_without_values(applied.model)
    return applied


def uncomputed_step(
    cell: Cell,
    *,
    foreach: bool | None = None,
    on_meta: bool = False,
    applied: Applied | None = None,
    padding: float = 0.0,
    rank: Rank | None = None,
) -> tuple[Step, AbstractContextManager[object]]:
    """The step of `cell` with fake tensors on the CPU, and the mode to enter around it.

    foreach: the optimizer's implementation where the cell names none; None: torch's choice for the CPU.
    on_meta: with tensors on torch's meta device instead, which is ten times faster, knows no autocast, and whose
        operators are those of no device in particular: callers replace those that differ (overlay.py).
    applied: of `uncomputed_model`; with on_meta it may have been traced in another shape before. None: it is built.
    padding: of a packed cell, the share of each sequence that is left out; others have none.
    rank: of `fake_rank`, in which the step is made and run.
    Raises UserError: the model cannot be built, the method does not fit it, padding in the user's batch.
    """
    applied = applied or uncomputed_model(cell)
    model = applied.model
    mode: AbstractContextManager[object] = ExitStack()
    if not on_meta:
        mode = fake = FakeTensorMode()
        _fill(applied.model, fake)
    else:
        _to_host(applied.model)
    # One sample with values; the whole batch might not fit this machine's memory.
    sample, extra = batch_of(cell, model, 1, torch.device("cpu"), padding if cell.packing else 0.0, text=False)
    _check_unpadded(cell, model, sample)
    shapes = {name: (cell.batch_size, *tensor.shape[1:]) for name, tensor in sample.items()}
    if cell.packing:
        extra["lengths"] *= cell.batch_size
        shapes = dict.fromkeys(sample, (1, sum(extra["lengths"])))
        shapes[STARTS] = (cell.batch_size // cell.micro_batch_size, cell.micro_batch_size + 1)
    with mode:
        batch = {
            name: torch.empty(shapes[name], dtype=tensor.dtype, device="meta" if on_meta else "cpu")
            for name, tensor in sample.items()
        }
    if on_meta and "constants" in extra:
        constants = {
            name: value.to("meta") if isinstance(value, Tensor) else value for name, value in extra["constants"].items()
        }
        extra = {"constants": constants}
    device, step_class = torch.device("meta" if on_meta else "cpu"), _UNCOMPUTED[kind_of_step(cell)]
    if rank is not None:
        extra["sharing"] = shared(cell.label, applied, rank, device)
    step = step_on(cell, applied, batch, device, kind=step_class, foreach=foreach, scaled=False, **extra)
    if isinstance(mode, FakeTensorMode):
        tables_without_values(step.optimizer, mode)
    contexts = [mode, _values_of_peft(cell), products_of_groups(), *([unfused_products()] if on_meta else [])]
    return step, _entered(*contexts, *([] if rank is None else [Unsent()]))  # type: ignore[no-untyped-call]


def _values_of_peft(cell: Cell) -> AbstractContextManager[None]:
    by_peft = cell.method in PEFT_METHODS or issubclass(METHODS[cell.method].settings, Lora)
    return peft_without_values() if by_peft else nullcontext()


@contextmanager
def _entered(*contexts: AbstractContextManager[object]) -> Iterator[None]:
    """All of `contexts`, as one."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _check_unpadded(cell: Cell, model: nn.Module, sample: dict[str, Tensor]) -> None:
    mask = sample.get("attention_mask")
    if cell.batch is not None and mask is not None and transformers_part(model) is model and not bool(mask.all()):
        what = "its attention_mask has zeros, and padding cannot be predicted"
        raise UserError(cell.batch, what, "give a batch without padding, or count or measure it")


def _fill(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the model's tensors by fake CPU tensors; those that modules share stay shared."""
    replacements: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in replacements:
            with mode:
                fake_tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            replacements[id(tensor)] = (
                nn.Parameter(fake_tensor, requires_grad=tensor.requires_grad) if is_parameter else fake_tensor
            )
            if tensor._backward_hooks:  # such as OSF's, which project gradients
                replacements[id(tensor)]._backward_hooks = tensor._backward_hooks
            if is_parameter and tensor._post_accumulate_grad_hooks:  # such as an optimizer's that runs in backward
                replacements[id(tensor)]._post_accumulate_grad_hooks = tensor._post_accumulate_grad_hooks
            state = getattr(tensor, "quant_state", None)
            if state is not None:  # of a 4-bit weight; bitsandbytes looks for it on whatever is the layer's weight
                replacements[id(tensor)].quant_state = fake_state(state)  # type: ignore[attr-defined]
        return replacements[id(tensor)]

    def fake_state(state: Any) -> Any:
        replaced = copy(state)
        for name in STATISTICS:
            if isinstance(value := getattr(state, name), Tensor):
                setattr(replaced, name, fake(value))
        if state.state2 is not None:
            replaced.state2 = fake_state(state.state2)
        return replaced

    kept = []  # keeps the replaced tensors alive, so that no id is used twice
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    kept.append(tensor)
                    tensors[name] = fake(tensor)  # type: ignore[assignment]
    for attributes, name, tensor in _plain_attributes(model):
        kept.append(tensor)
        attributes[name] = fake(tensor)


def _to_host(model: nn.Module) -> None:
    """Put tensors that are plain attributes of peft's modules on the host, where they are when a step begins: there
    peft makes them, and moving a model to its device moves only parameters and buffers. A step then copies them.

    Their memory is reserved but never written, so that they take none.
    """
    for attributes, name, tensor in list(_plain_attributes(model)):
        attributes[name] = torch.empty_like(tensor, device="cpu")


def _plain_attributes(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Tensors that peft's modules hold as attributes, or in dictionaries, and that are no parameters or buffers: each
    with the dictionary that holds it, and its key there."""
    for module in model.modules():
        if type(module).__module__.partition(".")[0] != "peft":
            continue
        dictionaries = [value for value in vars(module).values() if type(value) is dict]
        for attributes in [vars(module), *dictionaries]:
            if attributes is module._parameters or attributes is module._buffers:
                continue
            for name, value in list(attributes.items()):
                if isinstance(value, Tensor):
                    yield attributes, name, value


class _Uncomputed(Step):
    """A step whose tensors have no values."""

    def run(self, mark: Mark = lambda phase: None) -> float:
        with self.applied.around_training_step():
            loss = self.forward_backward(mark)
        self._enter("optimizer", mark)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._enter("end", mark)
        del loss
        return 0.0  # the loss has no value

    def _samples(self, start: int, stop: int) -> dict[str, Tensor]:
        # transformers drops a mask of ones, but reads its values to see that; a trace has none.
        return {name: t for name, t in super()._samples(start, stop).items() if name != "attention_mask"}


class _UncomputedOwn(_Uncomputed, OwnStep):
    """A step of the user's own model or batch whose tensors have no values."""

    def _samples(self, start: int, stop: int) -> dict[str, Tensor]:
        # What the user's own module does with its mask is not known; it may need it.
        of_transformers = transformers_part(self.model) is getattr(self.model, "get_base_model", lambda: self.model)()
        return super()._samples(start, stop) if of_transformers else Step._samples(self, start, stop)


class _UncomputedPacked(_Uncomputed, PackedStep):
    """A step on packed rows whose tensors have no values."""


_UNCOMPUTED: dict[type[Step], type[Step]] = {Step: _Uncomputed, OwnStep: _UncomputedOwn, PackedStep: _UncomputedPacked}
