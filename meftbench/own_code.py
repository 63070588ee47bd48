"""Functions of the user's own, `module:function`: imported, looked at and called, their faults in one line each.

They are imported from the working folder, in which the command was started, or from an installed package, and only
where the parent process says by the environment (plan/factories.py) that this is allowed.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import pkgutil
import re
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

import meftbench
from meftbench.errors import CellFailure, UserError, one_line
from meftbench.plan.factories import BATCH_ARGUMENTS, FOLDER

Function = Callable[..., Any]
_FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^\s'\"/]+/)+(?=[^\s'\"/]+/[^\s'\"/]+)")


def load(name: str) -> Function:
    """The function called `name`.

    Raises UserError: not allowed, no such module or function, a module that raises, something that cannot be called.
    """
    folder = os.environ.get(FOLDER)
    if folder is None:
        raise UserError(name, "is Python code, which is imported only when allowed", "add --allow-code")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module_name, _, function_name = name.partition(":")
    try:
        with blamed([name], "its import failed", always=True):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise _not_found(name, str(error.name), Path(folder)) from None
    function = getattr(module, function_name, None)
    if function is None:
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = get_close_matches(function_name, own, n=1)
        cure = f"did you mean '{module_name}:{near[0]}'?" if near else "define it there, or name another"
        raise UserError(name, f"module {module_name!r} has no {function_name!r}", cure)
    if not callable(function):
        what = f"{function_name!r} is {type(function).__name__}, and cannot be called"
        raise UserError(name, what, "name a function, or a class, that gives it")
    return function  # type: ignore[no-any-return]


def _not_found(name: str, missing: str, folder: Path) -> UserError:
    module, _, function = name.partition(":")
    parent, _, last = missing.rpartition(".")
    places: Sequence[str] = [str(folder)]
    if parent:
        places = list(getattr(sys.modules.get(parent), "__path__", []))
    near = get_close_matches(last, [found.name for found in pkgutil.iter_modules(places)], n=1)
    cure = "start meftbench in the folder that holds it, or install its package"
    if module.endswith(".py"):
        cure = f"write {module.removesuffix('.py')}:{function}, as Python imports it"
    elif near:
        rest = module.removeprefix(missing)
        cure = f"did you mean '{'.'.join(filter(None, [parent, near[0]]))}{rest}:{function}'?"
    where = f"in package {parent!r}" if parent else "in the working folder or among installed packages"
    return UserError(name, f"module {missing!r} was not found {where}", cure)


def checked_function(name: str, arguments: Iterable[str]) -> Function:
    """The function called `name`. Raises UserError as `load` does, and where it does not take `arguments`."""
    function = load(name)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some that are not written in Python it is not known
        return function
    try:
        signature.bind(**dict.fromkeys(arguments))
    except TypeError as error:
        taken = ", ".join(signature.parameters) or "nothing"
        cure = "give them under `config`"
        if tuple(arguments) == BATCH_ARGUMENTS:
            cure = "write def batch(batch_size, sequence_length)"
        raise UserError(name, f"{one_line(error)}: it takes {taken}", cure) from None
    return function


def call(name: str, **arguments: Any) -> Any:
    """What the function gives. Raises UserError as `checked_function` does, and where it raises.

    Afterwards torch is set as it was before: what a cell is measured under is what its record says.
    """
    function = checked_function(name, arguments)
    with _settings_restored(), blamed([name], always=True):
        return function(**arguments)


@contextmanager
def _settings_restored() -> Iterator[None]:
    """torch's default dtype and device, gradients, autocast and threads, and our part of the environment."""
    ours = {key: value for key, value in os.environ.items() if key.startswith("MEFTBENCH_")}
    dtype, device, threads = torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()
    autocast = {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")}
    gradients = torch.is_grad_enabled()
    try:
        yield
    finally:
        os.environ.update(ours)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for kind, enabled in autocast.items():
            torch.set_autocast_enabled(kind, enabled)
        torch.set_grad_enabled(gradients)


@contextmanager
def blamed(names: Sequence[str], fact: str = "raised", always: bool = False) -> Iterator[None]:
    """What code of the user's own raises within becomes a UserError that says where in that code; its traceback is
    printed. Out of memory stays as it is, and so do a module that is missing by the very name of the first, and, unless
    `always`, what no line of that code led to.

    names: of the functions by which that code was reached.
    """
    try:
        yield
    except (UserError, CellFailure):
        raise
    except (Exception, SystemExit) as error:
        place = _place(error, names)
        if isinstance(error, ModuleNotFoundError) and f"{names[0].partition(':')[0]}.".startswith(f"{error.name}."):
            raise
        full = isinstance(error, MemoryError) or (isinstance(error, RuntimeError | OSError) and "memory" in str(error))
        if full or not (always or place):
            raise
        traceback.print_exception(error)
        said = f"{type(error).__name__}: {_without_folders(one_line(error))}".removesuffix(f": {type(error).__name__}")
        raise UserError(names[0], f"{fact}{f' at {place}' if place else ''}: {said}", "mend it there") from error


def _place(error: BaseException, names: Sequence[str]) -> str | None:
    """File and line of the innermost frame of the user's own code; None: there is none."""
    found = None
    for frame in traceback.extract_tb(error.__traceback__):
        if shown := _own_file(frame.filename, names):
            found = f"{shown}:{frame.lineno}"
    if isinstance(error, SyntaxError) and error.filename and (shown := _own_file(error.filename, names)):
        found = f"{shown}:{error.lineno}"
    return found


def _own_file(file: str, names: Sequence[str]) -> str | None:
    """A file of the user's own code, as it is called below its root; None: it is not theirs."""
    path = Path(file)
    if not path.is_absolute() or path.is_relative_to(Path(meftbench.__file__).parent):
        return None
    for name in names:
        top = sys.modules.get(name.partition(":")[0].partition(".")[0])
        if file == getattr(top, "__file__", None) and not hasattr(top, "__path__"):
            return path.name
        for root in getattr(top, "__path__", []):
            if path.is_relative_to(root):
                return str(path.relative_to(Path(root).parent))
    folder = os.environ.get(FOLDER, "")
    installed = {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    installed |= {*site.getsitepackages(), site.getusersitepackages()}
    if folder and path.is_relative_to(folder) and not any(path.is_relative_to(place) for place in installed):
        return str(path.relative_to(folder))
    return None


def _without_folders(text: str) -> str:
    """The text without the working folder; of other absolute paths the last two parts. Records are read elsewhere."""
    folder = os.environ.get(FOLDER, "") + os.sep
    return _FOLDERS.sub("", text.replace(folder, "") if len(folder) > 1 else text)


def digest_of(name: str) -> str | None:
    """16 hexadecimal digits of the source files that a loaded function is named in and defined in; None: it has none.
    What these import is not in it."""
    function = load(name)
    files = [getattr(sys.modules[name.partition(":")[0]], "__file__", None)]
    with suppress(TypeError):  # of a function that is not written in Python
        files.append(inspect.getsourcefile(inspect.unwrap(function)))
    summary = hashlib.blake2b(digest_size=8)
    known = list(dict.fromkeys(str(Path(file).resolve()) for file in files if file and Path(file).is_file()))
    for file in known:
        summary.update(Path(file).read_bytes() + b"\0")
    return summary.hexdigest() if known else None


def digests_of(names: Iterable[str | None]) -> dict[str, str | None]:
    return {name: digest_of(name) for name in names if name is not None}


def looked_at(calls: Iterable[tuple[str, Sequence[str]]]) -> dict[str, Any]:
    """For the parent process, before the first cell: `digests` by name; or, of the first fault, `error` and `call`."""
    digests = {}
    for name, arguments in calls:
        try:
            checked_function(name, arguments)
            digests[name] = digest_of(name)
        except UserError as error:
            return {"error": [error.where, error.what, error.cure], "call": [name, arguments]}
    return {"digests": digests}
