"""Versions for which predictions are made."""

from __future__ import annotations

import pytest

from meftbench.catalogue.versions import NOW, RULES, Versions
from meftbench.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", NOW),
        ("torch=2.4", Versions(torch=(2, 4))),
        ("torch==2.4.1+cu121, transformers=4.48.1", Versions((2, 4), (4, 48))),
        ("transformers=5.17", Versions(transformers=(5, 17))),
    ],
)
def test_versions_as_they_are_written(text, expected):
    """With one or two equals signs, with or without a patch number."""
    assert expected == Versions.parse(text)


@pytest.mark.parametrize("text", ["torch", "torch=2", "torch=two.four", "jax=0.4", "torch=2.4,torch=2.5", "torch>2.4"])
def test_what_is_no_version(text):
    """One line that says how to write it."""
    with pytest.raises(UserError, match=r"torch=2\.4,transformers=4\.48") as caught:
        Versions.parse(text)
    assert "--for-versions" == caught.value.where


@pytest.mark.parametrize(
    ("rule", "package", "before", "since"),
    [
        ("foreach_optimizer", "torch", (1, 13), (2, 0)),
        ("cublas_in_allocator", "torch", (1, 13), (2, 0)),
        ("softmax_keeps_input", "torch", (1, 10), (1, 11)),
        ("keeps_gradients", "torch", (1, 13), (2, 0)),
        ("prefers_cudnn_attention", "torch", (2, 9), (2, 10)),
        ("separate_cublaslt_workspace", "torch", (2, 9), (2, 10)),
        ("shifts_logits", "transformers", (4, 48), (4, 50)),
        ("repeats_keys", "transformers", (4, 54), (4, 55)),
        ("repeats_keys", "torch", (2, 4), (2, 5)),
        ("widens_logits", "transformers", (4, 45), (4, 46)),
    ],
)
def test_the_rules_that_differ(rule, package, before, since):
    """In the last version of the old rule it is not what it is in the first of the new one, and now."""
    old, new = (getattr(Versions(**{package: version}), rule) for version in (before, since))
    assert old is not new
    assert new is getattr(NOW, rule)


def test_a_prediction_says_for_which_versions_it_holds():
    assert RULES == str(NOW)
    assert f"torch 2.4 where they are known to differ from those of {RULES}" == str(Versions(torch=(2, 4)))


@pytest.mark.parametrize("text", ["torch=2.99", "torch=0.1", "torch=1.9", "transformers=3.0", "transformers=6.0"])
def test_versions_of_which_no_rule_is_known(text):
    """Neither older nor newer than what was read."""
    with pytest.raises(UserError, match=r"are not known; name one from \d\.\d+ to \d\.\d+, or leave it out"):
        Versions.parse(text)
