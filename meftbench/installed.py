"""What is installed, found without importing it.

Answers are kept: a suite asks for the same package with each of its cells, and each search goes through every folder of
sys.path.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from importlib import metadata
from pathlib import Path


@cache
def version_of(distribution: str) -> str:
    """Version of an installed distribution; "" where it is not installed, even if a folder of that name can be
    imported."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


@cache
def file_of(distribution: str, name: str) -> Path | None:
    """The file called `name` of an installed distribution; None: it is not installed, or has no such file."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == name), None)


@cache
def folder_of_package(name: str) -> Path | None:
    """The folder of a package that can be imported; None: there is no such package."""
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent
