"""Models that other libraries changed before a method is applied: forwards replaced on instances (accelerate's hooks,
kernels of other libraries), weights offloaded or quantised. Models that cannot be trained or split are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from meftbench.errors import UserError

# accelerate's hook replaces `forward` on an instance. It keeps the one before as `_old_forward`, and calls it after
# moving the inputs and before moving the outputs.
FORWARD, BEHIND_HOOK = "forward", "_old_forward"
_OF_TRANSFORMERS = "transformers.models."
_CAPTURING = "transformers.utils.output_capturing"


def name_of_forward(module: nn.Module) -> str:
    """The attribute with the module's own computation: `_old_forward` under accelerate's hook, else `forward`."""
    return BEHIND_HOOK if "_hf_hook" in vars(module) else FORWARD


def take_forwards(view: nn.Module, module: nn.Module) -> None:
    """Where the forward of `module` was replaced on the instance, bind the replacement to `view`, a shallow copy of
    `module` that has other submodules."""
    for name in (FORWARD, BEHIND_HOOK):
        if name in vars(module):
            vars(view)[name] = _rebound(vars(module)[name], module, view)


def _rebound(function: Any, module: nn.Module, view: nn.Module) -> Any:
    if isinstance(function, partial):
        args = [view if argument is module else argument for argument in function.args]
        return partial(function.func, *args, **function.keywords)
    assert isinstance(function, MethodType)
    return MethodType(function.__func__, view)


def check_forwards(layer: nn.Module, in_part: tuple[str, ...]) -> None:
    """Raises UserError where a layer cannot be run by its sublayers: its forward was replaced; that of a submodule
    `in_part` was replaced by a function that cannot be bound to a copy of it; or such a submodule has hooks, which
    would see its output without the projection.

    in_part: names of the submodules that are run without their output projection.
    """
    check_not_replaced(layer, ("",))
    for name in in_part:
        module = layer.get_submodule(name)
        for function in (vars(module)[key] for key in (FORWARD, BEHIND_HOOK) if key in vars(module)):
            method = isinstance(function, MethodType) and function.__self__ is module
            if not method and not (isinstance(function, partial) and any(arg is module for arg in function.args)):
                raise _patched(module)
        check_unhooked(module)


def check_unhooked(module: nn.Module) -> None:
    """Raises UserError where a submodule that runs without its output projection has hooks, which see and may change
    its output or the gradient. Those by which transformers collects outputs do nothing unless they are asked for."""
    tables: list[dict[int, Any]] = [module._forward_hooks, module._backward_hooks, module._backward_pre_hooks]
    if any(_module_of(hook) != _CAPTURING for table in tables for hook in table.values()):
        what = "has hooks, which would see it without its output projection: layers are run here in parts"
        raise UserError(type(module).__name__, what, "take them off, or hook its projections")


def check_not_replaced(layer: nn.Module, names: tuple[str, ...]) -> None:
    """Raises UserError where the forward of one of these submodules ("": the layer itself), or another attribute of its
    transformers class, was replaced on the instance, or the forward on the class. They run in parts only, so the
    replacement would be left out."""
    for module in map(layer.get_submodule, names):
        if name_of_forward(module) == FORWARD and FORWARD in vars(module):
            raise _patched(module)
        kind = type(module)
        known = {name for base in kind.__mro__ if base.__module__.startswith(_OF_TRANSFORMERS) for name in vars(base)}
        if shadowed := sorted((known - {FORWARD}) & vars(module).keys()):
            raise _patched(module, shadowed[0])
        if (where := foreign_forward(kind)) is not None:
            what = f"{kind.__name__}.forward was replaced ({where}), and layers are run here in parts"
            raise UserError(kind.__name__, what, "take the patch off, or take lora")


def foreign_forward(kind: type[nn.Module]) -> str | None:
    """The Python module of the function that a class's forward was replaced by; None: the forward is the class's own or
    an ancestor's, perhaps under decorators of transformers or torch."""
    class_modules = {ancestor.__module__ for ancestor in kind.__mro__}
    function: Any = kind.forward
    while function is not None:
        # A decorator may take over the name of what it wraps, so the module is read from the function's globals.
        where = str(getattr(function, "__globals__", {}).get("__name__", type(function).__module__))
        if where not in class_modules and not where.startswith(("transformers.", "torch.")):
            return where
        function = getattr(function, "__wrapped__", None)
    return None


