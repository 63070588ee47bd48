"""Encodes the rows of a task as the examples that a model with a given head takes."""

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
    """Makes a batch of examples. pad_to: the tokens that all are padded to, instead of to the longest of the batch."""

    def __call__(self, rows: Sequence[Row], *, pad_to: int | None = None) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Encoded:
    """The examples of a training split and its evaluations, and what makes batches of them (fields: collate.py).

    truncated: how many examples of all splits lost tokens to the sequence length.  tokens: how many the training
    examples have, without padding, all choices of a question counted; 0 for images.
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
    """Encode `splits` for a model with `head`: classification (of one text or two, or a regression), multiple_choice,
    causal_lm (trained on the answer's tokens, judged by the likelihood of every choice) or image_classification.

    image: (side in pixels, channels) that images are scaled to, their values to -1..1; None: `image_processor`, one
        of transformers, prepares them.
    sequence_length: the most tokens of an example. Of a pair the longer text is cut, of a question with choices the
        question.
    vocab_size: the model's.  pad_id: the model's padding token; None: the tokenizer's.

    Raises UserError: when the head cannot learn such a task, there is no tokenizer, or it has more tokens than the
    model.
    """
    if head == "image_classification" and task.kind == "images":
        return _encode_images(splits, image_processor, image)
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


def _pad_id(tokenizer: Any, preferred: int | None) -> int:
    # Without a padding token any token will do, because attention_mask hides it.
    for token in (preferred, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


class _Encoder(Protocol):
    """Encodes rows for training and for evaluation.  truncated: how many rows lost tokens so far."""

    truncated: int

    def training(self, rows: Dataset) -> list[Row]: ...

    def evaluation(self, rows: Dataset) -> list[Row]: ...


class _Texts:
    """Encodes one text, or two, and a label."""

    def __init__(self, task: Task, tokenizer: Any, sequence_length: int) -> None:
        self.task, self.tokenizer, self.limit, self.truncated = task, tokenizer, sequence_length, 0

    def training(self, rows: Dataset) -> list[Row]:
        first, *second = ([str(text) for text in rows[column]] for column in self.task.texts)
        examples, cut = _tokenized(self.tokenizer, first, second[0] if second else None, self.limit, "longest_first")
        self.truncated += sum(cut)
        return [example | {"labels": label} for example, label in zip(examples, rows["label"], strict=True)]

    evaluation = training


class _Choices:
    """Encodes a question as a pair of texts with each of its choices, and the index of the correct one."""

    def __init__(self, task: Task, tokenizer: Any, sequence_length: int) -> None:
        self.task, self.tokenizer, self.limit, self.truncated = task, tokenizer, sequence_length, 0

    def training(self, rows: Dataset) -> list[Row]:
        questions: list[str] = []
        choices: list[str] = []
        spans = []
        for row in rows:
            question = " ".join(text for column in self.task.texts if (text := row[column].strip()))
            spans.append(range(len(choices), len(choices) + len(row["choices"])))
            choices += row["choices"]
            questions += [question] * len(row["choices"])
        examples, cut = _tokenized(self.tokenizer, questions, choices, self.limit, "only_first")
        self.truncated += sum(any(cut[i] for i in span) for span in spans)
        names = list(examples[0])
        return [
            {name: [examples[i][name] for i in span] for name in names} | {"labels": label}
            for span, label in zip(spans, rows["label"], strict=True)
        ]

    evaluation = training


class _Answers:
    """Encodes a prompt that a decoder continues: by the correct answer in training, by every choice in evaluation."""

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
        """For each row, an example with each of its `answers`."""
        prompts = [
            self.task.template.format(**{column: row[column] for column in self.task.texts})
            for row, row_answers in zip(rows, answers, strict=True)
            for _ in row_answers
        ]
        tokenized = iter(self.tokens.examples(prompts, [answer for row_answers in answers for answer in row_answers]))
        groups = [[next(tokenized) for _ in row_answers] for row_answers in answers]
        self.truncated += sum(any(cut for _, _, cut in group) for group in groups)
        return [[{"input_ids": ids, "labels": labels} for ids, labels, _ in group] for group in groups]


def _tokenized(
    tokenizer: Any, first: list[str], second: list[str] | None, limit: int, strategy: str
) -> tuple[list[Row], list[bool]]:
    """Token ids, and what else the model's forward takes, of each text or pair; and which of them were cut.

    limit: in tokens.  strategy: how transformers truncates an example above it.
    Raises UserError: when special tokens alone exceed the limit.
    """

    def tokenize(*texts: Any, **options: Any) -> Any:
        return tokenizer(*texts, padding=False, verbose=False, **options)

    encoding = tokenize(first) if second is None else tokenize(first, second)
    names = [name for name in encoding if name != "attention_mask"]  # the collator pads, and makes it
    columns = {name: list(encoding[name]) for name in names}
    excess = [len(ids) - limit for ids in encoding["input_ids"]]
    long = [index for index, over in enumerate(excess) if over > 0]
    first_alone = tokenize([first[index] for index in long], add_special_tokens=False)["input_ids"] if long else []
    # Where the first text has no more tokens than must go, cutting it alone is not enough: both texts are cut.
    strategies = [
        strategy if len(ids) > excess[index] else "longest_first" for index, ids in zip(long, first_alone, strict=True)
    ]
    for strategy in dict.fromkeys(strategies):
        indices = [index for index, chosen in zip(long, strategies, strict=True) if chosen == strategy]
        texts = [[text[index] for index in indices] for text in (first, second) if text is not None]
        shorter = tokenize(*texts, truncation=strategy, max_length=limit)
        for name in names:
            for index, value in zip(indices, shorter[name], strict=True):
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


def _encode_images(splits: Splits, processor: Any, image: tuple[int, int] | None) -> Encoded:
    assert processor is not None or image is not None, "neither a processor nor a size of images"
    pixels = _process_by(processor) if image is None else _scale_to(*image)
    evaluations = {name: ImageRows(rows, pixels) for name, rows in splits.evaluations.items()}
    return Encoded(ImageRows(splits.train, pixels), evaluations, collate_images, 0, 0)


class ImageRows(Sequence[Row]):
    """Rows with images, each decoded when it is indexed."""

    def __init__(self, rows: Dataset, pixels: Callable[[Any], Any]) -> None:
        self.rows, self.pixels = rows, pixels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[int(index)]
        return {"pixel_values": self.pixels(row[IMAGE_COLUMN]), "labels": row["label"]}


def _scale_to(size: int, channels: int) -> Callable[[Any], Any]:
    """What turns an image into float32 values (channels, size, size) in -1..1."""
    from PIL import Image

    def pixels(image: Any) -> Any:
        image = image.convert("RGB" if channels == 3 else "L")
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        values = np.asarray(image, dtype=np.float32).reshape(size, size, channels)
        return (values / 127.5 - 1).transpose(2, 0, 1)

    return pixels


def _process_by(processor: Any) -> Callable[[Any], Any]:
    """What turns an image into the float32 pixel_values of transformers' `processor`."""

    def pixels(image: Any) -> Any:
        values = processor(images=[image.convert("RGB")], return_tensors="np")["pixel_values"][0]
        return np.asarray(values, dtype=np.float32)

    return pixels
