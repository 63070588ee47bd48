"""The published formats: a JSON Schema (draft 2020-12) for each file and for what each command prints with `--json`.

The types of this package are where they are declared, and files/*.schema.json what is made from them:
`python -m meftbench.schemas` writes them anew, and a test holds both together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from meftbench.errors import unknown

DRAFT = "https://json-schema.org/draft/2020-12/schema"
FOLDER = Path(__file__).with_name("files")

# The type of each format, as "module:name", and what has it.
FORMATS: Mapping[str, tuple[str, str]] = {
    "suite": ("meftbench.plan.suite:SuiteFile", "a suite file, suites/NAME.yaml"),
    "record": ("meftbench.schemas.runs:RecordLine", "a line of records.jsonl, and of `show --json`"),
    "cell": ("meftbench.schemas.runs:CellLine", "a line of `show --cells --json`"),
    "run": ("meftbench.schemas.runs:RunAnswer", "`run --json` and `finetune --json`"),
    "dry-run": ("meftbench.schemas.runs:DryRunAnswer", "`run --dry-run --json`"),
    "export": ("meftbench.schemas.runs:ExportedRun", "`export RUN --json`, or --format json"),
    "written": ("meftbench.schemas.runs:WrittenAnswer", "`report --json`, `init --json`, and `export --json` of files"),
    "check": ("meftbench.schemas.runs:CheckAnswer", "`check --json`"),
    "compare": ("meftbench.schemas.runs:CompareAnswer", "`compare --json`"),
    "estimate": ("meftbench.estimates:Estimate", "`estimate --json`"),
    "fit": ("meftbench.schemas.predictions:FitAnswer", "`fit --json`"),
    "plan": ("meftbench.schemas.predictions:PlanAnswer", "`plan --json`"),
    "inspect": ("meftbench.schemas.predictions:InspectAnswer", "`inspect --json`"),
    "validate-run": ("meftbench.schemas.runs:ValidateRunAnswer", "`validate RUN --json`, and validation.json"),
    "validate-snapshot": (
        "meftbench.schemas.predictions:ValidateSnapshotAnswer",
        "`validate SNAPSHOT MODEL METHOD --json`",
    ),
    "validate-published": ("meftbench.schemas.predictions:ValidatePublishedAnswer", "`validate --published --json`"),
    "doctor": ("meftbench.schemas.machine:DoctorAnswer", "`doctor --json`"),
    "profile": ("meftbench.schemas.machine:CalibrateAnswer", "a device profile, and `doctor --calibrate --json`"),
    "list": ("meftbench.schemas.machine:ListAnswer", "`list KIND --json`"),
}


def schema_of(name: str) -> dict[str, Any]:
    """The JSON Schema of a format, from the package's files. Raises UserError: there is no such format."""
    if name not in FORMATS:
        raise unknown("list schema", "schema", name, FORMATS)
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.schema.json").read_text(encoding="utf-8"))
    return content


def made(name: str) -> dict[str, Any]:
    """The JSON Schema of a format, made from its type."""
    from pydantic import TypeAdapter

    module, _, attribute = FORMATS[name][0].partition(":")
    content = TypeAdapter(getattr(import_module(module), attribute)).json_schema(by_alias=True)
    return {"$schema": DRAFT, "title": f"meftbench {name}", "description": FORMATS[name][1]} | {
        key: value for key, value in content.items() if key != "title"
    }


def text_of(schema: Mapping[str, Any]) -> str:
    """A schema as the package's files have it."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
