"""Waiting that Ctrl-C and SIGTERM end, whenever they come.

Python acts on a signal in its main thread, between two steps of that. While it sleeps on a lock, only a signal that
comes to it wakes it, and only once it is asleep: one that comes right before that, or that another thread takes, would
be acted on when the wait is over, which may be in hours. So a wait is many short ones.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from typing import TypeVar

T = TypeVar("T")

SLICE_SECONDS = 0.2
"""By so much at most a signal is acted on late: short for who waits for it, long for the processor that is woken."""


def join(thread: threading.Thread) -> None:
    """Waits until a thread has ended."""
    while thread.is_alive():
        thread.join(SLICE_SECONDS)


def get(items: queue.Queue[T], patience: float | None = None) -> T:
    """The next item.

    Args:
        patience: seconds to wait for it; None for as long as it takes.

    Raises:
        queue.Empty: none came.
    """
    end = math.inf if patience is None else time.monotonic() + patience
    while (left := end - time.monotonic()) > SLICE_SECONDS:
        with contextlib.suppress(queue.Empty):
            return items.get(timeout=SLICE_SECONDS)
    return items.get(timeout=max(left, 0.0))


def sleep(seconds: float) -> None:
    """Waits so long."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, SLICE_SECONDS))
