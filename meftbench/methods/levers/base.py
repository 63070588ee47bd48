"""The interface of a lever: a memory optimisation that is added to any method by `+`.

A lever changes how activations are held, never what is computed. Each model has lever objects of its own. A lever puts
itself into the model, can be switched off for the reference run, and says whether it had an effect in a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from meftbench.catalogue import resolve
from meftbench.catalogue.levers import LEVERS, settings_for

if TYPE_CHECKING:
    from meftbench.methods.applied import Applied


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

    @abstractmethod
    def apply(self, applied: Applied) -> None:
        """Put the lever into the model, and set `applied.recomputes` if it makes layers run again in the backward pass.

        Raises UserError: the lever does not apply to this model.
        """

    @abstractmethod
    def without(self) -> AbstractContextManager[object]:
        """Entered for the reference run, to switch the lever off: reference autograd, everything held on the device."""

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

    def numbers(self) -> dict[str, LeverNumber]:
        """Metrics of the watched step for the record, by name."""
        return {}
