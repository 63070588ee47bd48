"""The axes of a sweep: what a suite may vary, each declared once in the table AXES.

From this table come the keys of `grid`, `defaults`, `include` and `exclude` in a suite, the keys of `--where`, parts of
a cell's label, the options of the commands that predict (`estimate`, `fit`), and the columns by which tables tell
settings apart. A new axis needs a row here, a field of `plan.cell.Cell`, and the code that its value affects. Nothing
that is slow to import is imported here, since `--help` reads this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from meftbench.catalogue.backbones import HEADS
from meftbench.catalogue.choices import ATTENTIONS, PRECISIONS
from meftbench.catalogue.optimizers import OPTIMIZER_IMPLEMENTATIONS, OPTIMIZERS
from meftbench.catalogue.parallelisms import PARALLELISMS


@dataclass(frozen=True)
class Axis:
    """One axis of a sweep.

    kind: what its values are: `named`, a name that may have settings; `size`, a whole number from 1; `natural`, a whole
        number from 0; `positive`, a positive number; `flag`, true or false; `text`; `choice`, one of `known`, which the
        JSON Schema lists.
    known: the allowed values with their meanings; None: any value, or the values are checked elsewhere.
    field: the field of a cell that holds the value, where it is not named like the axis.
    of_training: whether the value is a field of the cell's training, which a cell without a task does not have.
    in_grid: whether it is a key of `grid`; tasks are not, they have the key `tasks` in a suite.
    in_label: whether a cell's label names a value that is not the default.
    word: what the label says where a flag is true.
    column: its part in tables: `shape`, a part of the shape; `setting`, something else in which cells must agree before
        their methods are compared; None: neither.
    help: of the option that the commands that predict have for it; None: no option, or one that each command declares.
    fitted: whether `fit` has this option as well.
    """

    kind: Literal["named", "size", "natural", "positive", "flag", "choice", "text"] = "text"
    known: Mapping[str, str] | None = None
    field: str | None = None
    of_training: bool = False
    in_grid: bool = True
    in_label: bool = False
    word: str = ""
    column: Literal["shape", "setting"] | None = None
    help: str | None = None
    fitted: bool = False


AXES: dict[str, Axis] = {
    "model": Axis("named", column="setting"),
    "method": Axis("named"),
    "batch_size": Axis("size", column="shape"),
    "micro_batch_size": Axis("size", column="shape", help="Samples per forward pass; divides the batch size."),
    "sequence_length": Axis("size", column="shape"),
    "precision": Axis(
        known=PRECISIONS,
        in_label=True,
        column="setting",
        help="fp32 (the default), bf16, bf16-autocast ...",
        fitted=True,
    ),
    "head": Axis(known=HEADS, in_label=True, column="setting", help="classification, causal_lm ...", fitted=True),
    "attention": Axis(
        known=ATTENTIONS,
        field="attention_requested",
        in_label=True,
        column="setting",
        help="sdpa or eager.",
        fitted=True,
    ),
    "optimizer": Axis(
        known={name: optimizer.summary for name, optimizer in OPTIMIZERS.items()},
        in_label=True,
        column="setting",
        help="A name of `meftbench list optimizers`: adamw (the default), adamw-8bit ...",
        fitted=True,
    ),
    "optimizer_impl": Axis("choice", known=OPTIMIZER_IMPLEMENTATIONS, in_label=True, column="setting"),
    "packing": Axis(
        "flag",
        in_label=True,
        word="packed",
        column="setting",
        help="Lay samples end to end in one row, without padding.",
    ),
    "world_size": Axis("size", column="setting", help="Processes (ranks) that share a step, each with its own batch."),
    "parallelism": Axis(
        "choice",
        known={name: way.summary for name, way in PARALLELISMS.items()},
        column="setting",
        help="How ranks share a step: ddp or fsdp2.",
    ),
    "device": Axis(column="setting"),
    "seed": Axis("natural", column="setting"),
    "task": Axis("named", of_training=True, in_grid=False, column="setting"),
    "learning_rate": Axis("positive", of_training=True, column="setting"),
    "batch": Axis(column="setting", help="Makes the batch from batch_size and sequence_length.", fitted=True),
}

# By name of an axis, the field of a cell (or of its training) that holds the value.
FIELDS = {name: axis.field or name for name, axis in AXES.items()}
OF_TRAINING = tuple(name for name, axis in AXES.items() if axis.of_training)
# By field of a flag, what a label says where it is true.
WORDS = {FIELDS[name]: axis.word for name, axis in AXES.items() if axis.kind == "flag"}
IN_LABEL = tuple(FIELDS[name] for name, axis in AXES.items() if axis.in_label)
SHAPE = tuple(FIELDS[name] for name, axis in AXES.items() if axis.column == "shape")
SETTINGS = tuple(FIELDS[name] for name, axis in AXES.items() if axis.column == "setting")
PREDICTED_OPTIONS = tuple(name for name, axis in AXES.items() if axis.help is not None)
FITTED_OPTIONS = tuple(name for name in PREDICTED_OPTIONS if AXES[name].fitted)
