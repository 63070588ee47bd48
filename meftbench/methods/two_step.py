"""BDIA, midpoint and leapfrog: rules that compute a hidden state from the two before it (docs/design.md 1).

They are the reversible rivals of MEFT, on the same engine: a rule is a coupling of the whole pre-trained layer F, with
h(o) = F(o) − o for what the layer adds. Each block replaces the older of two consecutive hidden states, x and o, by the
next one, and the streams are swapped:

    bdia        γ·x + (1 − γ)·o + (1 + γ)·h(o)    γ = ±1/2 for each sample and block in training, 0 in evaluation
    midpoint    x + 2·h(o)
    leapfrog    2·o − x + h(o)

Sources: Zhang, Lewis, Kleijn, "On Exact Bit-level Reversible Transformers Without Changing Architectures"
(arXiv:2407.09093); Gal et al., "Reversing Large Language Models for Efficient Training and Fine-Tuning"
(arXiv:2512.02056, eq. 2.4 and 2.6) with the step 1, at which a layer adds what it was pre-trained to add.

The first hidden state after the input is the pre-trained layer's own output, as in BDIA; Gal et al. leave the start
open. In a post-norm layer, which adds nothing to its input, h(o) is the difference all the same.
"""

from __future__ import annotations

from torch import nn

from meftbench.backbones import Site
from meftbench.catalogue.methods import Bdia, TwoStep
from meftbench.methods.applied import Applied
from meftbench.methods.meft import WHOLE_LAYER, Arrangement, arithmetic_of, reverse_layers
from meftbench.reversible import Coupling


def apply_bdia(model: nn.Module, settings: Bdia) -> Applied:
    """The factor is γ = ±1/2 (±2^-side_bits), drawn for each sample and block in training, 0 in evaluation."""
    return _apply(model, settings, Coupling(arithmetic_of(settings), 2.0**-settings.side_bits, 2, drawn=True))


def apply_midpoint(model: nn.Module, settings: TwoStep) -> Applied:
    """The factor is 1, so that there are no side bits."""
    return _apply(model, settings, Coupling(arithmetic_of(settings), 1.0, 2))


def apply_leapfrog(model: nn.Module, settings: TwoStep) -> Applied:
    """The factor is −1, so that there are no side bits."""
    return _apply(model, settings, Coupling(arithmetic_of(settings), -1.0, 1))


def _apply(model: nn.Module, settings: TwoStep, coupling: Coupling) -> Applied:
    arrangement = Arrangement(
        f=WHOLE_LAYER,
        g=None,
        couplings=(coupling,),
        start=Coupling(coupling.arithmetic, 1.0, 1),  # x − o + F(o): F(o), as both streams are the input there
        sites=(Site.BESIDE_FEED_FORWARD,),
        own_adapter=False,
        swap=True,
        carrier=0,
        output="last",
    )
    return reverse_layers(model, settings, arrangement)
