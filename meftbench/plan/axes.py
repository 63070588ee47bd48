"""The axes of a sweep, each declared once: what a suite may vary, and what follows from that elsewhere.

From this table come the keys of `grid`, `defaults`, `include` and `exclude` of a suite, the keys of `--where`, the part
of a cell's label, the options of the verbs that predict, and the columns by which tables tell settings apart. To add an
axis: a row here and a field of `plan.cell.Cell`, and whatever the value changes. Nothing slow is imported here, since
`--help` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from meftbench.catalogue.backbones import HEADS
from meftbench.catalogue.choices import ATTENTIONS, OPTIMIZER_IMPLEMENTATIONS, OPTIMIZERS, PRECISIONS


@dataclass(frozen=True)
class Axis:
    """One axis.

    kind: of its values: a name that may have settings; a size (from 1), a number from 0, a positive number; a text, of
        `known` where that is given; `choice`, one of `known` and nothing that resembles it.
    known: the values there are, with what they mean; None: any, or checked by whoever knows them.
    field: of a cell that holds the value, where its name is another.
    of_training: the value is a field of the cell's training, which a cell without a task has not.
    in_grid: a key of `grid`; the axis of tasks has a key of its own in a suite.
    in_label: a cell's label says a value that is not the default.
    column: what tables take it for: part of the shape, or a setting that tells cells apart that are not comparable by
        method alone; None: neither.
    help: of the option on the command line; None: it has none there, or one of the verb's own.
    fitted: whether `fit`, too, takes it as an option, beside the other verbs that predict.
    """

    kind: Literal["named", "size", "natural", "positive", "choice", "text"] = "text"
    known: Mapping[str, str] | None = None
    field: str | None = None
    of_training: bool = False
    in_grid: bool = True
    in_label: bool = False
    column: Literal["shape", "setting"] | None = None
    help: str | None = None
    fitted: bool = False


AXES: dict[str, Axis] = {
    "model": Axis("named", column="setting"),
    "method": Axis("named"),
    "batch_size": Axis("size", column="shape"),
    "micro_batch_size": Axis("size", column="shape", help="Samples a forward; divides the batch."),
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
    "optimizer": Axis(known=OPTIMIZERS, in_label=True, column="setting", help="adamw (the default) or sgd."),
    "optimizer_impl": Axis("choice", known=OPTIMIZER_IMPLEMENTATIONS, in_label=True, column="setting"),
    "device": Axis(column="setting"),
    "seed": Axis("natural", column="setting"),
    "task": Axis("named", of_training=True, in_grid=False, column="setting"),
    "learning_rate": Axis("positive", of_training=True, column="setting"),
    "batch": Axis(column="setting", help="Makes the batch, from batch_size and sequence_length.", fitted=True),
}

FIELDS = {name: axis.field or name for name, axis in AXES.items()}
OF_TRAINING = tuple(name for name, axis in AXES.items() if axis.of_training)
IN_LABEL = tuple(FIELDS[name] for name, axis in AXES.items() if axis.in_label)
SHAPE = tuple(FIELDS[name] for name, axis in AXES.items() if axis.column == "shape")
SETTINGS = tuple(FIELDS[name] for name, axis in AXES.items() if axis.column == "setting")
PREDICTED_OPTIONS = tuple(name for name, axis in AXES.items() if axis.help is not None)
FITTED_OPTIONS = tuple(name for name in PREDICTED_OPTIONS if AXES[name].fitted)
