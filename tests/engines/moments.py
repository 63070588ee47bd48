"""Moments of a sweep at which tests act."""

import threading

from sweeps import wait_until


def running(marks, seed):
    """The pids of cells of the seed that have begun."""
    return [int(text) for file in marks.glob(f"{seed}-*.began") if (text := file.read_text())]


def in_background(action, when):
    """Do it when a condition holds, beside the sweep."""
    thread = threading.Thread(target=lambda: (wait_until(when), action()))
    thread.start()
    return thread
