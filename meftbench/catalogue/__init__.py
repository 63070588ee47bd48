"""What can be named in a suite or on the command line: a file for each kind, with one type of row.

Torch is not imported here: `--help`, `list` and the check of a suite must stay fast. An entry names what implements it
by its `home`, "module:NAME", which is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def resolve(home: str) -> Any:
    """The object that an entry's `home`, "module:NAME", stands for; its module is imported."""
    module, _, name = home.partition(":")
    return getattr(import_module(module), name)
