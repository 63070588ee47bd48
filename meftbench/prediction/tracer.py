"""Traces cells on the device of a profile: a few layers and micro-batches of each, from which the rest is told."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from meftbench.catalogue.operations import Work, extrapolated
from meftbench.catalogue.optimizers import OPTIMIZERS
from meftbench.catalogue.profiles import Profile
from meftbench.catalogue.versions import NOW, Versions
from meftbench.errors import UserError
from meftbench.measuring.build import AUTOCAST
from meftbench.measuring.sharing import Rank
from meftbench.methods import Applied
from meftbench.plan.cell import Cell
from meftbench.prediction.columns import Trace
from meftbench.prediction.cuda_counter import PredictedStep
from meftbench.prediction.deepened import Growth, IrregularError
from meftbench.prediction.fake_ranks import fake_rank
from meftbench.prediction.loops import LeftOut, OtherRoundsError, expanded, shortened
from meftbench.prediction.older_rules import older_rules
from meftbench.prediction.overlay import cuda_semantics
from meftbench.prediction.partitioned import partitioned_instead_of_compiled
from meftbench.prediction.remembered import Remembered
from meftbench.prediction.repeating import Repeating, repeated_by
from meftbench.prediction.trace import blamed_step, named_refusals, uncomputed_model, uncomputed_step
from meftbench.probes.counted_metrics import paged_metrics, parameter_counts
from meftbench.records.record import Metric
from meftbench.reversible.rounds import left_out_by

# Steps of a distributed cell that are traced: the first, which makes the optimizer's states; the second, in which DDP
# makes its buckets anew; and one that all later ones are like.
DISTRIBUTED_STEPS = 3
FEWEST = 3  # of what repeats: traced with these numbers of units, the next, and the one after that
GAIN = 3  # further units from which on a rule is looked for


@dataclass(frozen=True)
class Traced:
    """A cell's making and its first step; the further ones, too, where the optimizer replaces its state in each. Of a
    distributed cell the first three steps of rank 0, the largest.

    sizes: numbers of parameters, and of bytes that are in no event.  attention: fused attention operators that ran.
    tokens: of a sample.  work: what the last step does, as a later one does it; None: only `Tracer.work` tells.
    """

    trace: Trace
    sizes: dict[str, Metric]
    attention: frozenset[str]
    tokens: int
    work: Work | None = None


class Tracer:
    """Traces cells. What they have in common is kept: models, what operators gave.

    traced: how many cells were traced, those of fewer layers among them.  remembered: what operators gave.
    irregular: of cells that differ in shape alone, and units of what they repeat, why more of these cannot be told.
    """

    def __init__(
        self,
        profile: Profile,
        versions: Versions = NOW,
        *,
        extrapolate: bool = True,
        made: Callable[[Cell], Applied] = uncomputed_model,
    ) -> None:
        self.profile, self.versions = profile, versions
        self.traced = 0
        self._extrapolate, self._made = extrapolate, made
        self.remembered = Remembered()
        self._models: dict[str, Applied] = {}
        self._known: dict[tuple[str, int, float], Traced] = {}
        self._growths: dict[Any, list[_Growth]] = {}
        self.irregular: dict[tuple[str, tuple[int, ...]], str] = {}
        self._whole_loops: set[str] = set()  # families in which rounds of a loop are not alike

    def __call__(self, cell: Cell, steps: int = 2, padding: float = 0.0) -> Traced:
        """A cell with any number of layers and micro-batches. What it allocates is that of `directly`, in fewer layers
        where layers allocate alike. steps: of which `trace` has the first alone, unless the optimizer makes them
        differ.  padding: of a packed cell, the share of each sequence that is left out.

        Raises UserError: the cell cannot be built, or a trace cannot follow it.
        """
        if not self._extrapolate or _traced_whole(cell):
            return self.directly(cell, steps, padding)
        repeating = repeated_by(cell)
        traced = partial(self._with, repeating, steps, padding)
        for family in self._families(cell, repeating):
            try:
                return self._told(family, repeating.counts, traced)
            except IrregularError as irregular:
                self.irregular[family] = str(irregular)
            except UserError:  # names a cell with fewer layers, which nobody asked for
                break
        return traced(repeating.counts)

    def work(self, cell: Cell, steps: int = 2, padding: float = 0.0) -> Work:
        """What a step of a cell does that was traced before. Arguments: as above."""
        if not self._extrapolate or _traced_whole(cell):
            return self.directly(cell, steps, padding).work or Work()
        repeating = repeated_by(cell)
        families = self._families(cell, repeating)
        traced = partial(self._with, repeating, steps, padding)
        return _work(families[0][1] if families else None, repeating.counts, traced)

    def _with(self, repeating: Repeating, steps: int, padding: float, counts: tuple[int, ...]) -> Traced:
        """The cell with other numbers of what repeats, traced directly, once."""
        cell = repeating.cell_with(counts)
        key = (cell.model_dump_json(), steps, padding)
        if key not in self._known:
            self._known[key] = self.directly(cell, steps, padding)
        return self._known[key]

    def _families(self, cell: Cell, repeating: Repeating) -> list[tuple[str, tuple[int, ...]]]:
        """What cells have in common that differ in shape alone, and units of what repeats, for which no irregularity is
        known. Where layers take turns with two buffers, two of them are a unit."""
        units = [tuple(together * unit for unit in repeating.units) for together in (1, 2)]
        family = self._family(repeating.cell_with(repeating.units))
        families = [(family, unit) for unit in units]
        return [family for family in families if family not in self.irregular]

    def _told(
        self,
        family: tuple[str, tuple[int, ...]],
        counts: tuple[int, ...],
        traced: Callable[[tuple[int, ...]], Traced],
    ) -> Traced:
        """The trace with `counts` of what repeats: by `traced`, or from those of smaller counts."""
        units = family[1]
        for place, (count, unit) in enumerate(zip(counts, units, strict=True)):
            fewest, times = _fewest(count, unit)
            if times < GAIN:
                continue

            def fewer(more: int, place: int = place, fewest: int = fewest, unit: int = unit) -> Traced:
                return self._told(family, (*counts[:place], fewest + more * unit, *counts[place + 1 :]), traced)

            first = fewer(0)
            others = (*counts[:place], fewest, *counts[place + 1 :])
            known = self._growths.setdefault((*family, place, others), [])
            for growth in known:
                if (trace := growth.alike(first.trace, times)) is not None:
                    return Traced(trace, growth.sizes(times), first.attention, first.tokens)
            second = fewer(1)
            try:
                known.append(_Growth.of_two(known[-1], first, second) if known else _Growth.of(first, second, fewer(2)))
            except IrregularError:
                if not known:
                    raise
                known.append(_Growth.of(first, second, fewer(2)))
            return Traced(known[-1].by(times), known[-1].sizes(times), first.attention, first.tokens)
        return traced(counts)

    def directly(self, cell: Cell, steps: int = 2, padding: float = 0.0) -> Traced:
        """Every layer and micro-batch of a cell, and of loops over tiles or chunks the first rounds, where the others
        are like them. Arguments and errors: as above."""
        family = self._family(cell)
        if self._extrapolate and cell.parallelism is None and family not in self._whole_loops:
            try:
                return self._traced(cell, steps, padding, whole_loops=False)
            except OtherRoundsError:
                self._whole_loops.add(family)
        return self._traced(cell, steps, padding, whole_loops=True)

    def _traced(self, cell: Cell, steps: int, padding: float, *, whole_loops: bool) -> Traced:
        """whole_loops: whether all rounds are traced. Raises OtherRoundsError: where not, and they are not alike."""
        with fake_rank(cell) as rank:
            return self._traced_rank(rank, cell, steps, padding, whole_loops=whole_loops)

    def _traced_rank(self, rank: Rank | None, cell: Cell, steps: int, padding: float, *, whole_loops: bool) -> Traced:
        self.traced += 1
        sharded = cell.parallelism == "fsdp2"
        on_meta = cell.precision not in AUTOCAST and not sharded  # fully_shard refuses meta tensors
        step, mode = uncomputed_step(
            cell,
            # Of sharded tensors torch takes one at a time: they are none of the types that it takes several of.
            foreach=False if sharded else self.versions.foreach_optimizer,
            on_meta=on_meta,
            # A model that was shared among ranks cannot be shared again in another shape.
            applied=self._model(cell) if on_meta and rank is None else self._made(cell),
            padding=padding,
            rank=rank,
        )
        for lever in step.applied.levers.values():
            lever.forget_steps()  # of the model in another shape
        with ExitStack() as entered:
            for region in (blamed_step(cell), named_refusals(cell), cuda_semantics(self.profile, self.versions)):
                entered.enter_context(region)
            entered.enter_context(older_rules(self.versions, step))
            entered.enter_context(partitioned_instead_of_compiled(step.applied))
            entered.enter_context(mode)
            counted = entered.enter_context(PredictedStep(step, self.remembered, self.profile, self.versions))
            counter = counted.counter
            entered.enter_context(counter.work.entered())
            entered.enter_context(nullcontext() if whole_loops else left_out_by(counter))
            starts = []
            few = 1 if rank is None else min(steps, DISTRIBUTED_STEPS)
            for _ in range(steps if OPTIMIZERS[cell.optimizer].replaces_state else few):
                starts.append(len(counter.events))
                counted.run()
                gc.collect()  # what the step leaves alive after this stays alive
        for name, made in step.applied.levers.items():
            if fact := made.missing_in_trace(counter.attention_kernels):
                what = f"{name}: {fact} on {self.profile.device}"
                raise UserError(cell.label, what, f"change the settings of {name}")
        left_out = [_after_starts(each, starts) for each in counter.rounds_left_out]
        trace = shortened(Trace.of(counter.events, starts), left_out)
        sizes = parameter_counts(step.model) | paged_metrics(step, "predicted")
        gc.freeze()  # so that no collection in a later trace goes through the models and what is remembered
        return Traced(trace, sizes, frozenset(counter.attention_kernels), step.sequence_length, counter.work.work)

    def _family(self, cell: Cell) -> str:
        """What cells have in common that differ in the shape of the batch alone."""
        return cell.model_dump_json(exclude={"batch_size", "micro_batch_size", "sequence_length"})

    def _model(self, cell: Cell) -> Applied:
        """The cell's model with its method, which does not depend on the shape of the batch."""
        key = self._family(cell)
        if key not in self._models:
            self._models[key] = self._made(cell)
        return self._models[key]


