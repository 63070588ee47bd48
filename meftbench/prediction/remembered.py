"""Remembers what operators on meta tensors returned for arguments of the same shapes, to save the time of calling them.

Layers are alike: of a step's operators nine in ten were called before with the same shapes. torch works out most shapes
of results in Python, which is most of the time of a trace.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _TensorSpec(NamedTuple):
    """What a new tensor that an operator returned looks like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def new_tensor(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


_FIRST_ARGUMENT = object()  # the operator changes its first argument and returns it
_NOTHING = object()  # the operator changes its first argument and returns nothing
_NOT_REMEMBERED = object()  # the result cannot be remembered: the operator is called each time
_TENSORS = ("Tensor", "Tensor?", "List[Tensor]")


class Remembered:
    """Calls operators, those on meta tensors once for each set of shapes. Those that return views are always called.

    For a mode that counts storages: a remembered result is a new tensor, which it counts as any other.
    key: of the last call, the same for every call with arguments of the same shapes; None: it has none (a view).
    hits, asked: how often the result of an operator was remembered, and how often the operator was called for it.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}
        self.hits = self.asked = 0
        self.key: Any = None

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        kind, self.key = _kind(func), None
        if kind is None:
            return func(*args, **kwargs or {})
        tensors: list[Tensor] = []
        try:
            key = (func, _key(args, tensors), _key(tuple(kwargs.items()), tensors) if kwargs else ())
            known = self._known.get(key)
        except TypeError:  # an argument cannot be hashed
            return func(*args, **kwargs or {})
        self.key = key
        if known is None or not tensors:
            self.asked += 1
            result = func(*args, **kwargs or {})
            if all(tensor.device.type == "meta" for tensor in tensors):
                self._known[key] = _to_remember(kind, result, args, tensors)
            else:
                self._known[key] = _NOT_REMEMBERED
            return result
        if known is _NOT_REMEMBERED:
            self.asked += 1
            return func(*args, **kwargs or {})
        self.hits += 1
        if known is _FIRST_ARGUMENT:
            return args[0]
        if known is _NOTHING:
            return None
        return (
            known.new_tensor()
            if isinstance(known, _TensorSpec)
            else type(known)(spec and spec.new_tensor() for spec in known)
        )


@cache
def _kind(func: Any) -> str | None:
    """`new`: an operator that returns new tensors; `in place`: it writes to its first argument, and returns that or
    nothing (as those on lists of tensors do); None: it returns a view, or its schema does not tell."""
    schema = func._schema  # alias_info: None where a value is neither a view nor written to
    outputs = [value.alias_info for value in schema.returns]
    inputs = [value.alias_info for value in schema.arguments]
    if not any(outputs) and not any(inputs):
        return "new" if all(str(value.type) in _TENSORS for value in schema.returns) and outputs else None
    first = inputs[0] if inputs else None
    if first is None or not first.is_write or any(inputs[1:]):
        return None
    if not outputs:
        return "in place"
    same = len(outputs) == 1 and outputs[0] is not None and outputs[0].before_set == first.before_set
    return "in place" if same else None


def _key(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return (value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, tuple | list):
        return tuple([_key(item, tensors) for item in value])
    return (value.__class__, value)


def _to_remember(kind: str, result: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> Any:
    """What to remember of a result: `_TensorSpec`s, or one of the constants above."""
    if kind == "in place":
        return _FIRST_ARGUMENT if result is args[0] else _NOTHING if result is None else _NOT_REMEMBERED
    input_storages = {tensor.untyped_storage()._cdata for tensor in tensors}
    if isinstance(result, Tensor):
        return _spec_of(result, input_storages)
    parts = [value if value is None else _spec_of(value, input_storages) for value in result]
    return _NOT_REMEMBERED if any(part is _NOT_REMEMBERED for part in parts) else type(result)(parts)


def _spec_of(tensor: Any, input_storages: set[int]) -> Any:
    if not isinstance(tensor, Tensor) or tensor.device.type != "meta" or tensor.layout is not torch.strided:
        return _NOT_REMEMBERED
    spec = _TensorSpec(tuple(tensor.shape), tensor.stride(), tensor.dtype)
    storage = tensor.untyped_storage()
    alike = tensor.storage_offset() == 0 and spec.new_tensor().untyped_storage().nbytes() == storage.nbytes()
    return spec if alike and storage._cdata not in input_storages else _NOT_REMEMBERED
