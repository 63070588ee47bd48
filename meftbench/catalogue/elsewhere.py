"""What other libraries call the methods, levers, precisions and optimizers of this one: the one table of equivalents.

The flags were looked up in the sources of the versions in `VERSIONS`, and nothing is listed that is not there. A flag
of the same purpose is not always the same arithmetic: where it differs, a note says how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from meftbench.catalogue.backbones import BACKBONES

Flags = Mapping[str, Any]

TRAINER, TRL, AXOLOTL, UNSLOTH = "transformers.Trainer", "TRL", "axolotl", "unsloth"
VERSIONS: dict[str, str] = {
    TRAINER: "transformers 5.23, peft 0.21",
    TRL: "trl 1.10",  # trl/trainer/sft_config.py at f2cd577 (1.10.0.dev0)
    AXOLOTL: "axolotl 0.18",  # src/axolotl/utils/schemas and integrations at 067b021 (0.18.0)
    UNSLOTH: "unsloth 2026.8",  # unsloth/models/loader.py and llama.py at 015bdef (2026.8.19)
}


@dataclass(frozen=True)
class Elsewhere:
    """The flags of each library for one thing; None: not offered there. notes: how it differs, by library."""

    trainer: Flags | None = None
    trl: Flags | None = None
    axolotl: Flags | None = None
    unsloth: Flags | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    def of(self, library: str) -> Flags | None:
        return {TRAINER: self.trainer, TRL: self.trl, AXOLOTL: self.axolotl, UNSLOTH: self.unsloth}[library]


_NON_REENTRANT = {"use_reentrant": False}
_CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": _NON_REENTRANT}
_ALL_OF_LIGER = "all of Liger's kernels, not its loss alone"
_ALWAYS_CHUNKED = "the loss over the vocabulary is in chunks there, by default"
_WHOLE_STEP = "compiles the whole model, not its layers one by one"

# By a lever, with the settings that need flags of their own. `checkpoint+offload` is what the two are together.
LEVERS_ELSEWHERE: dict[str, Elsewhere] = {
    "checkpoint": Elsewhere(
        # `gradient_checkpointing` is the deprecated name of the first from transformers 5.23 on.
        trainer={"activation_checkpointing": True, "activation_checkpointing_kwargs": _NON_REENTRANT},
        trl=_CHECKPOINTED,
        axolotl=_CHECKPOINTED,
        unsloth={"use_gradient_checkpointing": True},
    ),
    "checkpoint(every)": Elsewhere(
        trainer={
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {**_NON_REENTRANT, "every_n_layers": "{every}"},
        }
    ),
    "checkpoint(layers)": Elsewhere(),
    "checkpoint(keep)": Elsewhere(axolotl={**_CHECKPOINTED, "selective_checkpointing": True}),
    "offload": Elsewhere(
        trl={"activation_offloading": True},
        # Its checks ask for gradient_checkpointing, and with adapters the offloading then takes its place.
        axolotl={"gradient_checkpointing": True, "activation_offloading": True},
        notes={AXOLOTL: "with adapters; in full fine-tuning axolotl recomputes layers as well"},
    ),
    "checkpoint+offload": Elsewhere(
        trainer={
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {**_NON_REENTRANT, "offload": True},
        },
        trl={**_CHECKPOINTED, "activation_offloading": True},
        axolotl={"gradient_checkpointing": True, "activation_offloading": "hidden_states"},
        unsloth={"use_gradient_checkpointing": "unsloth"},
        notes={TRAINER: "copies run on the stream of the computation, so that the step is slower than predicted"},
    ),
    "tiled_mlp": Elsewhere(axolotl={"tiled_mlp": True}, unsloth={"unsloth_tiled_mlp": True}),
    "chunked_loss": Elsewhere(
        trl={"loss_type": "chunked_nll"},
        unsloth={},
        notes={UNSLOTH: "on by default, by kernels of its own"},
    ),
    "liger_loss": Elsewhere(
        trainer={"use_liger_kernel": True},
        trl={"use_liger_kernel": True},
        axolotl={"plugins": ["axolotl.integrations.liger.LigerPlugin"], "liger_fused_linear_cross_entropy": True},
        notes={TRAINER: _ALL_OF_LIGER, TRL: _ALL_OF_LIGER},
    ),
    "cut_loss": Elsewhere(
        axolotl={
            "plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"],
            "cut_cross_entropy": True,
        }
    ),
    "compile": Elsewhere(
        trainer={"torch_compile": True},
        trl={"torch_compile": True},
        axolotl={"torch_compile": True},
        notes={TRAINER: _WHOLE_STEP, TRL: _WHOLE_STEP, AXOLOTL: _WHOLE_STEP},
    ),
    "weight_offload": Elsewhere(axolotl={"layer_offloading": True}),
    "optimizer_offload": Elsewhere(),
    "optimizer_in_backward": Elsewhere(),
}
# What has to be switched off there where the lever is not taken, because it is on by default.
ON_BY_DEFAULT: dict[str, dict[str, Flags]] = {
    TRL: {"checkpoint": {"gradient_checkpointing": False}, "loss": {"loss_type": "nll"}},
    UNSLOTH: {"checkpoint": {"use_gradient_checkpointing": False}},
}
# Methods that have equivalents elsewhere; the others are put into a model by meftbench.apply_method.
METHODS_ELSEWHERE = ("full", "lora")
METHOD_NOTES = {
    "lora-fa": "peft's create_lorafa_optimizer also corrects the gradient of B (version 2 of the paper), which this "
    "method does not",
}
# Projections that `lora` adapts where no targets are named, by model type: attention_targets of the backbones' layouts.
LORA_TARGETS: dict[str, list[str]] = {
    **{name: ["q_proj", "v_proj"] for name in BACKBONES},
    **{name: ["query", "value"] for name in ("bert", "roberta")},
    **{name: ["q_proj", "v_proj", "in_proj_qkv"] for name in ("qwen3_5_text", "qwen3_5_moe_text")},
    "qwen3_next": ["q_proj", "v_proj", "in_proj_qkvz"],
}
# By head, the fields of LoraConfig with which peft trains a new task head as well.
LORA_HEADS: dict[str, dict[str, Any]] = {
    "causal_lm": {"task_type": "CAUSAL_LM"},
    "seq2seq_lm": {"task_type": "SEQ_2_SEQ_LM"},
    "classification": {"task_type": "SEQ_CLS"},
    "multiple_choice": {"modules_to_save": ["classifier"]},
    "image_classification": {"modules_to_save": ["classifier"]},
}
# The name of a new head where it is none that peft finds by the task type, by model type.
OTHER_HEADS = {"bart": "classification_head"}


def lora_fields(model_type: str | None, head: str | None) -> dict[str, Any]:
    """The fields of LoraConfig about the head of a model of `model_type`; None: not known, so a language model's."""
    fields = LORA_HEADS[head or "causal_lm"]
    if head == "classification" and model_type in OTHER_HEADS:
        return {**fields, "modules_to_save": [OTHER_HEADS[model_type]]}
    return fields


