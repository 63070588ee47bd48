"""What can be named in a suite or on the command line: a file for each kind, with one type of entry.

Torch is not imported here, so that `--help`, `list` and the check of a suite stay fast. The `home` of an entry,
"module:NAME", names what implements it, which is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def resolve(home: str) -> Any:
    """The object that an entry's `home`, "module:NAME", stands for; its module is imported."""
    module, _, name = home.partition(":")
    return getattr(import_module(module), name)
