"""Imports, checks and calls the user's own functions, named `module:function`; an error in one is reported in one line.

Functions are imported from the working folder, in which the command was started, or from an installed package, and only
if an environment variable that the parent process sets (plan/factories.py) allows it.
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
from meftbench.errors import CellFailure, UserError, is_out_of_memory, one_line
from meftbench.plan.factories import BATCH_ARGUMENTS, FOLDER

Function = Callable[..., Any]
# The folders of an absolute path but for its last two parts.
_LEADING_FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^\s'\"/]+/)+(?=[^\s'\"/]+/[^\s'\"/]+)")


def load(name: str) -> Function:
    """The function called `name`.

    Raises UserError: importing code is not allowed, there is no such module or function, the import raises, or what is
    named cannot be called.
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
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = get_close_matches(function_name, callables, n=1)
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
    near = get_close_matches(last, [entry.name for entry in pkgutil.iter_modules(places)], n=1)
    cure = "start meftbench in the folder that holds it, or install its package"
    if module.endswith(".py"):
        cure = f"write {module.removesuffix('.py')}:{function}, as Python imports it"
    elif near:
        rest = module.removeprefix(missing)
        cure = f"did you mean '{'.'.join(filter(None, [parent, near[0]]))}{rest}:{function}'?"
    where = f"in package {parent!r}" if parent else "in the working folder or among installed packages"
    return UserError(name, f"module {missing!r} was not found {where}", cure)


def checked_function(name: str, arguments: Iterable[str]) -> Function:
    """The function called `name`. Raises UserError as `load` does, and where the function cannot be called with exactly
    the keyword arguments that are named in `arguments`."""
    function = load(name)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions that are not written in Python have none
        return function
    try:
        signature.bind(**dict.fromkeys(arguments))
    except TypeError as error:
        accepted = ", ".join(signature.parameters) or "nothing"
        cure = "give them under `config`"
        if tuple(arguments) == BATCH_ARGUMENTS:
            cure = "write def batch(batch_size, sequence_length)"
        raise UserError(name, f"{one_line(error)}: it takes {accepted}", cure) from None
    return function


def call(name: str, **arguments: Any) -> Any:
    """What the function returns. Raises UserError as `checked_function` does, and where the function raises.

    The settings of torch are restored afterwards, so that a cell is measured under those that its record states.
    """
    function = checked_function(name, arguments)
    with _settings_restored(), blamed([name], always=True):
        return function(**arguments)


@contextmanager
def _settings_restored() -> Iterator[None]:
    """Restore, at the end of the context, torch's default dtype and device, its modes of gradients and autocast, its
    number of threads, and the environment variables of this package."""
    environment = {key: value for key, value in os.environ.items() if key.startswith("MEFTBENCH_")}
    dtype, device, threads = torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()
    autocast = {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")}
    gradients = torch.is_grad_enabled()
    try:
        yield
    finally:
        for key in [key for key in os.environ if key.startswith("MEFTBENCH_") and key not in environment]:
            del os.environ[key]
        os.environ.update(environment)
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
    """Turn what the user's code raises within the context into a UserError that names the line of that code, and print
    the traceback.

    Some errors are raised unchanged: those of this package; running out of memory; that the module of the first name,
    or a package that it is in, was not found; and, unless `always`, those whose traceback has no line of that code.

    names: of the functions by which the user's code was reached.  fact: what happened, for the message.
    """
    try:
        yield
    except (UserError, CellFailure):
        raise
    except (Exception, SystemExit) as error:
        location = _location(error, names)
        if isinstance(error, ModuleNotFoundError) and f"{names[0].partition(':')[0]}.".startswith(f"{error.name}."):
            raise
        if is_out_of_memory(error) or not (always or location):
            raise
        traceback.print_exception(error)
        text = f"{type(error).__name__}: {_without_folders(one_line(error))}".removesuffix(f": {type(error).__name__}")
        raise UserError(names[0], f"{fact}{f' at {location}' if location else ''}: {text}", "mend it there") from error


def _location(error: BaseException, names: Sequence[str]) -> str | None:
    """File and line of the innermost frame of the user's code, or of its syntax error; None: there is neither."""
    location = None
    for frame in traceback.extract_tb(error.__traceback__):
        if file := _user_file(frame.filename, names):
            location = f"{file}:{frame.lineno}"
    if isinstance(error, SyntaxError) and error.filename and (file := _user_file(error.filename, names)):
        location = f"{file}:{error.lineno}"
    return location


def _user_file(file: str, names: Sequence[str]) -> str | None:
    """A file of the user's code, as a path relative to the folder that it was imported from; None: it is not theirs."""
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
    """The text with paths in the working folder made relative to it, and of other absolute paths only the last two
    parts, since records are read on other machines."""
    folder = os.environ.get(FOLDER, "") + os.sep
    return _LEADING_FOLDERS.sub("", text.replace(folder, "") if len(folder) > 1 else text)


def digest_of(name: str) -> str | None:
    """A digest, 16 hexadecimal digits, of the source files of the module in the function's name and of the one that
    defines it; None: there are no such files. What these files import is not in the digest.

    Raises UserError as `load` does."""
    function = load(name)
    files = [getattr(sys.modules[name.partition(":")[0]], "__file__", None)]
    with suppress(TypeError):  # the function is not written in Python
        files.append(inspect.getsourcefile(inspect.unwrap(function)))
    summary = hashlib.blake2b(digest_size=8)
    sources = list(dict.fromkeys(str(Path(file).resolve()) for file in files if file and Path(file).is_file()))
    for file in sources:
        summary.update(Path(file).read_bytes() + b"\0")
    return summary.hexdigest() if sources else None


def digests_of(names: Iterable[str | None]) -> dict[str, str | None]:
    return {name: digest_of(name) for name in names if name is not None}


def looked_at(calls: Iterable[tuple[str, Sequence[str]]]) -> dict[str, Any]:
    """Checks functions for the parent process, before the first cell. Each is a name and the names of its arguments.

    Returns `digests` by name; or, where a function has a fault, `error` and `call` of the first such function.
    """
    digests = {}
    for name, arguments in calls:
        try:
            checked_function(name, arguments)
            digests[name] = digest_of(name)
        except UserError as error:
            return {"error": [error.where, error.what, error.cure], "call": [name, arguments]}
    return {"digests": digests}
