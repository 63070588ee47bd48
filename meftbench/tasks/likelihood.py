"""The likelihood that a decoder gives to each choice after its question.

The choices of a question follow one prompt, which is most of the tokens. Where the model takes a mask of what each
token attends to, the prompt is read once with all choices behind it side by side: each attends to the prompt and to
itself, at the positions that it would have alone.

Shape suffixes: B questions, C choices, L tokens of a prompt with one choice, S tokens of a sequence as the model reads
it, R sequences, N tokens of all answers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meftbench.tasks.collate import IGNORED

# Model types whose forward takes the caller's positions and mask; tests/tasks/test_likelihood.py checks each of them.
SHARE_A_PROMPT = frozenset({"gemma2", "gemma3_text", "llama", "mistral", "opt", "qwen2", "qwen3"})
MASKED_ATTENTION = ("eager", "sdpa")


@dataclass(frozen=True)
class Sequences:
    """Inputs of the model, and where in them the answers' tokens are predicted.

    rows, places (N): the sequence and the position whose logits predict a token of an answer.  targets (N): that token.
    owners (N): the choice that it belongs to, counted through all questions (b · C + c).
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    places: Tensor
    targets: Tensor
    owners: Tensor


def likelihoods(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The log likelihood (B, C), float32, of each choice after its prompt, summed over the choice's tokens.

    batch: of `TextCollate`: input_ids, attention_mask and labels (B, C, L), labels -100 except at the answers' tokens.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    shared = _shares_prompt(batch, base.config)
    B, C, _ = batch["labels"].shape
    log_likelihoods = torch.zeros(B, C, device=shared.device)
    for questions, arrange in ((shared, _side_by_side), (~shared, _one_by_one)):
        if questions.any():
            selected = {name: tensor[questions] for name, tensor in batch.items()}
            sequences = arrange(selected, base)
            likelihood = -F.cross_entropy(_logits(model, base, sequences).float(), sequences.targets, reduction="none")
            sums = log_likelihoods.new_zeros(int(questions.sum()) * C).index_add(0, sequences.owners, likelihood)
            log_likelihoods[questions] = sums.view(-1, C)
    return log_likelihoods


def _shares_prompt(batch: Mapping[str, Tensor], config: Any) -> Tensor:
    """Whether the choices of each question (B) can be read behind one prompt.

    False where the model takes no mask, or attends through a window shorter than the longest example; else whether the
    prompts of the question are equal. They differ where one was cut to make room for a long choice.
    """
    ids_BCL = batch["input_ids"]
    B, _, L = ids_BCL.shape
    if not _takes_masks(config) or (getattr(config, "sliding_window", None) or L) < L:
        return torch.zeros(B, dtype=torch.bool, device=ids_BCL.device)
    prompts_BC, _ = _lengths(batch)
    in_prompt = torch.arange(L, device=ids_BCL.device) < prompts_BC[..., None]
    prompt_ids = ids_BCL.masked_fill(~in_prompt, -1)
    return (prompt_ids == prompt_ids[:, :1]).all(-1).all(-1)


def _takes_masks(config: Any) -> bool:
    """Whether the model attends by a mask that its caller gives."""
    return config.model_type in SHARE_A_PROMPT and config._attn_implementation in MASKED_ATTENTION


def _lengths(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens of each choice's prompt and of its answer, both (B, C)."""
    answers_BC = (batch["labels"] != IGNORED).sum(-1)
    return batch["attention_mask"].sum(-1) - answers_BC, answers_BC


def _one_by_one(batch: Mapping[str, Tensor], _: Any) -> Sequences:
    """Each choice behind a prompt of its own: R = B · C sequences of S = L tokens."""
    labels_RS = batch["labels"].flatten(0, 1)
    rows, places = (labels_RS[:, 1:] != IGNORED).nonzero(as_tuple=True)
    inputs = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
    return Sequences(inputs, rows, places, labels_RS[rows, places + 1], rows)


def _side_by_side(batch: Mapping[str, Tensor], model: Any) -> Sequences:
    """A question's choices behind one prompt: R = B sequences."""
    ids_BCL, labels_BCL = batch["input_ids"], batch["labels"]
    B, C, L = ids_BCL.shape
    prompts_BC, answers_BC = _lengths(batch)
    prompts_B = prompts_BC[:, 0]
    starts_BC = prompts_BC + answers_BC.cumsum(-1) - answers_BC
    S = int((prompts_B + answers_BC.sum(-1)).max())
    ids = ids_BCL.new_zeros(B, S)
    positions = torch.zeros_like(ids)
    # What a token belongs to: 0 the prompt, c + 1 choice c, -1 padding.
    segments = torch.full_like(ids, -1)
    b, place = (torch.arange(L, device=ids.device) < prompts_B[:, None]).nonzero(as_tuple=True)
    ids[b, place], positions[b, place], segments[b, place] = ids_BCL[b, 0, place], place, 0
    b, c, place = (labels_BCL != IGNORED).nonzero(as_tuple=True)
    nth = place - prompts_B[b]  # of the answer's tokens
    slot = starts_BC[b, c] + nth
    ids[b, slot], positions[b, slot], segments[b, slot] = ids_BCL[b, c, place], place, c + 1
    predicting = torch.where(nth == 0, prompts_B[b] - 1, slot - 1)
    inputs = {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": _mask(segments, model.config._attn_implementation, model.dtype),
    }
    return Sequences(inputs, b, predicting, labels_BCL[b, c, place], b * C + c)


def _mask(segments_RS: Tensor, attention: str, dtype: torch.dtype) -> Tensor:
    """What each token attends to (R, 1, S, S): of itself and the tokens before it, the prompt's and its own segment's.

    For sdpa the mask is True where a token attends; for eager it is what is added to attention scores.
    """
    keys, queries = segments_RS[:, None, :], segments_RS[:, :, None]
    S = segments_RS.shape[1]
    before = torch.ones(S, S, dtype=torch.bool, device=segments_RS.device).tril()
    visible = (before & ((keys == 0) | (keys == queries)))[:, None]
    if attention == "sdpa":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def _logits(model: Any, base: Any, sequences: Sequences) -> Tensor:
    """Logits (N, V) that predict the answers' tokens; a hook keeps all other hidden states from the head."""

    def pick(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        return (arguments[0][sequences.rows, sequences.places][None],)

    hook = base.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        logits: Tensor = model(**sequences.inputs).logits
    finally:
        hook.remove()
    return logits[0]
