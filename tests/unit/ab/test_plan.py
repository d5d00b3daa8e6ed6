"""Who is asked what and when, and what it is written with: plan, arms, limits, the journal, samples."""

from __future__ import annotations

import json
import threading
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest
from ab_cases import sample

from ssv.ab.answers import Answer
from ssv.ab.arms import Arm, check_arms, parse_arm
from ssv.ab.journal import Journal, JournalReader
from ssv.ab.limits import Limit, parse_limits
from ssv.ab.plan import Turn, make_plan, seed_of
from ssv.ab.samples import Sample, answered, read_samples
from ssv.support.errors import UserError

# The plan.


def blocks_of(plan: list[Turn]) -> list[list[Turn]]:
    return [list(turns) for _, turns in groupby(plan, key=lambda turn: turn.block)]


@pytest.mark.parametrize("arms", [("a", "b"), ("a", "b", "c", "d")])
def test_in_a_block_every_arm_goes_twice_the_second_time_in_reverse(arms: tuple[str, ...]) -> None:
    for block in blocks_of(make_plan(20, arms, [2], blocks_of=None, seed=1)):
        names = [turn.arm for turn in block]
        assert sorted(names[: len(arms)]) == sorted(arms)
        assert names == names[::-1]
        assert [turn.repeat for turn in block] == [0] * len(arms) + [1] * len(arms)
        assert len({turn.prompts for turn in block}) == 1


def test_either_arm_begins_about_as_often() -> None:
    firsts = Counter(block[0].arm for block in blocks_of(make_plan(400, "ab", [1], blocks_of=None, seed=0)))
    assert 160 < firsts["a"] < 240


@pytest.mark.parametrize(
    ("num_prompts", "concurrency", "given", "sizes"),
    [
        (6, 2, None, [2, 2, 2]),
        (7, 2, None, [2, 2, 3]),
        (10, 2, 4, [4, 6]),
        (4, 4, None, [4]),
        (6, 3, 1, [3, 3]),  # a block below the concurrency could not keep that many busy
        (3, 1, None, [1, 1, 1]),
    ],
)
def test_blocks_hold_every_prompt_once_and_the_last_what_is_left(
    num_prompts: int, concurrency: int, given: int | None, sizes: list[int]
) -> None:
    blocks = blocks_of(make_plan(num_prompts, "ab", [concurrency], blocks_of=given, seed=3))
    assert [len(block[0].prompts) for block in blocks] == sizes
    assert sorted(prompt for block in blocks for prompt in block[0].prompts) == list(range(num_prompts))


def test_every_concurrency_asks_everything_in_an_order_of_its_own() -> None:
    plan = make_plan(30, "ab", [1, 3], blocks_of=3, seed=0)
    orders = {
        c: [p for t in plan if (t.concurrency, t.arm, t.repeat) == (c, "a", 0) for p in t.prompts] for c in (1, 3)
    }
    assert sorted(orders[1]) == sorted(orders[3]) == list(range(30))
    assert orders[1] != orders[3] != list(range(30))
    assert [t.concurrency for t in plan] == sorted(t.concurrency for t in plan)
    assert len({turn.block for turn in plan}) == 20


def test_a_plan_follows_from_its_seed_and_its_blocks_do_not_depend_on_the_arms() -> None:
    plan = make_plan(12, "ab", [1, 2], blocks_of=None, seed=5)
    assert plan == make_plan(12, "ab", [1, 2], blocks_of=None, seed=5)
    assert plan != make_plan(12, "ab", [1, 2], blocks_of=None, seed=6)
    others = make_plan(12, ["x", "a", "y"], [1, 2], blocks_of=None, seed=5)
    assert {(t.block, t.prompts) for t in plan} == {(t.block, t.prompts) for t in others}


def test_a_concurrency_above_the_number_of_prompts_is_refused() -> None:
    with pytest.raises(UserError, match="3 prompts do not fill a block of 4, for concurrency 4: give more prompts"):
        make_plan(3, "ab", [1, 4], blocks_of=None, seed=0)


