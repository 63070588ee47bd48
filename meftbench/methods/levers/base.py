"""The interface of a lever: a memory optimisation that is added to any method by `+`.

A lever changes how activations, gradients or optimizer states are held, never what is computed. Each model has lever
objects of its own. A lever puts itself into the model or the training step, can be switched off for the reference run,
and says whether it had an effect in a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from meftbench.catalogue import resolve
from meftbench.catalogue.levers import LEVERS, settings_for

if TYPE_CHECKING:
    from meftbench.methods.applied import Applied


# Makes the optimizer of some parameters.
BuildOptimizer = Callable[[list[nn.Parameter]], Optimizer]


@dataclass
class LayerRuns:
    """What one layer or reversible block did in one forward and backward pass.

    first: the first module without submodules that ran in it.  again: whether that module ran again in backward.
    wanted: whether the backward pass goes through it (a layer's output, or a parameter of a block, requires grad).
    """

    name: str
    first: nn.Module | None = None
    again: bool = False
    wanted: bool = False


@dataclass
class Runs:
    """layers: those outside of stacks that transformers can checkpoint.  blocks: those of reversible stacks."""

    layers: list[LayerRuns] = field(default_factory=list)
    blocks: list[LayerRuns] = field(default_factory=list)


@dataclass(frozen=True)
class WatchedStep:
    """What was observed in one training step, from which a lever tells whether it engaged (had an effect).

    runs: which layers ran again in the backward pass.  labels: positions in the labels of one micro-batch.
    backward: whether the step has a backward pass.
    """

    applied: Applied
    runs: Runs
    labels: int
    backward: bool = True


@dataclass(frozen=True)
class LeverNumber:
    """A number that a lever adds to the record of a cell (a name of records.metrics.METRICS)."""

    value: int
    source: Literal["measured", "counted"]


@contextmanager
def held_at(owner: Any, attribute: str, value: object) -> Iterator[None]:
    """Give an attribute of `owner` another value while the context is entered."""
    before = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, before)


def made_lever(where: str, name: str, given: dict[str, Any]) -> Lever:
    """A new object of the lever `name` of LEVERS, with the settings `given`. Raises UserError: they are not valid."""
    entry = LEVERS[name]
    lever: Lever = (
        resolve(entry.home)(settings_for(where, name, given)) if entry.settings or given else resolve(entry.home)()
    )
    return lever


class Lever(ABC):
    """One memory optimisation (lever) on one model.

    A new one is a subclass in a file of its own, and an entry in LEVERS (catalogue/levers.py). One with settings takes
    them, validated, as its only argument.
    """

    # Whether the pre-trained model, with which a method is compared before training, is run under the lever as well.
    on_reference_model = False
    # Whether the lever has its effect in the training step as a whole, and none in forward and backward alone.
    acts_in_training_step = False

    @abstractmethod
    def apply(self, applied: Applied) -> None:
        """Put the lever into the model, and set `applied.recomputes` if it makes layers run again in the backward pass.

        Raises UserError: the lever does not apply to this model.
        """

    @abstractmethod
    def without(self) -> AbstractContextManager[object]:
        """Entered for the reference run, to switch the lever off: reference autograd, everything held on the device."""

    def optimizer_of(self, build: BuildOptimizer) -> BuildOptimizer:
        """How the optimizer is made under the lever. build: how it is made without it, or under other levers."""
        return build

    def in_training_step(self) -> AbstractContextManager[object]:
        """Entered around forward and backward of a step whose gradients the optimizer then takes. Other passes read
        the gradients, and do not enter it."""
        return nullcontext()

    def in_evaluation(self) -> AbstractContextManager[object]:
        """Entered where a loss is computed without gradients, for a lever that would have no effect there otherwise."""
        return nullcontext()

    def watched(self, applied: Applied) -> AbstractContextManager[object]:
        """Entered around the watched step, in which the lever may count what it does."""
        return nullcontext()

    def on_host(self) -> Iterable[Tensor]:
        """Tensors that are in host memory from now on, also between steps, on whatever device they seem to be."""
        return ()

    def called_in_pieces(self, applied: Applied) -> list[Any]:
        """Modules that the lever runs several times in one forward pass: the probes do not count their calls."""
        return []

    @abstractmethod
    def missing(self, seen: WatchedStep) -> str | None:
        """The fact that shows that the lever had no effect, or not all of it, in the watched step; None: it engaged."""

    def missing_in_trace(self, attention: set[str]) -> str | None:
        """The same for a step that is predicted, which is traced and not observed.

        attention: names of the fused attention operators that ran in it.
        """
        return None

    def forget_steps(self) -> None:  # noqa: B027  most levers keep nothing from step to step
        """Drop what earlier steps left for later ones to use again: the next step runs as the first one did."""

    def numbers(self) -> dict[str, LeverNumber]:
        """Metrics of the watched step for the record, by name."""
        return {}
