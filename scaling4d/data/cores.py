"""How many processor cores this process may use."""

import os


def usable_cores() -> int:
    """Cores of this process's affinity mask where the system has one (containers and schedulers set it), else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
