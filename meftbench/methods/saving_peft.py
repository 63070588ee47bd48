"""Save and load a model in peft's wrapper: by peft, adding the heads and prompt encoders that peft leaves out."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from meftbench.catalogue.settings import Settings
from meftbench.errors import UserError
from meftbench.methods.adapter_files import (
    CONFIG,
    WEIGHTS,
    as_json,
    base_of_config,
    check_same,
    check_saved_vocabulary,
    check_tensors,
    check_vocabulary,
    unwritable,
    warn_of_base,
)
from meftbench.methods.applied import NOTE, check_untouched, note_before, vocabulary_of
from meftbench.methods.peft_model import freeze_first_factors, wrapped_by_peft
from meftbench.methods.unloading import (
    changes_weights,
    in_new_head,
    is_peft,
    note_of,
    trained_beside,
)

# Key in the metadata of the tensors' file: rows of the embeddings of the model that it was saved from.
VOCABULARY = "meftbench_vocabulary"
# Another: the method that was applied. peft's configuration does not say which factors of LoRA are frozen.
METHOD = "meftbench_method"
_MAY_DIFFER = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")


def files_by_peft(model: Any) -> dict[str, bytes]:
    """The contents of the two files of the active adapter, by name.

    Raises UserError: the files cannot be written, or the vocabulary was resized and the embeddings are not trained.
    """
    adapter = model.active_adapters[0]
    with tempfile.TemporaryDirectory() as temporary:
        try:
            model.save_pretrained(temporary, selected_adapters=[adapter])
        except (OSError, SafetensorError) as error:
            raise unwritable(temporary, error) from None
        source = Path(temporary) / ("" if adapter == "default" else adapter)
        weights, config = (source / WEIGHTS).read_bytes(), json.loads((source / CONFIG).read_bytes())
    left_out = {name: p.detach().cpu().contiguous() for name, p in _left_out_by_peft(model).items() if p.requires_grad}
    tensors = safetensors.torch.load(weights) | left_out
    base = model.get_base_model()
    embeddings = base.get_input_embeddings().weight if vocabulary_of(base) else None
    check_saved_vocabulary(base, note_of(model).get("vocabulary"), embeddings is not None and embeddings.requires_grad)
    method = note_of(model).get("method", "")
    metadata = {"format": "pt", VOCABULARY: str(vocabulary_of(base) or ""), METHOD: method}
    weights = safetensors.torch.save(tensors, metadata=metadata)
    for key, value in base_of_config(model.get_base_model()).items():
        config[key] = config.get(key) or value
    return {WEIGHTS: weights, CONFIG: as_json(config)}


def _left_out_by_peft(model: Any) -> dict[str, nn.Parameter]:
    """What peft does not write, by name: the new task head of methods that have no `modules_to_save`, such as prompts;
    the encoder that computes the prompts, of which peft writes the result only; and whatever else requires grad, such
    as norms or embeddings. peft itself can also read the file that contains them."""
    left_out = _heads_without_peft(model)
    left_out |= {name: p for name, p in trained_beside(model).items() if not name.startswith("prompt_encoder.")}
    for adapter, encoder in getattr(model, "prompt_encoder", {}).items():
        parameters = dict(encoder.named_parameters(prefix=f"prompt_encoder.{adapter}"))
        left_out |= parameters if len(parameters) > 1 else {}
    return left_out


def _heads_without_peft(model: Any) -> dict[str, nn.Parameter]:
    """The parameters of a new task head that are not in one of peft's modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = model.get_base_model()
    by_peft = {
        id(parameter)
        for module in base.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for parameter in cast(nn.Module, module).parameters()
    }
    heads = {id(parameter) for name, parameter in base.named_parameters() if in_new_head(base, name)} - by_peft
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in heads}


def load_by_peft(
    model: Any, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], metadata: dict[str, str]
) -> nn.Module:
    """Put an adapter that peft has written on `model`, and return peft's wrapper around the model.

    Warns: the base model has another name or revision.
    Raises UserError: the configuration cannot be read, another method or other settings applied, tensors do not fit.
    """
    from peft import PeftConfig

    vocabulary = int(metadata.get(VOCABULARY) or 0) or None
    try:
        saved = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise UserError(str(folder / CONFIG), f"peft cannot read it ({error})", "save the adapter again") from None
    method = str(config["peft_type"]).lower()
    if is_peft(model):
        current = model.peft_config[model.active_adapters[0]]
        applied = str(current.peft_type.value).lower()
        check_same(folder, method, applied, saved.to_dict(), current.to_dict(), _MAY_DIFFER)
        warn_of_base(model.get_base_model(), config)
        _fill_by_peft(model, folder, tensors, vocabulary)
        return cast(nn.Module, model)
    if NOTE in vars(model):
        check_same(folder, method, vars(model)[NOTE]["method"], {}, {}, ())
    check_untouched(model)
    warn_of_base(model, config)
    frozen = metadata.get(METHOD) == "lora-fa"
    note = note_before(model, "lora-fa" if frozen else method, Settings())
    saved.inference_mode, saved.base_model_name_or_path = False, None
    try:
        with torch.random.fork_rng(devices=[]), _weights_restored(model, changes_weights(saved)):
            wrapped = _filled_by_peft(wrapped_by_peft(model, saved), note, folder, tensors, vocabulary)
    except UserError:
        raise
    except Exception as error:  # peft raises errors of any type for a configuration that does not fit
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(str(folder), f"does not fit the model ({reason})", "load it into its own base model") from error
    if frozen:
        freeze_first_factors(wrapped)
    return wrapped if model.training else wrapped.eval()


@contextmanager
def _weights_restored(model: nn.Module, changed: bool) -> Iterator[None]:
    """Restore the model's weights if the code inside raises.

    changed: whether that code changes them; only then a copy is held in host memory.
    """
    before = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in model.parameters() if changed]
    try:
        yield
    except BaseException:
        for parameter, values in before:
            parameter.data.copy_(values)
        raise


def _filled_by_peft(
    wrapped: nn.Module, note: dict[str, Any], folder: Path, tensors: dict[str, Tensor], vocabulary: int | None
) -> nn.Module:
    setattr(wrapped, NOTE, note)
    _fill_by_peft(wrapped, folder, tensors, vocabulary)
    return wrapped


def _fill_by_peft(model: Any, folder: Path, tensors: dict[str, Tensor], vocabulary: int | None) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    adapter = model.active_adapters[0]
    has_embeddings = any(part in EMBEDDING_LAYER_NAMES for name in tensors for part in name.split("."))
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=has_embeddings)
    check_vocabulary(folder, model.get_base_model(), vocabulary)
    left_out = {name: p for name, p in _left_out_by_peft(model).items() if name in tensors or p.requires_grad}
    left_out |= {name: p for name, p in model.named_parameters() if name in tensors}
    # Tied weights are saved once, under one name: for example an output layer that shares the embeddings.
    saved_pointers = {tensor.data_ptr() for name, tensor in (state | left_out).items() if name in tensors}
    state = {
        name: tensor for name, tensor in state.items() if name in tensors or tensor.data_ptr() not in saved_pointers
    }
    check_tensors(folder, state | left_out, tensors)
    set_peft_model_state_dict(model, tensors, adapter_name=adapter)
    with torch.no_grad():
        for name, parameter in left_out.items():
            parameter.copy_(tensors[name])
            parameter.requires_grad_(True)
