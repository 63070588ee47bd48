"""Runs a suite: each cell in a process of its own, each end a record on the disk before the next cell begins."""

from meftbench.runner.sweep import Ended, Event, Noted, Started, run_suite

__all__ = ["Ended", "Event", "Noted", "Started", "run_suite"]
