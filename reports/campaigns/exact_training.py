"""Does reversal change training? Loss curves of MEFT against the same equations under plain autograd, step by step.

    python reports/campaigns/exact_training.py reports/exact-training-cpu

Each method is trained twice from the same weights, on the same batches and random numbers: once reversed, once with
everything cached. Exact arithmetic should differ by rounding alone, the paper's float arithmetic shows what its
reversal does to the gradients. How far rounding alone leads is measured too: the equations of the exact methods are
trained a third time in float64. A case is a model and a learning rate.

Writes `losses.csv`, `exact-training.png` and `.svg`, `environment.json` and `summary.md`, which is also printed.
`--data` is a folder with a `train.jsonl` of one or two text fields and a label, as those of GLUE; without it the
script says so and ends with exit code 2. It may be interrupted and called again: what has ended is not repeated.
tests/test_exact_training.py runs it in miniature.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pandas as pd
import torch
from torch import Tensor, nn

from meftbench.backbones import layouts_of
from meftbench.backbones.build import build_model, tokenizer_of
from meftbench.catalogue.methods import SIDE_BITS
from meftbench.errors import UserError
from meftbench.measuring.requests import describe
from meftbench.methods import Applied, prepare
from meftbench.records.store import made
from meftbench.report.figures.pictures import Picture
from meftbench.runner import gpus, host
from meftbench.runner.environment import environment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

ROOT = Path(__file__).resolve().parents[2]
COMPARED = ("meft1-exact", "meft3-exact", "meft1", "meft3")
TWICE = "-twice"
# As in the paper's code release (docs/paper.md), but at a constant rate: 50 steps are shorter than its warm-up.
ADAMW: dict[str, Any] = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
CLIP = 1.0
# Okabe and Ito; exact and float of one variant are not neighbours in hue.
COLOUR = {"meft1-exact": "#009E73", "meft3-exact": "#0072B2", "meft1": "#E69F00", "meft3": "#D55E00"}
MARKER = {"meft1-exact": "o", "meft3-exact": "s", "meft1": "^", "meft3": "v"}
ZERO = "0 (bit-identical)"
IDENTITY = ("step", "case", "model", "layers", "learning_rate", "method", "arithmetic", "activations", "precision")
DISTANCES = ("weights_distance", "gradient_distance", "same_weights_loss_difference")


@dataclass(frozen=True)
class Case:
    """What every method is trained on.  model: as for `build_model`; `-twice` behind it: its layers stacked twice."""

    model: str
    learning_rate: float

    @staticmethod
    def read(text: str) -> Case:
        """MODEL:LEARNING_RATE, as on the command line."""
        model, _, rate = text.rpartition(":")
        return Case(model, float(rate))

    def __str__(self) -> str:
        return f"{self.model}:{self.learning_rate:g}"


# 5e-4 is the paper's largest (docs/paper.md). At 1e-3 training on 12 layers itself magnifies any difference.
CASES = [Case("minilm", 1e-3), Case(f"minilm{TWICE}", 5e-4), Case(f"minilm{TWICE}", 1e-3)]


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "glue" / "stsb")
    parser.add_argument("--cases", nargs="+", type=Case.read, default=CASES, metavar="MODEL:LEARNING_RATE")
    parser.add_argument("--methods", nargs="+", default=list(COMPARED), choices=COMPARED)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="tokens; longer pairs are cut, shorter ones padded")
    parser.add_argument("--gradient-every", type=int, default=10, help="steps between gradient comparisons; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        task = read_task(options.data, options.steps, options.batch_size, options.length, options.seed)
        table = trained(task, options)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    write_figure(table, task, options.out)
    text = summary(table, task, options)
    (options.out / "summary.md").write_text(text)
    print(text)
    return 0


def trained(task: Task, options: argparse.Namespace) -> pd.DataFrame:
    """losses.csv of all cases and methods; those that an interrupted call has ended are not repeated.

    Raises UserError: the folder holds another campaign.
    """
    told = environment_of(task, options)
    losses, facts = options.out / "losses.csv", options.out / "environment.json"
    made(options.out)
    if facts.is_file():
        if _sameness(told) != _sameness(json.loads(facts.read_text())):
            raise UserError(str(options.out), "holds a campaign of other options or code", "name another folder")
    else:
        facts.write_text(json.dumps(told, indent=2) + "\n")
    tables = [pd.read_csv(losses)] if losses.is_file() else []
    ended = {pair for table in tables for pair in zip(table["case"], table["method"], strict=True)}
    for case in options.cases:
        for method in options.methods:
            if (str(case), method) not in ended:
                tables.append(train(case, method, task, gradient_every=options.gradient_every, seed=options.seed))
                pd.concat(tables, ignore_index=True).to_csv(losses, index=False)
    return pd.concat(tables, ignore_index=True)


def _sameness(told: dict[str, Any]) -> tuple[object, ...]:
    """What must agree for two calls to be one campaign."""
    return told["campaign"], told["meftbench"]["code_digest"], told["packages"]["torch"]


# --- the task ---


@dataclass(frozen=True)
class Task:
    """Batches of a text data set, one a step.

    batches: arguments of the model's forward: input_ids, token_type_ids, attention_mask (B, L), labels (B).
    num_labels: 1 is regression.  padding, cut: share of the tokens that is padding, of the samples that were cut.
    """

    name: str
    digest: str
    batches: list[dict[str, Tensor]]
    num_labels: int
    padding: float
    cut: float


def read_task(folder: Path, steps: int, batch_size: int, length: int, seed: int) -> Task:
    """The first `steps` batches of `train.jsonl` in an order drawn from `seed`, tokenised for MiniLM.

    Raises UserError: no such file, a line that is no record with text and label.
    """
    from transformers import AutoTokenizer

    file = folder / "train.jsonl"
    if not file.is_file():
        raise UserError(str(folder), "has no train.jsonl", "name a folder that has one with --data")
    content = file.read_bytes()
    records = [_record(f"{file}:{number}", line) for number, line in enumerate(content.splitlines(), start=1)]
    if not records:
        raise UserError(str(file), "is empty", "name another folder with --data")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of("minilm"))
    fields = [name for name, value in records[0].items() if isinstance(value, str)][:2]
    regression = any(isinstance(record["label"], float) for record in records)
    drawn = _orders(len(records), seed)
    batches, uncut = [], []
    for _ in range(steps):
        chosen = [records[next(drawn)] for _ in range(batch_size)]
        texts = [[record[name] for record in chosen] for name in fields]
        batch = tokenizer(*texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        labels = torch.tensor([record["label"] for record in chosen])
        batches.append({**batch, "labels": labels.float() if regression else labels})
        uncut += [len(ids) for ids in tokenizer(*texts)["input_ids"]]
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return Task(
        name=f"{file.parent.parent.name}/{file.parent.name}",
        digest=hashlib.sha256(content).hexdigest(),
        batches=batches,
        num_labels=1 if regression else max(record["label"] for record in records) + 1,
        padding=1 - real / (steps * batch_size * length),
        cut=sum(count > length for count in uncut) / len(uncut),
    )


def _record(where: str, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not (isinstance(record, dict) and "label" in record and any(isinstance(v, str) for v in record.values())):
        raise UserError(where, "is no record with text and a label", "see the GLUE tasks on the hub for the fields")
    return record


def _orders(count: int, seed: int) -> Iterator[int]:
    """0..count-1 in a new order each time round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


