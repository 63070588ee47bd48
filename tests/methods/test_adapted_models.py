"""A model that is adapted already, by whom ever: a second method is refused in one line, and nothing is changed."""

from __future__ import annotations

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import meftbench
from meftbench.errors import UserError
from meftbench.methods import prepare
from tests.models import METHODS, a_model

LORA = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
PROMPTS = peft.PromptTuningConfig(
    task_type="SEQ_CLS", num_virtual_tokens=2, token_dim=32, num_layers=2, num_attention_heads=4
)


def by_peft(model):
    return peft.get_peft_model(model, LORA)


def injected(model):
    by_peft(model)  # the layers are changed in place
    return model


def by_transformers(model):
    model.add_adapter(LORA)
    return model


def prompted(model):
    return peft.get_peft_model(model, PROMPTS)


def nested(model):
    return by_peft(model).get_base_model()


ADAPTED = {
    **{method: (lambda model, method=method: meftbench.apply_method(model, method)) for method in METHODS},
    "full+checkpoint": lambda model: meftbench.apply_method(model, "full+checkpoint"),
    **{f.__name__: f for f in (by_peft, injected, by_transformers, prompted, nested)},
}


def seen_of(model):
    """Weights, what is trained, and the types of all modules."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: type(module) for name, module in model.named_modules()},
    )


@given(st.sampled_from(sorted(ADAPTED)), st.sampled_from([*METHODS, "dora", "prompt-tuning", "lora+checkpoint"]))
@settings(max_examples=60)
def test_a_second_method_is_refused_and_changes_nothing(first, second):
    model = ADAPTED[first](a_model(2, torch.float32))
    tensors, trained, types = seen_of(model)

    with pytest.raises(UserError, match=r"has .* applied already; take it off by meftbench.unload, or load") as caught:
        prepare(model, second)

    found = seen_of(model)
    assert 1 == len(str(caught.value).splitlines())
    assert (trained, types) == found[1:]
    assert all(torch.equal(tensor, found[0][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("first", ["by_peft", "nested", "by_transformers"])
def test_an_adapter_is_not_loaded_on_top_of_another(first, tmp_path):
    """Where the model is not the wrapper that the adapter belongs to."""
    meftbench.save_adapter(meftbench.apply_method(a_model(2, torch.float32), "parallel"), tmp_path / "own")
    meftbench.save_adapter(meftbench.apply_method(a_model(2, torch.float32), "ia3"), tmp_path / "peft")
    model = ADAPTED[first](a_model(2, torch.float32))
    types = seen_of(model)[2]

    for folder in ("own", "peft"):
        with pytest.raises(UserError, match=r"applied already|is an adapter of|has .* applied"):
            meftbench.load_adapter(model, tmp_path / folder)
    assert types == seen_of(model)[2]


@pytest.mark.parametrize("method", ["lora", "meft1-exact", "parallel+checkpoint", "dora"])
def test_after_unloading_another_method_fits(method):
    """The way that the line names."""
    model = a_model(2, torch.float32)

    assert meftbench.unload(meftbench.apply_method(model, method)) is model
    assert meftbench.apply_method(model, "meft3-exact") is model
