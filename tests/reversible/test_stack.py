"""The engine alone, on toy blocks: gradients, memory of what is kept, and the company it must keep in autograd."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from meftbench.reversible import Block, Coupling, FixedPoint, Float, ReversibleStack

D = 6


def _f(block, h, shift=0.0, *, scale=1.0):
    return scale * torch.tanh(block.first(block.drop(h))) + shift


def _g(block, h, shift=0.0, *, scale=1.0):
    return block.second(torch.relu(h))


def a_stack(blocks=3, factors=(0.5, 1.0), centred=False, swap=True, output="mean", dropout=0.0):
    torch.manual_seed(0)
    parts = [
        Block({"first": nn.Linear(D, D), "second": nn.Linear(D, D), "drop": nn.Dropout(dropout)}, _f, _g)
        for _ in range(blocks)
    ]
    arithmetic = Float()
    couplings = (Coupling(arithmetic, factors[0], centred), Coupling(arithmetic, factors[1]))
    return ReversibleStack(parts, *couplings, swap=swap, carrier=0, output=output).double()


def a_hidden_state(requires_grad=True, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, D, dtype=torch.float64, generator=generator).requires_grad_(requires_grad)


def reference(stack):
    other = copy.deepcopy(stack)
    other.activations = "cache"
    return other


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("output", ["mean", "last"])
def test_gradients_are_those_of_reference_autograd(swap, centred, output):
    """Input, context and parameters get the gradients of the same equations under plain autograd."""
    stack = a_stack(swap=swap, centred=centred, output=output)
    plain = reference(stack)
    results = []
    for each in (stack, plain):
        h, shift = a_hidden_state(), torch.ones(D, dtype=torch.float64, requires_grad=True)
        out = each(h, shift, scale=0.7)
        (out**2).sum().backward()
        results.append([out, h.grad, shift.grad, *(p.grad for p in each.parameters())])

    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        assert found is None or torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_numerical_gradcheck():
    """torch's own finite-difference check passes for the input."""
    stack = a_stack(blocks=2)

    assert torch.autograd.gradcheck(lambda h: stack(h), (a_hidden_state(),))


def test_gradients_that_autograd_hands_on_unchanged_are_not_overwritten():
    """Where a value is a sum, autograd gives the same tensor to all terms: parameters, context and input."""

    def f(block, h, shift):
        return h + block.one + block.two + shift

    def g(block, h, shift):
        return h + block.one

    results = []
    for activations in ("reverse", "cache"):
        block = Block({}, f, g)
        for name in ("one", "two"):
            block.register_parameter(name, nn.Parameter(torch.ones(2, 4, D, dtype=torch.float64)))
        stack = ReversibleStack([block], Coupling(Float(), 0.5), Coupling(Float(), 0.25), swap=True, carrier=0)
        stack.activations = activations
        h, shift = a_hidden_state(), torch.ones(2, 4, D, dtype=torch.float64, requires_grad=True)
        (stack(h, shift) ** 2).sum().backward()
        results.append([h.grad, shift.grad, block.one.grad, block.two.grad])

    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=1e-12)


def test_dropout_is_repeated_and_the_global_stream_is_left_alone():
    """Recomputation sees the forward's masks, and what is drawn after the step is what would have been drawn."""
    stack, plain = a_stack(dropout=0.5), reference(a_stack(dropout=0.5))
    drawn, gradients = [], []
    for each in (stack, plain):
        torch.manual_seed(5)
        each(a_hidden_state()).sum().backward()
        gradients.append([p.grad for p in each.parameters()])
        drawn.append(torch.rand(4))

    assert torch.equal(*drawn)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*gradients, strict=True))


def test_the_mode_of_the_forward_pass_is_repeated():
    """A switch to evaluation between forward and backward does not change what is recomputed, and stays switched."""
    expected = a_stack(dropout=0.5)
    torch.manual_seed(2)
    expected(a_hidden_state()).sum().backward()
    stack = a_stack(dropout=0.5)
    torch.manual_seed(2)
    out = stack(a_hidden_state())
    stack.eval()
    out.sum().backward()

    assert not any(module.training for module in stack.modules())
    for found, true in zip(stack.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(found.grad, true.grad, atol=1e-12)


def test_the_input_need_not_require_grad():
    """Frozen embeddings below the stack: parameters get their gradients all the same."""
    stack, plain = a_stack(), reference(a_stack())
    for each in (stack, plain):
        each(a_hidden_state(requires_grad=False)).sum().backward()

    for found, expected in zip(stack.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(found.grad, expected.grad, atol=1e-12)


def test_each_half_runs_once_forward_and_once_backward():
    """Backward costs one more forward of each sublayer, not two."""
    stack, calls = a_stack(blocks=3), []
    for module in stack.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: calls.append(1))

    out = stack(a_hidden_state())
    assert 6 == len(calls)
    out.sum().backward()

    assert 12 == len(calls)


def test_hooks_see_one_gradient_a_parameter():
    """As DDP needs it: a parameter used in every block becomes ready once, with the whole gradient."""
    stack = a_stack()
    shared = stack.blocks[0].first
    for block in stack.blocks:
        block.first = shared
    seen = []
    shared.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    plain = reference(stack)
    stack(a_hidden_state()).sum().backward()
    plain(a_hidden_state()).sum().backward()

    assert 1 == len(seen)
    assert torch.allclose(plain.blocks[0].first.weight.grad, seen[0], atol=1e-12)


def test_autograd_grad_returns_gradients_and_accumulates_nothing():
    """torch.autograd.grad by the user leaves .grad alone."""
    stack = a_stack()
    parameters = list(stack.parameters())

    found = torch.autograd.grad(stack(a_hidden_state()).sum(), parameters)

    assert all(gradient.abs().sum() > 0 for gradient in found)
    assert all(parameter.grad is None for parameter in parameters)


def test_gradients_accumulate_over_two_steps():
    """Two backward passes without zero_grad add up."""
    stack = a_stack()
    stack(a_hidden_state()).sum().backward()
    once = [p.grad.clone() for p in stack.parameters()]
    stack(a_hidden_state()).sum().backward()

    assert all(torch.allclose(2 * g, p.grad) for g, p in zip(once, stack.parameters(), strict=True))


def test_a_second_backward_is_a_clear_error_unless_the_graph_is_retained():
    """As for any torch graph."""
    stack = a_stack()
    out = stack(a_hidden_state()).sum()
    out.backward(retain_graph=True)
    first = stack.blocks[0].first.weight.grad.clone()
    out.backward()

    assert torch.allclose(2 * first, stack.blocks[0].first.weight.grad)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward()


def test_double_backward_is_a_clear_error():
    """Gradients of gradients are not offered, and say so."""
    stack, h = a_stack(), a_hidden_state()
    (gradient,) = torch.autograd.grad((stack(h) ** 2).sum(), h, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_nothing_is_kept_in_evaluation():
    """Under no_grad the same values come out, without a graph."""
    stack = a_stack().eval()
    expected = stack(a_hidden_state())
    with torch.no_grad():
        found = stack(a_hidden_state())

    assert torch.equal(expected, found)
    assert found.grad_fn is None


def test_a_forward_without_backward_is_freed_without_the_garbage_collector():
    """No reference cycle keeps the streams of a step whose backward never came."""
    for output in ("mean", "last"):
        stack = a_stack(output=output)
        gc.disable()
        try:
            out = stack(a_hidden_state())
            node = weakref.ref(out.grad_fn)
            del out
            assert node() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("activations", ["cache", "checkpoint", "reverse"])
def test_autocast_gradients_match(activations):
    """Under bf16 autocast, even with backward inside the region, every parameter gets its gradient."""
    stack = a_stack(factors=(0.5, 1.0)).float()
    stack.activations = activations
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = stack(a_hidden_state().detach().float())
        assert torch.float32 == out.dtype
        (out**2).sum().backward()
    plain = a_stack(factors=(0.5, 1.0)).float()
    plain.activations = "cache"
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        out = plain(a_hidden_state().detach().float())
    (out**2).sum().backward()

    for found, expected in zip(stack.parameters(), plain.parameters(), strict=True):
        assert found.grad.abs().sum() > 0
        assert (found.grad - expected.grad).norm() <= 0.05 * expected.grad.norm()


def test_a_deep_copy_trains_its_own_weights():
    """EMA copies and the like: the copy's blocks call the copy's modules."""
    stack = a_stack()
    copied = copy.deepcopy(stack)
    copied(a_hidden_state()).sum().backward()

    assert all(p.grad is None for p in stack.parameters())
    assert all(p.grad is not None for p in copied.parameters())


def test_couplings_of_two_arithmetics_are_refused():
    """Streams are held in one way."""
    with pytest.raises(ValueError, match="one arithmetic"):
        ReversibleStack([], Coupling(Float(), 0.5), Coupling(FixedPoint(), 1.0), swap=True, carrier=0)