# By precision: the dtype in which a model is loaded, and what the libraries are told. nf4 quantises while loading.
PRECISIONS_ELSEWHERE: dict[str, tuple[str, Elsewhere]] = {
    "fp64": ("torch.float64", Elsewhere(trainer={})),
    "fp32": ("torch.float32", Elsewhere(trainer={}, trl={"bf16": False}, axolotl={"bf16": False, "float32": True})),
    "bf16": (
        "torch.bfloat16",
        Elsewhere(trainer={}, trl={"bf16": False}, axolotl={"bf16": False, "bfloat16": True}, unsloth={"bf16": True}),
    ),
    "bf16-autocast": ("torch.float32", Elsewhere(trainer={"bf16": True}, trl={"bf16": True})),
    "fp16-autocast": ("torch.float32", Elsewhere(trainer={"fp16": True}, trl={"fp16": True})),
    "nf4": (
        "torch.bfloat16",
        Elsewhere(
            trainer={"bf16": True},
            trl={"bf16": True},
            axolotl={"bf16": True, "load_in_4bit": True},
            unsloth={"bf16": True},
        ),
    ),
}
# `optim` of TrainingArguments and `optimizer` of axolotl, which takes the same names; with `optim_args` where needed.
OPTIMIZERS_ELSEWHERE: dict[str, dict[str, str]] = {
    "adamw": {"optim": "adamw_torch"},
    "adamw-8bit": {"optim": "adamw_bnb_8bit"},
    "paged-adamw": {"optim": "paged_adamw_32bit"},
    "paged-adamw-8bit": {"optim": "paged_adamw_8bit"},
    "lion": {"optim": "lion_32bit"},
    "lion-8bit": {"optim": "lion_8bit"},
    "adafactor": {"optim": "adafactor"},
    "sgd": {"optim": "sgd"},
    "sgd-momentum": {"optim": "sgd", "optim_args": "momentum=0.9"},
}


