"""The resident batch of a cell: text where the weights are pre-trained, random tokens otherwise.

Memory and speed do not depend on the values; reconstruction error and starting-point shift of pre-trained weights do,
so that they are measured on text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from meftbench.errors import UserError, one_line, reading, reason_of
from meftbench.own_code import call, load
from meftbench.plan.factories import BATCH_ARGUMENTS

# Written for this project.
PASSAGE = """\
The mountain road was closed after the first snow, so the mail came by boat. Every Tuesday an old man with a grey
coat carried the bags up from the pier and left them at the bakery, where people asked for their letters while they
bought bread. Nobody remembered how this had begun. When the bakery moved to a larger house, the letters moved with it,
and the office in the capital never noticed. A young teacher who had just arrived wanted to know why the school got
its books two weeks late. She was told to be patient, because the boat could not carry paper and flour on the same day.
She wrote to the minister, and her letter waited for the next boat. In spring the engineers came to measure the road.
They drank coffee, talked about tunnels, bridges and prices, and drew a line across the map that went straight through
the lake. The mayor laughed and hung the map above his desk. Ten years later the tunnel was dug after all, on the other
side of the valley, and the mail now takes a single morning. Still, on Tuesdays, a few people stand in line at the
bakery and ask whether there is anything for them."""


def resident_batch(
    model: Any,
    batch_size: int,
    sequence_length: int,
    device: torch.device,
    *,
    text_from: str | None = None,
    padding: float = 0.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of the model's forward, the same for the same seed: for a text model input_ids and attention_mask
    (B, L), for an image model pixel_values (B, channels, size, size); and labels: for a model that predicts tokens the
    tokens themselves (B, L), -100 where they are padding, for others random ones as the head takes them.

    text_from: folder or hub id of a tokenizer. Each sample is the passage, from another token on, repeated to length L.
        None: random tokens from `seed`.  padding: share of each sequence, at its end, that is padding.
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(batch_size, config.num_channels, config.image_size, config.image_size, generator=generator)
        labels = _classes(config, batch_size, generator)
        return {"pixel_values": pixels.to(device), "labels": labels.to(device)}
    ids = (
        _random_tokens(config, batch_size, sequence_length, generator)
        if text_from is None
        else _text_tokens(text_from, batch_size, sequence_length)
    )
    mask = torch.ones_like(ids)
    real = real_tokens(sequence_length, padding)
    ids[:, real:] = config.pad_token_id or 0
    mask[:, real:] = 0
    if config.is_encoder_decoder:
        ids[:, real - 1] = config.eos_token_id  # BART's classifier reads the last such token of each sample
    if model.get_output_embeddings() is not None:
        labels = ids.masked_fill(mask == 0, -100)
    else:
        labels = _classes(config, batch_size, generator)
    return {name: t.to(device) for name, t in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()}


def real_tokens(sequence_length: int, padding: float) -> int:
    """Tokens of a sample that are not padding, at least one. padding: the share that is."""
    return max(1, round(sequence_length * (1 - padding)))


def _classes(config: Any, batch_size: int, generator: torch.Generator) -> Tensor:
    """Labels as the head takes them: classes (B); 0 or 1 for each label (B, labels) if a sample may have several;
    numbers for a regression, (B) or (B, labels)."""
    kind, count = getattr(config, "problem_type", None), config.num_labels
    if kind == "multi_label_classification":
        return torch.randint(2, (batch_size, count), generator=generator).float()
    if kind == "regression" or (kind is None and count == 1):
        return torch.rand((batch_size,) if count == 1 else (batch_size, count), generator=generator)
    return torch.randint(count, (batch_size,), generator=generator)


def _random_tokens(config: Any, batch_size: int, sequence_length: int, generator: torch.Generator) -> Tensor:
    # The lowest ids are special tokens: RoBERTa, for one, would treat its padding id as padding.
    lowest = min(5, config.vocab_size - 1)
    return torch.randint(lowest, config.vocab_size, (batch_size, sequence_length), generator=generator)


def _text_tokens(text_from: str, batch_size: int, sequence_length: int) -> Tensor:
    from transformers import AutoTokenizer

    def not_loaded(error: Exception) -> UserError:
        what = f"its tokenizer cannot be loaded ({reason_of(error)})"
        return UserError(text_from, what, "save the tokenizer again, or add @random to the model's name")

    with reading(not_loaded):
        tokenizer = AutoTokenizer.from_pretrained(text_from)
    tokens: list[int] = tokenizer(PASSAGE, add_special_tokens=False)["input_ids"]
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    rows = []
    for sample in range(batch_size):
        start = sample * 37 % len(tokens)  # 37 does not divide the passage's length, so that samples differ
        stream = (tokens[start:] + tokens[:start]) * (sequence_length // len(tokens) + 1)
        row = [first, *stream[: sequence_length - 2], last] if first is not None and last is not None else stream
        rows.append(row[:sequence_length])
    return torch.tensor(rows)


def own_batch(
    name: str, batch_size: int, sequence_length: int, device: torch.device, *, dtype: torch.dtype | None, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The batch that the user's own function `name` returns: its samples, and what is passed on as it is.

    dtype: to which floating-point samples are converted; None: they stay as they are.
    The global RNG state on the CPU is the same afterwards.
    Raises UserError: the function cannot be called, or gives no batch of `batch_size` samples.
    """
    with torch.random.fork_rng(devices=[]):
        load(name)  # an import may draw random numbers
        torch.manual_seed(seed)
        batch = call(name, **dict(zip(BATCH_ARGUMENTS, (batch_size, sequence_length), strict=True)))
    samples, constants = sorted_out(name, batch, device)
    for argument, tensor in samples.items():
        if len(tensor) != batch_size:
            what = f"was asked for {batch_size} samples, and gives {argument} of {len(tensor)}"
            raise UserError(name, what, "make the first dimension of each tensor batch_size")
        if dtype is not None and tensor.is_floating_point():
            samples[argument] = tensor.to(dtype)
    return samples, constants


def sorted_out(where: str, batch: Mapping[str, Any], device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The samples of the user's own batch, tensors on `device`, and what else is passed to forward as it is.

    where: named in errors.
    Raises UserError: not a mapping, no samples, tensors without values, or arguments with different numbers of samples.
    """
    if not isinstance(batch, Mapping):
        cure = "give a dict of the arguments of the model's forward: {'input_ids': ..., 'labels': ...}"
        raise UserError(where, f"the batch is {type(batch).__name__}, no mapping", cure)
    samples: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    for name, value in batch.items():
        converted = _as_tensor(where, name, value)
        if isinstance(converted, Tensor) and converted.is_meta and device.type != "meta":
            raise UserError(where, f"{name} has no values (meta)", "give a batch that has them")
        if isinstance(converted, Tensor) and converted.dim():
            samples[name] = converted.to(device)
        else:
            constants[name] = converted.to(device) if isinstance(converted, Tensor) else converted
    if not samples:
        raise UserError(where, "the batch has no tensor of samples", "give input_ids, labels and the like")
    counts = {name: len(tensor) for name, tensor in samples.items()}
    if len(set(counts.values())) > 1:
        numbers = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(where, f"the batch has different numbers of samples ({numbers})", "give each as many")
    if not min(counts.values()):
        raise UserError(where, "the batch has no samples", "give one or more")
    return samples, constants


def _as_tensor(where: str, name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, list) or type(value).__module__ == "numpy":
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            what = f"{name} is no table of numbers ({one_line(error)})"
            raise UserError(where, what, "pad the samples to one length, or give a tensor") from None
    return value
