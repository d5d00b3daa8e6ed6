"""Work in another thread."""

from __future__ import annotations

import threading

import pytest

from ssv.support.background import begun


def test_the_result_is_waited_for() -> None:
    go = threading.Event()
    finished = begun(lambda: go.wait(60) and 7)
    go.set()
    assert finished() == finished() == 7


def test_what_it_raises_is_raised_where_it_is_asked_for() -> None:
    def work() -> None:
        raise LookupError("no such thing")

    finished = begun(work)
    for _ in range(2):
        with pytest.raises(LookupError, match="no such thing"):
            finished()


def test_it_does_not_keep_the_process_from_ending() -> None:
    seen: list[bool] = []
    begun(lambda: seen.append(threading.current_thread().daemon))()
    assert seen == [True]
