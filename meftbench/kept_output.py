"""What a process prints, kept in a file that stays small however much the process prints."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

ROOM = 2**20  # bytes of what a process has printed that are kept, the last ones
_BLOCK = 2**16  # bytes that are read at a time: what a pipe of Linux holds
_LEFT = 2**24  # bytes that are read at most when the process has ended: no pipe holds more


class KeptOutput:
    """A pipe that a process prints to, and the file that the other end of it is written to.

    The file grows to twice `ROOM` at most, and is then cut to its last `ROOM` bytes. A process that prints faster than
    that waits for the pipe.

    log: the file, which is emptied; its folder is made where it was removed. Never the target of a link.
    write_end, read_end: of the pipe. The process inherits `write_end`, which is then closed here (`begun`).
    """

    def __init__(self, log: str) -> None:
        self._file, self._size = _opened(log), 0
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)

    def begun(self) -> None:
        """The process has inherited its end of the pipe, so that the pipe ends when the process does."""
        os.close(self.write_end)

    def take(self) -> bool:
        """Write what has arrived to the file. False: no process prints here any more."""
        try:
            printed = os.read(self.read_end, _BLOCK)
        except BlockingIOError:
            return True
        self._keep(printed)
        return bool(printed)

    def end(self) -> None:
        """Write what has arrived until now, and close the file and this end of the pipe.

        A process that has left the group of the one that has ended, and still prints, is not waited for.
        """
        left = _LEFT
        with suppress(BlockingIOError):
            while left > 0 and (printed := os.read(self.read_end, _BLOCK)):
                self._keep(printed)
                left -= len(printed)
        self.close()

    def _keep(self, printed: bytes) -> None:
        # What cannot be written on a full disk is lost; that the disk is full is noticed by who writes the result.
        with suppress(OSError):
            self._size += os.pwrite(self._file, printed, self._size)
            if self._size > 2 * ROOM:
                self._size = os.pwrite(self._file, os.pread(self._file, ROOM, self._size - ROOM), 0)
                os.ftruncate(self._file, self._size)

    def close(self) -> None:
        """Close the file and this end of the pipe, in a process that inherited them, too."""
        os.close(self.read_end)
        os.close(self._file)


def _opened(log: str) -> int:
    """A descriptor of the file; of /dev/null where it cannot be opened, which stderr then says."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        return os.open(log, flags, 0o644)
    except OSError as error:
        print(f"{log}: cannot be written ({error.strerror}); what its process prints is lost", file=sys.stderr)
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
