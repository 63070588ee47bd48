"""Tokens of a prompt with its answer, for a decoder that is trained on the answer's tokens only."""

from __future__ import annotations

from typing import Any

import numpy as np

from meftbench.tasks.collate import IGNORED

Ids = np.ndarray[Any, np.dtype[np.int32]]


class AnswerTokens:
    """Tokenizes prompt + " " + answer to at most `limit` tokens, after those that begin every text (OPT: </s>).

    The prompt is tokenized by itself, so that all answers to it follow the same tokens. The answer is what comes after
    these tokens in the whole text. Where a token of the whole text spans the boundary, the answer is tokenized by
    itself.
    """

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self.tokenizer, self.limit = tokenizer, limit
        plain, with_special = self._tokenize_one("a"), tokenizer("a", verbose=False)["input_ids"]
        starts = [i for i in range(len(with_special)) if with_special[i : i + len(plain)] == plain]
        self.begin: list[int] = with_special[: starts[0]] if starts else []

    def examples(self, prompts: list[str], answers: list[str]) -> list[tuple[Ids, Ids, bool]]:
        """Of each prompt and answer: input_ids (L), labels (L), and whether tokens were cut off.

        labels are -100 except at the answer's tokens. A text that is too long loses the beginning of its prompt; an
        answer loses its end only where it has more than `limit` - 1 tokens by itself.
        """
        prompt_ids = dict(zip(dict.fromkeys(prompts), self._tokenize(list(dict.fromkeys(prompts))), strict=True))
        whole_ids = self._tokenize([f"{prompt} {answer}" for prompt, answer in zip(prompts, answers, strict=True)])
        return [
            self._fit_to_limit(prompt_ids[prompt], self._answer_ids(prompt_ids[prompt], ids, answer))
            for prompt, answer, ids in zip(prompts, answers, whole_ids, strict=True)
        ]

    def _answer_ids(self, prompt: list[int], whole: list[int], answer: str) -> list[int]:
        begins_with_prompt = whole[: len(prompt)] == prompt and len(whole) > len(prompt)
        return whole[len(prompt) :] if begins_with_prompt else self._tokenize_one(f" {answer}")

    def _fit_to_limit(self, prompt: list[int], answer: list[int]) -> tuple[Ids, Ids, bool]:
        context, full_length = self.begin + prompt, len(self.begin) + len(prompt) + len(answer)
        # One token must stay before the answer, because nothing predicts the first token of a sequence.
        answer = answer[: self.limit - 1]
        room = self.limit - len(answer)
        if len(context) > room:
            begin = self.begin if len(self.begin) < room else []
            context = begin + context[len(context) - (room - len(begin)) :]
        ids = np.asarray(context + answer, dtype=np.int32)
        labels = ids.copy()
        labels[: len(context)] = IGNORED
        return ids, labels, len(ids) < full_length

    def _tokenize_one(self, text: str) -> list[int]:
        return self._tokenize([text])[0]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
