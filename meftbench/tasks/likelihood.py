"""How likely a decoder finds each choice after its question.

The choices of a question follow one prompt, which is most of the tokens. Where the model can be told by a mask what
each token sees, the prompt is read once and its choices lie behind it side by side: each sees the prompt and itself,
at the positions that it would have alone.

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

# Their forward takes positions and a mask of one's own; tests/tasks/test_likelihood.py holds each of them to it.
SHARE_A_PROMPT = frozenset({"gemma2", "gemma3_text", "llama", "mistral", "opt", "qwen2", "qwen3"})
MASKED_ATTENTION = ("eager", "sdpa")


@dataclass(frozen=True)
class Sequences:
    """What the model reads, and where in it the answers' tokens are predicted.

    inputs: of the model.  rows, places, targets, owners (N): the sequence and the position whose logits predict an
    answer's token, that token, and the choice it belongs to, counted through all questions (b · C + c).
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    places: Tensor
    targets: Tensor
    owners: Tensor


def likelihoods(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The log likelihood (B, C), float32, of every choice's tokens after their prompt, summed over them.

    batch: of `TextCollate`: input_ids, attention_mask and labels (B, C, L), labels -100 but at the answers' tokens.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    together = _shares_prompt(batch, base.config)
    B, C, _ = batch["labels"].shape
    found = torch.zeros(B, C, device=together.device)
    for questions, arranged in ((together, _side_by_side), (~together, _one_by_one)):
        if questions.any():
            of_these = {name: tensor[questions] for name, tensor in batch.items()}
            read = arranged(of_these, base)
            likelihood = -F.cross_entropy(_logits(model, base, read).float(), read.targets, reduction="none")
            sums = found.new_zeros(int(questions.sum()) * C).index_add(0, read.owners, likelihood)
            found[questions] = sums.view(-1, C)
    return found


def _shares_prompt(batch: Mapping[str, Tensor], config: Any) -> Tensor:
    """Of each question (B) whether its choices can be read behind one prompt: none where the model cannot, or attends
    through a window that cuts the longest; else those whose prompts are alike. One that was cut for the sake of a long
    choice is not.
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
    # Whose token it is: 0 the prompt's, c + 1 that of choice c, -1 padding.
    whose = torch.full_like(ids, -1)
    b, place = (torch.arange(L, device=ids.device) < prompts_B[:, None]).nonzero(as_tuple=True)
    ids[b, place], positions[b, place], whose[b, place] = ids_BCL[b, 0, place], place, 0
    b, c, place = (labels_BCL != IGNORED).nonzero(as_tuple=True)
    nth = place - prompts_B[b]  # of the answer's tokens
    lies = starts_BC[b, c] + nth
    ids[b, lies], positions[b, lies], whose[b, lies] = ids_BCL[b, c, place], place, c + 1
    predicts = torch.where(nth == 0, prompts_B[b] - 1, lies - 1)
    inputs = {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": _mask(whose, model.config._attn_implementation, model.dtype),
    }
    return Sequences(inputs, b, predicts, labels_BCL[b, c, place], b * C + c)


def _mask(whose_RS: Tensor, attention: str, dtype: torch.dtype) -> Tensor:
    """What each token sees (R, 1, S, S): of the tokens before it the prompt's and its own choice's; padding itself.

    As the kind of attention takes it: true where it sees, or what is added to its scores.
    """
    seen, sees = whose_RS[:, None, :], whose_RS[:, :, None]
    S = whose_RS.shape[1]
    before = torch.ones(S, S, dtype=torch.bool, device=whose_RS.device).tril()
    visible = (before & ((seen == 0) | (seen == sees)))[:, None]
    if attention == "sdpa":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def _logits(model: Any, base: Any, read: Sequences) -> Tensor:
    """Logits (N, V) where an answer's token is predicted: of the hidden states no other goes through the head."""

    def pick(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        return (given[0][read.rows, read.places][None],)

    hook = base.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        logits: Tensor = model(**read.inputs).logits
    finally:
        hook.remove()
    return logits[0]
