"""What to type for a row of a plan: a meftbench command, a Python snippet, and the flags of other libraries."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from meftbench.catalogue.elsewhere import (
    AXOLOTL,
    LORA_TARGETS,
    METHOD_NOTES,
    METHODS_ELSEWHERE,
    OPTIMIZERS_ELSEWHERE,
    PRECISIONS_ELSEWHERE,
    TRAINER,
    TRL,
    UNSLOTH,
    VERSIONS,
    levers_in,
    lora_fields,
)
from meftbench.catalogue.labels import Part, joined, parts_from
from meftbench.catalogue.levers import NOT_IN_A_MODEL
from meftbench.catalogue.methods import METHODS, Lora
from meftbench.catalogue.models import MODELS
from meftbench.catalogue.optimizers import OPTIMIZERS
from meftbench.plan.factories import is_factory
from meftbench.plan.models import known_config, split_name
from meftbench.plan.ranking import method_of

# By head of the model, the class that loads it.
_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "multiple_choice": "AutoModelForMultipleChoice",
    "image_classification": "AutoModelForImageClassification",
}
_FOR_LANGUAGE_MODELS = (TRL, AXOLOTL, UNSLOTH)
_AUTOCAST = {"bf16-autocast": "torch.bfloat16", "fp16-autocast": "torch.float16"}
_NF4 = (
    'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
    "bnb_4bit_compute_dtype=torch.bfloat16)"
)
_TRAINED = "[p for p in model.parameters() if p.requires_grad]"

Row = Mapping[str, Any]


def micro_batch_of(row: Row) -> int:
    """The micro-batch of a row; where it does not fit, the smallest there is."""
    return row["micro_batch_size"] or 1


def batch_of(row: Row, about: Row) -> int:
    """Samples a step: those asked for, or one micro-batch."""
    return about["batch_size"] or micro_batch_of(row)


def estimate_command(row: Row, about: Row) -> str:
    """The `meftbench estimate` command that predicts the row's memory again."""
    micro, batch = micro_batch_of(row), batch_of(row, about)
    words = ["meftbench", "estimate", about["model_name"], row["method"], "--batch-size", str(batch)]
    words += ["--micro-batch-size", str(micro)] if micro != batch else []
    words += ["--sequence-length", str(row["sequence_length"]), "--precision", row["precision"]]
    words += ["--optimizer", row["optimizer"]] if row["optimizer"] != "adamw" else []
    for option, value in about["options"].items():  # as they were typed
        words += [f"--{option}", value] if value is not True else [f"--{option}"]
    for key, value in about["config"].items():
        words += ["--config", f"{key}={value}"]
    return shlex.join([*words, "--profile", about["profile_name"]])


def suite_of(row: Row, about: Row) -> dict[str, Any]:
    """A suite of the row alone, which `meftbench run FILE --device cuda` measures on the card itself."""
    model: Any = about["model_name"]
    grid = {
        "model": {"name": model, "config": about["config"]} if about["config"] else model,
        "method": row["method"],
        "batch_size": batch_of(row, about),
        "micro_batch_size": micro_batch_of(row),
        "sequence_length": row["sequence_length"],
        "precision": row["precision"],
        "optimizer": row["optimizer"],
    }
    grid |= {name: about["options"][name] for name in ("attention", "head", "batch") if name in about["options"]}
    if row["optimizer"] == "adamw":
        del grid["optimizer"]  # the default, and the only one of methods with an optimizer of their own
    return {"schema": 1, "name": "plan", "description": f"the answer of meftbench plan {about['model']}", "grid": grid}


def snippet(row: Row, about: Row) -> str:
    """A Python script's lines: the model, the method with its levers, and the optimizer."""
    (method, settings), *levers = parts_from(row["parts"])
    inside = [lever for lever in levers if lever.name not in NOT_IN_A_MODEL]
    outside = [name for name, _ in levers if name in NOT_IN_A_MODEL]
    lines = ["import meftbench, torch"]
    base = Part(method, settings) if METHODS[method].backward else _trained_by_forward_passes(settings)
    label = joined([base, *inside])
    lines += [*_loaded(row, about), f'model = meftbench.apply_method(model, "{label}")', *_outside(outside)]
    if not METHODS[method].backward:
        lines.insert(1, "from meftbench.methods.mezo import ForwardOnly")
        lines.append(f"optimizer = ForwardOnly({_TRAINED}, lr=1e-6)  # {method}: optimizer.step(closure)")
        return "\n".join([*lines, *_of_the_step(row, about)])
    optimizer = OPTIMIZERS[row["optimizer"]]
    module, _, name = optimizer.home.partition(":")
    arguments = "".join(f", {key}={value!r}" for key, value in optimizer.arguments.items())
    if module == "torch.optim":
        lines.append(f"optimizer = torch.optim.{name}({_TRAINED}{arguments})")
    else:
        lines.insert(1, f"from {module} import {name}")
        lines.append(f"optimizer = {name}({_TRAINED}{arguments})")
    return "\n".join([*lines, *_of_the_step(row, about)])


