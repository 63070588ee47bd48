"""A prompt and what a decoder is to answer, as tokens: the answer is learnt, the prompt is read."""

from __future__ import annotations

from typing import Any

import numpy as np

from meftbench.tasks.collate import IGNORED

Ids = np.ndarray[Any, np.dtype[np.int32]]


class AnswerTokens:
    """Tokens of prompt + " " + answer, at most `limit`, begun as the tokenizer begins a text (OPT: </s>).

    The prompt's tokens are those that it has by itself, so that all answers follow the same ones. What comes after
    them in the whole text is the answer. Where a token of the whole runs over the boundary, the answer is tokenized by
    itself.
    """

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self.tokenizer, self.limit = tokenizer, limit
        plain, dressed = self._ids("a"), tokenizer("a", verbose=False)["input_ids"]
        begins = [i for i in range(len(dressed)) if dressed[i : i + len(plain)] == plain]
        self.begin: list[int] = dressed[: begins[0]] if begins else []

    def examples(self, prompts: list[str], answers: list[str]) -> list[tuple[Ids, Ids, bool]]:
        """input_ids (L), labels (L) with -100 but at the answer's tokens, and whether tokens were left out, of each.

        Where it is too long the prompt loses its beginning; the answer its end, only if there is no prompt left.
        """
        alone = dict(zip(dict.fromkeys(prompts), self._all(list(dict.fromkeys(prompts))), strict=True))
        whole = self._all([f"{prompt} {answer}" for prompt, answer in zip(prompts, answers, strict=True)])
        return [
            self._fitted(alone[prompt], self._after(alone[prompt], ids, answer))
            for prompt, answer, ids in zip(prompts, answers, whole, strict=True)
        ]

    def _after(self, prompt: list[int], whole: list[int], answer: str) -> list[int]:
        clean = whole[: len(prompt)] == prompt and len(whole) > len(prompt)
        return whole[len(prompt) :] if clean else self._ids(f" {answer}")

    def _fitted(self, prompt: list[int], answer: list[int]) -> tuple[Ids, Ids, bool]:
        before, uncut = self.begin + prompt, len(self.begin) + len(prompt) + len(answer)
        # One token stays before the answer: nothing predicts the first of a sequence.
        answer = answer[: self.limit - 1]
        room = self.limit - len(answer)
        if len(before) > room:
            begin = self.begin if len(self.begin) < room else []
            before = begin + before[len(before) - (room - len(begin)) :]
        ids = np.asarray(before + answer, dtype=np.int32)
        labels = ids.copy()
        labels[: len(before)] = IGNORED
        return ids, labels, len(ids) < uncut

    def _ids(self, text: str) -> list[int]:
        return self._all([text])[0]

    def _all(self, texts: list[str]) -> list[list[int]]:
        return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
