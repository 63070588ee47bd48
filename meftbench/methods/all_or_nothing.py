"""Changes of a model's modules that are undone if they fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """If the code inside raises, restore the modules of `model`: submodules, parameters and buffers by name, hooks,
    attributes, classes, modes, and whether a parameter requires grad. The values of tensors are not restored.
    """
    before = [(module, type(module), _snapshot(module)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, kind, (attributes, contents) in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in contents.items():
                # The same object is filled again: others, such as the handle of a hook, refer to it.
                attributes[name].clear()
                attributes[name].update(content)
        for parameter, required in trained:
            if parameter.requires_grad != required:  # uninitialised and inference parameters may not allow setting it
                parameter.requires_grad_(required)
        raise


def _snapshot(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """A module's attributes, and copies of those that are dicts or sets."""
    attributes = dict(vars(module))
    contents = {name: value.copy() for name, value in attributes.items() if type(value).__name__ in _COPIED_TYPES}
    return attributes, contents


_COPIED_TYPES = ("dict", "OrderedDict", "set")
