"""A distributed cell: as many processes (ranks) as it says are started, each runs the passes, and their metrics become
those of the cell.

The ranks are children of the cell's process and in its process group, so that they are killed with it. A rank that
fails ends the others.
"""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from meftbench.errors import NOT_COMPARABLE, CellFailure, UserError, is_out_of_memory
from meftbench.measuring.groups import in_group
from meftbench.measuring.passes import Measured, run_passes
from meftbench.measuring.sharing import Rank
from meftbench.plan.cell import Cell
from meftbench.plan.protocol import Protocol
from meftbench.probes.host_memory import host_peak
from meftbench.probes.nvml import reading_of
from meftbench.records.record import Metric

# Seconds in which, after a rank has failed, others may tell why they failed: the first cause is reported.
_GRACE_S = 0.5
_MEMORY, _TIME, _HOST = "peak_allocated_bytes", "step_time_s", "host_rss_peak_bytes"
_SPEEDS = (_TIME, "forward_s", "backward_s", "optimizer_s", "cpu_wait_share")


class RankFailed(Exception):  # noqa: N818 - named like CellFailure
    """A rank raised an error that is a bug, or ended without a word; its own traceback is a note of this error."""


@dataclass(frozen=True)
class _Failure:
    """How a rank failed. at: time.monotonic() of that, which is the same clock in all processes of a machine.

    error: what the cell raises.  notes: the traceback in the rank.
    """

    at: float
    error: Exception
    notes: str = ""


def run_ranks(cell: Cell, protocol: Protocol, device_type: str) -> Measured:
    """Run the passes of a distributed cell in processes on this machine, on a GPU each where `device_type` is cuda.

    Memory metrics are those of the rank with the highest peak, times those of the slowest, and throughput is that of
    all ranks together.
    Raises CellFailure and UserError as `run_passes` does in a rank, CellFailure for a rank that was ended by a signal,
    RankFailed for any other end of a rank, and UserError where there are fewer GPUs than ranks.
    """
    if device_type == "cuda" and (gpus := torch.cuda.device_count()) < cell.world_size:
        what = f"{cell.world_size} ranks take a GPU each, and {gpus} can be seen"
        raise UserError(cell.label, what, f"write world_size: {gpus}, or use --device counted", NOT_COMPARABLE)
    # Without fork, as on Windows, the modules are imported again in each rank.
    context: Any = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    threads = max(1, torch.get_num_threads() // cell.world_size)
    with tempfile.TemporaryDirectory(prefix="meftbench-ranks-") as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        processes, receivers = [], []
        try:
            for number in range(cell.world_size):
                receiver, sender = context.Pipe(duplex=False)
                arguments = (sender, number, cell, protocol, device_type, meeting, threads)
                process = context.Process(target=_run_rank, args=arguments, daemon=True)
                process.start()
                sender.close()  # so that the end of the rank is the end of the pipe
                processes.append(process)
                receivers.append(receiver)
            return _combined(_answers(processes, receivers))
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _run_rank(
    sender: Connection, number: int, cell: Cell, protocol: Protocol, device_type: str, meeting: str, threads: int
) -> None:
    """The work of one rank: sends a Measured, or a _Failure."""
    torch.set_num_threads(threads)
    assert cell.parallelism is not None
    rank = Rank(number, cell.world_size, cell.parallelism)
    try:
        device = torch.device(device_type, number) if device_type == "cuda" else torch.device(device_type)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            if protocol.memory_limit is not None:
                total = torch.cuda.get_device_properties(device).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, protocol.memory_limit / total), device)
        with in_group(rank, meeting, device):
            measured = run_passes(cell, protocol, device, reading_of(device) if device.type == "cuda" else None, rank)
        measured.metrics |= {_HOST: host_peak()}
        sender.send(measured)
    except Exception as error:  # whatever it is, the cell's process reports it
        sender.send(_failure(number, error))


def _failure(number: int, error: Exception) -> _Failure:
    """The failure of rank `number` as it is sent; other errors than our own may not survive that."""
    at = time.monotonic()
    if isinstance(error, UserError):
        return _Failure(at, error)
    if isinstance(error, CellFailure):
        return _Failure(at, error)
    message = f"rank {number}: {type(error).__name__}: {error}"
    if is_out_of_memory(error):
        return _Failure(at, CellFailure("oom", type=type(error).__name__, message=message))
    return _Failure(at, RankFailed(message), "".join(traceback.format_exception(error)))


def _answers(processes: list[Any], receivers: list[Connection]) -> list[Measured]:
    """What each rank measured. Raises what the first rank that failed has raised."""
    measured: dict[int, Measured] = {}
    failures: list[_Failure] = []
    waiting = dict(enumerate(receivers))
    until = None
    while waiting and (until is None or time.monotonic() < until):
        ready = wait(list(waiting.values()), None if until is None else max(0.0, until - time.monotonic()))
        for number in [number for number, receiver in waiting.items() if receiver in ready]:
            receiver = waiting.pop(number)
            try:
                answer = receiver.recv()
            except EOFError:
                answer = _Failure(-1.0, _without_a_word(number, processes[number]))
            if isinstance(answer, Measured):
                measured[number] = answer
            else:
                failures.append(answer)
        if failures and until is None:
            until = time.monotonic() + _GRACE_S
    if failures:
        # Ranks that wait for one that has ended fail, too, but later. One that ended without a word comes first.
        first = min(failures, key=lambda failure: failure.at)
        if first.notes:
            first.error.add_note(first.notes)
        raise first.error
    return [measured[number] for number in range(len(processes))]


def _without_a_word(number: int, process: Any) -> Exception:
    """What the cell raises for a process that has ended and sent nothing."""
    process.join()
    code = process.exitcode
    if code >= 0:
        return RankFailed(f"rank {number} ended with exit code {code}")
    # Whether the kernel sent a SIGKILL because memory ran out is found out by who started this process.
    message = f"rank {number} was ended by {signal.Signals(-code).name}"
    return CellFailure("error", type=RankFailed.__name__, message=message, exit_signal=-code)


def _combined(ranks: list[Measured]) -> Measured:
    """The metrics of the cell: see `run_ranks`."""
    largest = max(ranks, key=lambda rank: _value(rank, _MEMORY))
    metrics = dict(largest.metrics)
    if _MEMORY in metrics:
        peaks = [int(_value(rank, _MEMORY)) for rank in ranks]
        metrics["peak_memory_by_rank"] = Metric(peaks, metrics[_MEMORY].source)
    if _TIME in metrics:
        slowest = max(ranks, key=lambda rank: _value(rank, _TIME))
        metrics |= {name: slowest.metrics[name] for name in _SPEEDS}
        for name in ("tokens_per_s", "samples_per_s"):
            amount = sum(_value(rank, name) * _value(rank, _TIME) for rank in ranks)
            metrics[name] = Metric(amount / _value(slowest, _TIME), "measured", n=metrics[name].n)
    metrics[_HOST] = max((rank.metrics[_HOST] for rank in ranks), key=lambda metric: metric.value or 0)
    return Measured(metrics, largest.observed)


def _value(rank: Measured, name: str) -> float:
    metric = rank.metrics.get(name)
    return metric.value if metric is not None and isinstance(metric.value, int | float) else 0.0
