"""What Slurm says of jobs, and jobs that it is asked to take: the commands squeue, sacct and scancel, and submitit's
call of sbatch."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stderr
from typing import Any

from meftbench.errors import NOT_COMPARABLE, UserError, one_line

STATE_SECONDS = 30.0  # between questions to Slurm
COMMAND_SECONDS = 60.0  # for which a command of Slurm is waited for
AWAY_SECONDS = 600.0  # for which a controller that does not answer is waited for, as while it is restarted
_AWAY = ("Unable to contact slurm controller", "Zero Bytes were transmitted")  # sbatch says so then
_UNCONFIGURED = "Could not establish a configuration source"  # and then: no file and no controller says what there is
_SPEAKER = "sbatch: error: "  # begins each line of it
UNKNOWN = "UNKNOWN"  # the state of a job that Slurm has forgotten
LOST = ("NODE_FAIL", "BOOT_FAIL", "PREEMPTED", UNKNOWN)  # not by the job's own doing
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "REVOKED", *LOST)
_LOOKS = (
    2  # a job has to be over, or not known, at so many questions in a row: one that is preempted may be queued again
)


class SlurmStates:
    """The states of jobs, asked of Slurm for all at once.

    squeue knows jobs on every cluster, those that have ended for some minutes; sacct, on clusters that keep accounts,
    knows them for months.
    """

    def __init__(self) -> None:
        self._asked = 0.0  # by the monotonic clock; never, at first
        self._states: dict[str, str] = {}
        self._looks: dict[str, int] = {}

    def ended(self, job: Any, jobs: Collection[Any] = ()) -> str:
        """The state in which a job of submitit has ended; "" while it may still run.

        jobs: all that are waited for; sacct is asked for those that squeue does not know."""
        now = time.monotonic()
        if not self._asked or now - self._asked >= STATE_SECONDS:
            self._asked = now
            self._ask({str(one.job_id) for one in jobs} | {str(job.job_id)})
        state = self._states.get(job.job_id, "")
        return state if self._looks.get(job.job_id, 0) >= _LOOKS else ""

    def _ask(self, job_ids: set[str]) -> None:
        queue = ("squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%i|%T")
        answer = _answer(queue)
        if answer is None:
            return  # the controller does not answer: what is known stands
        found = _states_of(answer)
        if forgotten := job_ids - found.keys():
            account = ("sacct", "--noheader", "--parsable2", "--format=JobID,State", f"--jobs={','.join(forgotten)}")
            found |= _states_of(_answer(account) or "")
        for job_id in job_ids:
            state = found.get(job_id, UNKNOWN)
            self._looks[job_id] = self._looks.get(job_id, 0) + 1 if state in _OVER else 0
            self._states[job_id] = state


class LocalStates:
    """The states of jobs that are processes of this machine, by submitit's executor for it."""

    def ended(self, job: Any, jobs: Collection[Any] = ()) -> str:
        """As of `SlurmStates`."""
        state = str(job.state)
        return state if state in ("FINISHED", "INTERRUPTED") else ""


def _answer(command: Sequence[str]) -> str | None:
    """What the command prints; None where it is not there, fails or does not end."""
    try:
        options: Any = {"capture_output": True, "text": True, "errors": "replace", "check": False}
        done = subprocess.run(command, timeout=COMMAND_SECONDS, **options)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _states_of(lines: str) -> dict[str, str]:
    """The states by job, of lines `JOB|STATE`; without what follows a state, as in `CANCELLED by 1000`."""
    pairs = (line.strip().partition("|") for line in lines.splitlines())
    return {job_id: state.split()[0].rstrip("+") for job_id, _, state in pairs if state.strip()}


def cancel_jobs(name: str) -> None:
    """Cancel the jobs of this name, which are an earlier run's."""
    _answer(("scancel", f"--name={name}"))


def submitted(submit: Callable[[], list[Any]]) -> list[Any]:
    """The jobs that `submit` returns. What sbatch warns of goes to standard error.

    A controller that does not answer is waited for, which is said there, too.
    Raises UserError (exit 4): sbatch refuses them, or knows of no cluster."""
    limit, told = time.monotonic() + AWAY_SECONDS, False
    while True:
        printed = io.StringIO()  # submitit lets sbatch print, what it raises says it once more
        try:
            with redirect_stderr(printed):
                jobs = submit()
        except RuntimeError as error:  # submitit's FailedJobError has what sbatch printed
            said = one_line(error)
            if _UNCONFIGURED in said:
                cure = "run this on a login node of the cluster"
                raise UserError(
                    "--engine slurm", "Slurm is not configured on this machine", cure, NOT_COMPARABLE
                ) from None
            if any(word in said for word in _AWAY) and time.monotonic() < limit:
                if not told:
                    print("meftbench: waiting for Slurm's controller, which does not answer", file=sys.stderr)
                told = True
                time.sleep(STATE_SECONDS / 3)
                continue
            cure = "see `--slurm` for its options; `--jobs` says how many jobs are in the queue at a time"
            said = said.replace(_SPEAKER, "")[:300]
            raise UserError("--engine slurm", f"sbatch refuses: {said}", cure, NOT_COMPARABLE) from None
        sys.stderr.write(printed.getvalue())
        return jobs
