"""The command line, with a file for each command (verb). This one joins them, and turns errors into exit codes."""

from __future__ import annotations

import errno
import gc
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from meftbench import __version__
from meftbench.cli import (
    check,
    compare,
    doctor,
    estimate,
    export,
    finetune,
    fit,
    init,
    inspect,
    listing,
    plan,
    report,
    run,
    show,
    validate,
)
from meftbench.cli.output import put, put_error
from meftbench.cli.streams import abandon_stdout, encode_anything, flush
from meftbench.errors import BUG, INTERRUPTED, INVALID, UserError
from meftbench.escapes import single_line

EXIT_CODES = """
Exit codes: 0 done, budgets held · 1 over budget or regressed · 2 usage, unreadable or invalid input ·
3 cells ended in error or timeout · 4 not comparable, or the device is absent · 5 nothing matched ·
130/143 interrupted, finished records kept
"""

app = typer.Typer(
    name="meftbench",
    help="Which fine-tuning method fits your GPU, and what does it cost?",
    epilog=EXIT_CODES,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_VERBS: dict[str, Callable[..., None]] = {
    "run": run.run,
    "show": show.show,
    "report": report.report,
    "compare": compare.compare,
    "check": check.check,
    "estimate": estimate.estimate,
    "fit": fit.fit,
    "plan": plan.plan,
    "finetune": finetune.finetune,
    "validate": validate.validate,
    "export": export.export,
    "init": init.init,
    "inspect": inspect.inspect,
    "list": listing.list_,
    "doctor": doctor.doctor,
}


class _Interrupted(Exception):  # noqa: N818 - no error
    """Stands in for KeyboardInterrupt, on which typer would end the program without a message."""


def _interruptible(verb: Callable[..., None]) -> Callable[..., None]:
    @wraps(verb)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except KeyboardInterrupt:
            raise _Interrupted from None

    return wrapped


def _without_garbage_collection(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb without Python's search for reference cycles, for verbs that read runs and end soon.

    Records and comparisons of large runs are millions of objects without cycles. Python would search all of them for
    cycles again and again, which took more than half of the time.
    """

    @wraps(verb)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        gc.disable()  # `main` enables it again, when the verb's objects are gone
        verb(*args, **kwargs)

    return wrapped


_ENDING_SOON = ("show", "report", "compare", "check", "export")

for _name, _verb in _VERBS.items():
    _called = _without_garbage_collection(_verb) if _name in _ENDING_SOON else _verb
    app.command(_name)(_interruptible(_called))


def _version(requested: bool) -> None:
    if requested:
        put(f"meftbench {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Which fine-tuning method fits your GPU, and what does it cost?"""
    if context.invoked_subcommand is None:
        context.get_help()  # printed by rich
        raise typer.Exit(INVALID)


_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)

# typer < 0.20 raises click's exceptions; later versions contain a copy of click and raise the exceptions of that.
_ClickException: type[Exception] = typer.BadParameter.__bases__[0].__bases__[0]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit. A UserError is printed as one line; a traceback means a bug (exit 70)."""
    collects_garbage, thresholds = gc.isenabled(), gc.get_threshold()
    # Thousands of cells and records hold no cycles, for which Python would look after every few hundred of them.
    gc.set_threshold(100_000, *thresholds[1:])
    try:
        exit_code = _exit_code(arguments)
    finally:
        gc.set_threshold(*thresholds)
        if collects_garbage:
            gc.enable()
    sys.exit(exit_code)


def program() -> None:
    """`main` in a process that ends with it, which then need not search what is left for cycles: the search took
    five hundredths of a second or more after a large run was read."""
    try:
        main()
    finally:
        gc.freeze()


def _exit_code(arguments: list[str] | None) -> int:
    encode_anything()
    command = typer.main.get_command(app)
    try:
        outcome = command.main(args=arguments, prog_name="meftbench", standalone_mode=False)
        flush()
        return outcome if isinstance(outcome, int) else 0
    except UserError as error:
        put_error(f"meftbench: {single_line(str(error))}")
        return error.exit_code
    except _ClickException as error:
        # Some of the messages come from pydantic, with this prefix.
        message = single_line(error.format_message().replace("Value error, ", ""))  # type: ignore[attr-defined]
        put_error(f"meftbench: {message.rstrip('.')}; see `meftbench --help`")
        return INVALID
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except _Interrupted:
        put_error("meftbench: interrupted")
        return INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        # Where a pipe is closed, rich and typer exit with 1, which here would mean "over budget".
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        # The reader of the output (such as `| head`) has closed the pipe: that is not an error.
        abandon_stdout()
        return 0
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            put_error(f"meftbench: {single_line(str(error.filename))}: is too long for a path; give a shorter one")
            return INVALID
        if error.errno not in _CANNOT_WRITE or error.filename is not None:
            return _bug()
        abandon_stdout()
        put_error(f"meftbench: output cannot be written ({error.strerror}); make room, or send it elsewhere")
        return INVALID
    except Exception:  # not swallowed: shown with its traceback
        return _bug()


def _bug() -> int:
    """Print the traceback of any other exception, which is a bug, and return an exit code that no result has."""
    put_error(traceback.format_exc().rstrip("\n"), "meftbench: this is a bug; please report it with the lines above")
    return BUG
