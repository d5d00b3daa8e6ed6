"""Who is in which row."""

from __future__ import annotations

import ast
import random
from pathlib import Path

import pytest

from ssv.runtime import scheduler as module
from ssv.runtime.scheduler import Scheduler


def test_first_come_first_served() -> None:
    scheduler: Scheduler[str] = Scheduler(2)
    for item in "abc":
        scheduler.submit(item)
    assert scheduler.admit() == [(0, "a"), (1, "b")]
    assert scheduler.admit() == []
    assert scheduler.rows == ["a", "b"]
    assert list(scheduler.waiting) == ["c"]


def test_has_work() -> None:
    scheduler: Scheduler[str] = Scheduler(1)
    assert not scheduler.has_work
    scheduler.submit("a")
    assert scheduler.has_work
    scheduler.admit()
    assert scheduler.has_work
    scheduler.finish(0)
    assert not scheduler.has_work


def test_last_row_moves_into_the_place_of_one_that_ends() -> None:
    scheduler: Scheduler[str] = Scheduler(3)
    for item in "abcd":
        scheduler.submit(item)
    scheduler.admit()
    assert scheduler.finish(0) == 2
    assert scheduler.rows == ["c", "b"]
    assert scheduler.finish(1) == 1
    assert scheduler.rows == ["c"]
    assert scheduler.admit() == [(1, "d")]


def test_finish_of_a_row_that_is_not_there() -> None:
    scheduler: Scheduler[str] = Scheduler(2)
    scheduler.submit("a")
    scheduler.admit()
    with pytest.raises(IndexError):
        scheduler.finish(1)


def test_state_follows_its_item() -> None:
    """An array moved as `finish` says keeps every item's state in its row."""
    rng = random.Random(0)
    scheduler: Scheduler[int] = Scheduler(4)
    state: dict[int, int] = {}
    waiting = list(range(30))
    served = []
    while waiting or scheduler.has_work:
        for _ in range(rng.randint(0, 3)):
            if waiting:
                scheduler.submit(waiting.pop(0))
        for row, item in scheduler.admit():
            assert row not in state
            state[row] = item
            served.append(item)
        for row in range(len(scheduler.rows) - 1, -1, -1):
            if rng.random() < 0.4:
                moved = scheduler.finish(row)
                state[row] = state[moved]
                del state[moved]
        assert [state[row] for row in range(len(state))] == scheduler.rows
        assert len(scheduler.rows) <= 4
    assert served == list(range(30))


def test_imports_no_torch() -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any(name.split(".")[0] in ("torch", "ssv") for name in names)