# --- training ---


@dataclass
class Arm:
    """One training run of a method: its model and optimizer.

    activations: "reversed", or "ordinary": the same equations, everything cached.
    """

    activations: str
    applied: Applied
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype

    @staticmethod
    def of(model: nn.Module, method: str, activations: str, dtype: torch.dtype, learning_rate: float, seed: int) -> Arm:
        """`model` is left as it is. Exact reversal is verified in every step (`strict`)."""
        settings = {"strict": True} if method.endswith("-exact") and activations == "reversed" else {}
        applied = prepare(deepcopy(model), method, settings, seed=seed)
        applied.model.to(dtype)
        optimizer = torch.optim.AdamW(applied.trained().values(), lr=learning_rate, **ADAMW)
        return Arm(activations, applied, optimizer, dtype)

    @property
    def precision(self) -> str:
        return {torch.float32: "fp32", torch.float64: "fp64"}[self.dtype]

    def loss_and_gradients(self, batch: dict[str, Tensor], step: int, activations: str) -> float:
        """The loss of a batch, its gradients left in the parameters. Random numbers are those of `step`."""
        torch.manual_seed(step)
        inputs = {
            name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()
        }
        with self.applied.reference_autograd() if activations == "ordinary" else nullcontext():
            loss = self.applied.model(**inputs).loss
            loss.backward()
        return float(loss.detach())

    def update(self) -> None:
        """Clip the gradients, step, and forget them."""
        nn.utils.clip_grad_norm_(self.applied.trained().values(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def adapters(self) -> list[nn.Parameter]:
        """What is trained within the reversible stack. The task head lies above it: its gradient is never reversed."""
        return [p for stack in self.applied.stacks for p in stack.parameters() if p.requires_grad]

    def gradients(self) -> list[Tensor]:
        """Of each adapter tensor, in float64."""
        return [torch.zeros_like(p) if p.grad is None else p.grad.double() for p in self.adapters]

    def weights(self) -> Tensor:
        """All adapter tensors in one vector of float64."""
        return torch.cat([p.detach().flatten().double() for p in self.adapters])


def train(case: Case, method: str, task: Task, *, gradient_every: int, seed: int, fp64: bool = True) -> pd.DataFrame:
    """Train a method reversed and ordinarily, in step with each other; a row a step and arm.

    fp64: train the equations of exact methods in float64 too, ordinarily.

    loss: of the step's batch, before its update.
    weights_distance: of the adapters after the update from those of the ordinary fp32 arm, relative to how far that
        arm has come from the start. Adam divides small gradients by their own size, so what is rounding in them need
        not be small here.
    gradient_distance: reversed from reference autograd, relative, the worst adapter tensor, at the reversed arm's
        weights, random numbers and batch; every `gradient_every` steps.
    same_weights_loss_difference: of the losses of these two.
    """
    exact = method.endswith("-exact")
    model = _model(case.model, task.num_labels, seed)
    layers = len(layouts_of(model)[0].list_of(model)[2])
    wanted = [("reversed", torch.float32), ("ordinary", torch.float32)]
    wanted += [("ordinary", torch.float64)] if exact and fp64 else []
    arms = [Arm.of(model, method, activations, dtype, case.learning_rate, seed) for activations, dtype in wanted]
    reversed_, reference, start = arms[0], arms[1], arms[1].weights()
    rows = []
    for step, batch in enumerate(task.batches):
        told: list[dict[str, Any]] = [{} for _ in arms]
        if gradient_every and step % gradient_every == 0:
            told[0] = _held_against_ordinary(reversed_, batch, step)
        losses = [arm.loss_and_gradients(batch, step, arm.activations) for arm in arms]
        for arm in arms:
            arm.update()
        gone = reference.weights()
        for arm, loss, more in zip(arms, losses, told, strict=True):
            if arm is not reference:
                more["weights_distance"] = _relative(arm.weights() - gone, gone - start)
            trained_on = (step, str(case), case.model, layers, case.learning_rate)
            identity = (*trained_on, method, "exact" if exact else "float", arm.activations, arm.precision)
            rows.append({**dict(zip(IDENTITY, identity, strict=True)), "loss": loss, **more})
        if step % 10 == 9 or step == len(task.batches) - 1:
            said = ", ".join(f"{row['activations']} {row['precision']} {row['loss']:.7g}" for row in rows[-len(arms) :])
            print(f"{case} {method} step {step}: {said}", file=sys.stderr, flush=True)
    return pd.DataFrame(rows).reindex(columns=[*IDENTITY, "loss", *DISTANCES])


def _held_against_ordinary(arm: Arm, batch: dict[str, Tensor], step: int) -> dict[str, float]:
    """Loss and gradients of the reversed arm against reference autograd at the same weights; nothing is updated."""
    found = []
    for activations in ("reversed", "ordinary"):
        loss = arm.loss_and_gradients(batch, step, activations)
        found.append((loss, arm.gradients()))
        arm.optimizer.zero_grad(set_to_none=True)
    (loss, gradients), (true_loss, true_gradients) = found
    errors = [_relative(ours - true, true) for ours, true in zip(gradients, true_gradients, strict=True)]
    worst = math.nan if any(map(math.isnan, errors)) else max(errors)
    return {"gradient_distance": worst, "same_weights_loss_difference": loss - true_loss}


def _model(name: str, num_labels: int, seed: int) -> nn.Module:
    """A classifier on the named backbone; `-twice`: its layers once more on top of themselves."""
    single = name.removesuffix(TWICE)
    model = build_model(single, num_labels=num_labels, seed=seed)
    if single == name:
        return model
    # Not built with twice the layers in its configuration: weights that lack half of them are refused.
    layers = cast(nn.ModuleList, layouts_of(model)[0].list_of(model)[2])
    layers.extend([deepcopy(layer) for layer in layers])
    model.config.num_hidden_layers = len(layers)
    return model


def _relative(error: Tensor, of: Tensor) -> float:
    distance, size = float(error.norm()), float(of.norm())
    return 0.0 if distance == 0 else distance / size if size else math.inf


# --- what came of it ---


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that are held against ordinary fp32, with `difference` = |loss - its loss| and `relative` to it."""
    keys = ["case", "method", "step"]
    is_reference = (table["activations"] == "ordinary") & (table["precision"] == "fp32")
    reference = table[is_reference].set_index(keys)["loss"].rename("ordinary")
    found = table[~is_reference].join(reference, on=keys)
    found["difference"] = (found["loss"] - found["ordinary"]).abs()
    found["relative"] = found["difference"] / found["ordinary"].abs()
    return found


def summary(table: pd.DataFrame, task: Task, options: argparse.Namespace) -> str:
    """summary.md: how it was done, a row a model, method and arm, and what follows in words."""
    found = differences(table)
    in_fp64 = found["precision"] == "fp64"
    betas = ", ".join(map(str, ADAMW["betas"]))
    lines = [
        "# Reversed training against the same equations under plain autograd",
        "",
        f"All numbers are measured, on a CPU ({host.facts()['cpu']}, threads: {options.threads}, torch "
        f"{torch.__version__}). {options.steps} steps on {task.name} (train split), batch {options.batch_size}, length "
        f"{options.length} tokens ({task.padding:.0%} of them padding; {task.cut:.0%} of the samples were cut), "
        f"dropout on, seed {options.seed}. AdamW, constant learning rate, betas {betas}, eps "
        f"{ADAMW['eps']:g}, weight decay {ADAMW['weight_decay']}, gradients clipped to norm {CLIP:g}. The arms of a "
        "method share initial weights, batches and random numbers. `meft1`, `meft3`: the paper's float arithmetic, "
        f"factor 0.1; `-exact`: fixed point, factor 1/{2**SIDE_BITS}. These are different equations, so each is held "
        "against its own ordinary run.",
        "",
        *(f"- {words}" for words in dict.fromkeys(_in_words(rows) for _, rows in table.groupby("case", sort=False))),
        "",
        "Reversed against ordinary, both fp32:",
        "",
        *_comparison_table(found[~in_fp64]),
    ]
    if in_fp64.any():
        lines += [
            "",
            "For scale, float64 against fp32, both ordinary. Where these part too, training itself magnifies rounding; "
            "what reversal adds to a step is the last column of the table above:",
            "",
            *_comparison_table(found[in_fp64]),
        ]
    lines += [
        "",
        f"- loss: of the step's batch, before its update ({_unit(task)}).",
        "- difference: |loss - loss of the ordinary fp32 run|, the largest over all steps; relative: to that loss.",
        "- adapters: how far the adapters are from those of the ordinary fp32 run after the last step, relative to how "
        "far that run has moved them.",
        "- gradients: relative distance of reversed gradients from those of reference autograd at the same weights, "
        "batch and random numbers; the worst adapter tensor, smallest to largest over "
        f"{found.loc[found['gradient_distance'].notna(), 'step'].nunique()} steps.",
        "",
        *(f"- {sentence}" for sentence in _findings(found)),
        "",
    ]
    return "\n".join(lines)


def _in_words(rows: pd.DataFrame) -> str:
    model, layers = rows["model"].iloc[0], rows["layers"].iloc[0]
    single = model.removesuffix(TWICE)
    return f"{model}: {layers} layers, {'' if single == model else f'those of {single} stacked twice, '}all reversible."


def _comparison_table(found: pd.DataFrame) -> list[str]:
    names = ["first loss", "last loss", "ordinary, last", "largest difference", "at step", "relative", "adapters"]
    names += ["gradients"] if found["gradient_distance"].notna().any() else []
    lines = [
        f"| model | rate | method | {' | '.join(names)} |",
        "| --- | ---: | --- " + "| ---: " * len(names) + "|",
    ]
    for (_, method), rows in found.groupby(["case", "method"], sort=False):
        gradients = rows["gradient_distance"].dropna()
        cells = [
            rows["model"].iloc[0],
            f"{rows['learning_rate'].iloc[0]:g}",
            method,
            f"{rows['loss'].iloc[0]:.7g}",
            f"{rows['loss'].iloc[-1]:.7g}",
            f"{rows['ordinary'].iloc[-1]:.7g}",
            _number(_largest(rows["difference"])),
            str(rows["step"].iloc[_place_of_largest(rows["difference"])]),
            _number(_largest(rows["relative"])),
            _number(rows["weights_distance"].iloc[-1]),
        ]
        if len(gradients):
            cells.append(f"{_number(gradients.min())} to {_number(_largest(gradients))}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _findings(found: pd.DataFrame) -> Iterator[str]:
    """What the numbers say, a sentence a case and method."""
    for (case, method), arms in found.groupby(["case", "method"], sort=False):
        rows, wide = arms[arms["activations"] == "reversed"], arms[arms["precision"] == "fp64"]
        first = "bit-identical" if rows["difference"].iloc[0] == 0 else "different"
        text = f"{case} {method}: first loss {first}, as are {int((rows['difference'] == 0).sum())} of {len(rows)}"
        same = rows["same_weights_loss_difference"].dropna()
        if len(same):
            text += f"; at equal weights {int((same == 0).sum())} of {len(same)}"
        broken = rows[~rows["loss"].map(math.isfinite)]
        if len(broken):
            text += f"; no longer finite from step {broken['step'].iloc[0]}"
        if len(wide) and _largest(wide["difference"]):
            ratio = _largest(rows["difference"]) / _largest(wide["difference"])
            text += f"; largest difference {_number(ratio)} times that between float64 and fp32"
        yield text + "."


def _largest(values: pd.Series) -> float:
    """nan where there is one: a run that broke is no smaller for it."""
    return math.nan if values.isna().any() else float(values.max())


def _place_of_largest(values: pd.Series) -> int:
    return int(values.isna().to_numpy().argmax() if values.isna().any() else values.to_numpy().argmax())


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.0f}" if 10 <= value < 1e4 else f"{value:.2g}"


def environment_of(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """environment.json of a run, with what was asked for under `campaign`."""
    asked = {name: value for name, value in vars(options).items() if name not in ("out", "data", "cases")}
    asked |= {"cases": [str(case) for case in options.cases], "data": {"name": task.name, "sha256": task.digest}}
    asked |= {"adamw": ADAMW | {"betas": list(ADAMW["betas"])}, "clip": CLIP}
    return environment(gpus.read(), describe()) | {"campaign": asked}


# --- the figure ---


def write_figure(table: pd.DataFrame, task: Task, folder: Path) -> None:
    """exact-training.png and .svg: a row a case; left the losses, right how far they are apart."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(table["case"]))
    figure = Figure(figsize=(13, 1.2 + 3.6 * len(cases)), layout="constrained")
    grid = figure.subplots(len(cases), 2, squeeze=False, sharex=True)
    for (left, right), case in zip(grid, cases, strict=True):
        rows = table[table["case"] == case]
        plot_losses(rows, left)
        plot_differences(differences(rows), right)
        depth, rate = rows["layers"].iloc[0], rows["learning_rate"].iloc[0]
        name = f"{depth} layers ({rows['model'].iloc[0]}), learning rate {rate:g}"
        left.set_title(f"{name}: losses", fontsize=11)
        right.set_title(f"{name}: distances", fontsize=11)
        left.set_ylabel(f"loss of the batch ({_unit(task)})")
        right.set_ylabel(f"|loss - ordinary loss| ({_unit(task)})")
    for ax in grid[-1]:
        ax.set_xlabel("step")
    handles = _legend(list(dict.fromkeys(table["method"])))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    title = f"MEFT trained reversed and under reference autograd: {task.name}, fp32, measured"
    figure.suptitle(title)
    Picture("exact-training", title, title, lambda: figure).write(folder)


def _legend(methods: list[str]) -> list[Line2D]:
    """Colour and marker are the method, the line is the arm."""
    from matplotlib.lines import Line2D

    return [
        *(Line2D([], [], color=COLOUR[name], marker=MARKER[name], linestyle="none", label=name) for name in methods),
        Line2D([], [], color="#555555", linewidth=4, alpha=0.4, label="loss, reference autograd"),
        Line2D([], [], color="#555555", linestyle="--", linewidth=1.3, label="loss, reversed"),
        Line2D([], [], color="#555555", marker="o", markersize=4, linewidth=1.2, label="distance, reversed"),
        Line2D([], [], color="#555555", linestyle=":", linewidth=1.4, label="distance, ordinary in float64"),
    ]


def plot_losses(table: pd.DataFrame, ax: Axes) -> None:
    """Loss against step: ordinary fp32 a broad pale line, reversed a thin dashed one on it; one colour a method."""
    for (method, activations, precision), rows in table.groupby(["method", "activations", "precision"], sort=False):
        if precision == "fp64":
            continue
        if activations == "ordinary":
            ax.plot(rows["step"], rows["loss"], "-", color=COLOUR[method], linewidth=4, alpha=0.4, zorder=2)
        else:
            ax.plot(rows["step"], rows["loss"], "--", color=COLOUR[method], linewidth=1.3, zorder=3)
    ax.set_ylim(bottom=0)
    ax.grid(True, color="#DDDDDD", linewidth=0.6)


def plot_differences(found: pd.DataFrame, ax: Axes) -> None:
    """|loss - loss of ordinary fp32| against step, log axis: reversed with markers, float64 dotted.

    0 stands on a floor of its own, which no line leads to; what is not finite stands at the top and is named.
    """
    finite = found["difference"].map(math.isfinite)
    reversed_, zero = found["activations"] == "reversed", found["difference"] == 0
    # float64 is never equal by more than chance: its luckiest steps do not set the scale.
    scale = found.loc[finite & reversed_ & ~zero, "difference"]
    low, high = (scale.min(), scale.max()) if len(scale) else (1e-8, 1e-7)
    floor, ceiling = low / 8, high * 8
    for (method, activations), rows in found.groupby(["method", "activations"], sort=False):
        style = {"linestyle": "-", "marker": MARKER[method], "markersize": 4} if activations == "reversed" else {}
        drawn = rows["difference"].where(rows["difference"] > 0)
        ax.plot(rows["step"], drawn, **{"color": COLOUR[method], "linewidth": 1.2, "linestyle": ":"} | style)
        for place, there in ((floor, rows["difference"] == 0), (ceiling, ~rows["difference"].map(math.isfinite))):
            if there.any() and activations == "reversed":
                steps = rows.loc[there, "step"]
                ax.plot(steps, [place] * len(steps), MARKER[method], color=COLOUR[method], markersize=4)
    if not finite.all():
        ax.annotate("not finite", (found.loc[~finite, "step"].min(), ceiling), xytext=(0, 5),
                    textcoords="offset points", fontsize=8, fontweight="bold")  # fmt: skip
    powers = [10.0**k for k in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    ticks = {power: f"1e{round(math.log10(power)):d}" for power in powers}
    if (reversed_ & zero).any():
        ax.axhline(floor, color="#999999", linewidth=0.8)
        ticks |= {floor: ZERO}
    ax.set_yscale("log")
    ax.set_ylim(floor / 2, high * 3 if finite.all() else ceiling * 4)
    ax.set_yticks(list(ticks), list(ticks.values()))
    ax.minorticks_off()
    ax.grid(True, color="#DDDDDD", linewidth=0.6)


def _unit(task: Task) -> str:
    return "squared error" if task.num_labels == 1 else "nat"


def _quiet() -> None:
    """Transformers is not to tell that the task head is new, once for every model."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    _quiet()
    sys.exit(main())
