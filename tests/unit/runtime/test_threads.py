"""How many threads a CPU engine has: the machine's cores, an operator's word, and that no output depends on it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_decoder
from torch import Tensor

from ssv.runtime.engines import torch_engine
from ssv.runtime.engines.contract import EngineError
from ssv.runtime.engines.torch_engine import TorchEngine, cpu_threads, target_engine
from ssv.runtime.threads import (
    INTERVAL_SECONDS,
    CpuTimes,
    ThreadCount,
    default_threads,
    quota_of_cores,
    read_cpu_times,
    threads_for,
)
from ssv.support.precisions import TorchPrecision


@pytest.mark.parametrize(
    ("free", "current", "most", "expected"),
    [
        (2.0, 2, 2, 2),
        (1.7, 2, 2, 2),  # somebody's hiccup
        (1.5, 2, 2, 1),
        (1.0, 2, 2, 1),  # one busy neighbour
        (0.6, 1, 2, 1),  # two of them: never none
        (-0.3, 1, 2, 1),  # the kernel counts in ticks
        (1.65, 1, 2, 1),  # not yet: a thread is taken back later than it is given up
        (1.75, 1, 2, 2),
        (6.0, 8, 8, 6),
        (7.95, 6, 8, 8),
        (64.0, 2, 2, 2),  # others' cores of a big machine
        (2.0, 2, 1, 1),
    ],
)
def test_threads_follow_the_cores_that_are_free(free: float, current: int, most: int, expected: int) -> None:
    assert threads_for(free, current, most) == expected


class Machine:
    """Two cores whose readings the test writes."""

    def __init__(self) -> None:
        self.now, self.busy, self.own = 0.0, 0.0, 0.0
        self.applied: list[int] = []
        self.reads = 0

    def pass_time(self, seconds: float, own: float, others: float) -> None:
        self.now, self.busy, self.own = (
            self.now + seconds,
            self.busy + seconds * (own + others),
            self.own + seconds * own,
        )

    def read(self) -> CpuTimes | None:
        self.reads += 1
        return CpuTimes(2, self.now, self.busy, self.own)

    def count(self) -> ThreadCount:
        return ThreadCount(2, self.applied.append, read=self.read, clock=lambda: self.now)


def test_one_thread_beside_a_busy_neighbour_and_two_when_it_has_left() -> None:
    machine = Machine()
    count = machine.count()
    for seconds, own, others, expected in [
        (0.15, 2.0, 0.0, 2),
        (0.15, 1.2, 0.6, 2),  # a burst, which says little
        (0.15, 2.0, 0.0, 2),
        (0.15, 1.0, 1.0, 1),  # the neighbour
        (0.15, 1.0, 1.0, 1),
        (0.15, 0.66, 1.34, 1),  # another
        (0.15, 1.0, 0.0, 1),
        (0.15, 1.0, 0.0, 2),
    ]:
        machine.pass_time(seconds, own, others)
        count.follow()
        assert count.current == machine.applied[-1] == expected


def test_the_machine_is_not_looked_at_before_every_step() -> None:
    machine = Machine()
    count = machine.count()
    for _ in range(100):
        machine.pass_time(INTERVAL_SECONDS / 50, 2.0, 0.0)
        count.follow()
    assert machine.reads in (2, 3)


def test_what_happened_in_a_long_pause_says_nothing_of_now() -> None:
    machine = Machine()
    count = machine.count()
    machine.pass_time(600.0, 0.0, 2.0)
    count.follow()
    assert count.current == 2
    machine.pass_time(0.15, 1.0, 1.0)
    count.follow()
    assert count.current == 1


def test_a_system_that_does_not_tell_leaves_the_number_alone() -> None:
    now = [0.0]
    applied: list[int] = []
    count = ThreadCount(2, applied.append, read=lambda: None, clock=lambda: now[0])
    now[0] = 1.0
    count.follow()
    assert count.current == 2 and applied == [2, 2]


def test_readings_of_this_machine_grow() -> None:
    first = read_cpu_times()
    if first is None:
        assert not Path("/proc/stat").exists()
        return
    sum(range(2_000_000))
    second = read_cpu_times()
    assert second is not None
    assert second.cores == first.cores >= 1
    assert second.at > first.at and second.own > first.own and second.busy >= first.busy


@pytest.mark.parametrize(
    ("files", "groups", "expected"),
    [
        ({"cpu.max": "200000 100000\n"}, "0::/\n", 2.0),
        ({"cpu.max": "max 100000\n"}, "0::/\n", None),
        ({"a/cpu.max": "50000 100000\n", "cpu.max": "max 100000\n"}, "0::/a/b\n", 0.5),
        ({"a/cpu.max": "max 100000\n", "a/b/cpu.max": "150000 100000\n"}, "0::/a/b\n", 1.5),
        ({"cpu.max": "150000 100000\n"}, "0::/host/path/of/a/container\n", 1.5),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "4:cpu,cpuacct:/\n", 3.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "4:cpu,cpuacct:/\n", None),
        ({"cpu.max": "damaged\n"}, "0::/\n", None),
        ({}, "7:memory:/x\n0::/\n", None),
    ],
)
def test_a_quota_on_cores_is_read(tmp_path: Path, files: dict[str, str], groups: str, expected: float | None) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    own.write_text(groups)
    assert quota_of_cores(root, own) == expected


def test_a_part_of_a_core_is_worth_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for quota, expected in [(None, 8), (1.5, 2), (0.3, 1), (64.0, 8)]:
        monkeypatch.setattr("ssv.runtime.threads.quota_of_cores", lambda quota=quota: quota)
        assert default_threads(8) == expected


@pytest.fixture
def torchs_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch_engine, "_shared_count", None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("torchs_threads")
def test_a_chosen_number_of_threads_is_kept() -> None:
    assert cpu_threads(1) is None
    assert torch.get_num_threads() == 1
    for wrong in (0, 1025):  # torch takes what is far too many, and crashes
        with pytest.raises(EngineError, match=f"threads must be 1 to 1024, got {wrong}"):
            cpu_threads(wrong)
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("torchs_threads")
def test_an_operators_variable_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert cpu_threads(None) is None
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("torchs_threads")
def test_engines_of_a_process_follow_the_same_count() -> None:
    first = cpu_threads(None)
    assert first is not None
    first.current = 1  # beside a neighbour
    torch.set_num_threads(1)
    assert cpu_threads(None) is first  # and not one that believes that there was never more than one thread
    torch.set_num_threads(2)  # a caller's own wish
    assert cpu_threads(None) is not first


@pytest.mark.usefixtures("torchs_threads")
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_packed_weights_give_the_same_bits_while_the_number_of_threads_changes(precision: TorchPrecision) -> None:
    decoder = tiny_decoder()
    outputs = []
    for numbers in ([1], [2], [2, 1, 1, 2]):
        turns = iter(numbers * 8)
        count = ThreadCount(2, torch_engine._set_threads)
        count.follow = lambda turns=turns: torch_engine._set_threads(next(turns))  # type: ignore[method-assign]
        engine = target_engine(decoder, precision=precision, max_batch=2, max_length=64, threads=count)
        logits = []
        for at in range(0, 24, 6):
            ids = torch.arange(at, at + 12).view(2, 6) % decoder.spec.vocab_size
            step = engine.step(ids, torch.full((2,), at, dtype=torch.int32), torch.arange(12))
            logits.append(step.logits_RV)
        outputs.append(torch.cat(logits))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.usefixtures("torchs_threads")
def test_only_packed_weights_follow() -> None:
    count = ThreadCount(2, lambda _: None)
    wrong = "the bits of these products depend on the number of threads"
    count.follow = lambda: pytest.fail(wrong)  # type: ignore[method-assign]
    for precision in ("fp32", "bf16"):
        sizes: dict[str, Any] = {"precision": precision, "max_batch": 1, "max_length": 64}
        engine = target_engine(tiny_decoder(), threads=count, **sizes)
        engine.step(torch.tensor([[1, 2]]), torch.tensor([0], dtype=torch.int32), torch.tensor([1]))


@pytest.mark.usefixtures("torchs_threads")
def test_a_forked_process_has_threads_of_its_own() -> None:
    engine = target_engine(tiny_decoder(), precision="int4", max_batch=1, max_length=64)

    def logits() -> bytes:
        ids = torch.arange(16)[None]
        return engine.step(ids, torch.zeros(1, dtype=torch.int32), torch.arange(16)).logits_RV.numpy().tobytes()

    expected = logits()
    child = os.fork()
    if child == 0:  # no assertion here: the child must not go on with the tests
        os._exit(0 if logits() == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert logits() == expected


@pytest.mark.usefixtures("torchs_threads")
def test_engines_step_in_several_threads_of_python() -> None:
    engines = [target_engine(tiny_decoder(), precision="int8", max_batch=1, max_length=64) for _ in range(3)]

    def logits(engine: TorchEngine) -> list[Tensor]:
        zero = torch.zeros(1, dtype=torch.int32)
        return [engine.step(torch.arange(9)[None] + at, zero, torch.arange(9)).logits_RV for at in range(20)]

    expected = logits(engines[0])
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(logits, engines):
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
