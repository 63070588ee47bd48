"""Exact reversal on real BERT layers: nothing differs at any depth, precision, tiling; what cannot be held is said."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from long_profile import sampled
from meftbench.errors import UserError
from meftbench.methods import prepare
from meftbench.methods.bottleneck import Bottleneck
from meftbench.probes.counted_metrics import count_memory
from meftbench.reversible import Block, Coupling, FixedPoint, ReversibleStack, StreamError, SubLayer
from tests.models import EXACTS, TWO_STEP, a_batch, a_batch_for, a_model, a_step, gradients, worst_relative_error

EXACT = [*EXACTS, *TWO_STEP]


class Differences:
    """Observer: elements of recomputed streams that are not those of the forward pass."""

    def __init__(self):
        self.true, self.blocks, self.wrong = {}, 0, 0

    def __call__(self, direction, block, streams):
        if direction == "forward":
            self.true[block] = [stream.clone() for stream in streams]
            return
        self.blocks += 1
        self.wrong += sum(int((a != b).sum()) for a, b in zip(streams, self.true.pop(block), strict=True))


def differences(applied, batch, **autocast):
    """Elements that differ in one step, and the gradients."""
    observer = applied.stacks[0].observer = Differences()
    with torch.autocast("cpu", **autocast) if autocast else torch.enable_grad():
        _, found = gradients(applied.model, batch)
    applied.stacks[0].observer = None
    assert len(applied.stacks[0].blocks) == observer.blocks
    return observer.wrong, found


DTYPES = (None, torch.bfloat16, torch.float16)
DEPTHS = ((12, 1), (12, 3), (12, 8), (24, 1), (24, 3), (24, 8), (48, 3), (48, 8), (96, 3))
# Each depth in one type; in the others in the long profile.
DEPTHS_IN_DTYPES = [(*depth, DTYPES[(i + j) % 3]) for i, depth in enumerate(DEPTHS) for j in range(3)]


@pytest.mark.parametrize(("depth", "tiles", "dtype"), sampled(DEPTHS_IN_DTYPES, 3))
def test_nothing_differs_at_any_depth(depth, tiles, dtype):
    """fp32, bf16 and fp16 autocast, dropout on, padding on; neither 3 nor 8 tiles divide the 20 tokens."""
    applied = prepare(a_model(depth, torch.float32), "meft1-exact", {"tiles": tiles, "head_groups": 2}, seed=1)

    wrong, _ = differences(applied, a_batch(2, 10), **({"dtype": dtype} if dtype else {}))

    assert 0 == wrong


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", EXACT)
def test_nothing_differs_in_any_variant(method, attention, precision):
    """MEFT1, 2, 3, BDIA, midpoint and leapfrog with both attentions, in whole-model precisions."""
    model = a_model(12, precision)
    model.config._attn_implementation = attention
    applied = prepare(model, method, {"tiles": 3}, seed=1)

    assert 0 == differences(applied, a_batch())[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"coupling": "centred", "output": "last"},
        {"tiles": 3, "head_groups": 2},
        {"side_bits": 1},
        {"side_bits": 8, "coupling": "centred"},
        {"step_bits": 10},
        {"lambda": 1.0, "beta": 1.0},
        {"reversible_layers": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", EXACTS)
def test_gradients_are_those_of_straight_through_autograd(method, settings):
    """fp32, 12 layers, dropout and padding: 1e-5 against the same numbers reached in float64 under plain autograd."""
    applied = prepare(a_model(12, torch.float32), method, settings, seed=1)

    loss, found = gradients(applied.model, a_batch())
    with applied.reference_autograd():
        expected_loss, expected = gradients(applied.model, a_batch())

    assert torch.equal(expected_loss, loss)
    assert worst_relative_error(found, expected) <= 1e-5


def test_published_arithmetic_fails_where_exact_does_not():
    """24 layers, fp32: with floating point the gradients of MEFT3 are noise; with integers they are right."""
    errors = {}
    for method in ("meft3", "meft3-exact"):
        applied = prepare(a_model(24, torch.float32), method, seed=1)
        _, found = gradients(applied.model, a_batch())
        with applied.reference_autograd():
            _, expected = gradients(applied.model, a_batch())
        errors[method] = worst_relative_error(found, expected)

    assert errors["meft3-exact"] <= 1e-5
    assert not errors["meft3"] <= 1


@settings(max_examples=30)
@given(
    samples=st.integers(1, 3),
    length=st.integers(1, 9),
    depth=st.integers(1, 6),
    m=st.integers(1, 8),
    step_bits=st.integers(4, 20),
    tiles=st.integers(1, 30),
    groups=st.sampled_from([1, 2, 4]),
    method=st.sampled_from(EXACT),
)
def test_nothing_differs_whatever_the_shape(samples, length, depth, m, step_bits, tiles, groups, method):
    """Shapes, side bits, steps, tiles (more than tokens, too) and groups of heads."""
    chosen = {"step_bits": step_bits, "tiles": tiles, "head_groups": groups}
    if method not in ("midpoint", "leapfrog"):
        chosen["side_bits"] = m
    applied = prepare(a_model(depth, torch.float32), method, chosen, seed=1)

    assert 0 == differences(applied, a_batch(samples, length, padded=length // 3))[0]


def test_evaluation_computes_what_training_computes():
    """Without dropout the logits of a training forward, and of one under no_grad, are the same bits."""
    applied = prepare(a_model(4, torch.float32, dropout=0.0), "meft1-exact", {"tiles": 3}, seed=1)
    trained = applied.model(**a_batch()).logits
    applied.model.eval()
    with torch.no_grad():
        assert torch.equal(trained, applied.model(**a_batch()).logits)


# --- nothing outside changes what is recomputed ---


def test_switches_set_around_the_forward_alone_are_repeated():
    """A user's `with sdpa_kernel(MATH)` around the model does not reach backward; recomputation takes it up again."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    applied = prepare(a_model(4, torch.float32, dropout=0.0), "meft1-exact", {"strict": True}, seed=1)
    threads = torch.get_num_threads()
    found = torch.backends.cuda.flash_sdp_enabled()
    torch.set_num_threads(1)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            loss = applied.model(**a_batch()).loss
    finally:
        torch.set_num_threads(threads)
    loss.backward()  # strict: raises if a bit differs

    assert found == torch.backends.cuda.flash_sdp_enabled()
    assert threads == torch.get_num_threads()


