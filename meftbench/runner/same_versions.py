"""Machines of one run have the same meftbench and the same versions of what it measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import meftbench
from meftbench.errors import NOT_COMPARABLE, UserError
from meftbench.plan.suite import Suite
from meftbench.runner.environment import code_digest, versions
from meftbench.runner.job import Machine

PACKAGES = ("torch", "transformers", "peft")


# Run as `python -m meftbench.worker` is: by the same interpreter in the same folder, it finds the same packages.
_READ = """
import json, sys
from importlib import metadata
found = dict.fromkeys(['meftbench', *sys.argv[1:], 'code'])
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
try:
    import meftbench
    found['meftbench'] = meftbench.__version__
    from meftbench.runner.environment import code_digest
    found['code'] = code_digest()
except ImportError:
    pass
print(json.dumps(found))
"""


def version_reader() -> Callable[[], dict[str, str | None]]:
    """A function that returns the versions of meftbench and of `PACKAGES` on the machine on which it runs, and as
    `code` the digest of meftbench's files; None for what is not there.

    It needs no meftbench there: Ray sends a function that is made within another one by value.
    """
    script, packages = _READ, PACKAGES

    def read() -> dict[str, str | None]:
        import json
        import subprocess
        import sys

        command = [sys.executable, "-c", script, *packages]
        return dict(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))

    return read


def refuse_other_versions(found: Iterable[tuple[str, Mapping[str, str | None]]]) -> None:
    """Raises UserError (exit 4): a machine has another version of a package than this one, or other code of meftbench.

    found: of each machine its name, and what `version_reader` found there. Builds of one version (such
    as torch's for CPUs and for CUDA) are not told apart.
    """
    here = {"meftbench": meftbench.__version__} | versions(PACKAGES) | {"code": code_digest()}
    for host, there in found:
        for name, version in here.items():
            other = there.get(name)
            if _release(other) != _release(version):
                package = "a meftbench whose files have digest" if name == "code" else name
                what = f"has {package} {other or '(not installed)'}, and this machine {version or '(not installed)'}"
                cure = "install the same on all: records of a run come from one version"
                raise UserError(f"node {host}", what, cure, NOT_COMPARABLE)


def refuse_other_code(machine: Machine) -> None:
    """Raises UserError (exit 4): what started the machine's worker is of another meftbench than this one.

    Ray looks for modules where this process does, too, and so may have found another than the worker."""
    there = machine.environment["meftbench"]
    here = {name: str(version) for name, version in versions(PACKAGES).items()}
    refuse_other_versions([(machine.host, here | {"meftbench": there["version"], "code": there["code_digest"]})])


def code_digests(suite: Suite, machines: Sequence[Machine]) -> dict[str, str | None]:
    """Digests of the user's own functions, by name. Raises UserError: a worker could not import or call one, or it is
    another on another machine (exit 4)."""
    for machine in machines:
        if "error" in machine.code:
            where, what, cure = machine.code["error"]
            name, arguments = machine.code["call"]
            place = suite.code.get((name, tuple(arguments)))
            raise UserError(f"{place}: {where}" if place else where, what, cure)
    digests = dict(machines[0].code.get("digests", {}))
    for machine in machines[1:]:
        for name, digest in machine.code.get("digests", {}).items():
            if digest != digests.get(name):
                what = f"is another on {machine.host} than on {machines[0].host}"
                raise UserError(name, what, "copy the code of one machine to all", NOT_COMPARABLE)
    return digests


def _release(version: str | None) -> str | None:
    return None if version is None else str(version).partition("+")[0]
