"""Counts the CPU cores that loaders may use."""

import os


def count_cores() -> int:
    """Returns the number of CPU cores that this process may use.

    A scheduler or a container may give a job fewer cores than the machine has. If the operating
    system does not say how many, returns the number of cores of the machine.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
