"""Follows the header of a GGUF file from its begin to its end, and refuses one that says more than the file can hold.

The package gguf believes the counts and lengths of a header: where one of them is too large, it makes empty values
without end. Layout: the specification in github.com/ggml-org/ggml, versions 2 and 3.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from meftbench.errors import UserError
from meftbench.plan.gguf_files import MAGIC

MOST_ITEMS = 2**22  # of all arrays; the largest vocabularies have 2¹⁸ words, each with its text, type and score
MOST_DIMENSIONS = 8  # of a tensor; ggml has 4
# Bytes of a value by its type.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_CURE = "check that the file is whole, or download or convert it again"


def check_bounds(name: str, file: Path) -> None:
    """Raises UserError: the header ends behind the end of the file, or has more items than the header of any model.
    name: what the user calls the model."""
    with file.open("rb") as stream:
        try:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise UserError(name, f"{str(file)!r} is empty", _CURE) from None
    with content:
        try:
            _Header(content).walk()
        except (_Damage, struct.error) as error:
            reason = str(error) if isinstance(error, _Damage) else "its header ends behind the end of the file"
            raise UserError(name, f"{str(file)!r} cannot be read as a model ({reason})", _CURE) from None


class _Damage(Exception):  # noqa: N818 - becomes a UserError
    """What is wrong with a header."""


class _Header:
    """Reads a header piece by piece. at: the next byte.  items: of arrays so far."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._at, self._items = content, len(MAGIC), 0
        # A file of the other byte order has its version in the upper half.
        self._order = "<" if self._number("<I") & 0xFFFF else ">"

    def walk(self) -> None:
        """Raises _Damage, or struct.error at the end of the file."""
        tensors, values = self._number("Q"), self._number("Q")
        for _ in range(values):
            self._text()
            self._value(self._number("I"))
        for _ in range(tensors):
            self._text()
            dimensions = self._number("I")
            if dimensions > MOST_DIMENSIONS:
                raise _Damage(f"a tensor has {dimensions:,} dimensions")
            self._skip(8 * dimensions + 4 + 8)  # with its type and its offset

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._text()
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind == _ARRAY:
            self._array(self._number("I"), self._number("Q"))
        else:
            raise _Damage(f"a value has the unknown type {kind}")

    def _array(self, kind: int, length: int) -> None:
        self._items += length
        if self._items > MOST_ITEMS:
            raise _Damage(f"its header has arrays of more than {MOST_ITEMS:,} items")
        if kind in _SIZES:
            self._skip(length * _SIZES[kind])
            return
        if kind != _STRING:
            raise _Damage(f"an array has items of the type {kind}")
        for _ in range(length):
            self._text()

    def _text(self) -> None:
        self._skip(self._number("Q"))

    def _number(self, form: str) -> int:
        form = form if form.startswith("<") else self._order + form
        (number,) = struct.unpack_from(form, self._content, self._at)
        self._at += struct.calcsize(form)
        return int(number)

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._content):
            raise _Damage("its header ends behind the end of the file")
