"""Who is in which row."""

from __future__ import annotations

import ast
import random
from pathlib import Path

import pytest

from ssv.runtime.decode import scheduler as module
from ssv.runtime.decode.scheduler import QueueFull, Scheduler


def let_in(scheduler: Scheduler[str]) -> None:
    """Has everyone join for whom there is a row."""
    while scheduler.admit() is not None:
        scheduler.joined()


def holding(items: str, max_rows: int) -> Scheduler[str]:
    scheduler: Scheduler[str] = Scheduler(max_rows)
    for item in items:
        scheduler.submit(item)
    let_in(scheduler)
    return scheduler


def test_first_come_first_served() -> None:
    scheduler = holding("abc", 2)
    assert scheduler.rows == ["a", "b"]
    assert list(scheduler.waiting) == ["c"]
    assert scheduler.admit() is None


def test_one_joins_at_a_time() -> None:
    scheduler: Scheduler[str] = Scheduler(3)
    for item in "abc":
        scheduler.submit(item)
    assert scheduler.admit() == "a"
    assert scheduler.admit() is None
    assert (scheduler.rows, scheduler.joining, list(scheduler.waiting)) == ([], "a", ["b", "c"])
    scheduler.joined()
    assert (scheduler.rows, scheduler.joining, list(scheduler.waiting)) == (["a"], None, ["b", "c"])
    assert scheduler.admit() == "b"


def test_who_joins_needs_a_row() -> None:
    scheduler = holding("abc", 2)
    scheduler.finish(0)
    assert scheduler.admit() == "c"
    scheduler.joined()
    assert scheduler.rows == ["b", "c"]


def test_nobody_has_joined_if_none_does() -> None:
    with pytest.raises(AssertionError):
        holding("ab", 1).joined()


def test_falsy_items_are_items() -> None:
    scheduler: Scheduler[int] = Scheduler(1)
    scheduler.submit(0)
    scheduler.submit(0)
    assert scheduler.admit() == 0
    assert scheduler.has_work
    assert scheduler.admit() is None
    scheduler.joined()
    assert scheduler.rows == [0]


def test_has_work() -> None:
    scheduler: Scheduler[str] = Scheduler(1)
    assert not scheduler.has_work
    scheduler.submit("a")
    assert scheduler.has_work
    scheduler.admit()
    assert scheduler.has_work
    scheduler.joined()
    assert scheduler.has_work
    scheduler.finish(0)
    assert not scheduler.has_work


def test_abandon() -> None:
    scheduler: Scheduler[str] = Scheduler(1)
    for item in "ab":
        scheduler.submit(item)
    scheduler.admit()
    scheduler.abandon()
    assert (scheduler.rows, scheduler.joining, list(scheduler.waiting)) == ([], None, ["b"])
    assert scheduler.admit() == "b"
    scheduler.abandon()
    assert not scheduler.has_work


def test_drop_takes_out_of_the_queue_alone() -> None:
    scheduler = holding("abcdef", 2)
    scheduler.finish(0)
    scheduler.admit()
    scheduler.drop(lambda item: item in "bce")
    assert (scheduler.rows, scheduler.joining, list(scheduler.waiting)) == (["b"], "c", ["d", "f"])


@pytest.mark.parametrize("max_waiting", [0, 1, 3])
def test_bound_of_the_queue(max_waiting: int) -> None:
    """Beside those that free rows take: what joins has its row already."""
    scheduler: Scheduler[str] = Scheduler(2, max_waiting)

    def room() -> int:
        taken = 0
        while True:
            try:
                scheduler.submit("x")
            except QueueFull as error:
                assert str(len(scheduler.waiting)) in str(error)
                break
            taken += 1
        for _ in range(taken):
            scheduler.waiting.pop()
        return taken

    assert room() == 2 + max_waiting
    scheduler.submit("a")
    assert room() == 1 + max_waiting
    scheduler.admit()
    assert room() == 1 + max_waiting
    scheduler.joined()
    assert room() == 1 + max_waiting
    scheduler.submit("b")
    scheduler.admit()
    assert room() == max_waiting
    scheduler.abandon()
    assert room() == 1 + max_waiting
    scheduler.finish(0)
    assert room() == 2 + max_waiting