def test_seeds_depend_on_run_prompt_and_repeat_and_not_on_the_arm() -> None:
    seeds = {seed_of(seed, prompt, repeat) for seed in (0, 1) for prompt in ("x", "y") for repeat in (0, 1)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(0, "x", 0) == seed_of(0, "x", 0)


# Arms.


def test_an_arm_is_a_name_an_address_and_settings() -> None:
    assert parse_arm("a=grpc://h:8001") == Arm("a", "grpc://h:8001")
    assert parse_arm("fast=grpcs://h:8001/?method=turbo&gpus=2&price_per_hour=1.5") == Arm(
        "fast", "grpcs://h:8001", tier="turbo", gpus=2.0, price_per_hour=1.5
    )
    assert parse_arm("a=grpc://h:1?max_divergence=0.05").max_divergence == 0.05
    api = parse_arm("api-1.x=https://h/v1/?model=org/m%3Aturbo&price_per_1m_tokens=0.6")
    assert api == Arm("api-1.x", "https://h/v1", model="org/m:turbo", price_per_1m_tokens=0.6)
    assert api.is_openai and not parse_arm("a=grpc://h:1").is_openai


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grpc://h:1", "is no arm: give NAME=grpc://host:port"),
        ("=grpc://h:1", "is no arm"),
        ("a b=grpc://h:1", "is no arm"),
        ("<b>=grpc://h:1", "is no arm"),
        ("-a=grpc://h:1", "is no arm"),
        ("a" * 33 + "=grpc://h:1", "is no arm"),
        ("a=h:1", "arm a: 'h:1' is no address"),
        ("a=", "arm a: '' is no address"),
        ("a=ftp://h:1", "is no address"),
        ("a=grpc://", "is no address"),
        ("a=grpc://h:port", "arm a: 'grpc://h:port' is no address"),
        ("a=http://h:port/v1?model=m", "arm a: 'http://h:port/v1?model=m' is no address"),
        ("a=http://h:70000/v1?model=m", "is no address"),
        ("a=http://[::1/v1?model=m", "arm a: 'http://[::1/v1?model=m' is no address"),
        ("a=grpc://h:1?teir=turbo", "arm a: unknown setting 'teir'; known for grpc: gpus,"),
        ("a=grpc://h:1?model=m", "unknown setting 'model'; known for grpc"),
        ("a=http://h/v1?model=m&method=turbo", "unknown setting 'method'; known for http"),
        ("a=http://h/v1", "arm a names no model: add ?model=..."),
        ("a=http://h/v1?model=", "arm a names no model"),
        ("a=grpc://h:1?method=turbo&method=premium", "says something twice"),
        ("a=grpc://h:1?method=turbo&max_divergence=0.1", "has a method and a max_divergence: give one of them"),
        ("a=grpc://h:1?price_per_hour=-1", "arm a: price_per_hour=-1 must be a number above 0"),
        ("a=grpc://h:1?gpus=0", "gpus=0 must be a number above 0"),
        ("a=grpc://h:1?gpus=many", "gpus=many must be a number above 0"),
        ("a=grpc://h:1?gpus=", "gpus= must be a number above 0"),
        ("a=grpc://h:1?price_per_hour=nan", "must be a number above 0"),
        ("a=http://h/v1?model=m&price_per_1m_tokens=inf", "must be a number above 0"),
        ("a=http://h/v1?model=m&stream=maybe", "arm a: stream=maybe must be yes or no"),
        ("a=http://h/v1?model=m&temperature=-1", "arm a: temperature=-1 must be a number, 0 or above, or `default`"),
        ("a=grpc://h:1?stream=no", "unknown setting 'stream'; known for grpc"),
    ],
)
def test_a_malformed_arm_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_arm(text)
    assert message in str(caught.value)


def test_arms_are_two_or_more_of_different_names() -> None:
    a, b = parse_arm("a=grpc://h:1"), parse_arm("b=grpc://h:1")
    check_arms([a, b])
    with pytest.raises(UserError, match="nothing to compare"):
        check_arms([a])
    with pytest.raises(UserError, match="arms a, b, a must have different names"):
        check_arms([a, b, a])


def test_a_key_is_one_arms_alone() -> None:
    alike = [parse_arm(f"{name}=https://{host}/v1?model=m") for name, host in (("api-1", "one"), ("API_1", "two"))]
    with pytest.raises(UserError, match="api-1 and API_1 would both be asked with the key in SSV_AB_KEY_API_1"):
        check_arms(alike)


