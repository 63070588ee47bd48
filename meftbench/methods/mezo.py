"""MeZO: training by forward passes alone.

The method is an optimizer. It compares the loss at weights that lie to either side of the present ones along a random
direction, and goes along that direction. There is no backward pass: no activations, gradients or states are kept.
Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023, algorithm 1.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meftbench.catalogue.methods import Mezo
from meftbench.methods import lora
from meftbench.methods.applied import Applied

# Numbers of a direction that are drawn at a time. A whole embedding's would be the largest tensor of many a step.
PIECE = 2**22


def apply(model: nn.Module, settings: Mezo) -> Applied:
    """`model`, or with `trained: lora` the model in peft's wrapper, and the optimizer that trains it.

    Raises UserError as `lora.apply` does.
    """
    applied = Applied(model) if settings.whole else lora.apply(model, settings.of_lora())
    applied.own_optimizer = partial(ForwardOnly, epsilon=settings.epsilon)
    return applied


class ForwardOnly(torch.optim.Optimizer):
    """SGD along a random direction z of the trained weights θ, whose slope g two forward passes give.

        g = (L(θ + ε·z) − L(θ − ε·z)) / 2ε        `estimate`
        θ ← θ − η·(g·z + w·θ)                     `step`

    params: parameters or groups of them.  lr: η.  weight_decay: w.  epsilon: ε.  seed: of the directions.
    z has a standard normal number for each weight, in the weight's dtype. It is never held: each of the four times that
    it is needed it is drawn anew, a piece of a tensor at a time. There is no state but the number of steps, which is in
    the group of parameters so that a checkpoint has it: directions do not depend on torch's generators.

    >>> optimizer = ForwardOnly(model.parameters(), lr=1e-6)  # doctest: +SKIP
    >>> loss = optimizer.step(lambda: model(**batch).loss)  # doctest: +SKIP
    The model must be in evaluation mode: with dropout the two losses would be those of two models.
    """

    def __init__(
        self, params: Any, lr: float = 1e-6, *, weight_decay: float = 0.0, epsilon: float = 1e-3, seed: int = 0
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "steps": 0})
        self.epsilon, self.seed = epsilon, seed
        # The slope of what was estimated since the last step, summed; a scalar on the device of the loss.
        self.slope: Tensor | None = None

    @torch.no_grad()
    def estimate(self, loss: Callable[[], Tensor]) -> Tensor:
        """Two forward passes: adds to `slope`, and returns the mean of both losses (a scalar), about L(θ).

        loss: gives the loss (a scalar) of a batch, or of a part of it: until `step` the direction stays the same, so
        that the slopes of the parts of a batch add up to that of the batch.
        Afterwards the weights are what they were but for rounding, also where `loss` raises an error.
        """
        offset = 0.0
        try:
            losses = []
            for target in (self.epsilon, -self.epsilon):
                self._move(target - offset)
                offset = target
                losses.append(loss().detach())
        finally:
            self._move(-offset)
        above, below = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in losses)
        slope = (above - below) / (2 * self.epsilon)
        self.slope = slope if self.slope is None else self.slope + slope
        return (above + below) / 2

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Move the weights by the slope that was estimated. closure: gives the loss (a scalar); it is estimated first,
        and its estimate returned. Without either, nothing changes."""
        loss = None if closure is None else self.estimate(closure)
        if self.slope is not None:
            for group, piece, z in self._pieces():
                if group["weight_decay"]:
                    piece.mul_(1 - group["lr"] * group["weight_decay"])
                # A tensor, not its value, which would have to be waited for, and which a trace has not.
                piece.add_(z.mul_(self.slope.to(piece.device)), alpha=-group["lr"])
                del z
            for group in self.param_groups:
                group["steps"] += 1
            self.slope = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what was estimated."""
        super().zero_grad(set_to_none)
        self.slope = None

    def _move(self, distance: float) -> None:
        for _, piece, z in self._pieces():
            piece.add_(z, alpha=distance)
            del z

    def _pieces(self) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        """Every piece of the weights, some rows of a tensor each, with its group and its part of z.

        A caller deletes z before it asks for the next, or two pieces are held.
        """
        # By a hash, since the generator of the CPU takes no more than 32 bits of a seed.
        seed = random.Random(f"{self.seed} {self.param_groups[0]['steps']}").getrandbits(32)
        generators: dict[torch.device, torch.Generator | None] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                device = parameter.device
                if device not in generators:
                    # Tensors without values (meta) have no generator, and need none.
                    generators[device] = None if parameter.is_meta else torch.Generator(device).manual_seed(seed)
                weights = torch.atleast_1d(parameter.detach())
                rows = max(1, PIECE * len(weights) // max(1, weights.numel()))
                for piece in weights.split(rows):
                    z = torch.randn(piece.shape, generator=generators[device], dtype=piece.dtype, device=device)
                    yield group, piece, z
                    del z
