"""Valid documents made hostile, and a watch on what reading them does.

A mutation replaces values of a document, at any depth, by fragments of text that a parser or a reader may not bear, and
may then damage the text itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from long_profile import LONG
from meftbench.cli import main
from meftbench.errors import BUG, UserError

EXAMPLES = LONG or 25
# Without the one that traces each line, to explain a failure: what is traced takes many times as long.
PHASES = tuple(phase for phase in Phase if phase is not Phase.explain)
SLOWEST_S = 2.0  # CPU seconds that any input may take in the long profile
HANGS_S = 120.0  # seconds after which an input ends the whole process, with a traceback, in any profile

# A suite with every kind of key.
SUITE = {
    "schema": 1,
    "name": "toy",
    "description": "a suite with every key",
    "protocol": {
        "warmup": 1,
        "steps": 2,
        "timeout": "5m",
        "passes": ["memory"],
        "padding": 0.5,
        "memory_limit": "1GiB",
    },
    "defaults": {"precision": "fp32", "device": "counted", "seed": 3},
    "grid": {
        "model": ["bert-tiny@random", {"name": "bert-tiny@random", "config": {"num_hidden_layers": 3}}],
        "method": ["full", {"name": "lora", "rank": 4}, "meft1+checkpoint"],
        "batch_size": [1, 2],
        "sequence_length": 16,
    },
    "include": [{"model": "bert-tiny@random", "method": "full", "batch_size": 4, "sequence_length": 8}],
    "exclude": [{"method": "full", "batch_size": 2}],
}

# As JSON has them; all are YAML, too.
_FRAGMENTS = [
    *(
        "null",
        "true",
        "false",
        "0",
        "-1",
        "-0",
        "-0.0",
        "1",
        "7.5",
        "0.1",
        "1e308",
        "1e999",
        "-1e999",
        "NaN",
        "Infinity",
    ),
    *("9" * 400, "-" + "9" * 400, "9" * 5000, "1" + "0" * 29, "10000000", "1000000000", "18446744073709551616"),
    *('""', '" "', '"\\u0000"', '"a\\u0000b"', '"\\ud800"', '"\\u001b[31mred\\u001b]8;;http://x\\u0007"', '"\\u202e"'),
    *(f'"{"x" * 10_000}"', f'"/{"x" * 10_000}"', '"../../../../../../etc/passwd"', '"/dev/zero"', '"/proc/self/mem"'),
    *('"NaN"', '"Infinity"', '"1e999"', '"=1+1"', '"{0.__class__}"', '"%s%n"', '"a:b"', '"os:system"', '"x.py:f"'),
    *('"full"', '"lora"', '"cuda"', '"counted"', '"predicted:h100-sxm"', '"bert-tiny@random"', '"*"', '"1%"', '"4MiB"'),
    *("[]", "{}", "[[]]", "[null]", '[1, "a", null]', '{"": ""}', '{"a": {"b": {"c": [1]}}}', '{"name": null}'),
    *('{"name": "lora", "rank": 10000000}', '{"1": 2}', '{"a": 1, "a": 2}', "[" + "1," * 5000 + "1]"),
    *("[" * 1000 + "]" * 1000, '{"a":' * 1000 + "1" + "}" * 1000, "[" * 60 + "]" * 60, "[" * 100_000),
]
# As YAML alone has them.
_YAML = [
    *("!!python/object/apply:os.system [touch PWNED]", "!!python/name:os.system", "!!binary x"),
    *("!!binary aGFsbG8=", "~"),
    *("!!int x", "!!int ''", "!!bool x", "!!timestamp x", "!!float '_'", "!!set {a}", "!!omap [a: 1]", "!own {a: 1}"),
    *("2026-12-31", "2026-13-45", "0x" + "f" * 9000, "1:30", "010", ".inf", "-.inf", ".nan", "*missing", "yes"),
    *("{? [a] : b}", "{1: a}", "{null: a}", "{2026-12-31: a}", "{<<: {a: 1}}", "{<<: 1}"),
    *("{a: 1, <<: [{a: 2}, {b: 3}]}", "- " * 500 + "a"),
    *("[&a [1, 1], &b [*a, *a, *a, *a], *b]", "&a [*a]", "&a {<<: *a}"),
    "[&a [1]" + "".join(f", &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghijk")) + "]",
]  # fmt: skip
_DAMAGES = [
    *(lambda t, n: t[:n], lambda t, n: b"", lambda t, n: b"\xef\xbb\xbf" + t, lambda t, n: t.replace(b"\n", b"\r\n")),
    *(lambda t, n: t[:n] + b"\x00" + t[n:], lambda t, n: t[:n] + b"\xff\xfe" + t[n:], lambda t, n: t[n:] + t[:n]),
    *(lambda t, n: t + t, lambda t, n: t[:n] + t[n + 1 :], lambda t, n: t[:n] + b"\x1b" + t[n:], lambda t, n: t[n:]),
    *(lambda t, n: t[:n] + b"\xed\xa0\x80" + t[n:], lambda t, n: b"\x80\x04." + t),
    lambda t, n: t[:n] + b"]}[{" + t[n:],
]  # fmt: skip
_PLACE = "PLACE{}OF"


def _paths(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _paths(value, (*path, key))


@st.composite
def mutated(draw: st.DrawFn, content: Any, form: str = "yaml", damaged: bool = True) -> bytes:
    """`content` as the bytes of a YAML or JSON file, with one to three of its values replaced, added or removed.

    damaged: in one of four, the text is damaged, too.
    """
    content = deepcopy(content)
    fragments = _FRAGMENTS + (_YAML if form == "yaml" else [])
    chosen = []
    for number in range(draw(st.integers(1, 3))):
        *outer, last = draw(st.sampled_from([*_paths(content)][1:] or [("",)]))
        place = content
        for key in outer:
            place = place[key]
        deed = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
        if deed == "remove" and len(place) > 1:
            del place[last]
            continue
        if deed == "add" and isinstance(place, dict):
            last = draw(st.sampled_from(("x", "", "\x1b[2J", "x" * 10_000, "name", "schema", "__class__", "a\x00")))
        place[last] = _PLACE.format(number)
        chosen.append((number, draw(st.sampled_from(fragments))))
    text = yaml.safe_dump(content, sort_keys=False) if form == "yaml" else json.dumps(content)
    for number, fragment in chosen:
        place = _PLACE.format(number)
        text = text.replace(place if form == "yaml" else f'"{place}"', fragment)
    damage = draw(st.sampled_from(_DAMAGES)) if damaged and draw(st.integers(0, 3)) == 0 else None
    written = text.encode("utf-8", "surrogatepass")
    return damage(written, draw(st.integers(0, len(written)))) if damage else written


def hostile(reader: str) -> Callable[[Any], Any]:
    """Decorates a test that `given` gives mutated inputs: as many as the profile asks for. reader: what reads them, a
    row of the table of the long profile."""
    # Inputs share the folders of a test, each of which writes anew what it reads.
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

    def decorated(test: Any) -> Any:
        chosen = settings(max_examples=EXAMPLES, suppress_health_check=checks, phases=PHASES)
        return pytest.mark.reader(reader)(chosen(test))

    return decorated


# --- what reading does ---

_watched: dict[str, Any] = {"allowed": None, "deeds": []}
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "shutil.rmtree")
_DESCRIPTORS = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.rename": 2}  # place of a folder's among arguments
_CALLS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
)


def _notice(event: str, arguments: tuple[Any, ...]) -> None:
    allowed = _watched["allowed"]
    if allowed is None:
        return
    if event in _CALLS and "uname" not in str(arguments[0]):  # by which Python finds the name of the processor
        _watched["deeds"].append((event, str(arguments)[:200]))
    elif event == "open" or event in _CHANGES:
        place, flags = arguments[0], arguments[2] if event == "open" else os.O_WRONLY
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if writes and isinstance(place, str | bytes | os.PathLike):
            at = _DESCRIPTORS.get(event)  # of the folder that a relative path is meant in; -1: the working folder
            base = f"/proc/self/fd/{arguments[at]}" if at and arguments[at] >= 0 else ""
            path = os.path.realpath(os.path.join(base, os.fsdecode(place)))
            harmless = path == os.devnull or "__pycache__" in path or "/matplotlib" in path
            if not harmless and not path.startswith(allowed):
                _watched["deeds"].append((event, path[:200]))


sys.addaudithook(_notice)


@dataclass
class Seen:
    """What the inputs of a test did: how many there were, how many were refused, and the CPU seconds of the slowest
    beyond what sound input takes."""

    inputs: int = 0
    refused: int = 0
    slowest_s: float = 0.0


seen = Seen()  # of the test that runs; tests/hostile/conftest.py makes a table of it


@contextlib.contextmanager
def watched(folder: Path, usual_s: float = 0.0) -> Iterator[None]:
    """Asserts that nothing in it writes outside `folder`, starts a process, connects or loads a name of a pickle; in
    the long profile also that it takes no more than two CPU seconds. A hang ends the process.

    usual_s: CPU seconds that the same takes on sound input, which are added.
    """
    faulthandler.dump_traceback_later(HANGS_S, exit=True)
    _watched.update(allowed=os.path.realpath(folder), deeds=[])
    began = time.process_time()
    try:
        yield
    finally:
        _watched["allowed"] = None
        took_s = time.process_time() - began
        faulthandler.cancel_dump_traceback_later()
    seen.inputs += 1
    seen.slowest_s = max(seen.slowest_s, took_s - 2 * usual_s)
    assert not _watched["deeds"], _watched["deeds"]
    assert not LONG or took_s < SLOWEST_S + 2 * usual_s


def refused_or(read: Any, *arguments: Any) -> Any:
    """What `read` gives, or the UserError that it raised, which says a cure and is invalid input."""
    try:
        return read(*arguments)
    except UserError as error:
        refused = error
    seen.refused += 1
    assert refused.exit_code in (2, 4)
    assert refused.what
    assert refused.cure
    return refused


def command(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, which is no bug and shows no traceback."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
    seen.refused += code in (2, 4)
    assert code != BUG, err.getvalue()[-3000:]
    shown = out.getvalue() + err.getvalue()
    assert "Traceback (most recent call last)" not in shown
    acting = [sign for sign in shown if unicodedata.category(sign) in _ACTING and sign not in "\n\t"]
    assert not acting, (acting, shown[:2000])
    return code, out.getvalue(), err.getvalue()


_ACTING = ("Cc", "Cf", "Cs", "Zl", "Zp")  # what a terminal acts on without showing it
