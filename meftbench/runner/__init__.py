"""Runs a suite: each cell in its own process, and the record of each is on the disk before the next cell begins."""

from meftbench.runner.sweep import Ended, Event, Noted, Planned, Started, run_suite

__all__ = ["Ended", "Event", "Noted", "Planned", "Started", "run_suite"]
