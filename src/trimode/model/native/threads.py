"""How many threads this process may use, and the pool of them that all its networks share."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

ENVIRONMENT = "OMP_NUM_THREADS"


def num_threads() -> int:
    """`OMP_NUM_THREADS` if that is set, at most the CPUs; else `num_cpus`.

    `--threads` of the command line sets that variable; so torch, and every process started from
    here, goes by the same number.
    """
    # OpenMP allows one number for each level of nesting; the first is the outermost.
    word = os.environ.get(ENVIRONMENT, "").split(",")[0].strip()
    if word.isdecimal() and int(word) > 0:
        return min(int(word), num_allowed())
    return num_cpus()


def num_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process gets: those it may run on, or what its control groups grant.

    Args:
        root: Of the file system, for tests.
    """
    granted = [num_allowed(), *_quotas(root)]
    return max(1, min(granted))


def num_allowed() -> int:
    """CPUs that this process may run on: no more threads than that are of use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas(root: Path) -> list[int]:
    """CPUs granted by each control group that we are in, version 1 or 2, rounded up: half a CPU
    more is used by a further thread, and lost without it."""
    found = []
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = top / path.lstrip("/")
        # A container may see the path that its host knows, and have its own group at the top.
        for folder in {group, *group.parents, top}:
            if folder == top or top in folder.parents:
                found += _quota(folder)
    return found


def _quota(folder: Path) -> list[int]:
    """What one group's files grant; empty if they set no limit."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (folder / "cpu.max").read_text("utf-8").split()
        return [] if quota == "max" else [max(1, math.ceil(int(quota) / int(period)))]
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota = (folder / "cpu.cfs_quota_us").read_text("utf-8").strip()
        period = (folder / "cpu.cfs_period_us").read_text("utf-8").strip()
        return [] if int(quota) <= 0 else [max(1, math.ceil(int(quota) / int(period)))]
    return []