def test_accumulation_and_a_retained_graph():
    """Two forwards before their backwards, and a second backward through one graph, see their own streams."""
    applied = prepare(a_model(3, torch.float32, dropout=0.0), "meft1-exact", {"strict": True}, seed=1)
    weight = next(iter(applied.trained().values()))
    first, second = applied.model(**a_batch()).loss, applied.model(**a_batch(2)).loss
    first.backward(retain_graph=True)
    once = weight.grad.clone()
    weight.grad = None
    second.backward()
    weight.grad = None
    first.backward()

    assert torch.equal(once, weight.grad)


def test_the_output_is_not_overwritten_by_the_walk_back():
    """Who keeps the hidden states finds them unchanged after backward, in both arithmetics."""
    for method in ("meft1", "meft1-exact"):
        applied = prepare(a_model(2, torch.float32, dropout=0.0), method, {"output": "last"}, seed=1)
        hidden = applied.model.bert(a_batch()["input_ids"]).last_hidden_state
        before = hidden.detach().clone()
        hidden.sum().backward()

        assert torch.equal(before, hidden)


# --- what cannot be held, or was not restored, is said ---


def a_stack(scale=1.0, layers=4, drift=False, strict=True, **kwargs):
    """Linear sublayers; `drift`: the second block computes something else when it runs again."""
    calls = []

    def f(block, h):
        calls.append(block)
        wrong = drift and block.number == 1 and calls.count(block) == 2
        return block.linear(h) * scale + (0.01 if wrong else 0.0)

    def g(block, h):
        return block.linear(h)

    torch.manual_seed(0)
    blocks = [Block({"linear": nn.Linear(8, 8)}, f, g) for _ in range(layers)]
    for number, block in enumerate(blocks):
        block.number = number
    fixed = FixedPoint()
    return ReversibleStack(
        blocks, Coupling(fixed, 1 / 8), Coupling(fixed, 1.0), swap=True, carrier=0, strict=strict, **kwargs
    )


def test_leaving_the_range_is_an_error_with_layer_value_and_cure():
    """One line: which layer, which value, which setting; in training before anything is reversed, and in evaluation."""
    stack = a_stack(scale=3e5, layers=3, first_layer=5)
    h = torch.ones(1, 4, 8)
    expected = r"layer 5: stream value [\d,]+ is outside ±32,768; set `step_bits` to auto, or to \d+ or lower"

    out = stack(h)
    with pytest.raises(StreamError, match=expected) as raised:
        out.sum().backward()
    with torch.no_grad(), pytest.raises(StreamError, match=expected):
        stack(h)

    assert isinstance(raised.value, UserError)
    assert all(p.grad is None for p in stack.parameters())


