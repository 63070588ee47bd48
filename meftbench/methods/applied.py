"""The result of applying a method: the model to train, and what the probes need to know of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from meftbench.backbones import Layout, base_of
from meftbench.backbones.quantize import dtype_of
from meftbench.catalogue.methods import Bottleneck as BottleneckSettings
from meftbench.catalogue.settings import Settings
from meftbench.errors import UserError
from meftbench.methods.levers.base import BuildOptimizer, Lever
from meftbench.methods.levers.saved import SavedTensors
from meftbench.reversible import ReversibleStack
from meftbench.reversible.calibration import CalibratedRange
from meftbench.reversible.recompute import modes_as

from .bottleneck import Bottleneck


@dataclass
class Applied:
    """A model with a method applied.

    model: what is called and trained (for LoRA peft's wrapper; otherwise the model that was given).
    surroundings: entered, in this order, around forward and loss of every step; levers may add to them.
    saving: what levers such as offload do with the tensors that autograd saves; entered before the surroundings.
    reference_switches: entered so that the method's own layers run under reference autograd.
    recomputes: whether layers or parts of them run again in the backward pass.
    levers: the memory optimisations (levers) that are on, by name.
    layouts: the layouts by which the method has split the layers; empty where it leaves them whole.
    no_gradient: names of trained tensors whose true gradient is zero, whatever the batch.
    own_optimizer: makes the method's own optimizer from parameters or groups of them, lr, weight_decay and seed; None:
        any optimizer trains it.
    """

    model: nn.Module
    surroundings: list[Callable[[], AbstractContextManager[object]]] = field(default_factory=list)
    saving: SavedTensors = field(default_factory=SavedTensors)
    reference_switches: list[Callable[[], AbstractContextManager[object]]] = field(default_factory=list)
    recomputes: bool = False
    levers: dict[str, Lever] = field(default_factory=dict)
    layouts: tuple[Layout, ...] = ()
    no_gradient: frozenset[str] = frozenset()
    own_optimizer: Callable[..., Optimizer] | None = None

    @property
    def stacks(self) -> list[ReversibleStack]:
        """The reversible stacks of the model, empty for other methods."""
        return [module for module in self.model.modules() if isinstance(module, ReversibleStack)]

    @property
    def ranges(self) -> dict[str, CalibratedRange]:
        """The calibrated ranges of the model's fixed-point stacks, by the stack's name and `.range`."""
        return ranges_of(self.model)

    @property
    def range_widenings(self) -> int | None:
        """Forward passes that left a calibrated range and were run again with a wider one; None: no such range."""
        return sum(calibrated.widenings for calibrated in self.ranges.values()) if self.ranges else None

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def reference_autograd(self) -> Iterator[None]:
        """Entered to run the same equations under reference autograd: nothing is recomputed or offloaded."""
        with ExitStack() as stack:
            for switch in self.reference_switches:
                stack.enter_context(switch())
            for lever in self.levers.values():
                stack.enter_context(lever.without())
            yield

    @contextmanager
    def around_forward(self) -> Iterator[None]:
        """Entered around forward and loss of a step."""
        with ExitStack() as stack:
            stack.enter_context(self.saving())
            for surrounding in self.surroundings:
                stack.enter_context(surrounding())
            yield

    @contextmanager
    def around_training_step(self) -> Iterator[None]:
        """Entered around forward and backward of a step whose gradients the optimizer then takes."""
        with ExitStack() as stack:
            for lever in self.levers.values():
                stack.enter_context(lever.in_training_step())
            yield

    def optimizer(self, build: BuildOptimizer) -> Optimizer:
        """The optimizer of the trained parameters, as the levers hold it. build: makes one of given parameters."""
        for lever in self.levers.values():
            build = lever.optimizer_of(build)
        return build(list(self.trained().values()))

    @contextmanager
    def without_gradients(self) -> Iterator[None]:
        """Entered where a loss is computed without gradients: in evaluation mode, with levers in effect."""
        with ExitStack() as stack:
            for lever in self.levers.values():
                stack.enter_context(lever.in_evaluation())
            stack.enter_context(modes_as(self.model, [False for _ in self.model.modules()]))
            stack.enter_context(torch.no_grad())
            yield

    def zero_adapters(self) -> None:
        """Make every adapter's output zero, where the method has adapters."""
        for module in self.model.modules():
            if isinstance(module, Bottleneck):
                module.zero()


def ranges_of(model: nn.Module) -> dict[str, CalibratedRange]:
    """Like `Applied.ranges`, for a model that has a method applied."""
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, ReversibleStack)}
    return {f"{name}.range": stack.range for name, stack in stacks.items() if stack.range is not None}


def check_untouched(model: nn.Module) -> None:
    """Raises UserError where the model has a method applied already, by this package or by peft."""
    applied_method = next((vars(module)[NOTE]["method"] for module in model.modules() if NOTE in vars(module)), None)
    if applied_method is None and any(isinstance(module, Bottleneck | ReversibleStack) for module in model.modules()):
        applied_method = "a method"
    if applied_method is None and (kind := _peft_class_in(model)):
        applied_method = f"an adapter of peft ({kind})"
    if applied_method:
        cure = "take it off by meftbench.unload, or load the pre-trained model afresh"
        raise UserError(type(model).__name__, f"has {applied_method} applied already", cure)


def _peft_class_in(model: nn.Module) -> str | None:
    """The class name of the first of peft's modules: its wrapper around the model, or a module inside."""
    if "peft" not in sys.modules:  # peft is not imported, so that no module can be one of its classes
        return None
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (PeftModel, PeftMixedModel, BaseTunerLayer, AuxiliaryTrainingWrapper)
    return next((type(module).__name__ for module in model.modules() if isinstance(module, kinds)), None)


# Attribute of the model to train that says what was applied. It holds plain values only, so that it can be copied and
# pickled with the model.
NOTE = "meftbench_adapter"


def note_before(model: nn.Module, method: str, settings: Settings) -> dict[str, Any]:
    """The value of the attribute NOTE, made before a method is applied.

    It holds the method, whether it trains the whole model, its settings, and what `unload` must know of the model as it
    was: the frozen parameters, the modules that were checkpointed, and the arguments of torch's checkpoint.
    """
    return {
        "method": method,
        "whole": settings.whole,
        "settings": json.loads(json.dumps(settings.in_full(), default=str)),
        "levers": [],
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "checkpointed": [n for n, m in model.named_modules() if getattr(m, "gradient_checkpointing", False) is True],
        "checkpointing": next(map(_options, filter(None, map(_checkpointing_of, model.modules()))), None),
        "vocabulary": vocabulary_of(model),
    }


def _checkpointing_of(module: nn.Module) -> Any:
    return vars(module).get("_gradient_checkpointing_func")


def _options(function: Any) -> dict[str, Any]:
    """The arguments of simple types that transformers has bound to torch's checkpoint, such as use_reentrant."""
    bound = getattr(function, "keywords", {}).items()
    return {name: value for name, value in bound if isinstance(value, bool | int | str)}


def vocabulary_of(model: Any) -> int | None:
    """Rows of the model's input embeddings; None: it reads no tokens."""
    try:
        rows: int | None = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):  # raised by transformers or torch where the model has none
        return None
    return rows


def freeze_backbone(model: nn.Module) -> None:
    """Freeze everything except a new task head, which is what lies outside the pre-trained base model.

    BERT's pooler is part of the base model and is frozen, the classifier is trained (docs/paper.md). The head of a
    language model is pre-trained, and is frozen too.
    """
    for parameter in (model if predicts_tokens(model) else base_of(model)).parameters():
        parameter.requires_grad_(False)


LAYER_OUTPUTS = ("output_hidden_states", "output_attentions")


def asks(base: Any, kwargs: dict[str, Any], name: str) -> bool:
    """Whether a call of the base model asks for an output by its arguments or, without one, by its configuration."""
    requested = kwargs.get(name)
    return bool(getattr(base.config, name, False) if requested is None else requested)


def refuse_asked(base: Any, kwargs: dict[str, Any], names: tuple[str, ...], what: str, cure: str) -> None:
    """Raises UserError where a call asks for one of `names`, by its arguments or by the model's configuration."""
    for name in names:
        if asks(base, kwargs, name):
            raise UserError(name, what, cure)


def predicts_tokens(model: Any) -> bool:
    """Whether the model's head is a pre-trained one over its vocabulary."""
    return model.get_output_embeddings() is not None


def new_adapter(model: nn.Module, layout: Layout, settings: BottleneckSettings) -> Bottleneck:
    """An adapter of the model's hidden size, dtype and device."""
    config = model.config
    activation = settings.activation or layout.activation(config)
    adapter = Bottleneck(layout.hidden_size(config), settings.adapter_size, activation, settings.init_std)
    return adapter.to(device=next(model.parameters()).device, dtype=dtype_of(model))
