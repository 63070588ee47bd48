"""What is published of predictions: the answers of `estimate`, `fit`, `plan`, `inspect` and `validate`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from meftbench.catalogue.validated import Group
from meftbench.schemas.base import Bytes, MethodPart, Published, Seconds


class FitRow(Published):
    """The largest batch at a length, or the longest sequence at a batch, of one method on one card."""

    method: str
    parts: list[MethodPart]
    asked: Literal["batch_size", "sequence_length"]
    at: int
    """The size of the other: tokens of a sample, or samples."""
    memory_bytes: Bytes
    largest: int | None
    """Null: nothing fits."""
    at_limit: bool
    """`largest` is the largest size that was tried."""
    all_positions: bool


class FitAnswer(Published):
    """`meftbench fit --json`. Everything is predicted."""

    model: str
    precision: str
    profile: str
    predict_s: Seconds
    device: str
    verified: bool
    validation: str
    rules: str
    context_bytes: Bytes
    default_profile: bool
    cards: list[Bytes]
    positions: int | None
    source: Literal["predicted"]
    rows: list[FitRow]
    refused: dict[str, str]
    """Why a method has no row, by method."""
    cells: int
    """How many were predicted."""


class PlanRow(Published):
    """A candidate (method, levers, precision, optimizer) at the largest micro-batch that fits a card."""

    method: str
    parts: list[MethodPart]
    precision: str
    optimizer: str
    memory_bytes: Bytes
    capacity_index: int
    micro_batch_size: int
    """0: not even a micro-batch of one sample fits."""
    sequence_length: int
    fits: bool
    headroom_bytes: int
    peak_allocated_bytes: Bytes
    peak_reserved_bytes: Bytes
    process_device_bytes: Bytes
    smallest_reserved_bytes: Bytes
    least_device_bytes: Bytes
    """At micro-batch 1, with the context of the process."""
    breakdown: dict[str, int]
    parameters_trainable: int
    step_s: Seconds | None
    tokens_per_s: float | None
    recomputed_flops_share: float
    host_transfer_bytes: Bytes
    retries: int
    verified: bool
    fitted: bool
    relative_cost: float
    only_explains: bool
    on_frontier: bool
    has_backward: bool
    cost_per_million_tokens: float | None
    currency: str | None


class LargerCard(Published):
    """What a larger card buys. speedup: null where no time is predicted."""

    memory_bytes: Bytes
    fastest: PlanRow | None
    speedup: float | None
    newly_fits: list[Any]


class LeverPair(Published):
    """Two candidates that differ in one lever alone, and what the lever saves."""

    lever: str
    with_: str = Field(alias="with")
    parts: list[MethodPart]
    """Of the method that `with` names."""
    without: str
    precision: str
    optimizer: str
    micro_batch_size: int
    without_bytes: Bytes
    with_bytes: Bytes
    saves_bytes: int
    relative_cost_without: float
    relative_cost_with: float


class TooLarge(Published):
    """A method of which nothing fits: the candidate that misses least."""

    method: str
    parts: list[MethodPart]
    precision: str
    optimizer: str
    least_device_bytes: Bytes
    missing_bytes: Bytes


class Need(Published):
    """The smallest shipped card on which a method fits at micro-batch 1; null: none is large enough."""

    method: str
    parts: list[MethodPart]
    precision: str
    optimizer: str
    least_device_bytes: Bytes
    card: str | None
    memory_bytes: Bytes | None


class ShapeMap(Published):
    """Memory of one method by batch and length, a row a batch; null: not predicted."""

    method: str
    batch_sizes: list[int]
    lengths: list[int]
    process_device_bytes: list[list[Bytes | None]]


class PlanAnswer(Published):
    """`meftbench plan --json`. Everything is predicted."""

    model: str
    model_name: str
    config: dict[str, Any]
    head: str | None
    options: dict[str, Any]
    profile: str
    profile_name: str
    device: str
    verified: bool
    validation: str
    rules: str
    context_bytes: Bytes
    default_profile: bool
    cards: list[Bytes]
    """The card that was asked about, then larger ones."""
    sequence_length: int
    batch_size: int | None
    precisions: list[str]
    optimizer: str | None
    explained: bool
    source: Literal["predicted"]
    has_time: bool
    rows: list[PlanRow]
    fastest: PlanRow | None
    smallest: PlanRow | None
    best: list[PlanRow]
    """Of each method the best row that fits."""
    larger: list[LargerCard]
    too_large: list[TooLarge]
    levers: list[LeverPair]
    needs: list[Need]
    map: ShapeMap | None
    refused: dict[str, str]
    candidates: int
    traced: int
    predict_s: Seconds


# --- snapshots ---


class SizedName(Published):
    """Bytes and blocks that are alive at the peak, of one category or line of code."""

    name: str
    bytes: Bytes
    blocks: int


class OtherSettings(Published):
    """What other settings of the allocator would have reserved; alloc_conf null: as recorded."""

    alloc_conf: str | None
    peak_reserved_bytes: Bytes
    reserved_bytes: Bytes
    retries: int
    oom_at: int | None
    collects: bool | None


class InspectAnswer(Published):
    """`meftbench inspect --json`: a memory snapshot of torch, replayed. Sizes are in bytes."""

    file: str
    device: int
    entries: int
    segments: int
    streams: int
    source: Literal["measured", "predicted"]
    starts_empty: bool
    stacks: bool
    peak_allocated_bytes: Bytes
    peak_requested_bytes: Bytes
    peak_reserved_bytes: Bytes
    peak_at: int | None
    """The entry of the trace after which the peak is reached."""
    allocated_bytes: Bytes
    reserved_bytes: Bytes
    fragmentation: float | None
    allocations: int
    allocations_agreeing: int
    allocations_private: int
    first_difference: int | None
    replayed_peak_reserved_bytes: Bytes | None
    replayed_reserved_bytes: Bytes | None
    unused_in_blocks_bytes: Bytes
    unused_in_blocks: list[dict[str, Any]]
    blocks_at_peak: int
    by_category: list[SizedName]
    by_module: list[SizedName]
    other_modules: dict[str, int]
    capacity_bytes: Bytes | None
    other_settings: list[OtherSettings]
    notes: list[str]
    timeline: dict[str, Any]


class AllocationsOfOneSize(Published):
    """Allocations of one size that only the snapshot or only the prediction has."""

    requested_bytes: Bytes
    count: int
    origin: str


class ValidateSnapshotAnswer(Published):
    """`meftbench validate SNAPSHOT MODEL METHOD --json`: numbers of allocations, recorded and predicted."""

    label: str
    device: str
    rules: str
    recorded: int
    predicted: int
    common: int
    recorded_above_bytes: int
    predicted_above_bytes: int
    only_recorded: list[AllocationsOfOneSize]
    only_predicted: list[AllocationsOfOneSize]
    error: float
    """Of the peak above the beginning, as a share of the recorded one; negative: predicted too low."""


class ValidatePublishedAnswer(Published):
    """`meftbench validate --published --json`: what predictions were held against. figures: null without the table."""

    schema_: Literal[1] = Field(alias="schema")
    torch: str
    transformers: str
    traces: int
    allocations: int
    equal_addresses: int
    groups: list[Group]
    figures: list[dict[str, Any]] | None