def test_settings_of_an_openai_arm_are_written_behind_its_address() -> None:
    text = "a=http://h/v1?model=m&max_completion_tokens=yes&stream_options=no&stream=no&seed=no&temperature=default"
    arm = parse_arm(text)
    assert (arm.max_completion_tokens, arm.stream_options, arm.stream, arm.seed) == (True, False, False, False)
    assert arm.temperature == "default" and parse_arm("a=grpc://h:1?temperature=0").temperature == 0.0
    assert all(arm.has(setting) for setting in text.partition("&")[2].split("&"))
    assert not parse_arm("a=http://h/v1?model=m").has("stream=no")


def test_a_price_is_of_gpus_in_use_or_not_and_an_arms_own_comes_first() -> None:
    plain = parse_arm("a=grpc://h:1")
    price = plain.price(per_hour=2.0, gpus=4.0, utilisation=0.5)
    assert price is not None and price.per_second == pytest.approx(2 * 4 / 3600 / 0.5)
    assert price.per_token == 0
    assert plain.price(per_hour=None, gpus=4.0, utilisation=0.5) is None
    own = parse_arm("a=grpc://h:1?gpus=1&price_per_hour=7.2").price(per_hour=2.0, gpus=4.0, utilisation=1.0)
    assert own is not None and own.per_second == pytest.approx(0.002)
    api = parse_arm("a=http://h/v1?model=m&price_per_1m_tokens=3").price(per_hour=2.0, gpus=4.0, utilisation=0.5)
    assert api is not None and (api.per_second, api.per_token) == (0.0, pytest.approx(3e-6))


# Limits.


def test_limits_are_times_in_seconds_and_shares() -> None:
    limits = parse_limits(" ttft_p95 < 500ms, itl_p99<0.08s,tpot_mean<50 ms, error_rate<2%,", shares=("error_rate",))
    assert [limit.name for limit in limits] == ["ttft_p95", "itl_p99", "tpot_mean", "error_rate"]
    assert [limit.value for limit in limits] == pytest.approx([0.5, 0.08, 0.05, 0.02])
    assert [limit.metric for limit in limits[:3]] == ["ttft", "itl", "tpot"]
    assert [limit.quantile for limit in limits[:3]] == [0.95, 0.99, None]
    assert list(map(str, limits)) == ["ttft_p95 < 500 ms", "itl_p99 < 80 ms", "tpot_mean < 50 ms", "error_rate < 2 %"]
    assert parse_limits("error_rate<0.02", shares=("error_rate",)) == (Limit("error_rate", 0.02),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ttft_p95", "'ttft_p95' is no limit: give NAME<NUMBER and its unit"),
        ("ttft_p95>500ms", "is no limit"),
        ("ttft_p95<-5ms", "is no limit"),
        ("ttft_p95<1e3ms", "is no limit"),
        ("ttft_p95<5min", "is no limit"),
        ("latency<5s", "unknown name 'latency' in 'latency<5s'; known: ttft_mean"),
        ("ttft_p42<5s", "unknown name 'ttft_p42'"),
        ("error_rate<2%", "unknown name 'error_rate'"),
        ("ttft_p95<500", "has the wrong unit: give ms or s for a time"),
        ("ttft_p95<5%", "has the wrong unit"),
        ("share<5ms", "has the wrong unit"),
        ("ttft_p95<0ms", "can never hold"),
        ("share<100%", "always does"),
        (" , ", "holds no limit"),
    ],
)
def test_what_is_no_limit_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_limits(text, shares=("share",))
    assert message in str(caught.value)


# The journal.


