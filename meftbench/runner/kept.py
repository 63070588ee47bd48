"""Searches whose results are kept as they come, so that one that was interrupted can be taken up again."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from meftbench import __version__
from meftbench.escapes import single_line
from meftbench.installed import version_of
from meftbench.plan.gguf_files import cache_root
from meftbench.runner.predictions import ask

_DECIDING = ("torch", "transformers", "peft")  # packages whose version decides on what a search finds


def ask_kept(
    verb: str,
    request: Mapping[str, Any],
    tell: Callable[[str], None],
    allow_code: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """The answer of `runner.predictions.ask`, whose results are kept in the cache until it is complete.

    resume: whether results of the same request that were kept before are taken up; otherwise they are removed.
    Raises what `ask` raises, and KeyboardInterrupt, after saying how many results are kept.
    """
    file = _file_of(verb, request)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            file.unlink(missing_ok=True)
        file.touch()
    except OSError as error:
        _note(f"results are not kept for --resume: {file.parent} cannot be written ({error.strerror})")
        return ask(verb, request, tell, allow_code)
    if resume:
        tell(f"results taken up: {_count(file)}")
    try:
        answer = ask(verb, {**request, "kept": str(file)}, tell, allow_code)
    except KeyboardInterrupt:
        _note(f"results kept: {_count(file)}; the same command with --resume goes on from there")
        raise
    file.unlink(missing_ok=True)
    return answer


def _note(text: str) -> None:
    """Say on stderr what is no progress, so that `--quiet` does not hide it."""
    print(f"note: {single_line(text)}", file=sys.stderr, flush=True)


def _count(file: Path) -> int:
    return len(file.read_bytes().splitlines())


def _file_of(verb: str, request: Mapping[str, Any]) -> Path:
    """Where results of a request are kept: the same request has the same file, as long as versions are the same."""
    asked = {key: value for key, value in request.items() if key != "jobs"}
    versions = [__version__, *(version_of(name) for name in _DECIDING)]
    text = json.dumps([verb, asked, versions], sort_keys=True)
    return cache_root() / "searches" / f"{verb}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
