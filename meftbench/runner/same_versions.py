"""Machines of one run have the same meftbench and the same versions of what it measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import meftbench
from meftbench.errors import NOT_COMPARABLE, UserError
from meftbench.runner.environment import code_digest, versions

PACKAGES = ("torch", "transformers", "peft")


def version_reader() -> Callable[[Sequence[str]], dict[str, str | None]]:
    """A function that Ray sends by value, for a machine whose meftbench is missing, or too old to have it."""

    def read(packages: Sequence[str]) -> dict[str, str | None]:
        from importlib import metadata

        found: dict[str, str | None] = {}
        for name in packages:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = None
        try:
            import meftbench
            from meftbench.runner.environment import code_digest

            return found | {"meftbench": meftbench.__version__, "code": code_digest()}
        except ImportError:
            return found | {"meftbench": None, "code": None}

    return read


def refuse_other_versions(found: Mapping[str, Mapping[str, str | None]]) -> None:
    """Raises UserError (exit 4): a machine has another version of a package than this one, or other code of meftbench.

    found: versions by package, and the digest of meftbench's files as `code`, by machine. Builds of one version (such
    as torch's for CPUs and for CUDA) are not told apart.
    """
    here = {"meftbench": meftbench.__version__} | versions(PACKAGES) | {"code": code_digest()}
    for host, there in found.items():
        for name, version in here.items():
            other = there.get(name)
            if _release(other) != _release(version):
                package = "a meftbench whose files have digest" if name == "code" else name
                what = f"has {package} {other or '(not installed)'}, and this machine {version or '(not installed)'}"
                cure = "install the same on all: records of a run come from one version"
                raise UserError(f"node {host}", what, cure, NOT_COMPARABLE)


def _release(version: str | None) -> str | None:
    return None if version is None else version.partition("+")[0]
