"""The text of a run's suite.yaml: YAML, in which each cell is one line that JSON reads, too.

A run of ten thousand cells has seven megabytes of them. YAML takes five seconds to read these, JSON a tenth of one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml

_CELLS = "cells:\n"
# Characters that JSON leaves as they are in a text, and YAML does not allow there.
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def suite_text(content: Mapping[str, Any]) -> str:
    """The text of a suite whose `cells` are a list of mappings, of plain values."""
    rest = {key: value for key, value in content.items() if key != "cells"}
    # PyYAML writes line ends of Unicode as they are, and reads them as spaces.
    plain = _ESCAPED.search(json.dumps(rest, ensure_ascii=False, default=str)) is None
    head = yaml.safe_dump(rest, sort_keys=False, allow_unicode=plain, width=120)
    lines = [_flow(cell) for cell in content["cells"]]
    return head + (_CELLS + "".join(f"- {line}\n" for line in lines) if lines else "cells: []\n")


def read_suite_text(text: str, read_yaml: Callable[[str], Any]) -> Any:
    """What the text of a suite says. read_yaml: reads whatever is not one line of JSON for each cell.

    Raises what `read_yaml` raises.
    """
    head, mark, lines = text.partition(f"\n{_CELLS}")
    if mark and lines.startswith('- {"'):
        try:
            cells = [json.loads(line.removeprefix("- ")) for line in lines.splitlines() if line]
        except ValueError:  # it was written by hand, or by an earlier version
            return read_yaml(text)
        content = read_yaml(f"{head}\n")
        if isinstance(content, dict):
            return content | {"cells": cells}
    return read_yaml(text)


def _flow(value: Any) -> str:
    """A value as YAML and JSON have it. Raises ValueError: a number that is not finite, which JSON has not."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(str(key))}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is no number that JSON has")
        mantissa, mark, exponent = repr(value).partition("e")
        return mantissa if not mark else f"{mantissa}{'' if '.' in mantissa else '.0'}e{exponent}"  # for YAML 1.1
    text = json.dumps(value, ensure_ascii=False)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text) if isinstance(value, str) else text
