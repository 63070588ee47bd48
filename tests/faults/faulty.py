"""Stands in for meftbench.measuring.requests as stand_in does, with cells that do worse things, by their seed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import stand_in
from stand_in import describe

__all__ = ["describe"]

BLOCKED, GREEDY, PRINTING, LEAVING, FILLING, DISK_OF_OTHERS, WITHOUT_FOLDER, UNTIL_ROOM = range(100, 108)
FULL_ELSEWHERE, EXHAUSTED, WITHOUT_WORKER = 108, 109, 110
SIGNALLED = 1000  # plus the number of the signal by which the process ends itself
PRINTED = "FAULTY_PRINTED"  # variable: bytes that PRINTING prints
ROOM = "FAULTY_ROOM"  # variable: a file; while it is not there, UNTIL_ROOM is out of memory
FILLED = "FAULTY_FILLED"  # variable: folder whose disk FILLING fills
WORKERS = "FAULTY_WORKERS"  # variable: a file with a byte for each worker that WITHOUT_WORKER has killed, two at most
REMOVED = "FAULTY_REMOVED"  # variable: folder that WITHOUT_FOLDER removes


def measure(request: Any, tell: Any) -> dict[str, Any]:
    seed = request["cell"]["seed"]
    if seed >= SIGNALLED:
        stand_in.tell(f"{request['cell']['seed']} {os.getpid()}")
        if seed - SIGNALLED not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(seed - SIGNALLED, signal.SIG_DFL)
        os.kill(os.getpid(), seed - SIGNALLED)
        time.sleep(600)
    match seed:
        case s if s == BLOCKED:
            # As in C code that never returns to Python: no handler runs, and SIGTERM waits.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            time.sleep(600)
        case s if s == GREEDY:
            taken = []
            while True:
                taken.append(os.urandom(1) * 2**24)
        case s if s == EXHAUSTED:
            every_byte_taken()
        case s if s == PRINTING:
            block = b"x" * 2**20
            for _ in range(int(os.environ[PRINTED]) // len(block)):
                os.write(1, block)
            os.write(1, b"\nthe end\n")
        case s if s == LEAVING:
            child = subprocess.Popen(["sleep", "600"])
            stand_in.tell(f"left {child.pid}")
        case s if s == FILLING:
            fill(Path(os.environ[FILLED]))
        case s if s == DISK_OF_OTHERS:
            raise PermissionError(13, "Permission denied", "/elsewhere/model.safetensors")
        case s if s == FULL_ELSEWHERE:
            raise RuntimeError("unable to write to file </torch_17>: No space left on device (28)")
        case s if s == UNTIL_ROOM:
            if not Path(os.environ[ROOM]).exists():
                raise MemoryError
        case s if s == WITHOUT_WORKER:
            with Path(os.environ[WORKERS]).open("a+") as killed:
                killed.seek(0)
                if len(killed.read()) < 2:
                    killed.write("x")
                    killed.flush()
                    os.kill(os.getppid(), signal.SIGKILL)
                    time.sleep(600)
        case s if s == WITHOUT_FOLDER:
            shutil.rmtree(os.environ[REMOVED])
    return stand_in.measure(request, tell)


def every_byte_taken() -> None:
    """Raises MemoryError when not even a hundred bytes can be had, and holds all of it while that is reported."""
    taken = []
    for size in (2**24, 2**16, 2**10, 100):
        try:
            while True:
                taken.append(bytes(size))
        except MemoryError:
            if size == 100:
                raise


def fill(folder: Path) -> None:
    """Leave not one byte on the disk of the folder."""
    with (folder / "filler").open("ab", buffering=0) as stream:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    stream.write(bytes(size))
            except OSError:
                continue


VERBS = {"measure": measure}
