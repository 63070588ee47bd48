"""Workers that have imported torch and transformers before they are started, so that tests need not wait for it.

    python prestarted.py serve SOCKET       imports what a worker imports; forks a worker whenever it is asked
    python prestarted.py client SOCKET ...  stands in for `python -m meftbench.worker ...`

The client passes its arguments, environment, folder and descriptors to the server, ends as the worker ends, and is
followed by the worker when it is killed. It becomes the command that it stands in for where there is no server, and
where its environment has something that libraries read while they are imported.
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import struct
import sys
from contextlib import suppress
from typing import NoReturn

# Variables that are read when a worker works, not while it imports. Any other that differs needs a process of its own.
READ_LATER = (
    "CUDA_VISIBLE_DEVICES",
    "COLUMNS",
    "LINES",
    "NO_COLOR",
    "OLDPWD",
    "OMP_NUM_THREADS",
    "PATH",
    "PWD",
    "TMPDIR",
)
READ_LATER_PREFIXES = ("PYTEST_", "MEFTBENCH_", "STAND_IN_")
_LENGTH = struct.Struct("=Q")


def environment_of_imports(environment: dict[str, str]) -> dict[str, str]:
    """The part of an environment that has to be the same for server and client."""
    return {
        name: value
        for name, value in environment.items()
        if name not in READ_LATER and name != "PYTHONPATH" and not name.startswith(READ_LATER_PREFIXES)
    }


# --- the client: imports little, and starts in milliseconds ---


def client(place: str, arguments: list[str]) -> int:
    """Have a worker run; its exit code. A signal that ended it ends this process, too."""
    command = [sys.executable, "-m", "meftbench.worker", *arguments]
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(place)
        except OSError:
            os.execv(command[0], command)
        content = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        text = json.dumps(content).encode()
        descriptors = array.array("i", [0, 1, 2])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
        connection.sendmsg([_LENGTH.pack(len(text))], ancillary)
        connection.sendall(text)
        answer = connection.recv(16)
    if answer == b"other":
        os.execv(command[0], command)
    code = int(answer or b"-9")
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


# --- the server ---


def serve(place: str) -> int:
    """Fork workers until the process that started this one ends."""
    begun_with = environment_of_imports(dict(os.environ))  # imports add to it
    from meftbench import worker

    requests = worker.imported(worker.REQUESTS)
    getattr(requests, "preload", lambda: None)()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen(64)
        while True:
            ready, _, _ = select.select([listener, 0], [], [])
            if 0 in ready:
                return 0
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _keep(connection, begun_with)
            connection.close()


def _keep(connection: socket.socket, begun_with: dict[str, str]) -> NoReturn:
    """Fork the worker, tell the client how it ended, and end it when the client has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, ancillary, _, _ = connection.recvmsg(_LENGTH.size, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    descriptors = array.array("i")
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    (length,) = _LENGTH.unpack(head)
    text = b""
    while len(text) < length:
        text += connection.recv(length - len(text))
    content = json.loads(text)
    if environment_of_imports(content["environment"]) != begun_with:
        connection.sendall(b"other")
        os._exit(0)
    pid = os.fork()
    if pid == 0:
        connection.close()
        _become_worker(content, list(descriptors))
    for descriptor in (0, 1, 2, *descriptors):
        os.close(descriptor)
    handle = os.pidfd_open(pid)
    ready, _, _ = select.select([handle, connection], [], [])
    if handle not in ready:  # the client was killed
        for kill in (os.killpg, os.kill):  # the worker may not lead its group yet
            with suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with suppress(BrokenPipeError):
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _become_worker(content: dict, descriptors: list[int]) -> NoReturn:
    import tempfile

    from meftbench import worker

    os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(content["folder"])
    os.environ.clear()
    os.environ.update(content["environment"])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [content["folder"], *paths, *(path for path in sys.path[1:] if path not in paths)]
    tempfile.tempdir = None
    sys.argv = ["meftbench.worker", *content["arguments"]]
    sys.exit(worker.main(content["arguments"]))  # from here on as `python -m meftbench.worker` ends


if __name__ == "__main__":
    mode, place, *rest = sys.argv[1:]
    sys.exit(serve(place) if mode == "serve" else client(place, rest))
