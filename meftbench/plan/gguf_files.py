"""GGUF files as models: which file a model's name means, and what can be checked of it without torch.

A name that ends in `.gguf` is a file. A model of the catalogue may have its weights in a GGUF file of a Python package.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from meftbench.catalogue.models import MODELS
from meftbench.errors import UserError
from meftbench.installed import file_of, version_of

SUFFIX = ".gguf"
MAGIC = b"GGUF"
SCHEMA = 2  # version of what the cache holds; 2: nothing of the file is left out
_SAMPLE = 2**20  # bytes at each end of a file that enter its digest


def gguf_file_of(name: str) -> Path | None:
    """The GGUF file that a model's name (without @random) means; None: it means something else.

    For a model of the catalogue, the file in the installed package that has it, found without importing the package.
    """
    if name in MODELS:
        packaged = MODELS[name].gguf
        return None if packaged is None else file_of(*packaged)
    return Path(name).expanduser() if name.endswith(SUFFIX) else None


def check_gguf(where: str, file: Path) -> None:
    """Raises UserError: the file does not exist, cannot be read, is not GGUF, or the package gguf is not installed."""
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise UserError(where, f"GGUF file {str(file)!r} {what}", "name a file that ends in .gguf")
    try:
        with file.open("rb") as stream:
            first_bytes = stream.read(len(MAGIC))
    except OSError as error:
        raise UserError(where, f"{str(file)!r} cannot be read ({error.strerror})", "check its permissions") from None
    if first_bytes != MAGIC:
        raise UserError(where, f"{str(file)!r} is no GGUF file", "download or convert it again")
    if not version_of("gguf"):
        raise UserError(where, f"{str(file)!r} needs the package gguf", "pip install 'meftbench[gguf]'")


def cache_folder(file: Path) -> Path:
    """The folder for the dequantized weights of `file`, below MEFTBENCH_CACHE, XDG_CACHE_HOME or ~/.cache.

    Its name has a digest of the file's size, modification time and both ends, and of the versions of the packages that
    read it: a changed file, or another version, has another folder.
    """
    status = file.stat()
    digest = _digest(file.absolute(), status.st_size, status.st_mtime_ns)
    return cache_root() / "gguf" / f"{file.stem}-{digest}"


def cache_root() -> Path:
    """The folder for what is kept between commands, and may be deleted: MEFTBENCH_CACHE, or one in XDG_CACHE_HOME or
    ~/.cache."""
    if cache := os.environ.get("MEFTBENCH_CACHE"):
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "meftbench"


@lru_cache(maxsize=64)
def _digest(file: Path, size: int, changed_ns: int) -> str:
    """The digest of `cache_folder`; cached, since a suite needs it at least once for each of its cells."""
    readers = [version_of(name) for name in ("transformers", "gguf")]
    digest = hashlib.blake2b(" ".join(map(str, [SCHEMA, size, changed_ns, *readers])).encode(), digest_size=8)
    with file.open("rb") as stream:
        digest.update(stream.read(_SAMPLE))
        stream.seek(max(0, size - _SAMPLE))
        digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()
