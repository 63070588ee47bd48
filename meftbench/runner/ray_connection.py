"""The connection to a Ray cluster. This module and runner/ray_engine.py alone know Ray."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from types import ModuleType
from typing import Any

from meftbench.errors import NOT_COMPARABLE, UserError, one_line

CONNECT_SECONDS = 10.0
DEFAULT_ADDRESS = "auto"
_SHOWN = 100  # characters of an address in a message


def ray_module() -> ModuleType:
    """Ray, without reports of its use to its makers. Raises UserError: it is not installed."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
        import ray.exceptions
        import ray.util.scheduling_strategies
    except ImportError as error:
        what = f"needs Ray ({one_line(error)})"
        raise UserError("--engine ray", what, "pip install 'meftbench[ray]'") from None
    module: ModuleType = ray
    return module


def connected(address: str) -> Any:
    """Ray, connected to the cluster at `address`, and silent.

    Raises UserError (exit 4): there is no cluster, or it has another version of Ray or Python."""
    ray = ray_module()
    if address.startswith("ray://"):
        cure = "run this on a machine of the cluster, or as a job (`ray job submit`), with --address auto"
        raise UserError("--address", "ray:// goes through a proxy that cannot be used here", cure)
    named = os.environ.get("RAY_ADDRESS", DEFAULT_ADDRESS) if address == DEFAULT_ADDRESS else address
    if named != DEFAULT_ADDRESS:
        _refuse_unreachable(named)
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, include_dashboard=None)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        cure = "start one (`ray start --head`), or name the HOST:PORT of its head with --address"
        what = f"no Ray cluster can be used at {address!r} ({one_line(error)[:300]})"
        raise UserError("--engine ray", what, cure, NOT_COMPARABLE) from None
    else:
        # Ray prints what befalls the cluster to stdout, where results of commands go. Ray 2.60 has no other switch.
        ray._private.worker._worker_logs_enabled = False
    finally:
        if in_main_thread:  # Ray takes over SIGTERM, which is to end the sweep as without it
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return ray


def _refuse_unreachable(address: str) -> None:
    """Raises UserError (exit 4): nobody answers at the address, for which Ray itself would wait a minute, and abort."""
    name, _, port = address.rpartition(":")
    try:
        if not name or not re.fullmatch("[0-9]{1,5}", port):
            raise OSError("not HOST:PORT")
        socket.create_connection((name.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError, ValueError) as error:  # ValueError: no host has such a name
        why = "not HOST:PORT" if isinstance(error, ValueError) else one_line(error)
        what = f"no Ray cluster answers at {address[:_SHOWN]!r} ({why})"
        raise UserError("--address", what, "name the HOST:PORT of its head, or `auto`", NOT_COMPARABLE) from None