@dataclass(frozen=True)
class Equivalent:
    """What a choice of levers is in one library. missing: levers that are not offered there.  notes: how it differs."""

    flags: dict[str, Any]
    missing: list[str]
    notes: list[str]


def levers_in(library: str, levers: Mapping[str, Mapping[str, Any]]) -> Equivalent:
    """The flags of `library` for levers, each with its settings that differ from the defaults."""
    flags: dict[str, Any] = {}
    missing: list[str] = []
    notes: list[str] = []
    off = ON_BY_DEFAULT.get(library, {})
    if "checkpoint" not in levers:
        flags |= off.get("checkpoint", {})
    if not {"chunked_loss", "liger_loss", "cut_loss"} & levers.keys():
        flags |= off.get("loss", {})
    if library == UNSLOTH and "chunked_loss" not in levers:
        notes.append(_ALWAYS_CHUNKED)
    for key, settings in _keys(levers):
        entry = LEVERS_ELSEWHERE.get(key, Elsewhere())  # a lever that was added and is not in the table
        found = entry.of(library)
        if found is None:
            missing.append(key)
            if not key.startswith("checkpoint("):
                continue
            # The nearest that is offered, or its default would decide.
            found = LEVERS_ELSEWHERE["checkpoint"].of(library) or {}
            notes.append("every layer is checkpointed instead")
        for name, value in _filled(found, settings).items():
            # Plugins of several levers stand in one list.
            flags[name] = [*flags.get(name, []), *value] if isinstance(value, list) else value
        if library in entry.notes:
            notes.append(f"{key}: {entry.notes[library]}")
    return Equivalent(flags, missing, notes)


def _keys(levers: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """The keys of LEVERS_ELSEWHERE for levers, with the settings that fill their flags."""
    keys: list[tuple[str, Mapping[str, Any]]] = []
    checkpoint = levers.get("checkpoint")
    if checkpoint is not None:
        special = [name for name in ("every", "layers", "keep") if name in checkpoint]
        both = "offload" in levers and not special
        keys += [(f"checkpoint({name})", checkpoint) for name in special]
        if not special:
            keys.append(("checkpoint+offload" if both else "checkpoint", checkpoint))
    for name, settings in levers.items():
        if name == "checkpoint" or (name == "offload" and ("checkpoint+offload", checkpoint) in keys):
            continue
        keys.append((name, settings))
    return keys


def _filled(flags: Flags, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`flags`, in which "{every}" is the value of that setting."""
    filled: dict[str, Any] = {}
    for name, value in flags.items():
        if isinstance(value, Mapping):
            filled[name] = _filled(value, settings)
        elif isinstance(value, str) and value.startswith("{"):
            filled[name] = settings[value.strip("{}")]
        else:
            filled[name] = value
    return filled