def _traced_whole(cell: Cell) -> bool:
    """Whether all layers and micro-batches of a cell are traced, since a few do not tell the rest: lengths of packed
    micro-batches differ, and so do the buckets into which DDP puts gradients by their size."""
    return cell.parallelism is not None or (cell.packing and cell.micro_batch_size < cell.batch_size)


def _after_starts(left_out: LeftOut, starts: list[int]) -> LeftOut:
    """Rounds that were left out of events, where steps begin with `starts`, as of the trace with an event for each
    start."""
    return left_out._replace(place=left_out.place + sum(start < left_out.place for start in starts))


def _fewest(count: int, unit: int) -> tuple[int, int]:
    """The smallest number that is traced in place of `count`, and by how many units it is smaller."""
    fewest = max(2, -(-FEWEST // unit)) * unit + count % unit
    return fewest, (count - fewest) // unit


def _work(units: tuple[int, ...] | None, counts: tuple[int, ...], traced: Callable[[tuple[int, ...]], Traced]) -> Work:
    """The work with `counts` of what repeats: that of the smallest numbers, and what a unit more adds to it."""
    for place, (count, unit) in enumerate(zip(counts, units or (), strict=bool(units))):
        fewest, times = _fewest(count, unit)
        if times >= GAIN:
            first, second = (
                _work(units, (*counts[:place], fewest + more, *counts[place + 1 :]), traced) for more in (0, unit)
            )
            return extrapolated(first, second, times)
    return traced(counts).work or Work()


@dataclass(frozen=True)
class _Growth:
    """How a trace and numbers of parameters grow with the number of units of layers.

    whole: whether `of_trace` is of traces with all rounds of their loops. Layers that keep nothing, as where there is
    no backward pass, are themselves rounds, of which few are no loop yet.
    """

    of_trace: Growth
    numbers: dict[str, tuple[Metric, int]]
    whole: bool

    @classmethod
    def of(cls, first: Traced, second: Traced, third: Traced) -> _Growth:
        """Raises IrregularError: they do not grow by a rule."""
        if not first.attention == second.attention == third.attention or first.sizes.keys() != third.sizes.keys():
            raise IrregularError("other kernels run in further layers")
        numbers = {}
        for name, metric in first.sizes.items():
            one, two, three = (cast(int, traced.sizes[name].value) for traced in (first, second, third))
            if three - two != two - one:
                raise IrregularError(f"{name} does not grow by the same number with each unit of layers")
            numbers[name] = (metric, two - one)
        traces = [first.trace, second.trace, third.trace]
        try:
            return cls(Growth(*traces), numbers, whole=False)
        except IrregularError:
            whole = [expanded(trace) for trace in traces]
            if all(one is trace for one, trace in zip(whole, traces, strict=True)):
                raise
        return cls(Growth(*whole), numbers, whole=True)

    @classmethod
    def of_two(cls, known: _Growth, first: Traced, second: Traced) -> _Growth:
        """As of `Growth`."""
        if first.attention != second.attention or known.whole:
            raise IrregularError("other kernels run in further layers")
        numbers = {
            name: (metric, cast(int, second.sizes[name].value) - cast(int, metric.value))
            for name, metric in first.sizes.items()
        }
        return cls(Growth.of_two(known.of_trace, first.trace, second.trace), numbers, whole=False)

    def by(self, times: int) -> Trace:
        """As of `Growth`."""
        told = self.of_trace.by(times)
        return shortened(told) if self.whole else told

    def alike(self, trace: Trace, times: int) -> Trace | None:
        """As of `Growth`."""
        told = self.of_trace.alike(expanded(trace) if self.whole else trace, times)
        return shortened(told) if self.whole and told is not None else told

    def sizes(self, times: int) -> dict[str, Metric]:
        return {
            name: replace(metric, value=cast(int, metric.value) + times * by)
            for name, (metric, by) in self.numbers.items()
        }
