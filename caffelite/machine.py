"""What the machine offers this process."""

from __future__ import annotations

import os


def processors() -> int:
    """How many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux alone; it knows taskset's and a container's limits
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
