"""Lets HF peft's methods be built and traced where tensors have no values: what peft would read there is given here.

peft's own code runs, but for the helpers named here, each with the reason. Each result has the shape that peft's has.
Where the installed peft lacks a class or a function, it is left out: an older peft has fewer methods.
tests/prediction/test_trace_peft.py compares every method's traced step with a computed one, byte for byte.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental import _config as meta_options
from torch.overrides import TorchFunctionMode

from meftbench.prediction.sparse_shapes import sparse_shapes

# Modules of peft that ask whether a condition holds for a tensor's values, and the answer there.
_ANSWERS = {
    "peft.tuners.vblora.layer": False,  # whether logits are infinite; in a training that begins they are not
    "peft.tuners.loha.layer": True,  # whether a layer is kept in this step; its module_dropout is 0 by default
    "peft.tuners.lokr.layer": True,
}


@contextmanager
def peft_without_values() -> Iterator[None]:
    """Within it, peft's methods can be built on torch's meta device, and their steps traced."""
    patches: list[AbstractContextManager[Any]] = [
        mock.patch.object(torch.Tensor, "__bool__", _answer),
        mock.patch.object(torch, "bincount", _bincount),
        sparse_shapes(),
    ]
    for module, owner, name, replace in _REPLACED:
        holder = _imported(module, owner)
        if hasattr(holder, name):
            patches.append(mock.patch.object(holder, name, replace(getattr(holder, name))))
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def _imported(module: str, owner: str | None) -> Any:
    """The module, or its class called `owner`; None where there is none."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:  # an older peft, without this method
        return None
    return getattr(found, owner, None) if owner else found


def _without_values(value: Any) -> bool:
    return isinstance(value, FakeTensor) or (isinstance(value, Tensor) and value.is_meta)


# --- what is asked in a condition ---

_bool_of_values = torch.Tensor.__bool__


def _answer(tensor: Tensor) -> bool:
    """The truth of a tensor. Without values, it is given to the modules in _ANSWERS; torch refuses it to others."""
    if _without_values(tensor):
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if asker in _ANSWERS:
            return _ANSWERS[asker]
    return _bool_of_values(tensor)


# --- how many elements fulfil a condition ---