def hooked(layer: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether one of these submodules ("": the layer itself) has hooks that are neither from this package nor those by
    which transformers collects outputs."""
    modules = list(map(layer.get_submodule, names))
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for module in modules for table in tables for hook in getattr(module, table).values()]
    return any(not _module_of(hook).startswith(("meftbench.", _CAPTURING)) for hook in hooks)


def _module_of(function: Any) -> str:
    return str(getattr(function, "__module__", ""))


def check_tokens_alone(layer: nn.Module, feed_forward: Callable[[nn.Module, Tensor], Tensor], width: int) -> None:
    """Raises UserError where a submodule's forward was replaced by one with which tokens see each other in the
    feed-forward sublayer, which is run for one tile of tokens at a time.

    feed_forward: (layer, h (B, L, D)) -> (B, L, D).  width: D.
    """
    patched = [module for module in layer.modules() if name_of_forward(module) in vars(module) and module is not layer]
    parameter = next(layer.parameters())
    if not patched or parameter.is_meta:
        return
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        h_BLD = torch.randn(1, 6, width).to(parameter.device, parameter.dtype)
        alone = treats_tokens_alone(layer, feed_forward, h_BLD)
    if not alone:
        kind = type(patched[0]).__name__
        what = "its forward was replaced on the instance by one in which tokens see each other, and tokens are run here"
        raise UserError(kind, f"{what} in tiles", "take the patch off, or take lora")


def treats_tokens_alone(layer: nn.Module, feed_forward: Callable[[nn.Module, Tensor], Tensor], h_BLD: Tensor) -> bool:
    """Whether the feed-forward sublayer gives the same for tiles of tokens as for all of them at once. It runs in
    evaluation mode, since dropout would draw other numbers for each tile."""
    modes = [(module, module.training) for module in layer.modules()]
    layer.eval()
    try:
        whole_BLD = feed_forward(layer, h_BLD)
        tiles_BLD = torch.cat([feed_forward(layer, tile) for tile in h_BLD.split(2, 1)], 1)
    finally:
        for module, training in modes:
            module.training = training
    finite = bool(whole_BLD.isfinite().all())  # NaN and infinite values cannot be compared
    return not finite or alike(tiles_BLD, whole_BLD)


def alike(actual: Tensor, expected: Tensor) -> bool:
    """Whether the two are the same except for rounding errors."""
    tolerance = 1e-5 if expected.dtype.itemsize >= 4 else 2e-2
    return bool((actual - expected).norm() <= tolerance * expected.norm())


def _patched(module: nn.Module, name: str = FORWARD) -> UserError:
    what = f"its {name} was replaced on the instance, and layers are run here in parts"
    return UserError(type(module).__name__, what, "take the patch off")


def check_classes(layers: list[nn.Module]) -> None:
    """Raises UserError where a layer, or a submodule of one, is of a subclass of a transformers class, since what the
    subclass changes would be left out when the layer runs in parts; or where the layers are of several classes."""
    for kind in {type(module) for layer in layers for module in layer.modules()}:
        ancestors = [base for base in kind.__mro__ if base.__module__.startswith(_OF_TRANSFORMERS)]
        if ancestors and ancestors[0] is not kind:
            what = f"is a subclass of {ancestors[0].__name__}, and layers are run here in parts that know only that"
            raise UserError(kind.__name__, what, "take lora, or transformers' own class")
    if kinds := {type(layer).__name__ for layer in layers if type(layer) is not type(layers[0])}:
        what = f"its layers are of several classes ({', '.join(sorted({type(layers[0]).__name__, *kinds}))})"
        raise UserError(type(layers[0]).__name__, what, "take lora, or give them one class")


def check_trainable(model: nn.Module) -> None:
    """Raises UserError where no method could train the model: parameters have no shape yet, accelerate has offloaded
    weights (device_map, cpu_offload), they are quantised in a way that has no backward, or they were made under
    torch.inference_mode."""
    name, modules = type(model).__name__, list(model.modules())
    if any(isinstance(parameter, UninitializedParameter) for parameter in model.parameters()):
        raise UserError(
            name, "has parameters without a shape yet (LazyLinear and its kin)", "run a batch through it first"
        )
    if any(p.is_meta for p in model.parameters()) and any("_hf_hook" in vars(module) for module in modules):
        cure = 'load the model onto one device: from_pretrained(..., device_map={"": 0}), or without device_map'
        raise UserError(name, "its weights are offloaded by accelerate and cannot be trained", cure)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    packed = next((type(m).__name__ for m in modules if type(m).__module__.startswith(_WITHOUT_BACKWARD)), None)
    if packed or (quantizer is not None and not quantizer.is_trainable):
        what = f"its weights are quantised by {packed or type(quantizer).__name__}, which has no backward"
        raise UserError(name, what, "load it in 4 bits of bitsandbytes (precision nf4), or in bfloat16")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise UserError(name, "its weights were made under torch.inference_mode", "load it outside of it")


_WITHOUT_BACKWARD = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")


def check_one_device(model: nn.Module) -> None:
    """Raises UserError where the model is spread over several devices."""
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        cure = 'load it onto one: device_map={"": 0}, or take lora'
        raise UserError(type(model).__name__, f"is spread over {', '.join(devices)}", cure)
