"""Who is in which arm, what files of arms are refused, and which arms are out of service; then the log, which a crash
must not spoil.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ssv.ab.journal import Journal, JournalReader
from ssv.ab.routing import Fallback, LiveArm, Routing, RoutingError, fall_back, fallback_path, read_routing
from ssv.support.errors import UserError

UNITS = [f"user-{number}" for number in range(20_000)]


def routing(shares: Mapping[str, float], salt: str = "s", **fields: Any) -> Routing:
    arms = {name: LiveArm(share=share) for name, share in shares.items()}
    return Routing(salt=salt, log=Path("log.jsonl"), arms=arms, **fields)


def within_error(count: int, share: float) -> bool:
    """Four binomial standard errors of 20,000 units."""
    return abs(count - share * len(UNITS)) < 4 * math.sqrt(len(UNITS) * share * (1 - share))


# Assignment.


def test_a_unit_is_always_in_the_same_arm() -> None:
    """Also in another process, and another version: these are known by heart."""
    arms = routing({"a": 0.5, "b": 0.3, "c": 0.2}, salt="2026-11")
    assert [arms.arm_of(unit) for unit in ("ann", "bob", "cem", "dan", "eve", "fay", "", "ü")] == list("aacaaabc")
    again = routing({"a": 0.5, "b": 0.3, "c": 0.2}, salt="2026-11")
    assert all(arms.arm_of(unit) == again.arm_of(unit) for unit in UNITS[:500])


@pytest.mark.parametrize("shares", [{"a": 0.5, "b": 0.5}, {"a": 0.9, "b": 0.1}, {"a": 0.98, "b": 0.01, "c": 0.01}])
def test_arms_have_their_shares(shares: Mapping[str, float]) -> None:
    arms = routing(shares)
    found = Counter(arms.arm_of(unit) for unit in UNITS)
    assert set(found) == set(shares)
    for name, share in shares.items():
        assert within_error(found[name], share), found


def test_another_salt_shuffles_anew() -> None:
    """As many of those that were in b are in it again as of the others."""
    before, after = (routing({"a": 0.7, "b": 0.3}, salt=salt) for salt in ("one", "two"))
    both = sum(before.arm_of(unit) == after.arm_of(unit) == "b" for unit in UNITS)
    assert within_error(both, 0.09)


def test_a_change_of_two_arms_moves_no_more_units_than_it_must() -> None:
    before, after = routing({"a": 0.9, "b": 0.1}), routing({"a": 0.7, "b": 0.3})
    moved = Counter((before.arm_of(unit), after.arm_of(unit)) for unit in UNITS)
    assert moved["b", "a"] == 0
    assert within_error(moved["a", "b"], 0.2)
    before, after = routing({"a": 0.5, "b": 0.3, "c": 0.2}), routing({"a": 0.5, "b": 0.2, "c": 0.3})
    moved = Counter((before.arm_of(unit), after.arm_of(unit)) for unit in UNITS)
    assert {pair for pair in moved if pair[0] != pair[1]} == {("b", "c")}
    assert within_error(moved["b", "c"], 0.1)


def test_shares_that_add_up_but_for_rounding_leave_nobody_out() -> None:
    arms = routing({f"arm{number}": 0.1 for number in range(10)})
    assert sum(arm.share for arm in arms.arms.values()) < 1

    class Last(Routing):
        def _place(self, what: str, unit: str) -> float:
            return math.nextafter(1.0, 0.0)

    assert Last(**dict(arms)).arm_of("x") == "arm9"


def test_a_shadow_gets_its_share_of_copies_and_no_answers() -> None:
    arms = routing({"a": 1.0, "b": 1.0}, shadow="b", shadow_share=0.2)
    copied = [unit for unit in UNITS if arms.is_shadowed(unit)]
    assert within_error(len(copied), 0.2)
    assert {arms.arm_of(unit) for unit in UNITS[:1000]} == {"a"}
    assert all(routing({"a": 1.0, "b": 1.0}, shadow="b").is_shadowed(unit) for unit in UNITS[:1000])
    assert not any(routing({"a": 0.5, "b": 0.5}).is_shadowed(unit) for unit in UNITS[:1000])


# Files.

FINE = """
salt: 2026-autumn
log: outcomes.jsonl
arms:
  now: {share: 0.9, tier: premium}
  new: {share: 0.1, url: "grpcs://gpu-7:8001", max_divergence: 0.05}
