"""What is published of runs: the record, and the answers of `run`, `finetune`, `check`, `compare`, `export`, `show`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, RootModel

from meftbench.records.record import Status
from meftbench.schemas.base import Bytes, MethodPart, Number, Published, Seconds, Source

# --- the record ---


class MetricValue(Published):
    """One number with its unit and source. `value` is null where it could not be obtained; then `absent` says why."""

    value: Number | str | list[Any] | None
    unit: str
    """Of the stored value, as `meftbench list metrics` has it: byte, second, ratio ..."""
    source: Source
    absent: str | None = None
    n: int | None = None
    """Over how many measured steps `min`, `max` and the value are."""
    min: Number | None = None
    max: Number | None = None
    samples: list[Number] | None = None
    phases: dict[str, int] | None = None
    """The peak of each phase of a step, in bytes."""


class RecordedCell(Published):
    """What was run: the fields of the cell and what was observed of it. Trainings have more fields."""

    label: str
    """MODEL/METHOD/bBATCH/sLENGTH, and what differs from the defaults."""
    model: str
    cell_model_config: dict[str, Any] = Field(alias="model_config")
    method: str
    method_params: dict[str, Any]
    """All settings of the method, with defaults."""
    levers: dict[str, bool]
    parts: list[MethodPart] = Field(default_factory=list)
    """The method and then each lever that is on; the label is written from them. Older records lack it."""
    batch_size: int
    micro_batch_size: int
    sequence_length: int
    precision: str
    head: str | None = None
    attention_requested: str
    attention_used: str | None
    optimizer: str
    optimizer_impl: str | None
    device: str
    """`counted`, `cuda`, `cuda:PROFILE` (on that card alone), or `predicted:PROFILE`."""
    world_size: int = 1
    """Processes (ranks) that shared a step, each with `batch_size` samples. Older records lack it."""
    parallelism: str | None = None
    seed: int
    training: dict[str, Any] | None = None
    weights: Literal["random", "pretrained", "own"]
    model_revision: str | None


class RecordLine(Published):
    """A cell that was run, or skipped: one line of records.jsonl, and of `meftbench show RUN --json`."""

    schema_: Literal[1] = Field(alias="schema")
    record_id: str
    run_id: str
    cell_id: str
    """Hash of the cell's fields that differ from their defaults."""
    repeat: int = Field(ge=0)
    protocol_id: str
    environment_id: str
    meftbench_version: str
    code_digest: str
    started_at: str
    finished_at: str
    host: str
    worker_pid: int | None
    cell: RecordedCell
    status: Status
    status_detail: dict[str, Any]
    """Of a cell that did not end ok: type, message, requested_bytes, phase ...; only those that are known."""
    wall_s: Seconds
    metrics: dict[str, MetricValue]
    """By name; `meftbench list metrics` explains each."""


class CellLine(Published):
    """A cell of a run: one line of `meftbench show RUN --cells --json`."""

    label: str
    cell_id: str
    status: Status
    """Of several repeats the worst."""


# --- run, finetune ---


class ExpectedFrom(Published):
    """From what the time was told, in numbers of cells."""

    same: int
    scaled: int
    unknown: int


class RunAnswer(Published):
    """`meftbench run --json` and `meftbench finetune --json`."""

    run: str
    """The run folder."""
    run_id: str
    suite: str
    suite_id: str
    counts: dict[Status, int]
    exit_code: int
    expected_s: Seconds | None
    """Seconds that the run was expected to take before it began; null: not known, or nothing was left to run."""
    expected_range_s: list[Seconds] | None = Field(min_length=2, max_length=2)
    expected_from: ExpectedFrom
    answer: list[str]
    """The answer of the run in one to three sentences."""
    records: list[RecordLine]


class PlannedCell(Published):
    """A cell that a run would run."""

    cell_id: str
    label: str
    device: str


class DryRunAnswer(Published):
    """`meftbench run --dry-run --json`: nothing was run."""

    suite: str
    suite_id: str
    cells: list[PlannedCell]
    processes: int
    """Cells times repeats."""
    code: list[str] = Field(default_factory=list)
    """Functions of the user's own, MODULE:FUNCTION, that a run would import and call."""
    expected_s: Seconds | None
    expected_range_s: list[Seconds] | None = Field(min_length=2, max_length=2)
    expected_from: ExpectedFrom


