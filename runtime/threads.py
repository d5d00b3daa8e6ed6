"""Threads of a CPU engine: as many as there are cores that nobody else uses.

The threads of torch meet at the end of each product, some hundred times a token. If one of them has to wait for its
core, all of them wait: beside one busy process two threads on two cores decoded at a quarter to two fifths of the speed
of one, whether they spun or slept (`benchmarks/records/busy_neighbours.json`). The threads of int8 and int4
(`engines/_crew.c`) wait for each other only in the middle of a piece of work, and lose far less; but two of them beside
a busy process are no faster than one and take time from it. So the number of threads follows what the machine gives.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

INTERVAL_SECONDS = 0.1
"""Between two looks at the machine. The kernel counts in hundredths of a second: less would be noise."""

MAX_THREADS = 1024
"""The most threads of an engine. torch does not refuse what is far too many: the process crashes."""

STALE_SECONDS = 1.0
"""What happened in a longer pause between two steps says little of now."""

# Of a core: a thread is given up when so much of its core is missing, and taken back when no more than that is. Beside
# a core that is taken for a third of the time one thread decodes as fast as two.
_GIVE_UP, _TAKE_BACK = 0.4, 0.3

_MEMORY = 0.5
"""The weight of what others took before, beside what they take now.

A server's own other processes work in bursts.
"""

_OPERATORS_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds since some time in the past.

    Attributes:
        cores: that this process may use.
        at: of the clock.
        busy: of these cores, together.
        own: of this process.
    """

    cores: int
    at: float
    busy: float
    own: float


def read_cpu_times(everybody: bool = False) -> CpuTimes | None:
    """What the cores of this process have done (proc_stat(5)); None where the system does not tell.

    Args:
        everybody: whether the time of processes with a lower priority than this one is counted too: they give way.
    """
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        niced = everybody or os.getpriority(os.PRIO_PROCESS, 0) > 0
    except (OSError, AttributeError):
        return None
    ticks = 0
    for line in lines:
        name, *fields = line.split()
        if name in cores:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            ticks += user + system + irq + softirq + steal + (nice if niced else 0)
    return CpuTimes(len(cores), time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time())


def threads_for(free_cores: float, current: int, most: int) -> int:
    """How many threads `free_cores` are enough for, from 1 to `most`.

    A change upwards asks for a little more than the number itself.
    """
    grown = math.floor(free_cores + _TAKE_BACK)
    kept = min(math.floor(free_cores + _GIVE_UP), current)
    return max(1, min(max(grown, kept), most))


def quota_of_cores(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """The cores that the control groups of this process grant it.

    They say so in cgroup v2's `cpu.max`, and in v1's `cpu.cfs_quota_us`.

    Returns:
        None for no limit.
    """
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    quotas = []
    for _, controllers, path in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root if not controllers else root / "cpu"
        folder = base / path.lstrip("/")
        # In a container the path is the host's: only the root is there, and it is the container's own.
        for group in (folder, *folder.parents):
            if group.is_relative_to(base):
                quotas.append(_quota_v1(group) if controllers else _quota_v2(group))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_v2(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(group: Path) -> float | None:
    try:
        quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 else None


def default_threads(most: int) -> int:
    """`most`, or what a quota on this process's cores leaves of it; a part of a core is worth a thread."""
    quota = quota_of_cores()
    return most if quota is None else max(1, min(most, math.ceil(quota)))


def chosen_by_operator() -> bool:
    """Whether the environment says how many threads there shall be."""
    return any(os.environ.get(name) for name in _OPERATORS_VARIABLES)


class ThreadCount:
    """The number of threads, which follows the cores that are free.

    Attributes:
        current: threads now.
    """

    def __init__(
        self,
        most: int,
        apply: Callable[[int], None],
        *,
        read: Callable[[], CpuTimes | None] = read_cpu_times,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begins with as many threads as an idle machine would have.

        Args:
            most: threads on an idle machine.
            apply: sets the number of threads of the thread that calls `follow`.
        """
        self.most, self._apply, self._read, self._clock = most, apply, read, clock
        self.current, self._others = most, 0.0
        self._last = read()
        # Asked when it is due and not before: a look costs as much as a hundredth of a token.
        self._due = clock() + INTERVAL_SECONDS
        apply(most)

    def follow(self) -> None:
        """To be called before every step, in the thread that makes it."""
        if self._clock() < self._due:
            return
        now, last = self._read(), self._last
        self._last, self._due = now, self._clock() + INTERVAL_SECONDS
        if now is not None and last is not None and 0 < now.at - last.at < STALE_SECONDS:
            others = max(0.0, (now.busy - last.busy) - (now.own - last.own)) / (now.at - last.at)
            self._others = _MEMORY * self._others + (1 - _MEMORY) * others
            self.current = threads_for(now.cores - self._others, self.current, self.most)
        self._apply(self.current)  # always: a thread that decodes for the first time has its own number