def test_a_refused_item_is_not_kept() -> None:
    scheduler: Scheduler[str] = Scheduler(1, 0)
    scheduler.submit("a")
    with pytest.raises(QueueFull, match="1 requests are waiting"):
        scheduler.submit("b")
    assert list(scheduler.waiting) == ["a"]


def test_queue_without_a_bound() -> None:
    assert len(holding("a" * 1000, 1).waiting) == 999


def test_last_row_moves_into_the_place_of_one_that_ends() -> None:
    scheduler = holding("abcd", 3)
    assert scheduler.finish(0) == 2
    assert scheduler.rows == ["c", "b"]
    assert scheduler.finish(1) == 1
    assert scheduler.rows == ["c"]
    assert scheduler.admit() == "d"


def test_finish_of_a_row_that_is_not_there() -> None:
    with pytest.raises(IndexError):
        holding("a", 2).finish(1)


@pytest.mark.parametrize("seed", range(10))
def test_state_follows_its_item(seed: int) -> None:
    """An array moved as `finish` says keeps every item's state in its row; what joins has its own behind them."""
    rng = random.Random(seed)
    scheduler: Scheduler[int] = Scheduler(4)
    state: dict[int, int] = {}
    to_come = list(range(30))
    admitted: list[int] = []
    dropped: set[int] = set()
    while to_come or scheduler.has_work:
        for _ in range(rng.randint(0, 3)):
            if to_come:
                scheduler.submit(to_come.pop(0))
        if (item := scheduler.admit()) is not None:
            assert len(scheduler.rows) not in state
            state[len(scheduler.rows)] = item
            admitted.append(item)
        if scheduler.joining is not None:
            match rng.choice(["joined", "abandon", "later", "later"]):
                case "joined":
                    scheduler.joined()
                case "abandon":
                    del state[len(scheduler.rows)]
                    scheduler.abandon()
        if rng.random() < 0.2:
            leaving = set(rng.sample(list(scheduler.waiting), len(scheduler.waiting) // 3))
            scheduler.drop(leaving.__contains__)
            dropped |= leaving
        for row in range(len(scheduler.rows) - 1, -1, -1):
            if rng.random() < 0.3:
                moved = scheduler.finish(row)
                assert moved == len(scheduler.rows)
                state[row] = state[moved]
                del state[moved]
                if scheduler.joining is not None:
                    state[moved] = state.pop(moved + 1)
        held = [*scheduler.rows, *([] if scheduler.joining is None else [scheduler.joining])]
        assert [state[row] for row in range(len(state))] == held
        assert len(held) <= 4
    assert admitted == [item for item in range(30) if item not in dropped]
    assert scheduler.num_admitted == len(admitted)
    assert dropped and not state


def test_imports_no_torch() -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = [name for name in names if name != "ssv.support.errors"]  # which imports nothing
    assert not any(name.split(".")[0] in ("torch", "ssv") for name in names)


def test_it_is_filling_while_a_free_row_is_about_to_be_taken() -> None:
    scheduler = Scheduler[int](2, joins_early=lambda item: True)
    assert not scheduler.is_filling
    scheduler.submit(0)
    assert scheduler.is_filling
    scheduler.admit()
    assert scheduler.is_filling
    scheduler.joined()
    assert not scheduler.is_filling
    scheduler.submit(1)
    scheduler.submit(2)
    scheduler.admit()
    scheduler.joined()
    scheduler.admit()
    assert scheduler.joining == 2 and not scheduler.is_filling, "no row is free"
    scheduler.finish(0)
    assert scheduler.is_filling
