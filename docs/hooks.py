"""Pages of the documentation that are generated from the code when it is built; links to files outside of docs/.

`<!-- generated: NAME -->` in a page becomes what the function of that name gives.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import typer.main

from meftbench.catalogue.backbones import BACKBONES
from meftbench.catalogue.choices import PRECISIONS
from meftbench.catalogue.levers import LEVERS
from meftbench.catalogue.methods import METHODS
from meftbench.catalogue.metrics import METRICS
from meftbench.catalogue.models import MODELS
from meftbench.catalogue.optimizers import OPTIMIZERS
from meftbench.catalogue.peft_methods import NOT_APPLICABLE
from meftbench.catalogue.probes import PROBES
from meftbench.catalogue.profiles import PROFILES
from meftbench.catalogue.tasks import TASKS
from meftbench.cli import app
from meftbench.records.store import load_run
from meftbench.report.results import frame_of
from meftbench.report.views.best import BEST_HEAD, all_best_levers
from meftbench.schemas import FORMATS, schema_of

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"<!-- generated: (\w+) -->")
# A page of the site cannot link to what is not part of it.
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+((?:reports|README|CONTRIBUTING|suites|examples)[^)]*)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls it for each page."""
    markdown = OUTSIDE.sub(r"\1 (`\2` in the repository)", markdown)
    return MARK.sub(lambda mark: GENERATED[mark[1]](), markdown)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(head), *([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def commands() -> str:
    """Every verb: what it does, its arguments and options."""
    group: Any = typer.main.get_command(app)
    parts = []
    for name, command in group.commands.items():
        context = click.Context(command, info_name=f"meftbench {name}")
        rows = []
        for parameter in command.params:
            if parameter.name == "help":
                continue
            spelled = (
                ", ".join(parameter.opts) if parameter.param_type_name == "option" else str(parameter.name).upper()
            )
            rows.append([f"`{spelled}`", getattr(parameter, "help", None) or ""])
        usage = " ".join(command.collect_usage_pieces(context))
        about = " ".join((command.help or "").split())
        parts.append(f"## meftbench {name}\n\n`meftbench {name} {usage}`\n\n{about}\n\n{table(['', ''], rows)}")
    return "\n\n".join(parts)


def best() -> str:
    """Each method with its best levers at each shape, of the runs that compare them so."""
    parts = []
    for name, title in (("best-levers", "All on the device"), ("best-levers-host", "With host memory")):
        for found in all_best_levers(frame_of(load_run(ROOT / "reports" / name))):
            rows = [texts for comparison in found.comparisons for texts in comparison.texts()]
            parts.append(f"### {title}\n\n{table(BEST_HEAD, rows)}")
    return "\n\n".join(parts)


def metrics() -> str:
    """Every number of a record."""
    return table(
        ["metric", "unit", "better", "meaning"], ([f"`{n}`", k.unit, k.better, k.meaning] for n, k in METRICS.items())
    )


def schema() -> str:
    """The JSON schema of a suite file."""
    return f"```json\n{json.dumps(schema_of('suite'), indent=2, ensure_ascii=False)}\n```"


def formats() -> str:
    """The published formats, then the fields of each."""
    parts = [table(("name", "of"), ((name, what) for name, (_, what) in FORMATS.items()))]
    for name in FORMATS:
        if name != "suite":  # it has a page
            content = schema_of(name)
            parts += [f"## {name}", str(content["description"]), *_fields(content)]
            for part, of_part in content.get("$defs", {}).items():
                parts += [f"### {name}: {part}", str(of_part.get("description", "")), *_fields(of_part)]
    return "\n\n".join(part for part in parts if part)


def _fields(content: dict[str, Any]) -> list[str]:
    """The table of an object's fields; nothing of another type."""
    required = content.get("required", [])
    rows = [
        (f"`{name}`", _type(of_field), "" if name in required else "optional", of_field.get("description", ""))
        for name, of_field in content.get("properties", {}).items()
    ]
    return [table(("field", "type", "", "meaning"), rows)] if rows else []


def _type(of_field: dict[str, Any]) -> str:
    """The type of a field in words: `integer or null`, `list of Need`."""
    if "anyOf" in of_field:
        return " or ".join(map(_type, of_field["anyOf"]))
    if "$ref" in of_field:
        return str(of_field["$ref"]).rpartition("/")[2]
    if values := of_field.get("enum", [of_field["const"]] if "const" in of_field else []):
        return " or ".join(f"`{value}`" for value in values)
    kind = str(of_field.get("type", "anything"))
    if kind == "array" and isinstance(of_field.get("items"), dict):
        return f"list of {_type(of_field['items'])}"
    return {"array": "list"}.get(kind, kind)


def catalogue() -> str:
    """What a suite may name."""
    sections = {
        "Methods": ((name, entry.summary) for name, entry in METHODS.items()),
        "Levers": ((f"+{name}", entry.summary) for name, entry in LEVERS.items()),
        "Methods of peft that do not apply": ((name, entry.reason) for name, entry in NOT_APPLICABLE.items()),
        "Backbones": ((name, entry.summary) for name, entry in BACKBONES.items()),
        "Models": ((name, f"{entry.hub}: {entry.summary}") for name, entry in MODELS.items()),
        "Precisions": PRECISIONS.items(),
        "Optimizers": ((name, entry.summary) for name, entry in OPTIMIZERS.items()),
        "Passes": ((name, entry.summary) for name, entry in PROBES.items()),
        "Tasks": ((name, entry.summary) for name, entry in TASKS.items()),
        "Device profiles": ((name, profile.device) for name, profile in PROFILES.items()),
    }
    parts = []
    for title, rows in sections.items():
        parts.append(f"## {title}\n\n{table(['', ''], ([f'`{name}`', about] for name, about in rows))}")
    return "\n\n".join(parts)


def memory() -> str:
    """Counted activation memory by depth, as reports/exact-memory has it."""
    with (ROOT / "reports" / "exact-memory" / "depth.csv").open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["precision"] == "fp32"]
    depths = sorted({int(row["layers"]) for row in rows})
    found = {(row["method"], int(row["layers"])): float(row["streams"]) for row in rows}
    head = ["activation memory in streams of 12 MiB, BERT-base's width, 8 × 512 tokens, fp32, counted"]
    methods = dict.fromkeys(row["method"] for row in rows)
    lines = ([f"`{method}`", *(f"{found[method, depth]:.1f}" for depth in depths)] for method in methods)
    return table([*head, *(f"{depth} layers" for depth in depths)], lines)


GENERATED: dict[str, Callable[[], str]] = {
    "commands": commands,
    "metrics": metrics,
    "schema": schema,
    "formats": formats,
    "catalogue": catalogue,
    "memory": memory,
    "best": best,
}