def _trained_by_forward_passes(settings: Mapping[str, Any]) -> Part:
    """The method that chooses the weights that `mezo` moves, with its settings."""
    if settings.get("trained") != "lora":
        return Part("full", {})
    return Part("lora", {key: value for key, value in settings.items() if key in ("rank", "alpha", "targets")})


def _outside(levers: list[str]) -> list[str]:
    return [f"# {name} is not part of a model: {NOT_IN_A_MODEL[name]}" for name in levers]


def _of_the_step(row: Row, about: Row) -> list[str]:
    micro, batch = micro_batch_of(row), batch_of(row, about)
    pieces = f"{batch // micro:,} micro-batches of " if batch > micro else ""
    lines = [f"# a step: {pieces}{micro:,} × {row['sequence_length']:,} tokens"]
    if row["precision"] in _AUTOCAST:
        lines.append(f'# forward and loss under torch.autocast("cuda", dtype={_AUTOCAST[row["precision"]]})')
    return lines


def _loaded(row: Row, about: Row, *others: str) -> list[str]:
    """The lines that load the model in the row's precision. others: what is imported beside it from transformers."""
    if is_factory(about["model_name"]):
        imports = [f"from transformers import {', '.join(others)}", ""] if others else []
        return [*imports, f"model = ...  # what {about['model_name']} returns, in {row['precision']}"]
    name = _CLASSES.get(about["head"] or "causal_lm", "AutoModel")
    dtype = PRECISIONS_ELSEWHERE[row["precision"]][0]
    more = ", quantization_config=quantized" if row["precision"] == "nf4" else ""
    more += "".join(f", {key}={value!r}" for key, value in about["config"].items())
    classes = [name, *(["BitsAndBytesConfig"] if row["precision"] == "nf4" else []), *others]
    lines = [f"from transformers import {', '.join(classes)}", ""]
    lines += [f"quantized = {_NF4}"] if row["precision"] == "nf4" else []
    return [*lines, f'model = {name}.from_pretrained("{hub_of(about)}", dtype={dtype}{more})']


def hub_of(about: Row) -> str:
    """The hub id, or the folder, of the model that was asked about."""
    name, _ = split_name(about["model_name"])
    return MODELS[name].hub if name in MODELS else name


def elsewhere(row: Row, about: Row) -> dict[str, str]:
    """By library, what to write there (Python, or YAML of axolotl), or one line that says why it is not offered."""
    method, settings = parts_from(row["parts"])[0]
    texts = {}
    for library in VERSIONS:
        if library in _FOR_LANGUAGE_MODELS and about["head"] not in (None, "causal_lm"):
            texts[library] = "not offered there: the recipe is for language models"
        elif is_factory(about["model_name"]) and library != TRAINER:
            texts[library] = "not offered there: the model is made by a function of your own"
        elif method not in METHODS_ELSEWHERE and (library != TRAINER or not METHODS[method].backward):
            note = f" ({METHOD_NOTES[method]})" if library == TRL and method in METHOD_NOTES else ""
            texts[library] = f"not offered there: {method}{note}"
        elif PRECISIONS_ELSEWHERE[row["precision"]][1].of(library) is None:
            texts[library] = f"not offered there: precision {row['precision']}"
        else:
            texts[library] = _WRITERS[library](row, about, settings)
    return texts


def _flags(library: str, row: Row) -> tuple[dict[str, Any], list[str]]:
    """The flags of the row's precision and levers in a library, and comments on what is missing or differs."""
    _, *levers = parts_from(row["parts"])
    found = levers_in(library, {lever.name: dict(lever.settings) for lever in levers})
    comments = [f"# {library}: not offered there: {name}; the memory is then another" for name in found.missing]
    precision = PRECISIONS_ELSEWHERE[row["precision"]][1].of(library) or {}
    return {**precision, **found.flags}, [*comments, *(f"# {note}" for note in found.notes)]


def _sizes(row: Row, about: Row) -> dict[str, int]:
    micro = micro_batch_of(row)
    return {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch_of(row, about) // micro,
    }


