"""Rows of a task as the examples that a model with a head takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from meftbench.catalogue.task import IMAGE_COLUMN, Task
from meftbench.errors import UserError
from meftbench.tasks.answers import AnswerTokens
from meftbench.tasks.collate import Row, TextCollate, collate_images
from meftbench.tasks.data import Splits

if TYPE_CHECKING:
    from datasets import Dataset


class Collate(Protocol):
    """Examples to a batch; pad_to: pad all to so many tokens, not to the longest of the batch."""

    def __call__(self, rows: Sequence[Row], *, pad_to: int | None = None) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Encoded:
    """Examples of a training split and its evaluations, and how they become batches (collate.py has the fields).

    truncated: examples of all splits that lost tokens to the sequence length.  tokens: of the training examples,
    padding left out, all choices of a question counted; 0 of images.
    """

    train: Sequence[Row]
    evaluations: Mapping[str, Sequence[Row]]
    collate: Collate
    truncated: int
    tokens: int


def encode(
    splits: Splits,
    task: Task,
    *,
    head: str,
    tokenizer: Any = None,
    image_processor: Any = None,
    image: tuple[int, int] | None = None,
    sequence_length: int,
    vocab_size: int | None = None,
    pad_id: int | None = None,
) -> Encoded:
    """`splits` for a model with `head`: classification (of one text or two, or a regression), multiple_choice,
    causal_lm (learns the answer's tokens, is judged by the likelihood of every choice) or image_classification.

    image_processor: of transformers; None: an image is scaled to `image` (side in pixels, channels), values to -1..1.
    sequence_length: tokens, at most. Of a pair the longer text is cut, of a question with choices the question.
    vocab_size: of the model.  pad_id: the token that the model takes for padding; None: the tokenizer's.

    Raises UserError: the head cannot learn such a task; no tokenizer, or one with more tokens than the model knows.
    """
    if head == "image_classification" and task.kind == "images":
        return _images(splits, image_processor, image)
    encoders: dict[tuple[str, str], Callable[[Task, Any, int], _Encoder]] = {
        ("classification", "classification"): _Texts,
        ("classification", "regression"): _Texts,
        ("multiple_choice", "choices"): _Choices,
        ("causal_lm", "choices"): _Answers,
    }
    if (head, task.kind) not in encoders:
        cure = f"it can learn {', '.join(kind for known, kind in encoders if known == head) or 'images'}"
        raise UserError(f"task {task.name}", f"head {head!r} cannot learn a task of {task.kind}", cure)
    if tokenizer is None:
        raise UserError(f"task {task.name}", "its texts need a tokenizer", "name a model that has one")
    if vocab_size is not None and len(tokenizer) > vocab_size:
        what = f"the tokenizer does not fit the model: it has {len(tokenizer):,} tokens, the model {vocab_size:,}"
        raise UserError(f"task {task.name}", what, "use the tokenizer of the model")
    encoder = encoders[head, task.kind](task, tokenizer, sequence_length)
    train = encoder.training(splits.train)
    tokens = sum(sum(map(len, ids)) if isinstance(ids := row["input_ids"], list) else len(ids) for row in train)
    evaluations = {name: encoder.evaluation(rows) for name, rows in splits.evaluations.items()}
    return Encoded(train, evaluations, TextCollate(_pad_id(tokenizer, pad_id)), encoder.truncated, tokens)


def _pad_id(tokenizer: Any, asked: int | None) -> int:
    # Where there is no padding token, any will do: attention_mask hides it.
    for token in (asked, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


class _Encoder(Protocol):
    truncated: int

    def training(self, rows: Dataset) -> list[Row]: ...

    def evaluation(self, rows: Dataset) -> list[Row]: ...


class _Texts:
    """A text, or two, and a label."""

    def __init__(self, task: Task, tokenizer: Any, sequence_length: int) -> None:
        self.task, self.tokenizer, self.limit, self.truncated = task, tokenizer, sequence_length, 0

    def training(self, rows: Dataset) -> list[Row]:
        first, *second = ([str(text) for text in rows[column]] for column in self.task.texts)
        examples, cut = _tokens(self.tokenizer, first, second[0] if second else None, self.limit, "longest_first")
        self.truncated += sum(cut)
        return [example | {"labels": label} for example, label in zip(examples, rows["label"], strict=True)]

    evaluation = training


class _Choices:
    """A question with each of its choices as a pair of texts, and which is correct."""

    def __init__(self, task: Task, tokenizer: Any, sequence_length: int) -> None:
        self.task, self.tokenizer, self.limit, self.truncated = task, tokenizer, sequence_length, 0

    def training(self, rows: Dataset) -> list[Row]:
        questions: list[str] = []
        choices: list[str] = []
        places = []
        for row in rows:
            question = " ".join(text for column in self.task.texts if (text := row[column].strip()))
            places.append(range(len(choices), len(choices) + len(row["choices"])))
            choices += row["choices"]
            questions += [question] * len(row["choices"])
        examples, cut = _tokens(self.tokenizer, questions, choices, self.limit, "only_first")
        self.truncated += sum(any(cut[i] for i in place) for place in places)
        names = list(examples[0])
        return [
            {name: [examples[i][name] for i in place] for name in names} | {"labels": label}
            for place, label in zip(places, rows["label"], strict=True)
        ]

    evaluation = training


class _Answers:
    """A prompt that a decoder goes on from: in training with the answer, in evaluation with every choice."""

    def __init__(self, task: Task, tokenizer: Any, sequence_length: int) -> None:
        self.task, self.truncated = task, 0
        self.tokens = AnswerTokens(tokenizer, sequence_length)

    def training(self, rows: Dataset) -> list[Row]:
        answers = [[choices[label]] for choices, label in zip(rows["choices"], rows["label"], strict=True)]
        return [example[0] for example in self._examples(rows, answers)]

    def evaluation(self, rows: Dataset) -> list[Row]:
        examples = self._examples(rows, list(rows["choices"]))
        return [
            {name: [choice[name] for choice in choices] for name in choices[0]} | {"answer_index": label}
            for choices, label in zip(examples, rows["label"], strict=True)
        ]

    def _examples(self, rows: Dataset, answers: list[list[str]]) -> list[list[Row]]:
        """Of each row an example for each of its `answers`."""
        prompts = [
            self.task.template.format(**{column: row[column] for column in self.task.texts})
            for row, of_row in zip(rows, answers, strict=True)
            for _ in of_row
        ]
        made = iter(self.tokens.examples(prompts, [answer for of_row in answers for answer in of_row]))
        grouped = [[next(made) for _ in of_row] for of_row in answers]
        self.truncated += sum(any(cut for _, _, cut in group) for group in grouped)
        return [[{"input_ids": ids, "labels": labels} for ids, labels, _ in group] for group in grouped]


def _tokens(
    tokenizer: Any, first: list[str], second: list[str] | None, limit: int, strategy: str
) -> tuple[list[Row], list[bool]]:
    """Token ids, and what else the model's forward takes, of each text or pair; and which of them were cut."""

    def tokenize(*texts: Any, **options: Any) -> Any:
        return tokenizer(*texts, padding=False, verbose=False, **options)

    read = tokenize(first) if second is None else tokenize(first, second)
    names = [name for name in read if name != "attention_mask"]  # padding is the collator's
    columns = {name: list(read[name]) for name in names}
    excess = [len(ids) - limit for ids in read["input_ids"]]
    long = [index for index, over in enumerate(excess) if over > 0]
    own = tokenize([first[index] for index in long], add_special_tokens=False)["input_ids"] if long else []
    # A second text that fills the length by itself loses its end, too.
    asked = [strategy if len(ids) > excess[index] else "longest_first" for index, ids in zip(long, own, strict=True)]
    for strategy in dict.fromkeys(asked):
        picked = [index for index, one in zip(long, asked, strict=True) if one == strategy]
        texts = [[text[index] for index in picked] for text in (first, second) if text is not None]
        shorter = tokenize(*texts, truncation=strategy, max_length=limit)
        for name in names:
            for index, value in zip(picked, shorter[name], strict=True):
                columns[name][index] = value
    if (longest := max(map(len, columns["input_ids"]), default=0)) > limit:
        what = f"an example has {longest} tokens at the least, as its special tokens alone may not be cut"
        raise UserError(f"sequence length {limit}", what, "allow more tokens")
    examples = [
        {name: np.asarray(value, dtype=np.int32) for name, value in zip(names, values, strict=True)}
        for values in zip(*columns.values(), strict=True)
    ]
    return examples, [over > 0 for over in excess]


# --- images ---


def _images(splits: Splits, processor: Any, image: tuple[int, int] | None) -> Encoded:
    assert processor is not None or image is not None, "neither a processor nor a size of images"
    pixels = _processed(processor) if image is None else _scaled(*image)
    evaluations = {name: ImageRows(rows, pixels) for name, rows in splits.evaluations.items()}
    return Encoded(ImageRows(splits.train, pixels), evaluations, collate_images, 0, 0)


class ImageRows(Sequence[Row]):
    """Images, decoded when they are asked for."""

    def __init__(self, rows: Dataset, pixels: Callable[[Any], Any]) -> None:
        self.rows, self.pixels = rows, pixels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[int(index)]
        return {"pixel_values": self.pixels(row[IMAGE_COLUMN]), "labels": row["label"]}


def _scaled(size: int, channels: int) -> Callable[[Any], Any]:
    from PIL import Image

    def pixels(image: Any) -> Any:
        image = image.convert("RGB" if channels == 3 else "L")
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        values = np.asarray(image, dtype=np.float32).reshape(size, size, channels)
        return (values / 127.5 - 1).transpose(2, 0, 1)

    return pixels


def _processed(processor: Any) -> Callable[[Any], Any]:
    def pixels(image: Any) -> Any:
        read = processor(images=[image.convert("RGB")], return_tensors="np")["pixel_values"][0]
        return np.asarray(read, dtype=np.float32)

    return pixels
