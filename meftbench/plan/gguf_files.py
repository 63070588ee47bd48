"""GGUF files as models: which file a name means, and what can be seen of it without torch.

A name that ends in `.gguf` is a file; a model of the catalogue may have its weights in a file that a package carries.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from meftbench.catalogue.models import MODELS
from meftbench.errors import UserError

SUFFIX = ".gguf"
MAGIC = b"GGUF"
SCHEMA = 2  # of what is kept; 2: nothing of the file is left out
_SAMPLE = 2**20  # bytes at each end of a file that are part of its digest


def gguf_file_of(name: str) -> Path | None:
    """The GGUF file that a model's name (without @random) means; None: it means something else.

    Of a model of the catalogue: the file in the installed package that carries it, found without importing the package.
    """
    if name in MODELS:
        packaged = MODELS[name].gguf
        return None if packaged is None else _packaged(*packaged)
    return Path(name).expanduser() if name.endswith(SUFFIX) else None


def _packaged(distribution: str, file_name: str) -> Path | None:
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == file_name), None)


def check_gguf(where: str, file: Path) -> None:
    """Raises UserError: no such file, none of that format, or the package that reads them is missing."""
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise UserError(where, f"GGUF file {str(file)!r} {what}", "name a file that ends in .gguf")
    try:
        with file.open("rb") as stream:
            begin = stream.read(len(MAGIC))
    except OSError as error:
        raise UserError(where, f"{str(file)!r} cannot be read ({error.strerror})", "check its permissions") from None
    if begin != MAGIC:
        raise UserError(where, f"{str(file)!r} is no GGUF file", "download or convert it again")
    if not _version("gguf"):
        raise UserError(where, f"{str(file)!r} needs the package gguf", "pip install 'meftbench[gguf]'")


def _version(distribution: str) -> str:
    """Version of an installed package; "" where there is none. A folder of its name here, as `gguf`, is no package."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def cache_folder(file: Path) -> Path:
    """Where the dequantized weights of `file` are kept: below MEFTBENCH_CACHE, XDG_CACHE_HOME or ~/.cache.

    A file that was changed has another folder, as have other versions of what reads it: its name holds a digest of
    size, time of change and both ends, and of those versions.
    """
    status = file.stat()
    digest = _digest(file.resolve(), status.st_size, status.st_mtime_ns)
    if own := os.environ.get("MEFTBENCH_CACHE"):
        root = Path(own).expanduser()
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "meftbench"
    return root / "gguf" / f"{file.stem}-{digest}"


@lru_cache(maxsize=64)
def _digest(file: Path, size: int, changed_ns: int) -> str:
    """Remembered: a suite asks once for each of its cells, and some times more."""
    readers = [_version(name) for name in ("transformers", "gguf")]
    digest = hashlib.blake2b(" ".join(map(str, [SCHEMA, size, changed_ns, *readers])).encode(), digest_size=8)
    with file.open("rb") as stream:
        digest.update(stream.read(_SAMPLE))
        stream.seek(max(0, size - _SAMPLE))
        digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()
