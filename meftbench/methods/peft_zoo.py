"""Apply the methods of HF peft other than LoRA (PEFT_METHODS of catalogue/peft_methods.py) by peft's own classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from meftbench.backbones import Layout, base_of, checked_layouts
from meftbench.catalogue.backbones import BACKBONES
from meftbench.catalogue.peft_methods import PEFT_METHODS, Peft, PeftMethod, Targeted, refusal
from meftbench.errors import UserError, one_line, unknown
from meftbench.methods.applied import Applied, predicts_tokens
from meftbench.methods.lora import task_of
from meftbench.methods.peft_model import wrapped_by_peft

# The modules that IA3 adapts, which peft names for text models only. For ViT and DeiT they are chosen as for Llama.
_IA3_OF_IMAGES: dict[str, Any] = {"target_modules": ["k_proj", "v_proj", "mlp.fc2"], "feedforward_modules": ["mlp.fc2"]}
# What peft raises for a configuration that it, or the model, does not support.
_REFUSALS = (ValueError, TypeError, ImportError, NotImplementedError)


def apply(model: nn.Module, settings: Peft, name: str) -> Applied:
    """`model` in peft's wrapper: the adapter of the method called `name`, and a new task head, are trained.

    Raises UserError: the installed peft has no such method, it does not fit the model, peft refuses a field.
    """
    from peft import TaskType

    row = PEFT_METHODS[name]
    layouts = checked_layouts(model)
    config_class = _config_class(row, name)
    _check_fits(model, name)
    _check_config(settings, row, config_class, name)
    task = task_of(model)
    new_modules = task.pop("modules_to_save", [])
    fields = _fields(model, row, settings, layouts) | task
    if new_modules and "modules_to_save" in config_class.__dataclass_fields__:
        fields["modules_to_save"] = new_modules
    try:
        config = config_class(**(fields | settings.config))
        if config.is_prompt_learning and config.task_type is None:
            # Without a task type, peft's wrapper would silently leave its prompts out.
            what = f"peft has no prompts for the head of {type(model).__name__}, or its forward takes no inputs_embeds"
            raise UserError(name, what, "choose another method or model")
        by_position = config.task_type in (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)
        if row.positions and by_position and "checkpoint" not in row.refuses:  # else a cache, which shifts nothing
            what = f"{type(model).__name__} answers by position, and its virtual tokens would shift all of them"
            raise UserError(name, what, "choose another method or model")
        wrapped = wrapped_by_peft(model, config)
    except _REFUSALS as error:
        if "meta tensor" in str(error):
            raise  # peft looks at values, which a prediction's model has not: the caller says so
        what = f"peft refuses it on {type(model).__name__}: {one_line(error)}"
        raise UserError(name, what, "change its settings") from None
    if "modules_to_save" not in fields:
        for child in new_modules:
            model.get_submodule(child).requires_grad_(True)
    for parameter in _unread_parameters(wrapped):
        parameter.requires_grad_(False)
    return Applied(wrapped, no_gradient=frozenset(_factors_of_zero_biases(wrapped)))


def _config_class(row: PeftMethod, name: str) -> Any:
    """peft's configuration class. Raises UserError where the installed peft is too old for it."""
    from peft import __version__
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    for peft_type, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if getattr(peft_type, "value", peft_type) == row.peft_type:  # a plain string if another package registered it
            return config_class
    raise UserError(name, f"the installed peft {__version__} has no {row.peft_type}", "pip install --upgrade peft")


def _check_fits(model: Any, name: str) -> None:
    model_type = model.config.model_type
    encoder_decoder = ("classification", "seq2seq_lm") if model.config.is_encoder_decoder else ("classification",)
    heads = BACKBONES[model_type].heads if model_type in BACKBONES else encoder_decoder
    if model.main_input_name != "input_ids":
        heads = ("image_classification",)
    text_head = "classification" if not predicts_tokens(model) else "causal_lm"
    if model.config.is_encoder_decoder and predicts_tokens(model):
        text_head = "seq2seq_lm"
    reason = refusal(name, model_type, text_head if model.main_input_name == "input_ids" else heads[0], heads)
    if reason:
        raise UserError(type(model).__name__, reason, "choose another method or model")


def _check_config(settings: Peft, row: PeftMethod, config_class: Any, name: str) -> None:
    where = f"{name}: config"
    for key in settings.config:
        if key not in config_class.__dataclass_fields__:
            raise unknown(where, f"field of peft's {config_class.__name__}", key, config_class.__dataclass_fields__)
        if key in row.size:
            raise UserError(where, f"{key} is set by {settings.size}", f"write {settings.size} beside config")
        if key in row.fixed and key not in _MAY_BE_SET:
            raise UserError(where, f"{key} is what makes it {name}", "leave it out")


# Fields that are fixed because runs here are short. They do not define the method, so a user may set them.
_MAY_BE_SET = ("total_step", "progressbar")


def _fields(model: nn.Module, row: PeftMethod, settings: Peft, layouts: tuple[Layout, ...]) -> dict[str, Any]:
    """Fields of peft's configuration from the catalogue row, the settings and the model's layouts."""
    fields = dict(row.fixed)
    if settings.size:
        fields |= dict.fromkeys(row.size, getattr(settings, settings.size))
    attention_targets = sorted({target for layout in layouts for target in layout.attention_targets})
    if isinstance(settings, Targeted) and settings.targets:
        fields["target_modules"] = settings.targets
    elif row.targets == "attention":
        fields["target_modules"] = attention_targets
    elif row.targets == "value":
        fields["target_modules"] = sorted({layout.attention_targets[-1] for layout in layouts})
    elif row.targets == "norms":
        fields["target_modules"] = list(_norm_names(model))
    elif row.peft_type == "IA3" and model.main_input_name != "input_ids":
        fields |= _IA3_OF_IMAGES
    elif row.peft_type == "ADAPTION_PROMPT":
        fields["adapter_layers"] = sum(len(layout.list_of(model)[2]) for layout in layouts)
    return fields


def _norm_names(model: nn.Module) -> Iterator[str]:
    base = base_of(model)
    within = {id(module) for module in base.modules()}
    for name, module in model.named_modules():
        if id(module) in within and type(module).__name__.endswith(("LayerNorm", "RMSNorm")):
            yield name


def _unread_parameters(wrapped: nn.Module) -> list[nn.Parameter]:
    """Trained tensors that nothing reads: SHADOW's last layer updates a hidden state that no layer reads."""
    updates = {name: p for name, p in wrapped.named_parameters() if ".shadow_update_" in name}
    last = [name.partition(".shadow_update_")[0] for name in updates][-1:]
    return [p for name, p in updates.items() if name.partition(".shadow_update_")[0] in last]


def _factors_of_zero_biases(wrapped: nn.Module) -> Iterator[str]:
    """Names of GLoRA's factors D of biases b that are all zero, as in random weights: b·D is 0 whatever D is.

    Of biases without values (on torch's meta device) nothing is known, and none are named.
    """
    for name, _ in wrapped.named_parameters():
        owner, separator, _ = name.partition(".glora_D.")
        if separator:
            bias = getattr(wrapped.get_submodule(owner), "bias", None)
            if bias is not None and not bias.is_meta and not bias.any():
                yield name