def _call(name: str, arguments: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def _lora(settings: Mapping[str, Any], about: Row) -> dict[str, Any]:
    """The arguments of peft's LoraConfig for `lora` with these settings."""
    lora = Lora.model_validate(settings)
    targets = lora.targets or LORA_TARGETS.get(str(_type_of(about)))
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    arguments: dict[str, Any] = {"r": lora.rank, "lora_alpha": alpha, "lora_dropout": lora.dropout}
    return arguments | ({"target_modules": targets} if targets else {})


def _type_of(about: Row) -> str | None:
    """The model's type as transformers calls it; None: not known, as of a model on the hub."""
    return (known_config(about["model_name"], about["config"]) or {}).get("model_type")


def _is_lora(row: Row) -> bool:
    return method_of(row) == "lora"


def _for_trainer(row: Row, about: Row, settings: Mapping[str, Any]) -> str:
    method = method_of(row)
    optim = OPTIMIZERS_ELSEWHERE[row["optimizer"]]
    if method not in METHODS_ELSEWHERE:
        flags = PRECISIONS_ELSEWHERE[row["precision"]][1].trainer or {}
        comments = ["# model: as in the Python snippet, where meftbench.apply_method puts the method and its levers in"]
        outside = [part.name for part in parts_from(row["parts"]) if part.name in NOT_IN_A_MODEL]
        comments += [f"# {TRAINER}: not offered there: {name}; the memory is then another" for name in outside]
        lines = ["from transformers import TrainingArguments", "", *comments]
        return "\n".join([*lines, _arguments({**_sizes(row, about), **optim, **flags})])
    flags, comments = _flags(TRAINER, row)
    lines = [f"# {VERSIONS[TRAINER]}", "import torch", *_loaded(row, about, "TrainingArguments")]
    if _is_lora(row):
        lines.insert(2, "from peft import LoraConfig, get_peft_model")
        head = lora_fields(_type_of(about), about["head"])
        lines.append(f"model = get_peft_model(model, {_call('LoraConfig', {**_lora(settings, about), **head})})")
    return "\n".join([*lines, *comments, _arguments({**_sizes(row, about), **optim, **flags})])


def _arguments(flags: Mapping[str, Any]) -> str:
    return f"arguments = {_call('TrainingArguments', {'output_dir': 'out', **flags})}"


def _for_trl(row: Row, about: Row, settings: Mapping[str, Any]) -> str:
    flags, comments = _flags(TRL, row)
    given = {"output_dir": "out", "max_length": row["sequence_length"], "packing": False, **_sizes(row, about)}
    given |= OPTIMIZERS_ELSEWHERE[row["optimizer"]] | flags
    lines = [f"# {VERSIONS[TRL]}; the model as for transformers.Trainer, without get_peft_model"]
    lines += ["from trl import SFTConfig", *comments, f"arguments = {_call('SFTConfig', given)}"]
    if _is_lora(row):
        lines.insert(2, "from peft import LoraConfig")
        lines.append(
            f"peft_config = {_call('LoraConfig', {**_lora(settings, about), **lora_fields(None, 'causal_lm')})}"
        )
    return "\n".join(lines)


def _for_axolotl(row: Row, about: Row, settings: Mapping[str, Any]) -> str:
    import yaml

    flags, comments = _flags(AXOLOTL, row)
    micro = micro_batch_of(row)
    optim = OPTIMIZERS_ELSEWHERE[row["optimizer"]]
    keys: dict[str, Any] = {"base_model": hub_of(about)}
    if _is_lora(row):
        lora = _lora(settings, about)
        keys["adapter"] = "qlora" if row["precision"] == "nf4" else "lora"
        keys |= {"lora_r": lora["r"], "lora_alpha": lora["lora_alpha"], "lora_dropout": lora["lora_dropout"]}
        keys |= {"lora_target_modules": lora["target_modules"]} if "target_modules" in lora else {}
    keys |= {"sequence_len": row["sequence_length"], "sample_packing": False, "pad_to_sequence_len": True}
    keys |= {"micro_batch_size": micro, "gradient_accumulation_steps": batch_of(row, about) // micro}
    keys |= {"optimizer": optim["optim"], **({"optim_args": optim["optim_args"]} if "optim_args" in optim else {})}
    keys |= {"attn_implementation": about["options"].get("attention", "sdpa"), **flags}
    text = yaml.safe_dump(keys, sort_keys=False, default_flow_style=False).rstrip()
    return "\n".join([f"# {VERSIONS[AXOLOTL]}; add your datasets", *comments, text])


def _for_unsloth(row: Row, about: Row, settings: Mapping[str, Any]) -> str:
    flags, comments = _flags(UNSLOTH, row)
    checkpointing = {"use_gradient_checkpointing": flags.pop("use_gradient_checkpointing", False)}
    loading = {name: flags.pop(name) for name in ("unsloth_tiled_mlp",) if name in flags}
    loading |= {"max_seq_length": row["sequence_length"], "load_in_4bit": row["precision"] == "nf4", **checkpointing}
    loading |= {} if _is_lora(row) else {"full_finetuning": True}
    made = _call("FastLanguageModel.from_pretrained", {"model_name": hub_of(about), **loading})
    lines = [f"# {VERSIONS[UNSLOTH]}", "from unsloth import FastLanguageModel", "from trl import SFTConfig", ""]
    lines += [*comments, f"model, tokenizer = {made}"]
    if _is_lora(row):
        arguments = _call("FastLanguageModel.get_peft_model", {**_lora(settings, about), **checkpointing})
        lines.append(f"model = {arguments.replace('(', '(model, ', 1)}")
    given = {"output_dir": "out", "max_length": row["sequence_length"], **_sizes(row, about)}
    given |= OPTIMIZERS_ELSEWHERE[row["optimizer"]] | flags
    return "\n".join([*lines, f"arguments = {_call('SFTConfig', given)}"])


_WRITERS = {TRAINER: _for_trainer, TRL: _for_trl, AXOLOTL: _for_axolotl, UNSLOTH: _for_unsloth}
