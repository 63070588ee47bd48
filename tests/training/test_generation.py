"""`generate` with a cache: what it adds to each layer is what the layer would compute again without."""

from __future__ import annotations

import pytest
import torch

from meftbench.errors import UserError
from meftbench.methods import prepare
from tests.models import a_model

HEADS = {"llama": "causal_lm", "gemma3": "causal_lm", "opt": "causal_lm", "bart": "seq2seq_lm"}
NEW = 8


def a_generator(backbone, method, **settings):
    """A model with a method, whose random weights are large enough to say different things."""
    model = a_model(2, backbone=backbone, head=HEADS[backbone])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    applied = prepare(model, method, settings, seed=1)
    model.eval()
    for name in ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id"):
        setattr(model.generation_config, name, None)
    return applied


def a_prompt():
    """Two prompts, the first with three positions of padding on the left."""
    ids = torch.randint(5, 120, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ids[0, :3] = 0
    return ids, mask


def generated(model, use_cache=True, **said):
    """New tokens (samples, NEW), and the logits that each was chosen from."""
    ids, mask = a_prompt()
    given = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache} | said
    found = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **given)
    return found.sequences[:, -NEW:], torch.stack(found.logits, 1)


def by_hand(applied, backbone):
    """The same from the equations under reference autograd, each token from the whole sequence before it."""
    model = applied.model
    ids, mask = a_prompt()
    written = torch.full((2, 1), model.config.decoder_start_token_id or 0) if backbone == "bart" else ids
    logits = []
    with applied.reference_autograd():
        for _ in range(NEW):
            if backbone == "bart":
                given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": written}
            else:
                seen = torch.cat([mask, mask.new_ones(2, written.shape[1] - ids.shape[1])], 1)
                places = (seen.cumsum(1) - 1).clamp(min=0)
                given = {"input_ids": written, "attention_mask": seen, "position_ids": places}
            output = model(**given)
            assert output.logits.requires_grad
            logits.append(output.logits[:, -1].detach())
            written = torch.cat([written, logits[-1].argmax(-1, keepdim=True)], 1)
    return written[:, -NEW:], torch.stack(logits, 1)


def assert_same(found, expected):
    """Equal tokens; logits within a few of the fixed-point steps that sums in another order may round to."""
    assert torch.equal(expected[0], found[0])
    assert torch.allclose(expected[1].float(), found[1].float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["meft1-exact", "meft3", "bdia", "leapfrog"])
@pytest.mark.parametrize("backbone", HEADS)
def test_a_cache_changes_no_token(backbone, method):
    """Left padding, a sliding window, an encoder: greedy tokens with a cache, without, and of the plain equations."""
    applied = a_generator(backbone, method)
    found = generated(applied.model)

    assert_same(found, generated(applied.model, use_cache=False))
    assert_same(found, by_hand(applied, backbone))
    assert 1 < found[0].unique().numel()


@pytest.mark.parametrize("backbone", ["llama", "gemma3", "opt"])
def test_groups_of_heads_fill_a_cache_once(backbone):
    """With a cache attention is taken whole, whatever number of groups it is trained in."""
    parted = a_generator(backbone, "meft1-exact", tiles=8, head_groups=2)
    whole = a_generator(backbone, "meft1-exact")
    assert 2 == parted.stacks[0].parts_of(8)

    assert_same(generated(parted.model), generated(whole.model))
    assert_same(generated(parted.model, use_cache=False), generated(whole.model))


@pytest.mark.parametrize("settings", [{}, {"remaining": "frozen"}, {"reversible_at": "bottom"}], ids=str)
def test_ordinary_layers_fill_it_beside_the_stack(settings):
    """One layer of two is reversible: it generates as without a cache, and trains although decoders make caches."""
    applied = a_generator("llama", "meft1-exact", reversible_layers=1, **settings)
    ids, mask = a_prompt()
    output = applied.model(input_ids=ids, attention_mask=mask, labels=ids)
    output.loss.backward()

    assert output.past_key_values is None
    assert_same(generated(applied.model), generated(applied.model, use_cache=False))


@pytest.mark.parametrize("backbone", ["gemma3", "bart"])
def test_beam_search_reorders_the_cache(backbone):
    """Three beams."""
    applied = a_generator(backbone, "meft1-exact")
    tokens = [generated(applied.model, use_cache, num_beams=3)[0] for use_cache in (True, False)]

    assert torch.equal(*tokens)


def test_a_cache_may_be_filled_by_hand():
    """Two calls under no_grad, the second with the first one's cache, as transformers documents it."""
    model = a_generator("llama", "meft1-exact").model
    ids, _ = a_prompt()
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :5])
        second = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values)

    assert torch.allclose(whole[:, 5:], second.logits, atol=1e-3)


def test_a_cache_where_gradients_are_kept_is_one_line():
    """Backward would write to it again, or read what was not there in the forward pass."""
    model = a_generator("llama", "meft1-exact").model
    ids, _ = a_prompt()
    with torch.no_grad():
        cache = model(input_ids=ids).past_key_values

    assert model(input_ids=ids).past_key_values is None
    with pytest.raises(UserError, match=r"past_key_values: .* under torch\.no_grad\(\)"):
        model(input_ids=ids, past_key_values=cache)


@pytest.mark.parametrize("backbone", ["llama", "bart"])
def test_hidden_states_of_generation_are_refused(backbone):
    """An encoder is called by itself there; it says so too."""
    applied = a_generator(backbone, "meft1-exact")
    with pytest.raises(UserError, match="output_hidden_states: a reversible model does not keep"):
        generated(applied.model, output_hidden_states=True)


@pytest.mark.parametrize("method", ["houlsby", "lora"])
def test_methods_that_do_not_recompute_fill_caches_with_gradients_too(method):
    """An adapter in a layer takes nothing from it."""
    applied = prepare(a_model(2, backbone="llama", head="causal_lm"), method, seed=1)
    ids, _ = a_prompt()

    assert 9 == applied.model(input_ids=ids).past_key_values.get_seq_length()
