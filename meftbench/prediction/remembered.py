"""What an operator on meta tensors returned for arguments of these shapes, for the next time it is asked.

Layers are alike, and torch works out most shapes in Python: of a step's operators nine in ten were asked before, and
that is most of the time of a trace.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Made(NamedTuple):
    """A tensor that an operator makes."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def again(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


_ITSELF = object()  # the operator changes its first argument and returns it
_NOTHING = object()  # the operator changes its first argument and returns nothing
_ASK = object()  # not to be remembered
_TENSORS = ("Tensor", "Tensor?", "List[Tensor]")


class Remembered:
    """Calls operators, those on meta tensors once for each set of shapes. Views are always called.

    For a mode that counts, which sees what is remembered as it sees everything.  hits, asked: how often an operator
    was known, and was called.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}
        self.hits = self.asked = 0

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        kind = _kind(func)
        if kind is None:
            return func(*args, **kwargs or {})
        tensors: list[Tensor] = []
        try:
            key = (func, _key(args, tensors), _key(tuple(kwargs.items()), tensors) if kwargs else ())
            known = self._known.get(key)
        except TypeError:  # an argument that has no hash
            return func(*args, **kwargs or {})
        if known is None or not tensors:
            self.asked += 1
            result = func(*args, **kwargs or {})
            if all(tensor.device.type == "meta" for tensor in tensors):
                self._known[key] = _told(kind, result, args, tensors)
            else:
                self._known[key] = _ASK
            return result
        if known is _ASK:
            self.asked += 1
            return func(*args, **kwargs or {})
        self.hits += 1
        if known is _ITSELF:
            return args[0]
        if known is _NOTHING:
            return None
        return known.again() if isinstance(known, _Made) else type(known)(made and made.again() for made in known)


@cache
def _kind(func: Any) -> str | None:
    """`new`: what it returns is new; `in place`: it writes to its first argument, and returns that or nothing (lists of
    tensors); None: a view, or not known."""
    schema = func._schema
    returned = [value.alias_info for value in schema.returns]
    given = [value.alias_info for value in schema.arguments]
    if not any(returned) and not any(given):
        return "new" if all(str(value.type) in _TENSORS for value in schema.returns) and returned else None
    first = given[0] if given else None
    if first is None or not first.is_write or any(given[1:]):
        return None
    if not returned:
        return "in place"
    same = len(returned) == 1 and returned[0] is not None and returned[0].before_set == first.before_set
    return "in place" if same else None


def _key(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return (value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, tuple | list):
        return tuple([_key(item, tensors) for item in value])
    return (value.__class__, value)


def _told(kind: str, result: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> Any:
    """What to remember of a result."""
    if kind == "in place":
        return _ITSELF if result is args[0] else _NOTHING if result is None else _ASK
    given = {tensor.untyped_storage()._cdata for tensor in tensors}
    if isinstance(result, Tensor):
        return _made(result, given)
    parts = [value if value is None else _made(value, given) for value in result]
    return _ASK if any(part is _ASK for part in parts) else type(result)(parts)


def _made(tensor: Any, given: set[int]) -> Any:
    if not isinstance(tensor, Tensor) or tensor.device.type != "meta" or tensor.layout is not torch.strided:
        return _ASK
    made = _Made(tuple(tensor.shape), tensor.stride(), tensor.dtype)
    storage = tensor.untyped_storage()
    alike = tensor.storage_offset() == 0 and made.again().untyped_storage().nbytes() == storage.nbytes()
    return made if alike and storage._cdata not in given else _ASK