class ExportedRun(Published):
    """`meftbench export RUN --format json`: a whole run."""

    suite: dict[str, Any]
    """As suite.yaml in the run folder."""
    environment: dict[str, Any]
    """As environment.json in the run folder."""
    records: list[RecordLine]


class WrittenAnswer(Published):
    """`meftbench report --json`, `meftbench init --json`, and `meftbench export --json` where it writes files."""

    files: list[str]
    """Paths, as the options name their folder."""


# --- check, compare ---


class VerdictLine(Published):
    """A row of the budgets held against a cell, or against none that it matches. Numbers are in `unit`."""

    file: str
    line: int
    metric: str
    unit: str
    state: str
    label: str
    cell_id: str | None
    source: str | None
    value: Number | None
    bound: Number | None
    headroom: Number | None
    """Distance from the value to the bound; negative where the bound is violated."""
    limit: str | None
    """Which bound: max, min, warn or max_increase."""
    message: str
    missing: str
    wall_s: Seconds
    cause: str = ""
    """What the memory above a bound consists of; empty where it is not known."""
    fails: bool
    """Whether it makes `meftbench check` exit other than 0."""


class CheckAnswer(RootModel[list[VerdictLine]]):
    """`meftbench check --json`: a verdict a row and cell."""


class NoiseEvidence(Published):
    """What two sets of samples say about the ratio of their medians, after to before."""

    n: list[int]
    """How many samples before and after."""
    p: Number
    """Two-sided, of the Mann-Whitney U test."""
    low: Number
    high: Number
    """Bounds of the 95 % bootstrap interval of the ratio."""


class ChangeLine(Published):
    """One metric of one cell in both runs, in the metric's unit; or its status, where that differs."""

    label: str
    cell_id: str
    metric: str
    judgement: Literal["worse", "better", "changed", "noise", "same"]
    source: str
    before: Number | None
    after: Number | None
    delta: Number | None
    share: Number | None
    """delta as a share of `before`."""
    statuses: list[str] | None
    evidence: NoiseEvidence | None
    """What the samples of a measured time say; null: judged without them."""


class GrownPart(Published):
    """One kind of buffer, or one category of memory, in both cells, in bytes."""

    name: str
    category: str
    before: Bytes
    after: Bytes
    delta: int
    counts: list[int]
    """How many buffers in each of the cells."""
    module: str | None
    """Of a buffer, the path in the model of the module that it belongs to, `*` for numbers of layers; empty: the model
    itself. Null: of a category, or not known."""
    kind: str
    """new, gone, larger, smaller or same."""


class GrownCell(Published):
    """Why a peak of a cell is higher than in the other run; only what differs, the largest growth first."""

    label: str
    cell_id: str
    peaks: dict[str, list[Number]]
    """Each peak that grew, in bytes before and after."""
    categories: list[GrownPart]
    buffers: list[GrownPart] | None
    """Null: the records do not list them."""


class ComparisonAnswer(Published):
    """`meftbench compare RUN_A RUN_B --json`."""

    first: str
    second: str
    differs: list[str]
    """In what the runs differ beside their numbers."""
    grown: list[GrownCell]
    cells: int
    """Cells that are in both runs."""
    only_first: list[str]
    only_second: list[str]
    notes: list[str]
    counts: dict[str, int]
    changes: list[ChangeLine]


class ComparisonsAnswer(Published):
    """`meftbench compare RUN_A RUN_B RUN_C ... --json`: each later run against the first."""

    comparisons: list[ComparisonAnswer]


class CompareAnswer(RootModel[ComparisonAnswer | ComparisonsAnswer]):
    """`meftbench compare --json`: of two runs one comparison, of more a list of them."""


# --- validate RUN ---


class ErrorSpread(Published):
    """Relative errors of predicted memory over the cells of one value of `axis` (method, precision, attention, all)."""

    metric: str
    axis: str
    name: str
    count: int
    median: float
    worst: float
    signed: float


class PredictionError(Published):
    """One metric of one cell, measured and predicted, in bytes. share: predicted / measured - 1."""

    label: str
    method: str
    precision: str
    attention: str
    metric: str
    measured: Bytes
    predicted: Bytes
    method_name: str
    """The method without levers and settings."""
    share: float


class ValidateRunAnswer(Published):
    """`meftbench validate RUN --json`."""

    profile: str
    spreads: list[ErrorSpread]
    errors: list[PredictionError]
    not_predicted: list[str]
    """Cells without a prediction, and why."""
