"""What `meftbench init` writes into a repository: a suite of a model, its budgets, and a job that holds them in CI."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import yaml

from meftbench.asked import positions_of
from meftbench.documents import text_of
from meftbench.errors import UserError
from meftbench.plan.cell import Cell
from meftbench.plan.factories import check_allowed, is_factory, places_of
from meftbench.plan.models import RANDOM, folder_of, split_name
from meftbench.plan.point import cell_of
from meftbench.records.store import refuse_links, unwritable
from meftbench.strict_yaml import parse

METHODS = ("full", "lora", "lora+checkpoint")
BATCH_SIZE, SEQUENCE_LENGTH = 4, 128
GATED = ("activation_peak_bytes", "peak_allocated_bytes")
_TEMPLATES = Path(__file__).parent / "templates"
_PINNED = ("meftbench", "torch", "transformers", "peft")
_PROJECT = ("pyproject.toml", "setup.py")  # what makes a folder one that pip installs


@dataclass(frozen=True)
class Start:
    """What to write, below `out`: the suite called `name`, its budgets, and a job for GitHub or GitLab.

    cells: of the suite, in its order; all have the model, the shape and the batch of the first.
    """

    name: str
    out: Path
    cells: Sequence[Cell]
    gitlab: bool = False

    @property
    def model(self) -> str:
        """The model's name for a suite that is run from `out`, wherever the command was started."""
        return _below(self.out, self.cells[0].model)

    @property
    def suite_file(self) -> Path:
        return Path("suites") / f"{self.name}.yaml"

    @property
    def budgets_file(self) -> Path:
        return Path("suites") / f"{self.name}.budgets.yaml"

    @property
    def workflow_file(self) -> Path:
        """memory.yml; where that is there for something else, such as another suite, a file with the suite's name."""
        folder = Path(".gitlab" if self.gitlab else ".github/workflows")
        first = self.out / folder / "memory.yml"
        with suppress(UserError):  # it is not there, or cannot be read
            if self._run_command not in text_of(first):
                return folder / f"memory-{self.name}.yml"
        return folder / first.name

    @property
    def _runs_own_code(self) -> bool:
        """Whether a run imports functions of the repository."""
        return is_factory(self.cells[0].model) or self.cells[0].batch is not None

    @property
    def _run_command(self) -> str:
        return f"meftbench run {self.name} --out runs/memory"

    def files(self) -> dict[Path, str]:
        """The text of each file, by its path below `out`."""
        return {
            self.suite_file: self.suite(),
            self.budgets_file: self.budgets(),
            self.workflow_file: self.workflow(),
        }

    def suite(self) -> str:
        """The suite as YAML: every method at one shape, counted."""
        cell = self.cells[0]
        grid: dict[str, str | int | list[str]] = {"model": self.model}
        if cell.batch is not None:
            grid["batch"] = cell.batch
        grid |= {"method": [cell.method_label for cell in self.cells]}
        grid |= {"batch_size": cell.batch_size, "sequence_length": cell.sequence_length}
        lines = [
            "# Written by `meftbench init`. What is gated: these methods at the shape that is trained. Memory is",
            "# counted, so that it is the same on every machine. `meftbench list schema` has every key.",
            "schema: 1",
            f"name: {_as_yaml(self.name)}",
            f"budgets: {self.budgets_file.name}",
        ]
        if self._runs_own_code:
            lines += ["# A run imports functions of this repository, which are code.", "allow_code: true"]
        lines += [
            "protocol: {warmup: 1, steps: 2, passes: [memory]}",
            "defaults: {device: counted}",
            "grid:",
            *(f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in grid.items()),
        ]
        return "\n".join(lines) + "\n"

    def budgets(self) -> str:
        """The budgets as YAML: rows for each cell, not filled yet."""
        lines = [
            f"# Budgets of {self.suite_file}. Counted bytes are exact: one byte more is over budget. A max of 0 is not",
            "# filled yet. To fill them, and later where a change is meant to take more: run the suite, and then",
            "# `meftbench check RUN --update` with the folder of that run.",
            "schema: 1",
            "default: {tolerance: 0}",
            "budgets:",
            "  # No step begins with more memory than the one before.",
            '  - {match: "*", metric: drift_bytes_per_step, source: counted, max: 0}',
        ]
        for cell in self.cells:
            label = json.dumps(self.model + cell.label.removeprefix(cell.model), ensure_ascii=False)
            lines += [f"  - {{match: {label}, metric: {metric}, source: counted, max: 0}}" for metric in GATED]
        return "\n".join(lines) + "\n"

    def workflow(self) -> str:
        """The job that runs the suite and holds its budgets on every change."""
        template = _TEMPLATES / f"memory.{'gitlab' if self.gitlab else 'github'}.yml"
        project = any((self.out / name).is_file() for name in _PROJECT)
        packages = [f"{package}=={_version(package)}" for package in _PINNED]
        of_own_code = ""
        if self._runs_own_code and not project:
            indent = " " * (4 if self.gitlab else 6)
            of_own_code = f"\n{indent}# To fill in: what this repository's own code needs, such as -r requirements.txt"
        values = {
            "PYTHON": f"{sys.version_info.major}.{sys.version_info.minor}",
            # In one command, so that the project's requirements cannot replace these versions.
            "PACKAGES": " ".join([*(["."] if self._runs_own_code and project else []), *packages]),
            "OWN_CODE": of_own_code,
            "NAME": self.workflow_file.stem,
            "FILE": self.workflow_file.as_posix(),
            "RUN": self._run_command,
            "SUITE_FILE": self.suite_file.as_posix(),
        }
        return re.sub(r"@([A-Z_]+)@", lambda mark: values[mark[1]], template.read_text(encoding="utf-8"))


