"""Reads a user's memory snapshot, the pickle that torch.cuda.memory._dump_snapshot() writes, and checks it.

A pickle can make its reader call any function. The reader here refuses every name of a function or a class: a snapshot
has dictionaries, lists, texts and numbers alone.
"""

from __future__ import annotations

import pickle
import stat
from itertools import pairwise
from pathlib import Path

from meftbench.errors import UserError
from meftbench.memory_limit import memory_limit
from meftbench.snapshots.checks import checked_snapshot
from meftbench.snapshots.snapshot import CURE, DeviceSnapshot, Snapshot
from meftbench.units import GiB, format_bytes

MAX_FILE_BYTES = 2 * GiB
_MEMORY_A_BYTE = 40  # of the file, that its objects may take; in snapshots of torch they take about 10


def read_device(path: Path, device: int | None = None) -> DeviceSnapshot:
    """What the snapshot `path` has of `device`; None: of the only one that has memory.

    Raises UserError as `read_snapshot` does, and where it is not clear which device is meant.
    """
    snapshot = read_snapshot(path)
    names = ", ".join(map(str, snapshot.devices))
    if not snapshot.devices:
        raise UserError(str(path), "holds no memory of any CUDA device", "take it in the process that uses the GPU")
    if device is None and len(snapshot.devices) > 1:
        raise UserError(str(path), f"holds memory of the devices {names}", "choose one with --device N")
    chosen = snapshot.devices[0] if device is None else device
    if chosen not in snapshot.devices:
        raise UserError(str(path), f"holds no memory of device {chosen}", f"it has: {names}")
    segments = [segment for segment in snapshot.segments if segment.device == chosen]
    segments.sort(key=lambda segment: segment.address)
    for before, after in pairwise(segments):
        if before.address + before.size > after.address:
            raise UserError(str(path), f"is damaged: two segments overlap at address {after.address}", CURE)
    trace = snapshot.traces.get(chosen, ())
    return DeviceSnapshot(snapshot.settings, chosen, tuple(segments), trace, snapshot.predicted)


def read_snapshot(path: Path) -> Snapshot:
    """The snapshot in the file `path`. Nothing in it is run.

    Raises UserError: it cannot be read, is larger than 2 GiB, is not a pickle or a damaged one, names functions or
    classes, is not a snapshot, or has actions that are not known here.
    """
    return checked_snapshot(_unpickled(path), str(path))


class _Refused(Exception):  # noqa: N818 - it becomes a UserError
    """The pickle names something that would have to be imported."""


class _PlainUnpickler(pickle.Unpickler):
    """Makes dictionaries, lists, tuples, texts and numbers, and refuses whatever else a pickle may ask for."""

    def find_class(self, module: str, name: str) -> object:
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: object) -> object:
        raise _Refused("a persistent id")


def _unpickled(path: Path) -> object:
    where = str(path)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UserError(where, "is a folder", "name the file that torch.cuda.memory._dump_snapshot wrote")
        if not stat.S_ISREG(status.st_mode):
            raise UserError(where, "is not a regular file", "copy it to a file first")
        if status.st_size > MAX_FILE_BYTES:
            what = f"has {format_bytes(status.st_size)}, and at most {format_bytes(MAX_FILE_BYTES)} are read"
            raise UserError(where, what, "record less, with max_entries or without stacks")
        with path.open("rb") as file, memory_limit(GiB + _MEMORY_A_BYTE * status.st_size):
            return _PlainUnpickler(file).load()
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(where, "does not exist", "name a file that torch.cuda.memory._dump_snapshot wrote") from None
    except _Refused as refused:
        name = ascii(str(refused)[:80])[1:-1]
        what = f"is not a plain snapshot: it names {name}, which was not run"
        raise UserError(where, what, "do not open it with tools that would run it") from None
    except OSError as error:
        raise UserError(where, f"cannot be read ({error.strerror})", "name a file that can be read") from None
    # A damaged pickle makes the unpickler raise errors of any type: TypeError, KeyError, OverflowError ...
    except Exception as error:
        raise UserError(where, _damage(path, error), CURE) from None


def _damage(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        first = file.read(1)
    if not first:
        return "is empty"
    if first != pickle.PROTO:
        return "is not a pickle"
    if isinstance(error, EOFError) or "truncated" in str(error):
        return "is cut off: the pickle has no end"
    return f"is damaged: it cannot be unpickled ({type(error).__name__})"