def test_the_cure_cures():
    """With the step_bits that the message names, the same values are held."""
    stack = a_stack(scale=3e5, layers=1)
    with torch.no_grad(), pytest.raises(StreamError) as raised:
        stack(torch.ones(1, 4, 8))
    named = int(str(raised.value).split("`step_bits` to auto, or to ")[1].split()[0])
    fixed = FixedPoint(named)
    stack._couplings = (Coupling(fixed, 1 / 8), Coupling(fixed, 1.0))

    stack(torch.ones(1, 4, 8)).sum().backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_reported_not_reversed(value):
    """NaN and infinity in the input, or out of a sublayer."""
    word = "NaN" if value != value else "infinity"
    h = torch.ones(1, 2, 8)
    h[0, 1, 3] = value
    with pytest.raises(StreamError, match=f"the stack's input: a stream holds {word}"):
        a_stack()(h).sum().backward()
    stack = a_stack()
    with torch.no_grad():
        stack.blocks[2].linear.bias.fill_(value)
    with pytest.raises(StreamError, match=f"layer 2: a stream holds {word}"):
        stack(torch.ones(1, 2, 8)).sum().backward()


@pytest.mark.parametrize("tokens", [1, 5])
def test_strict_mode_finds_a_half_that_computes_something_else(tokens):
    """The error names the layer whose inputs came out wrong; without strict the same step goes through unseen."""
    with pytest.raises(StreamError, match=rf"layer 1: .*not restored exactly \({tokens} tokens differ\)"):
        a_stack(drift=True, layers=2)(torch.ones(1, tokens, 8)).sum().backward()

    a_stack(drift=True, layers=2, strict=False)(torch.ones(1, tokens, 8)).sum().backward()


def test_strict_needs_an_exact_arithmetic():
    """Verifying the published arithmetic bit for bit could only fail."""
    with pytest.raises(UserError, match="strict: needs arithmetic: exact"):
        prepare(a_model(2), "meft1", {"strict": True})


