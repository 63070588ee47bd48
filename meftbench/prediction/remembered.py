"""What an operator on meta tensors returned for arguments of these shapes, for the next time it is asked.

Layers are alike, and torch works out most shapes in Python: of a step's operators nine in ten were asked before, and
that is most of the time of a trace.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Made(NamedTuple):
    """A tensor that an operator makes."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def again(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


_ITSELF = object()  # the operator changes its first argument and returns it
_ASK = object()  # not to be remembered


class Remembered(TorchDispatchMode):
    """Within it, operators on meta tensors are asked once for each set of shapes. Views are always asked.

    Entered before a mode that counts, so that what is remembered passes that one as everything does.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to keep the compiler out costs more than to remember

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[Any, Any] = {}
        self.hits = self.asked = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
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
                self._known[key] = _ITSELF if kind == "in place" and result is args[0] else _told(kind, result, tensors)
            else:
                self._known[key] = _ASK
            return result
        if known is _ASK:
            self.asked += 1
            return func(*args, **kwargs or {})
        self.hits += 1
        if known is _ITSELF:
            return args[0]
        return known.again() if isinstance(known, _Made) else type(known)(made and made.again() for made in known)


@cache
def _kind(func: Any) -> str | None:
    """`new`: what it returns is new; `in place`: it returns its first argument; None: a view, or not known."""
    schema = func._schema
    returned = [value.alias_info for value in schema.returns]
    given = [value.alias_info for value in schema.arguments]
    if not any(returned) and not any(given):
        return "new" if all(str(value.type) in ("Tensor", "Tensor?") for value in schema.returns) and returned else None
    first = given[0] if given else None
    if len(returned) == 1 and first is not None and first.is_write and not any(given[1:]) and returned[0] is not None:
        return "in place" if returned[0].before_set == first.before_set else None
    return None


def _key(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return (value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, tuple | list):
        return tuple([_key(item, tensors) for item in value])
    return (value.__class__, value)


def _told(kind: str, result: Any, tensors: list[Tensor]) -> Any:
    """What to remember of a result."""
    if kind != "new":
        return _ASK
    given = {tensor.untyped_storage()._cdata for tensor in tensors}
    if isinstance(result, Tensor):
        return _made(result, given)
    parts = [value if value is None else _made(value, given) for value in result]
    return _ASK if any(part is _ASK for part in parts) else tuple(parts)


def _made(tensor: Any, given: set[int]) -> Any:
    if not isinstance(tensor, Tensor) or tensor.device.type != "meta" or tensor.layout is not torch.strided:
        return _ASK
    made = _Made(tuple(tensor.shape), tensor.stride(), tensor.dtype)
    storage = tensor.untyped_storage()
    alike = tensor.storage_offset() == 0 and made.again().untyped_storage().nbytes() == storage.nbytes()
    return made if alike and storage._cdata not in given else _ASK
