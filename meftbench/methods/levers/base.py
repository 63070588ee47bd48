"""What a lever is: a memory optimisation that composes with any method by `+`.

A lever changes how activations are held, never what is computed. It is an object of the model that it is applied to:
it puts itself in, can be switched off for the reference run, and says whether it did anything in a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

if TYPE_CHECKING:
    from meftbench.methods.applied import Applied


@dataclass
class LayerRuns:
    """One layer or reversible block, in one forward and backward pass.

    first: the module without submodules that it ran first.  again: that ran in backward.
    wanted: its output needs a gradient, so that backward passes through it.
    """

    name: str
    first: nn.Module | None = None
    again: bool = False
    wanted: bool = False


@dataclass
class Runs:
    """layers: those that transformers can checkpoint.  blocks: those of reversible stacks."""

    layers: list[LayerRuns] = field(default_factory=list)
    blocks: list[LayerRuns] = field(default_factory=list)


@dataclass(frozen=True)
class WatchedStep:
    """What one training step showed to whoever asks whether a lever engaged.

    runs: which layers ran again in the backward pass.  labels: positions of one micro-batch that have a label.
    """

    applied: Applied
    runs: Runs
    labels: int


@dataclass(frozen=True)
class LeverNumber:
    """A number that a lever adds to the record of a cell (a name of records.metrics.METRICS)."""

    value: int
    source: Literal["measured", "counted"]


@contextmanager
def held_at(owner: Any, attribute: str, value: object) -> Iterator[None]:
    """Within it, an attribute of `owner` has another value."""
    before = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, before)


class Lever:
    """One memory optimisation on one model. A new one is a subclass in a file of its own, and a row in LEVERS
    (catalogue/levers.py)."""

    # Whether the pre-trained model, which a method's start is compared with, is run under the lever as well.
    on_reference_model = False

    def apply(self, applied: Applied) -> None:
        """Put the lever into the model. Sets `applied.recomputes` where layers run again in backward because of it.

        Raises UserError: the lever does not apply to this model.
        """
        raise NotImplementedError

    def without(self) -> AbstractContextManager[object]:
        """Entered for the reference run: the same equations under plain autograd, everything held on the device."""
        raise NotImplementedError

    def in_evaluation(self) -> AbstractContextManager[object]:
        """Entered where a loss is computed without gradients, for a lever that then does nothing otherwise."""
        return nullcontext()

    def watched(self, applied: Applied) -> AbstractContextManager[object]:
        """Entered around the step that is watched, in which the lever may count what it does."""
        return nullcontext()

    def called_in_pieces(self, applied: Applied) -> list[Any]:
        """Modules that run several times in one forward pass under the lever: their calls are not those of layers."""
        return []

    def missing(self, seen: WatchedStep) -> str | None:
        """The fact which shows that the lever did not do what it is for in the watched step; None: it engaged."""
        raise NotImplementedError

    def numbers(self) -> dict[str, LeverNumber]:
        """What the watched step adds to the record, by the name of the metric."""
        return {}