# --- settings ---


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"lambda": 0.1}, r"lambda: must be 1, 1/2, 1/4 ... or 1/256 where arithmetic is exact.*it is 0.1"),
        ({"lambda": 0.25, "side_bits": 3}, "lambda: contradicts side_bits: 3, which is 0.125"),
        ({"side_bits": 9}, "side_bits: .*less than or equal to 8"),
        ({"arithmetic": "float"}, "arithmetic: .*exact"),
        ({"tiles": 0}, "tiles: must be auto, or a whole number from 1; it is 0"),
        ({"tiles": "none"}, "tiles: must be auto, or a whole number from 1; it is 'none'"),
        ({"head_groups": True}, "head_groups: must be auto, or a whole number from 1"),
        ({"head_groups": 3}, "head_groups: 3 does not divide 4 heads; write a divisor of 4, or auto"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_one_line(chosen, message):
    """Where, what, and what to do."""
    with pytest.raises(UserError, match=message) as raised:
        prepare(a_model(2), "meft1-exact", chosen)

    assert "\n" not in str(raised.value)


def test_side_bits_choose_the_factor():
    """λ = 2⁻ᵐ where the paper has 0.1; factors of 1 need no bits and keep nothing aside."""
    stack = prepare(a_model(2), "meft1-exact", {"side_bits": 5}).stacks[0]

    assert [2.0**-5, 1.0] == [coupling.factor for coupling in stack.couplings]
    assert [32 * 5 // 8, 0] == [stack.arithmetic.side_bytes(32, coupling.factor) for coupling in stack.couplings]


def test_a_half_is_taken_in_parts_and_tiles():
    """Groups of heads and tiles change no value: the whole layer in one piece gives the same."""
    torch.manual_seed(0)
    model = a_model(2, dropout=0.0)
    pieces = prepare(copy.deepcopy(model), "meft1-exact", {"tiles": 5, "head_groups": 4}, seed=1).model
    whole = prepare(model, "meft1-exact", {"tiles": 1, "head_groups": 1}, seed=1).model

    assert torch.allclose(whole(**a_batch()).logits, pieces(**a_batch()).logits, atol=1e-4)


def test_a_half_needs_something_to_compute():
    """Neither core nor tokens is a mistake of the caller."""
    with pytest.raises(ValueError, match="a core, tokens, or both"):
        SubLayer(None, None)


def without_kept_graph(applied):
    """The same method, every half recomputed."""
    for stack in applied.stacks:
        stack.keep_last = False
    return applied


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("backbone", ["bert", "bart", "llama", "opt", "vit"])
def test_a_kept_graph_gives_the_gradients_of_a_recomputed_one(method, backbone):
    """Bit for bit, dropout on, padding on; the layer whose graph is kept is run once a step, the others twice."""
    head = "classification" if backbone in ("llama", "opt") else None
    model = a_model(3, torch.float32, backbone=backbone, head=head)
    kept = prepare(copy.deepcopy(model), method, {}, seed=1)
    recomputed = without_kept_graph(prepare(model, method, {}, seed=1))
    batch, calls = a_batch_for(kept.model), []
    stack = kept.stacks[-1]
    for number, block in enumerate(stack.blocks):
        for module in block.modules():
            if isinstance(module, Bottleneck) and any(p.requires_grad for p in module.parameters()):
                module.register_forward_hook(lambda *_, number=number: calls.append(number))

    expected = gradients(recomputed.model, batch)
    found = gradients(kept.model, batch)
    again = gradients(kept.model, batch)

    assert torch.equal(expected[0], found[0])
    assert list(expected[1]) == list(found[1])
    assert all(torch.equal(expected[1][name], found[1][name]) for name in expected[1])
    assert all(torch.equal(again[1][name], found[1][name]) for name in expected[1])
    assert [stack.keep_last for stack in kept.stacks] == [False] * (len(kept.stacks) - 1) + [True]
    below, top = calls.count(0), calls.count(2)
    assert top < below


def test_no_graph_is_kept_where_it_would_raise_the_peak():
    """Below logits of a vocabulary, below ordinary layers, in tiles, in floating point."""
    for backbone, head in (("llama", "causal_lm"), ("bart", "seq2seq_lm")):
        model = a_model(2, torch.float32, backbone=backbone, head=head)
        assert not any(stack.keep_last for stack in prepare(model, "meft1-exact", {}, seed=1).stacks)
    partly = {"reversible_layers": 2, "reversible_at": "bottom", "remaining": "adapted"}
    assert not prepare(a_model(3, torch.float32), "meft1-exact", partly, seed=1).stacks[0].keep_last
    assert not prepare(a_model(3), "meft1", {"output": "last"}, seed=1).stacks[0].keeps_graph(1)
    stack = prepare(a_model(3, torch.float32), "meft1-exact", {}, seed=1).stacks[0]
    assert stack.keeps_graph(1)
    assert not stack.keeps_graph(2)


@pytest.mark.parametrize("method", EXACT)
def test_a_kept_graph_costs_no_peak(method):
    """Counted: a quarter of the tokens' bytes more would be a tensor too many."""
    step = a_step(method, sequence_length=64, model_config_overrides={"attention_probs_dropout_prob": 0.0})
    found = count_memory(step, 1, 1)["activation_peak_bytes"].value
    without_kept_graph(step.applied)

    assert found == pytest.approx(count_memory(step, 1, 1)["activation_peak_bytes"].value, rel=0.02)


def test_a_kept_graph_is_freed_and_retained_as_any_other():
    """Without the garbage collector where backward never comes; a second backward through it recomputes."""
    applied = prepare(a_model(2, torch.float32), "meft1-exact", {}, seed=1)
    batch, parameters = a_batch(), [p for p in applied.model.parameters() if p.requires_grad]
    gc.collect()
    gc.disable()
    try:
        loss = applied.model(**batch).loss
        walk = next(node for node in nodes_of(loss.grad_fn) if node.name() == "ReversalBackward")
        kept = weakref.ref(walk.passage.kept)
        once = torch.autograd.grad(loss, parameters, retain_graph=True)
        assert kept() is None
        twice = torch.autograd.grad(loss, parameters)
        loss = applied.model(**batch).loss
        walk = next(node for node in nodes_of(loss.grad_fn) if node.name() == "ReversalBackward")
        kept = weakref.ref(walk.passage.kept)
        del loss, walk
        assert kept() is None
    finally:
        gc.enable()
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def nodes_of(node):
    """A node of autograd's graph and all below it."""
    yield node
    for below, _ in node.next_functions:
        if below is not None:
            yield from nodes_of(below)