def start_of(
    model: str,
    methods: Sequence[str],
    batch_size: int | None,
    sequence_length: int | None,
    *,
    name: str | None = None,
    out: Path = Path(),
    batch: str | None = None,
    allow_code: bool = False,
    gitlab: bool = False,
) -> Start:
    """What to write for `model`, every cell checked as in a suite.

    methods: labels; none: METHODS.  batch_size, sequence_length: None: 4 samples; 128 tokens, or fewer where the model
        has no more positions, or the tokens of an image.  batch: the user's own function that makes the batch.
    Raises UserError: a value is wrong, or the user's own code is needed and not allowed.
    """
    chosen_name = name or _slug(model)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", chosen_name) or chosen_name.endswith(".budgets"):
        cure = "write letters, digits, `_`, `.` and `-`, with a letter or digit first and without .budgets at the end"
        raise UserError("--name", f"{chosen_name!r} is no name of a suite", cure)
    if sequence_length is None:
        longest, of_image = (None, None) if is_factory(model) else positions_of("init", model, {})
        sequence_length = of_image or min(SEQUENCE_LENGTH, longest or SEQUENCE_LENGTH)
    shape: dict[str, int | str] = {"batch_size": batch_size or BATCH_SIZE, "sequence_length": sequence_length}
    shape |= {"batch": batch} if batch else {}
    cells = {}
    for method in methods or METHODS:
        cell = cell_of("init", {"model": model, "method": method, **shape})
        cells[cell.cell_id] = cell
    only = list(cells.values())
    check_allowed(places_of(only[0], "init: model", "init: batch"), only, allow_code)
    return Start(chosen_name, out, only, gitlab)


def write_all(out: Path, files: Mapping[Path, str], force: bool) -> None:
    """Write every file, or none. Their paths are relative to `out`, which need not exist.

    Raises UserError: one is there already and `force` is not set, one or a folder of it is a link, or one cannot be
    written.
    """
    for file in files:
        refuse_links(out, out / file)
    existing = [str(out / file) for file in files if (out / file).exists()]
    if existing and not force:
        verb = "is" if len(existing) == 1 else "are"
        raise UserError(
            ", ".join(existing), f"{verb} there already", "add --force to overwrite, or another --name or --out"
        )
    folders = _missing_folders([(out / file).parent for file in files])
    staged: list[tuple[str, Path]] = []
    try:
        for folder in folders:
            folder.mkdir()
        for file, text in files.items():
            target = out / file
            if target.is_dir():
                raise IsADirectoryError(None, "is a folder", str(target))
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
            staged.append((temporary, target))
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            os.chmod(temporary, 0o644)
        for temporary, target in staged:
            os.replace(temporary, target)
    except OSError as error:
        for temporary, _ in staged:
            Path(temporary).unlink(missing_ok=True)
        for folder in reversed(folders):
            with suppress(OSError):
                folder.rmdir()
        raise unwritable(Path(error.filename or out), error) from None


def _missing_folders(folders: Sequence[Path]) -> list[Path]:
    """The folders that have to be made, each after the one that it is in."""
    needed = {parent for folder in folders for parent in [folder, *folder.parents] if not parent.exists()}
    return sorted(needed, key=lambda folder: len(folder.parts))


def _as_yaml(name: str) -> str:
    """A name as YAML: in quotes where it would be read as a number, a date, a flag or nothing (1e5, true, null)."""
    try:
        plain = parse(name) == name
    except yaml.YAMLError:  # such as 2026-13-45, which is no date
        plain = False
    return name if plain else json.dumps(name)


def _slug(model: str) -> str:
    """A name of a suite for a model: the last part of its name, in letters that suites may have."""
    name, _ = split_name(model)
    last = name.rstrip("/").removesuffix(".gguf").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", last.replace(":", "-")).strip("-.") or "memory"


def _below(out: Path, model: str) -> str:
    """The model's name for a suite that is run from `out`: a path of a folder below it is relative to it."""
    name, random = split_name(model)
    folder = None if is_factory(name) else folder_of(name)
    if folder is None or not Path(name).expanduser().exists():
        return model  # a name of the catalogue or the hub
    place = Path(os.path.relpath(Path(name).expanduser(), out)).as_posix()
    return (place if place.startswith("..") else f"./{place}") + (RANDOM if random else "")


def _version(package: str) -> str:
    """The installed version, without what a build adds to it, such as `+cpu`."""
    return metadata.version(package).partition("+")[0]
