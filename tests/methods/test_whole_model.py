"""`save_pretrained` of a model with a method in it: what from_pretrained will not find is said."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import meftbench
from tests.models import EXACTS, MEFTS, TWO_STEP, a_batch, a_model

LAYERS, ADAPTERS = "will not find the reversible layers in", "will not find the adapters in"


def without_warning(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return call()


@pytest.mark.parametrize(
    ("method", "said"),
    [
        *((method, LAYERS) for method in [*MEFTS, *EXACTS, *TWO_STEP]),
        ("houlsby", ADAPTERS),
        ("parallel+checkpoint", ADAPTERS),
    ],
)
def test_save_pretrained_says_what_is_lost(method, said, tmp_path):
    model = meftbench.apply_method(a_model(2, torch.float32), method, seed=1).eval()
    copies = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for number, each in enumerate(copies):
        with pytest.warns(UserWarning, match=said):
            each.save_pretrained(tmp_path / str(number))
        assert (tmp_path / str(number) / "model.safetensors").is_file()  # Trainer's checkpoints are written so

    meftbench.unload(model)

    assert "save_pretrained" not in vars(model)
    without_warning(lambda: model.save_pretrained(tmp_path / "unloaded"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "unloaded")
    batch = a_batch()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("method", ["full", "full+checkpoint", "lora", "ia3"])
def test_what_from_pretrained_reads_is_saved_without_a_word(method, tmp_path):
    model = meftbench.apply_method(a_model(2, torch.float32), method)

    without_warning(lambda: model.save_pretrained(tmp_path))