def test_records_come_back_as_they_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    reader = None
    with Journal(path) as journal:
        journal.append({"a": "é\u2028\n", "b": [1]})
        reader = JournalReader(path)
        assert reader.read() == [{"a": "é\u2028\n", "b": [1]}]
        journal.append({"c": None})
    assert reader.read() == [{"c": None}]
    assert reader.read() == []
    assert (reader.torn, reader.rest()) == (0, [])
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_line_that_a_crash_has_cut_takes_no_other_with_it(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"n":1}\n{"n":2,"te')
    with Journal(path) as journal:
        journal.append({"n": 3})
    reader = JournalReader(path)
    assert reader.read() == [{"n": 1}, {"n": 3}]
    assert reader.torn == 1


def test_a_line_that_is_still_written_is_left_for_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"n":1}\n{"n":')
    reader = JournalReader(path)
    assert reader.read() == [{"n": 1}]
    with path.open("ab") as file:
        file.write(b"2}\n")
    assert (reader.read(), reader.torn) == ([{"n": 2}], 0)


def test_the_rest_is_a_record_whose_line_was_cut_right_before_its_end_or_torn(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for tail, records, torn in ((b'{"n":2}', [{"n": 2}], 0), (b'{"n":2', [], 1), (b"7", [], 1), (b"\xff\xfe", [], 1)):
        path.write_bytes(b'{"n":1}\n' + tail)
        reader = JournalReader(path)
        assert reader.read() == [{"n": 1}]
        assert (reader.rest(), reader.torn) == (records, torn)


def test_a_file_that_has_become_shorter_is_not_the_same(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"n":1}\n{"n":2}\n')
    reader = JournalReader(path)
    reader.read()
    path.write_bytes(b'{"n":1}\n')
    with pytest.raises(UserError, match="has become shorter"):
        reader.read()


def test_lines_of_several_threads_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Journal(path) as journal:
        threads = [
            threading.Thread(target=lambda n=n: [journal.append({"n": n, "text": "x" * 5000}) for _ in range(20)])
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    reader = JournalReader(path)
    assert Counter(record["n"] for record in reader.read()) == dict.fromkeys(range(4), 20)
    assert reader.torn == 0


# Samples.

PLANNED = {"arm": "a", "concurrency": 1, "block": 0, "repeat": 0, "prompt": "p", "seed": 7}


def test_an_answer_is_a_sample_of_gaps_after_the_first_response() -> None:
    answer = Answer(text="x", arrivals=[(0.5, 2), (0.75, 1), (1.5, 3)], output_tokens=6, finish_reason="stop")
    made = answered(PLANNED, answer, 10.0, 12.0, 1.0)
    assert (made.ttft_s, made.gaps, made.e2e_s) == (0.5, ((0.25, 1), (0.75, 3)), 2.0)
    assert made.tpot_s == pytest.approx(1.0 / 4)
    assert (made.arm, made.seed, made.text, made.output_tokens, made.score) == ("a", 7, "x", 6, 1.0)


@pytest.mark.parametrize(("arrivals", "ttft"), [([], None), ([(0.5, 4)], 0.5)])
def test_an_answer_of_one_response_or_none_has_no_time_per_token(
    arrivals: list[tuple[float, int]], ttft: float | None
) -> None:
    made = answered(PLANNED, Answer(arrivals=arrivals), 0.0, 1.0, None)
    assert (made.ttft_s, made.gaps, made.tpot_s) == (ttft, (), None)


def test_samples_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    made = [sample(gaps=((0.5, 2),), ttft_s=0.1, text="é", tier="turbo"), sample(error="gone", score=0.0)]
    with Journal(path) as journal:
        for each in made:
            journal.append(each.to_dict())
    assert read_samples(path) == (made, 0)


@pytest.mark.parametrize(
    "line",
    [
        '{"arm":"a","concurren',
        "[1]",
        "{}",
        json.dumps({**sample().to_dict(), "surprise": 1}),
        json.dumps({**sample().to_dict(), "gaps": [[1]]}),
        json.dumps({**sample().to_dict(), "gaps": None}),
    ],
)
def test_lines_that_are_no_samples_are_counted_and_left_out(tmp_path: Path, line: str) -> None:
    path = tmp_path / "samples.jsonl"
    whole = json.dumps(sample().to_dict())
    path.write_text(f"{whole}\n{line}\n{whole}\n{whole[:-5]}")
    assert read_samples(path) == ([sample(), sample()], 2)
    path.write_text(f"{whole}\n{whole}")
    assert read_samples(path) == ([sample(), sample()], 0)
    assert Sample.from_dict(json.loads(whole)) == sample()
