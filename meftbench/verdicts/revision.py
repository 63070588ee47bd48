"""A run as it was committed: read from a revision of the git repository around it, without touching the checkout."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from meftbench.errors import UserError, one_line
from meftbench.records.store import BUDGETS, ENVIRONMENT, RECORDS, SUITE, Run, load_run

_SECONDS = 120  # for a command of git; one on an unreachable network drive would wait for ever
_FILES = (SUITE, ENVIRONMENT, RECORDS, BUDGETS)
_REGULAR, _LINK = ("100644", "100755"), "120000"  # modes of files in git


def load_named(name: str) -> Run:
    """The run in the folder `name`, or at a revision where `name` is `REVISION:FOLDER` and no such folder is there.

    FOLDER is relative to the top of the repository around the current folder, or to the current folder (`./runs/a`).
    Raises UserError (exit 2): as `load_run` and `load_run_at`.
    """
    revision, colon, folder = name.partition(":")
    if not colon or not revision or Path(name).exists():
        return load_run(name)
    top = _top(Path.cwd(), name)
    from_here = folder.startswith(("./", "../")) or folder in (".", "..")
    return _read(top, revision, (Path.cwd() / folder) if from_here else top / folder, name)


def load_run_at(revision: str, folder: Path) -> Run:
    """The run that `revision` has in `folder`, which need not be there in the checkout.

    Raises UserError (exit 2): git is not installed, there is no repository around the folder, no such revision, the
    revision has no run in the folder, or a file of it is a link or not in this clone.
    """
    name = f"{revision}:{folder}"
    around = next((parent for parent in folder.absolute().parents if parent.is_dir()), Path.cwd())
    return _read(_top(around, name), revision, folder.absolute(), name)


def _read(top: Path, revision: str, folder: Path, name: str) -> Run:
    commit = _git(top, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}", name=name)
    if commit is None:
        cure = "name a commit, branch or tag of this repository, and fetch it first (in CI: fetch-depth: 0)"
        raise UserError(name, f"no revision {revision!r}", cure)
    sha = commit.decode().strip()
    try:
        # The folder itself may be a link, so only what is above it is resolved.
        inside = (folder.parent.resolve() / folder.name).resolve().relative_to(top.resolve())
    except ValueError:
        raise UserError(name, f"{folder} is not inside the repository {top}", "name a folder of it") from None
    with tempfile.TemporaryDirectory(prefix="meftbench-") as temporary:
        copy = Path(temporary)
        present = _names(top, sha, inside.as_posix(), name)
        for file, mode in present.items():
            place = f"{(inside / file).as_posix()} of {sha[:12]}"
            if mode not in _REGULAR:
                what = "a symbolic link" if mode == _LINK else "not a file"
                raise UserError(name, f"{place} is {what}", "commit the file itself, or name another revision")
            content = _git(top, "cat-file", "blob", f"{sha}:{(inside / file).as_posix()}", name=name)
            if content is None:
                cure = "fetch it (a partial clone leaves contents out until they are asked for), or name a run folder"
                raise UserError(name, f"the content of {place} is not in this clone", cure)
            (copy / file).write_bytes(content)
        if not present.keys() >= {SUITE, ENVIRONMENT}:
            cure = f"a run has {SUITE}, {ENVIRONMENT} and {RECORDS}; commit them, or name another revision"
            raise UserError(name, f"{sha[:12]} has no run in {inside.as_posix()}", cure)
        try:
            run = load_run(copy)
        except UserError as error:
            raise UserError(name, error.what, error.cure, error.exit_code) from None
    return replace(run, path=Path(name))


def _names(top: Path, sha: str, inside: str, name: str) -> dict[str, str]:
    """Those of the files of a run, environments of resumed runs included, that the commit has in a folder, with the
    mode that git has of each."""
    listed = _git(top, "ls-tree", "-z", f"{sha}:{'' if inside == '.' else inside}", name=name)
    entries = listed.decode("utf-8", "surrogateescape").split("\0")[:-1] if listed else []
    modes = {file: facts.split(" ")[0] for facts, _, file in (entry.partition("\t") for entry in entries)}
    return {
        file: mode
        for file, mode in modes.items()
        if file in _FILES or (file.startswith("environment-") and file.endswith(".json"))
    }


def _top(around: Path, name: str) -> Path:
    """The top folder of the repository. Raises UserError: there is none, or it has no checkout."""
    top = _git(around, "rev-parse", "--show-toplevel", name=name)
    if top is None and _git(around, "rev-parse", "--is-inside-git-dir", name=name) == b"true\n":
        what = f"{around} is inside git's own folder (.git, or a bare repository), which has no checkout"
        raise UserError(name, what, "call it in a checkout, or name two run folders")
    if top is None:
        raise UserError(name, f"{around} is in no git repository", "name two run folders, or call it in a repository")
    return Path(top.decode("utf-8", "surrogateescape").rstrip("\n"))


def _git(folder: Path, *arguments: str, name: str) -> bytes | None:
    """What git prints; None where it fails. Raises UserError: it is not installed, or does not answer."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        ended = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=_SECONDS, check=False)
    except FileNotFoundError:
        raise UserError(name, "git is not installed", "install it, or name two run folders") from None
    except (subprocess.TimeoutExpired, ValueError, OSError) as error:
        raise UserError(name, f"git cannot be asked ({one_line(error)})", "name two run folders") from None
    return ended.stdout if ended.returncode == 0 else None