"""


def refused(folder: Path, text: str) -> str:
    path = folder / "arms.yaml"
    path.write_text(text)
    with pytest.raises(RoutingError) as raised:
        read_routing(path)
    message = str(raised.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def test_a_file_of_arms_is_read(tmp_path: Path) -> None:
    path = tmp_path / "arms.yaml"
    path.write_text(FINE)
    found = read_routing(path)
    assert (found.first, found.salt, found.log) == ("now", "2026-autumn", Path("outcomes.jsonl"))
    assert found.arms["now"] == LiveArm(share=0.9, tier="premium")
    assert found.arms["new"] == LiveArm(share=0.1, url="grpcs://gpu-7:8001", max_divergence=0.05)
    assert found.fallback_path == Path("outcomes.jsonl.fallback")
    # As ssv-serve hands it to the model.
    assert Routing.model_validate_json(found.model_dump_json()) == found
    assert list(Routing.model_validate_json(found.model_dump_json()).arms) == ["now", "new"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("share: 0.9", "share: 0.8", "the shares add up to 0.9: they must be 1 together"),
        ("share: 0.9", "share: 0.89999999", "the shares add up to 0.99999999: they"),
        ("share: 0.9", "share: 0", "arms.now.share: Input should be greater than 0"),
        ("share: 0.9", "share: -0.9", "arms.now.share: Input should be greater than 0"),
        ("share: 0.9", "share: 1.1", "arms.now.share: Input should be less than or equal to 1"),
        ("share: 0.9", "share: .nan", "arms.now.share"),
        ("share: 0.9", "share: many", "arms.now.share: Input should be a valid number"),
        ("share: 0.9", "shares: 0.9", "arms.now.shares: Extra inputs are not permitted"),
        ("tier: premium", "tier: 3", "arms.now.tier: Input should be a valid string"),
        ("tier: premium", "tier: premium, max_divergence: 0.1", "give a tier or a max_divergence"),
        ("0.05", "1.5", "arms.new.max_divergence"),
        ("grpcs://gpu-7:8001", "http://gpu-7:8001", "arms.new.url: String should match"),
        ("grpcs://gpu-7:8001", "grpc://gpu-7", "arms.new.url: String should match"),
        ("grpcs://gpu-7:8001", "grpc://gpu-7:8001/v1", "arms.new.url: String should match"),
        ("grpcs://gpu-7:8001", "grpc://gpu-7:80010", "arms.new.url: grpc://gpu-7:80010 has no port between 1 and"),
        ("grpcs://gpu-7:8001", "grpc://gpu-7:0", "arms.new.url: grpc://gpu-7:0 has no port between 1 and"),
        ("  now:", "  'the old':", "arms.the old"),
        ("  now:", "  '':", "arms."),
        ("salt: 2026-autumn", "", "salt: Field required"),
        ("salt: 2026-autumn", "salt: ''", "salt: String should have at least 1 character"),
        ("salt: 2026-autumn", "salt: 2026-11-22", "salt: Input should be a valid string"),
        ("salt: 2026-autumn", "salt: 2026-13-01", "is not YAML (month must be in 1..12"),
        ("log: outcomes.jsonl", "", "log: Field required"),
        ("log: outcomes.jsonl", "log: [a]", "log: Input is not a valid path"),
        ("log: outcomes.jsonl", "log: l\nlogs: a", "logs: Extra inputs are not permitted"),
        ("log:", "shadow: old\nlog:", "shadow 'old' is none of the arms after the first: now, new"),
        ("log:", "shadow: now\nlog:", "shadow 'now' is none of the arms after the first: now, new"),
        ("log:", "shadow: new\nshadow_share: 0\nlog:", "shadow_share: Input should be greater than 0"),
    ],
)
def test_files_that_are_not_of_arms_are_refused(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in FINE
    assert message in refused(tmp_path, FINE.replace(before, after))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file: Input should be"),
        ("- a\n- b", "the file: Input should be"),
        ("salt: s\nlog: l\narms: [a, b]", "arms: Input should be a valid dictionary"),
        ("salt: s\nlog: l\narms: {a: {share: 1}}", "there is nothing to compare: give two arms"),
        ("salt: s\nlog: l\narms: {a: , b: {share: 1}}", "arms.a: Input should be"),
        ("salt: [", "is not YAML (while parsing"),
        ("salt: a\nsalt: b", "is not YAML (key salt is given twice"),
        ("[" * 3000, "is nested too deeply"),
        ("salt: !!python/object/apply:os.getcwd []", "is not YAML (could not determine a constructor"),
    ],
)
def test_what_is_no_file_of_arms_at_all(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("before", "after", "cure"),
    [
        ("salt: 2026-autumn", "", "add a line `salt: TEXT`"),
        ("salt: 2026-autumn", "salt: 2026-11-22", "any text in quotes"),
        ("log: outcomes.jsonl", "", "add a line `log: FILE`"),
        (FINE, "salt: s\nlog: l", "add `arms:`"),
        ("share: 0.9", "shares: 0.9", "docs/comparing.md"),
        (FINE, "", "docs/comparing.md"),
        ("share: 0.9", "share: 0.8", ""),  # what is wrong says it
    ],
)
def test_what_is_wrong_with_a_file_of_arms_has_a_cure(tmp_path: Path, before: str, after: str, cure: str) -> None:
    path = tmp_path / "arms.yaml"
    path.write_text(FINE.replace(before, after))
    with pytest.raises(RoutingError) as raised:
        read_routing(path)
    assert cure in raised.value.cure
    assert bool(cure) == bool(raised.value.cure)


def test_all_that_is_wrong_with_a_file_of_arms_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path, "arms:\n  a: {share: 2}\n  b: {}")
    assert all(name in message for name in ("salt: Field", "log: Field", "arms.a.share: Input", "`salt: TEXT`"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RoutingError, match=r"none\.yaml cannot be read .*No such file"):
        read_routing(tmp_path / "none.yaml")
    with pytest.raises(RoutingError, match=r"cannot be read .*Is a directory"):
        read_routing(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"salt: \xff\xfe")
    with pytest.raises(RoutingError, match=r"binary\.yaml is not UTF-8"):
        read_routing(tmp_path / "binary.yaml")


# Falling back.


def test_the_file_of_fallbacks_is_looked_at_each_time(tmp_path: Path) -> None:
    path = fallback_path(tmp_path / "log.jsonl")
    assert path == tmp_path / "log.jsonl.fallback"
    fallback = Fallback(path)
    assert fallback.arms() == {}
    fall_back(path, {"b": "slow"})
    assert fallback.arms() == {"b": "slow"}
    fall_back(path, {"c": "wrong"})
    assert fallback.arms() == {"b": "slow", "c": "wrong"}
    path.unlink()
    assert fallback.arms() == {}
    fall_back(path, {"b": "again"})
    assert fallback.arms() == {"b": "again"}
    assert [each.name for each in tmp_path.iterdir()] == [path.name], (
        "the file comes whole, and nothing stays beside it"
    )


@pytest.mark.parametrize("text", ["", '{"b": "slo', '["b"]', "\xff"])
def test_a_torn_file_of_fallbacks_changes_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "log.fallback"
    fallback = Fallback(path)
    path.write_bytes(text.encode("latin-1"))
    assert fallback.arms() == {}
    fall_back(path, {"b": "slow"})
    assert fallback.arms() == {"b": "slow"}, "what cannot be read is written anew"
    path.write_bytes(text.encode("latin-1"))
    os.utime(path, ns=(1, 1))
    assert fallback.arms() == {"b": "slow"}
    path.write_text('{"c": "wrong"}')
    assert fallback.arms() == {"c": "wrong"}


def test_a_file_of_fallbacks_is_read_once_for_each_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.fallback"
    fall_back(path, {"b": "slow"})
    fallback, reads = Fallback(path), []
    whole = Path.read_text

    def read_text(self: Path, *args: Any, **options: Any) -> str:
        reads.append(self)
        return whole(self, *args, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    for _ in range(5):
        assert fallback.arms() == {"b": "slow"}
    assert len(reads) == 1


# The log.


def test_a_line_that_a_crash_has_cut_takes_no_other_with_it(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Journal(path) as journal:
        for number in range(3):
            journal.append({"number": number, "text": "é" * 40})
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(1, len(lines[-1])):
        path.write_bytes(whole[:-cut])
        reader = JournalReader(path)
        found = reader.read()
        with Journal(path) as journal:
            journal.append({"number": 3})
        found += reader.read()
        # Cut before the end of the line alone, the record is whole.
        kept = [0, 1, 2, 3] if cut == 1 else [0, 1, 3]
        assert [record["number"] for record in found] == kept
        assert reader.torn == (0 if cut == 1 else 1)


def test_a_disk_that_was_full_for_a_while_costs_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    write, room = os.write, [12, 0]

    def full(file: int, data: bytes) -> int:
        if not room:
            return write(file, data)
        size = room.pop(0)
        if not size:
            raise OSError(28, "No space left on device")
        return write(file, data[:size])

    with Journal(path) as journal:
        journal.append({"number": 0})
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            journal.append({"number": 1, "text": "lost"})
        journal.append({"number": 2})
        journal.append({"number": 3})
    reader = JournalReader(path)
    assert [record["number"] for record in reader.read()] == [0, 2, 3]
    assert reader.torn == 1


def test_a_process_that_is_killed_while_it_writes_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    code = (
        "import itertools, sys; from pathlib import Path; from ssv.ab.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for number in itertools.count(): journal.append({'number': number, 'text': 'x' * 3000})\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)]) as process:
        while not path.exists() or path.stat().st_size < 100_000:
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    reader = JournalReader(path)
    found = [record["number"] for record in (*reader.read(), *reader.rest())]
    assert found == list(range(len(found)))
    assert len(found) > 30
    with Journal(path) as journal:
        journal.append({"number": -1})
    again = JournalReader(path)
    assert [record["number"] for record in again.read()] == [*found, -1]
    assert again.torn <= 1


def test_threads_that_write_at_a_time_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Journal(path) as first, Journal(path) as second:

        def write(thread: int) -> None:
            for number in range(200):
                (first, second)[thread % 2].append(
                    {"thread": thread, "number": number, "text": "x" * (number * 37 % 5000)}
                )

        threads = [threading.Thread(target=write, args=(thread,)) for thread in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    reader = JournalReader(path)
    records = reader.read()
    assert (len(records), reader.torn) == (1200, 0)
    for thread in range(6):
        assert [record["number"] for record in records if record["thread"] == thread] == list(range(200))


def test_a_reader_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"n":1}\n{"n"')
    reader = JournalReader(path)
    assert reader.read() == [{"n": 1}]
    assert reader.read() == []
    with path.open("ab") as file:
        file.write(b':2}\n{"n":3}')
    assert reader.read() == [{"n": 2}]
    assert reader.rest() == [{"n": 3}]
    assert reader.torn == 0
    path.write_bytes(b"")
    with pytest.raises(UserError, match="has become shorter"):
        reader.read()


def test_lines_that_are_no_objects_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'[1]\n\n{"n":1}\n\xff\xfe\n"a"\n' + json.dumps({"n": 2}).encode() + b'\n{"n":')
    reader = JournalReader(path)
    assert [record["n"] for record in reader.read()] == [1, 2]
    assert reader.torn == 3
    assert reader.rest() == []
    assert reader.torn == 4
