"""A change of a model's modules that is undone where it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Where what is inside raises, the modules of `model` are as they were: submodules, parameters and buffers by name,
    hooks, attributes, classes, modes, and whether a parameter requires grad. Values of tensors are not looked after.
    """
    before = [(module, type(module), _noted(module)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, kind, (attributes, contents) in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in contents.items():
                # The very dict: others, such as the handle of a hook, refer to it.
                attributes[name].clear()
                attributes[name].update(content)
        for parameter, required in trained:
            if parameter.requires_grad != required:  # of some (uninitialised, of inference) it may not be set at all
                parameter.requires_grad_(required)
        raise


def _noted(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """A module's attributes, and what those hold that are dicts or sets."""
    attributes = dict(vars(module))
    contents = {name: value.copy() for name, value in attributes.items() if type(value).__name__ in _TABLES}
    return attributes, contents


_TABLES = ("dict", "OrderedDict", "set")