def _all_fulfil(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, in which every condition that selects elements counts as true for all of them."""

    @wraps(function)
    def assumed(*args: Any, **kwargs: Any) -> Any:
        table = {torch.ops.aten.nonzero.default: _every_index}
        with (
            mock.patch.object(meta_options, "meta_nonzero_assume_all_nonzero", True),
            mock.patch.dict(fake_impls.op_implementations_dict, table),
        ):
            return function(*args, **kwargs)

    return assumed


def _every_index(mode: Any, func: Any, condition: Tensor) -> Tensor:
    """`nonzero` of a fake tensor, for `_all_fulfil`."""
    with mode:
        return torch.empty(condition.numel(), condition.dim(), dtype=torch.int64, device=condition.device)


_bincount_of_values = torch.bincount


def _bincount(input: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    """torch has no implementation for the meta device. peft's UniLoRA counts indices below `minlength`."""
    if _without_values(input):
        return input.new_empty(minlength)
    return _bincount_of_values(input, weights, minlength)


# --- single methods ---


class _StayWithoutValues(TorchFunctionMode):
    """Copies of tensors of the meta device to the host stay on the meta device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func is torch.Tensor.cpu:
                return args[0]
            if func is torch.Tensor.to and str(kwargs.get("device")) == "cpu":
                del kwargs["device"]
                return func(*args, **kwargs) if len(args) > 1 or kwargs else args[0]
        return func(*args, **kwargs)


def _on_meta_throughout(function: Callable[..., Any]) -> Callable[..., Any]:
    """FRoD decomposes the weights of all layers on the host."""
    assumed = _all_fulfil(function)

    @wraps(function)
    def staying(*args: Any, **kwargs: Any) -> Any:
        with _StayWithoutValues():
            return assumed(*args, **kwargs)

    return staying


def _with_known_size(function: Callable[..., Any]) -> Callable[..., Any]:
    """FRoD reads the sides of a sparse square matrix from a tensor; they are those of V, by which it is multiplied."""

    @wraps(function)
    def sized(layer: Any, adapter: str, **kwargs: Any) -> Any:
        sides = [layer.frod_V[adapter].shape[0]] * 2
        kept = layer.frod_s_size
        # Not registered in the layer, as peft does it: the model owns these tensors.
        object.__setattr__(layer, "frod_s_size", {adapter: SimpleNamespace(tolist=lambda: sides)})
        try:
            return function(layer, adapter, **kwargs)
        finally:
            object.__setattr__(layer, "frod_s_size", kept)

    return sized


def _on_the_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """BOFT sorts the indices of a permutation, a vector, one by one."""

    @wraps(function)
    def computed(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return computed


def _matrix_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """BOFT writes the ones of a permutation matrix one by one, at indices that it reads."""
    return lambda layer, indices: torch.zeros(len(indices), len(indices))


def _indices_of_mask(function: Callable[..., Any]) -> Callable[..., Any]:
    """SHiRA looks for the ones in a mask, of which there are as many as trained weights."""

    @wraps(function)
    def update_layer(layer: Any, adapter_name: str, mask: Tensor | None, *args: Any, **kwargs: Any) -> None:
        if mask is None or not _without_values(mask):
            function(layer, adapter_name, mask, *args, **kwargs)
            return
        function(layer, adapter_name, None, *args, **kwargs)
        count = layer.shira_weight[adapter_name].numel()
        layer.shira_indices[adapter_name] = torch.empty(2, count, dtype=torch.int, device=mask.device)

    return update_layer


def _principal_parts(function: Callable[..., Any]) -> Callable[..., Any]:
    """AdaMSS decomposes the weight with random numbers of the weight's device, and the meta device has none."""

    @wraps(function)
    def shapes(tensor: Tensor, r: int, device: Any, dtype: torch.dtype, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not _without_values(tensor):
            return function(tensor, r, device, dtype, **kwargs)  # type: ignore[no-any-return]
        *leading, rows, columns = tensor.shape
        rank = min(r, rows, columns)
        return tensor.new_empty(*leading, rank, columns), tensor.new_empty(*leading, rows, rank)

    return shapes


def _equal_clusters(function: Callable[..., Any]) -> Callable[..., Any]:
    """AdaMSS clusters the rows of a weight by their values. Here all clusters have as many rows, to one. The trained
    numbers are as many as with any other clusters of at least `subspace_rank` rows; blocks of 512 bytes may differ."""

    @wraps(function)
    def clusters(rows: Tensor, num_subspaces: int, iterations: int) -> tuple[Tensor, int]:
        if not _without_values(rows):
            return function(rows, num_subspaces, iterations)  # type: ignore[no-any-return]
        count = min(num_subspaces, rows.shape[0])
        return torch.arange(rows.shape[0], device="cpu") % count, count

    return clusters


def _locations(function: Callable[..., Any]) -> Callable[..., Any]:
    """AdaMSS looks up the rows of each cluster, which are not needed after that."""

    @wraps(function)
    def locations(index: Tensor) -> dict[int, Tensor]:
        return {cluster: rows.to(torch.get_default_device()) for cluster, rows in function(index).items()}

    return locations


def _with_dtype_of_base(function: Callable[..., Any]) -> Callable[..., Any]:
    """peft gives an adapter the type of the layer that it adapts, but for adapters of the meta device, which it leaves
    in float32: in a model of float64 they would be half as large."""

    @wraps(function)
    def moved(layer: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        function(layer, adapter_name, *args, **kwargs)
        weight = getattr(layer.get_base_layer(), "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_meta or not weight.is_floating_point():
            return
        for name in (*layer.adapter_layer_names, *layer.other_param_names):
            parts = getattr(layer, name, None)
            if not isinstance(parts, nn.ModuleDict | nn.ParameterDict) or adapter_name not in parts:
                continue
            part = parts[adapter_name]
            if isinstance(part, nn.Module) or part.is_floating_point():
                parts[adapter_name] = part.to(weight.dtype)

    return moved


# Module, class or None, the name of the function, and what makes the one in its place from it.
_REPLACED: tuple[tuple[str, str | None, str, Callable[..., Any]], ...] = (
    ("peft.tuners.adamss.layer", None, "slice_pca", _principal_parts),
    ("peft.tuners.adamss.layer", None, "clustering_Z", _equal_clusters),
    ("peft.tuners.adamss.layer", None, "seg_locations", _locations),
    ("peft.tuners.boft.layer", "BOFTLayer", "block_butterfly_perm", _on_the_host),
    ("peft.tuners.boft.layer", "BOFTLayer", "perm2mat", _matrix_of),
    ("peft.tuners.frod.model", "FrodModel", "_init_frod_projections", _on_meta_throughout),
    ("peft.tuners.frod.layer", "FrodLayer", "update_layer", _on_meta_throughout),
    ("peft.tuners.frod.layer", "Linear", "_get_frod_tensors", _with_known_size),
    ("peft.tuners.shira.layer", "ShiraLayer", "update_layer", _indices_of_mask),
    ("peft.tuners.tuners_utils", "BaseTunerLayer", "_move_adapter_to_device_of_base_layer", _with_dtype_of_base),
    ("peft.tuners.unilora.model", "UniLoraModel", "_assign_unilora_indices_and_scales", _all_fulfil),
    ("peft.tuners.waveft.layer", "WaveFTLayer", "get_delta_weight", _all_fulfil),  # selects all that lie inside
)
