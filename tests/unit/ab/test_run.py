"""Runs against arms that are made up: what is written and said of those that end well, break off, or cannot begin; and
their reports.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from ab_cases import FakeEndpoint, chunk, events, http_server, sample, send, settings, usage, whole_answer
from matplotlib import pyplot

from ssv.ab import cli, page, terminal
from ssv.ab.analysis import RunSettings, analyse
from ssv.ab.answers import EndpointError, Sampling
from ssv.ab.arms import Arm, parse_arm
from ssv.ab.journal import Journal
from ssv.ab.load import MAX_FAILURES, ArmDown, LoadGenerator
from ssv.ab.page import render
from ssv.ab.plan import make_plan, seed_of
from ssv.ab.questions import Question
from ssv.ab.run import EXIT_PARTIAL, blocks_in_words, power_in_words
from ssv.ab.samples import Sample, read_samples
from ssv.support.progress import silent

QUESTIONS = [Question(f"q{n}", f"prompt {n}", ("right",)) for n in range(8)]
DISCLOSED = {
    "bundle": "tiny",
    "confidence": 0.95,
    "tiers": {
        "turbo": {
            "policy": {"accept_below": 0.125, "verify_above": 0.5, "risk_budget": 0.75, "max_pending": 8},
            "lossless": False,
            "divergence": 0.02,
            "divergence_bound": 0.0321,
        }
    },
}


def right(prompt: str, seed: int) -> str:
    return "right"


class Arms:
    """What answers for each arm; counts and keeps who was asked what."""

    def __init__(self, **behave: Callable[[str, int], str]) -> None:
        self.behave, self.asked, self.endpoints = behave, list[tuple[str, str, int]](), list[FakeEndpoint]()

    def connect(self, arm: Arm, *, ca: Path | None = None) -> FakeEndpoint:
        def answer(prompt: str, seed: int) -> str:
            self.asked.append((arm.name, prompt, seed))
            return self.behave[arm.name](prompt, seed)

        self.endpoints.append(FakeEndpoint(answer, DISCLOSED))
        return self.endpoints[-1]


def dies_after(requests: int) -> Callable[[str, int], str]:
    left = [requests]

    def answer(prompt: str, seed: int) -> str:
        left[0] -= 1
        if left[0] < 0:
            raise EndpointError("UNAVAILABLE: gone for good")
        return "right"

    return answer


# The load.


def load_of(arms: Arms, names: str = "ab") -> LoadGenerator:
    addresses = [parse_arm(f"{name}=grpc://127.0.0.1:1") for name in names]
    return LoadGenerator(addresses, QUESTIONS, Sampling(16, 0.0, 5.0), seed=3, connect=arms.connect)


def test_a_plan_is_run_as_it_is_and_the_warm_up_is_not_measured(tmp_path: Path) -> None:
    arms = Arms(a=right, b=lambda prompt, seed: "wrong")
    plan = make_plan(8, "ab", [1], blocks_of=4, seed=3)
    with Journal(tmp_path / "s.jsonl") as journal:
        samples = load_of(arms).run(plan, journal, silent)
    planned = [(t.arm, f"q{p}", t.block, t.repeat, seed_of(3, f"q{p}", t.repeat)) for t in plan for p in t.prompts]
    assert [(s.arm, s.prompt, s.block, s.repeat, s.seed) for s in samples] == planned
    warm_up = [("a", "prompt 0"), ("b", "prompt 0")]
    assert [each[:2] for each in arms.asked] == warm_up + [(s.arm, f"prompt {s.prompt[1:]}") for s in samples]
    assert [seed for *_, seed in arms.asked[2:]] == [s.seed for s in samples]
    assert {s.score for s in samples if s.arm == "a"} == {1.0}
    assert {s.score for s in samples if s.arm == "b"} == {0.0}
    assert all(s.start_s <= s.end_s for s in samples)
    assert read_samples(tmp_path / "s.jsonl") == (samples, 0)


def test_as_many_requests_run_at_once_as_the_concurrency_says(tmp_path: Path) -> None:
    together = threading.Barrier(4, timeout=60)  # opens for four, or breaks

    def answer(prompt: str, seed: int) -> str:
        together.wait()
        return "right"

    arms = Arms(a=answer, b=answer)
    plan = make_plan(8, "ab", [4], blocks_of=None, seed=3)
    with Journal(tmp_path / "s.jsonl") as journal:
        load = load_of(arms)
        samples = load.run(plan, journal, silent)
    assert len(samples) == 32
    assert not any(s.error for s in samples)
    assert len(arms.endpoints) == 8  # a connection of its own for each worker and arm
    load.close()
    assert all(endpoint.closed for endpoint in arms.endpoints)


def test_each_sample_is_written_before_the_next_request(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    written: list[int] = []

    def answer(prompt: str, seed: int) -> str:
        written.append(len(path.read_bytes().splitlines()))
        return "right"

    with Journal(path) as journal:
        load_of(Arms(a=answer, b=answer)).run(make_plan(8, "ab", [1], blocks_of=None, seed=0), journal, silent)
    assert written == [0, 0, *range(32)]


def test_a_failed_request_is_a_sample_that_is_wrong(tmp_path: Path) -> None:
    def sometimes(prompt: str, seed: int) -> str:
        if prompt == "prompt 3":
            raise EndpointError("500: <page>\x1b[31m\n" + "x" * 10000 + "\ud800")
        return "right"

    with Journal(tmp_path / "s.jsonl") as journal:
        samples = load_of(Arms(a=right, b=sometimes)).run(
            make_plan(8, "ab", [1], blocks_of=None, seed=0), journal, silent
        )
    failed = [s for s in samples if s.error]
    assert {(s.arm, s.prompt, s.score, s.output_tokens, s.ttft_s) for s in failed} == {("b", "q3", 0.0, 0, None)}
    assert len(failed) == 2 and len(samples) == 32
    for s in failed:
        assert s.error.startswith("500: <page> [31m xxx")
        assert s.error.isprintable() and len(s.error) == 500


def test_an_arm_is_down_after_failures_in_a_row_and_one_that_stumbles_is_not(tmp_path: Path) -> None:
    plan = make_plan(8, "ab", [1], blocks_of=8, seed=0)
    with Journal(tmp_path / "s.jsonl") as journal, pytest.raises(ArmDown) as caught:
        load_of(Arms(a=right, b=dies_after(4))).run(plan, journal, silent)
    assert str(caught.value) == (
        f"arm b has failed {MAX_FAILURES + 2} times one after the other: UNAVAILABLE: gone for good"
    )
    kept, _ = read_samples(tmp_path / "s.jsonl")
    assert [s.error != "" for s in kept if s.arm == "b"] == [False] * 3 + [True] * (MAX_FAILURES + 2)

    count = [0]

    def stumbles(prompt: str, seed: int) -> str:
        count[0] += 1
        if count[0] % (MAX_FAILURES + 2):
            raise EndpointError("busy")
        return "right"

    count[0] = MAX_FAILURES + 1  # the warm-up is answered
    with Journal(tmp_path / "t.jsonl") as journal:
        assert len(load_of(Arms(a=right, b=stumbles)).run(plan, journal, silent)) == 32


def test_what_an_endpoint_does_that_is_no_answer_and_no_error_of_its_ends_the_run(tmp_path: Path) -> None:
    def broken(prompt: str, seed: int) -> str:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        load_of(Arms(a=broken, b=right)).warm_up(2)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, as it does in a terminal; in the background of a shell Python leaves it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def wake_main() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def wake_nobody() -> None:
    """As where the signal comes right before the main thread falls asleep, which is too short a time to be hit here."""
    signal.raise_signal(signal.SIGINT)  # to the thread that calls it


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("interrupt", [wake_main, wake_nobody])
def test_an_answer_that_comes_after_an_interruption_is_written_nowhere(
    interrupt: Callable[[], None], tmp_path: Path
) -> None:
    released = threading.Event()
    workers: list[threading.Thread] = []

    def answer(prompt: str, seed: int) -> str:
        if len(arms.asked) > 5:
            workers.append(threading.current_thread())
            interrupt()
            released.wait(60)
        return "right"

    arms = Arms(a=answer, b=answer)
    with Journal(tmp_path / "s.jsonl") as journal, pytest.raises(KeyboardInterrupt):
        load_of(arms).run(make_plan(8, "ab", [1], blocks_of=8, seed=0), journal, silent)
    other = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
    if other != journal._file:  # the number that the journal's file had becomes this one's
        os.dup2(other, journal._file)
        os.close(other)
    released.set()
    workers[0].join(60)
    os.close(journal._file)
    assert not workers[0].is_alive()
    assert (tmp_path / "other").read_bytes() == b""
    samples, torn = read_samples(tmp_path / "s.jsonl")
    assert (len(samples), torn) == (3, 0)
    assert len(arms.asked) == 6  # and nothing more is asked


# The command line: what cannot begin.


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path)


def write_prompts(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    lines = [{"id": f"q{n}", "prompt": f"prompt {n}", "answer": "right"} for n in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(autouse=True)
def signals_stay() -> Any:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


A, B = "a=grpc://127.0.0.1:1", "b=grpc://127.0.0.1:1?method=turbo"


def ab(prompts: Path, *options: str, a: str = A, b: str = B) -> int:
    out = () if "--out" in options else ("--out", str(prompts.parent / "out"))
    return cli.main(["run", "--a", a, "--b", b, "--prompts", str(prompts), *out, *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--arm", "c"), "'c' is no arm"),
        (("--arm", A), "must have different names"),
        (("--arm", "c=grpc://h:1?speed=9"), "unknown setting 'speed'"),
        (("--price-per-hour", "-1"), "--price-per-hour -1.0 must be above 0"),
        (("--price-per-hour", "nan"), "--price-per-hour nan must be above 0"),
        (("--gpus", "0"), "--gpus 0.0 must be above 0"),
        (("--timeout", "inf"), "--timeout inf must be above 0"),
        (("--num-prompts", "0"), "--num-prompts 0 must be above 0"),
        (("--max-tokens", "-5"), "--max-tokens -5 must be above 0"),
        (("--utilisation", "1.5"), "--utilisation 1.5 must be a share"),
        (("--utilisation", "0"), "--utilisation 0.0 must be a share"),
        (("--margin", "2"), "--margin 2.0 must be a share"),
        (("--margin", "0"), "--margin 0.0 must be a share"),
        (("--discordant", "1"), "--discordant 1.0 must be a share"),
        (("--temperature", "-1"), "--temperature -1.0 must be 0 or above"),
        (("--slo", "speed<5ms"), "unknown name 'speed' in 'speed<5ms'"),
        (("--slo", "ttft_p95<500"), "wrong unit"),
        (("--concurrency", "1,two"), "--concurrency '1,two'"),
        (("--concurrency", "0"), "give whole numbers from 1 to 1024"),
        (("--concurrency", "1,9"), "8 prompts do not fill a block of 9, for concurrency 9"),
        (("--num-prompts", "3", "--concurrency", "4"), "3 prompts do not fill a block of 4"),
        (("--cost-per-correct",), "--cost-per-correct needs a price"),
    ],
)
def test_what_cannot_be_run_is_refused_and_nothing_is_written(
    prompts: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ab(prompts, *options) == 2
    said = capsys.readouterr().err
    assert message in said and "error: " in said and "Traceback" not in said
    assert not (prompts.parent / "out").exists()


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([{"prompt": "x"}], ("--margin", "0.1"), "no prompt of"),
        ([{"prompt": "x", "answer": "y"}, {"prompt": "z", "id": "lacking"}], ("--cost-per-correct",), "'lacking'"),
        ([{"prompt": "x", "answer": "y", "check": "f1"}], ("--cost-per-correct",), "right or wrong, and '1'"),
        ([], (), "holds no prompts"),
        ([{"prompt": "x", "id": 1}, {"prompt": "y", "id": "1"}], (), "the id '1' comes 2 times"),
        ([{"question": "x"}], (), "prompts.jsonl:1: expected a JSON object"),
    ],
)
def test_prompts_that_do_not_do_are_refused(
    prompts: Path, lines: list[Any], options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ab(prompts, "--price-per-hour", "1", *options) == 2
    assert message in capsys.readouterr().err
    assert not (prompts.parent / "out").exists()
    assert ab(prompts.with_name("none.jsonl")) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_not_written_to(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = prompts.parent / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    assert ab(prompts) == 2
    assert "is there already" in (said := capsys.readouterr().err) and "hint: choose another --out" in said
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert ab(prompts, "--out", str(out / "mine")) == 2
    assert (out / "mine").read_text() == "mine"


def test_an_endpoint_that_is_down_at_the_start_is_named_and_nothing_is_written(
    prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with http_server(lambda handler, _: send(handler, whole_answer())) as url:
        assert ab(prompts, a=f"a={url}?model=m", b="b=http://127.0.0.1:1/v1?model=m") == 2
    said = capsys.readouterr().err
    assert "error: arm b at http://127.0.0.1:1/v1 does not answer: APIConnectionError" in said
    assert ab(prompts, a="a=grpc://127.0.0.1") == 2
    assert "is not the address of a server" in capsys.readouterr().err
    assert not (prompts.parent / "out").exists()


def test_an_endpoint_that_sends_garbage_from_the_start_is_named_and_nothing_is_written(
    prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with http_server(lambda handler, _: send(handler, b"<html>Welcome!</html>")) as url:
        assert ab(prompts, a=f"a={url}?model=m", b=f"b={url}?model=m") == 2
    assert f"arm a at {url} does not answer: what came is no stream of chat completions" in capsys.readouterr().err
    assert not (prompts.parent / "out").exists()


# Runs that end well, or do not.


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take most of a second: only tests of the page have them."""
    monkeypatch.setattr(page, "render", lambda document, samples: f"<p>{document['status']}</p>")


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Arms]:
    def play(**behave: Callable[[str, int], str]) -> Arms:
        arms = Arms(**behave)
        monkeypatch.setattr(cli, "connect", arms.connect)
        return arms

    return play


def report_of(folder: Path) -> dict[str, Any]:
    document = json.loads((folder / "report.json").read_text())
    assert not list(folder.glob("*.part"))
    return document


def test_a_run_writes_its_settings_samples_and_reports(
    prompts: Path, played: Callable[..., Arms], capsys: pytest.CaptureFixture[str]
) -> None:
    played(a=right, b=right)
    options = ("--concurrency", "1,2,1", "--price-per-hour", "2", "--slo", "e2e_p95<60s", "--margin", "0.1")
    assert ab(prompts, *options, "--cost-per-correct") == 0
    folder, said = prompts.parent / "out", capsys.readouterr()
    assert sorted(path.name for path in folder.iterdir()) == [
        "report.html", "report.json", "run.json", "samples.jsonl",
    ]  # fmt: skip
    document = report_of(folder)
    assert (document["status"], document["schema_version"]) == ("complete", 1)
    assert document["settings"]["concurrency"] == [1, 2]
    assert [(row["arm"], row["concurrency"], row["requests"]) for row in document["figures"]] == [
        ("a", 1, 16), ("b", 1, 16), ("a", 2, 16), ("b", 2, 16),
    ]  # fmt: skip
    assert all(row["cost_per_correct"] and row["good_share"] == 1.0 for row in document["figures"])
    (comparison,) = document["comparisons"]
    assert (comparison["quality"]["prompts"], comparison["identical_share"]) == (8, 1.0)
    assert document["arms"][1]["tiers"] == DISCLOSED["tiers"]
    assert {"command", "date", "commit", "machine", "versions"} <= document.keys()
    assert comparison["verdict"] in re.sub(r"\s+", " ", said.out)
    assert "before the run: a margin of 10 points needs " in said.err
    assert "there are 8: quality will probably stay undecided" in said.err
    assert "too few prompts for intervals, which need 12 for concurrency 2; there are 8" in said.err
    assert len((folder / "samples.jsonl").read_bytes().splitlines()) == 64


def test_the_first_prompts_are_taken_and_only_those_of_the_plan(prompts: Path, played: Callable[..., Arms]) -> None:
    arms = played(a=right, b=right)
    assert ab(prompts, "--num-prompts", "2") == 0
    assert {prompt for _, prompt, _ in arms.asked} == {"prompt 0", "prompt 1"}
    assert report_of(prompts.parent / "out")["settings"]["num_prompts"] == 2


def test_an_arm_that_dies_leaves_a_partial_report_that_says_so(
    prompts: Path, played: Callable[..., Arms], capsys: pytest.CaptureFixture[str]
) -> None:
    played(a=right, b=dies_after(6))
    assert ab(prompts, "--price-per-hour", "1", "--margin", "0.1") == EXIT_PARTIAL
    folder, said = prompts.parent / "out", capsys.readouterr().out
    samples, torn = read_samples(folder / "samples.jsonl")
    status = report_of(folder)["status"]
    assert status == (
        "arm b has failed 7 times one after the other: UNAVAILABLE: gone for good; "
        f"{len(samples)} of 32 requests were made"
    )
    assert sum(not s.error for s in samples if s.arm == "b") == 4 and torn == 0
    assert "Partial report: arm b has failed 7 times" in said
    assert "7 of its 11 requests failed" in report_of(folder)["comparisons"][0]["verdict"]
    assert status in (folder / "report.html").read_text()
    # Made again it says the same.
    before = (folder / "report.html").read_bytes()
    assert cli.main(["report", str(folder)]) == EXIT_PARTIAL
    assert report_of(folder)["status"] == status
    assert (folder / "report.html").read_bytes() == before


@pytest.mark.parametrize("broken", ["not JSON", "no usage", "broken off", "500"])
def test_an_arm_that_sends_garbage_in_mid_run_is_partial_and_loses_nothing(prompts: Path, broken: str) -> None:
    garbage: Mapping[str, tuple[bytes, dict[str, int]]] = {
        "not JSON": (events(b"{nope"), {}),
        "no usage": (events(chunk("right"), chunk(reason="stop")), {}),
        "broken off": (events(chunk("ri"), done=False), {"missing": 99}),
        "500": (b"<html>" + b"x" * 100000, {"status": 500}),
    }
    count = [0]

    def respond(handler: Any, body: dict[str, Any]) -> None:
        if body["model"] == "bad":
            count[0] += 1
        if count[0] > 4 and body["model"] == "bad":
            content, options = garbage[broken]
            send(handler, content, **options)
        else:
            send(handler, whole_answer("right"))

    with http_server(respond) as url:
        assert ab(prompts, a=f"a={url}?model=good", b=f"b={url}?model=bad") == EXIT_PARTIAL
    folder = prompts.parent / "out"
    samples, _ = read_samples(folder / "samples.jsonl")
    assert [s.error != "" for s in samples if s.arm == "b"] == [False] * 2 + [True] * 7
    assert not any(s.error for s in samples if s.arm == "a")
    assert report_of(folder)["status"].startswith("arm b has failed 7 times")
    assert (folder / "report.json").stat().st_size < 20_000


def test_an_interrupted_run_reports_what_there_is(
    prompts: Path, played: Callable[..., Arms], capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(prompt: str, seed: int) -> str:
        if len(arms.asked) > 14:
            raise KeyboardInterrupt
        return "right"

    arms = played(a=interrupted, b=interrupted)
    assert ab(prompts) == EXIT_PARTIAL
    folder = prompts.parent / "out"
    assert report_of(folder)["status"] == "the run was interrupted; 10 of 32 requests were made"
    assert len(read_samples(folder / "samples.jsonl")[0]) == 10
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler  # as a SIGTERM would


def test_a_run_that_measured_nothing_says_why(
    prompts: Path, played: Callable[..., Arms], capsys: pytest.CaptureFixture[str]
) -> None:
    played(a=right, b=dies_after(1))
    assert ab(prompts, "--concurrency", "2") == 2
    assert "nothing was measured: arm b at grpc://127.0.0.1:1 does not answer" in capsys.readouterr().err


def test_a_disk_that_is_full_ends_the_run_and_not_the_report(
    prompts: Path, played: Callable[..., Arms], monkeypatch: pytest.MonkeyPatch
) -> None:
    played(a=right, b=right)
    append, count = Journal.append, [0]

    def full(journal: Journal, record: Mapping[str, Any]) -> None:
        count[0] += 1
        if count[0] > 9:
            raise OSError(28, "No space left on device")
        append(journal, record)

    monkeypatch.setattr(Journal, "append", full)
    assert ab(prompts) == EXIT_PARTIAL
    assert report_of(prompts.parent / "out")["status"] == (
        "samples could not be written: [Errno 28] No space left on device; 9 of 32 requests were made"
    )


# Reports of what was saved.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_prompts(tmp_path_factory.mktemp("saved"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "connect", Arms(a=right, b=right).connect)
        patch.setattr(page, "render", lambda document, samples: f"<p>{document['status']}</p>")
        assert ab(path, "--margin", "0.1") == 0
    return path.parent / "out"


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A run's, to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "out"))


def test_the_same_samples_give_the_same_report(folder: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in ("report.json", "report.html")}
    for name in before:
        (folder / name).unlink()
    assert cli.main(["report", str(folder)]) == 0
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_a_torn_last_line_is_left_out_and_the_report_says_so(folder: Path) -> None:
    path = folder / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    assert cli.main(["report", str(folder)]) == EXIT_PARTIAL
    document = report_of(folder)
    assert document["status"] == (
        "the run ended before its time; 31 of 32 requests were made; 1 damaged lines of samples.jsonl were left out"
    )
    assert sum(row["requests"] for row in document["figures"]) == 31
    # One that only lacks its end is whole.
    path.write_bytes(path.read_bytes().rpartition(b"\n")[0])
    assert cli.main(["report", str(folder)]) == EXIT_PARTIAL
    assert report_of(folder)["status"] == "the run ended before its time; 31 of 32 requests were made"


def test_a_damaged_line_besides_all_samples_is_told(folder: Path) -> None:
    with (folder / "samples.jsonl").open("ab") as file:
        file.write(b'{"arm": "a"}\n')
    assert cli.main(["report", str(folder)]) == EXIT_PARTIAL
    assert report_of(folder)["status"] == "1 damaged lines of samples.jsonl were left out"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", None, "is not the folder of a run"),
        ("run.json", "{", "is not the folder of a run"),
        ("run.json", "[]", "is not the folder of a run"),
        ("run.json", "{}", "is not the folder of a run"),
        ("run.json", '{"settings": {"arms": []}}', "is not the folder of a run"),
        ("samples.jsonl", None, "is not the folder of a run"),
        ("samples.jsonl", "", "holds no samples"),
        ("samples.jsonl", '{"arm": "a', "holds no samples"),
    ],
)
def test_what_is_no_folder_of_a_run_is_refused(
    folder: Path, name: str, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    assert cli.main(["report", str(folder)]) == 2
    assert cli.main(["compare", str(folder), str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.count(message) == 2 and "Traceback" not in said


def test_two_runs_are_compared_arm_by_arm(
    folder: Path, prompts: Path, played: Callable[..., Arms], capsys: pytest.CaptureFixture[str]
) -> None:
    played(b=right, c=right)
    after = prompts.parent / "after"
    assert ab(prompts, "--margin", "0.2", "--out", str(after), a=B, b="c=grpc://127.0.0.1:1") == 0
    capsys.readouterr()
    assert cli.main(["compare", str(folder), str(after)]) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"b:{after}against{folder},95.0%intervals" in said.replace(" ", "")  # the title may be broken anywhere
    assert "cost" in said and "a: " not in said and "c: " not in said
    assert "quality of b: before 100.0%, after 100.0% (right or wrong, 8 prompts); difference +0.0 points [" in said
    assert "margin 20: undecided" in said and "100.0% of the answers are the same text" in said
    assert "The runs were made at different times" in said
    assert "that differ" not in said


def test_answers_that_differ_between_two_runs_are_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three of the eight, first those that are right in one run alone, and nothing that a terminal would obey."""
    after = write_run(folder.with_name("after"), folder, {})
    lines = [json.loads(line) for line in (after / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        line["text"] += "[b]\x1b[31m\n" + "long " * 99
        line["score"] = 0.0 if line["prompt"] == "q5" else line["score"]
    (after / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["compare", str(folder), str(after)]) == 0
    said = capsys.readouterr().out
    shown = said.split("answers of b that differ, for example:\n")[1].splitlines()[:9]
    assert [line.strip() for line in shown[::3]] == ["q5", "q0", "q1"]
    assert shown[1] == "    before (100%): right"
    assert shown[2].startswith(r"    after (0%): right[b]\x1b[31m\nlong long ") and shown[2].endswith("…")
    assert max(map(len, shown)) < 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1, "max_tokens": 99}, "the runs differ in max_tokens, seed"),
        ({"prompts_sha256": "another"}, "the runs differ in prompts_sha256"),
        ({"concurrency": [2]}, "the runs differ in concurrency"),
    ],
)
def test_runs_of_other_settings_are_not_compared(
    folder: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(folder.with_name("other"), folder, changes)
    assert cli.main(["compare", str(folder), str(other)]) == 2
    said = capsys.readouterr().err
    assert message in said and "hint: choose runs of the same prompts" in said


def test_runs_without_an_arm_of_the_same_name_are_not_compared(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = [{"name": name, "url": "grpc://h:1"} for name in "xy"]
    other = write_run(folder.with_name("other"), folder, {"arms": arms})
    assert cli.main(["compare", str(folder), str(other)]) == 2
    assert "no arm of the same name" in capsys.readouterr().err


def write_run(folder: Path, like: Path, changes: dict[str, Any]) -> Path:
    folder.mkdir()
    header = json.loads((like / "run.json").read_text())
    header["settings"] |= changes
    (folder / "run.json").write_text(json.dumps(header))
    (folder / "samples.jsonl").write_bytes((like / "samples.jsonl").read_bytes())
    return folder


# Said before the run.


def test_the_number_of_prompts_that_a_margin_needs_is_said_before() -> None:
    assert power_in_words(settings(), QUESTIONS, 0.1) is None
    text = power_in_words(settings(margin=0.05, num_answers=10_000), QUESTIONS, 0.1)
    assert text is not None
    needed = int(re.findall(r"needs (\d+) prompts", text)[0])
    assert 200 < needed < 500 and text.endswith("there are 10000") and "differ on 10% of them" in text
    few = power_in_words(settings(margin=0.05, num_answers=needed - 1), QUESTIONS, 0.1)
    assert few is not None and few.endswith(f"there are {needed - 1}: quality will probably stay undecided")
    three = power_in_words(settings(margin=0.05, arms=settings().arms * 2), QUESTIONS, 0.1)
    assert three is not None and int(re.findall(r"needs (\d+)", three)[0]) > needed
    scores = power_in_words(settings(margin=0.05), [Question("1", "?", ("a",), "f1")], 0.1)
    assert scores is not None and "standard deviation of 0.25" in scores


def test_too_few_prompts_for_intervals_are_said_before() -> None:
    assert blocks_in_words(settings(num_prompts=24, concurrency=(1, 4))) is None
    assert blocks_in_words(settings(num_prompts=23, concurrency=(1, 4))) == (
        "too few prompts for intervals, which need 24 for concurrency 4; there are 23"
    )
    words = blocks_in_words(settings(num_prompts=40, concurrency=(1, 8), blocks_of=7))
    assert words is not None and "need 42 for concurrency 1, 48 for concurrency 8" in words


# The page, and the terminal.


class Page(HTMLParser):
    """Whether a page's tags are closed, and what they are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " " if tag in ("td", "th") else ""

    def handle_data(self, data: str) -> None:
        self.text += data


def document_of(
    run: RunSettings, samples: Sequence[Sample], disclosures: Mapping[str, Any] | None = None, status: str = "complete"
) -> dict[str, Any]:
    document = analyse(run, samples, disclosures or {}, status=status)
    where = {"command": "ssv-ab run", "date": "today", "commit": "0", "machine": {"cpu": "c", "cores": 2}}
    return json.loads(json.dumps(document | where | {"versions": {"ssv": "1"}}))  # as report.json has it


def served(arm: str, seconds: float, blocks: int = 6, **fields: Any) -> list[Sample]:
    told: dict[str, Any] = {"tier": "turbo", "lossless": False, "score": 1.0, "ttft_s": seconds / 2, **fields}
    return [
        sample(arm, block, repeat, f"p{block}", start=0, end=seconds * (1 + block / 10), **told)
        for block in range(blocks)
        for repeat in (0, 1)
    ]


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_a_page_needs_nothing_else_and_says_everything() -> None:
    samples = served("a", 2.0) + served("b", 1.0)
    document = document_of(settings(margin=0.1, slo="ttft_p95<1s"), samples, {"b": DISCLOSED})
    text = render(document, samples)
    shown = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in shown.tags}
    for _, attributes in shown.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action", "style"):
                assert not re.search(r"(?i)(https?:)?//|data:|@import", value or ""), (name, value)
            assert not name.startswith("on")
    assert "url(http" not in text and "@import" not in text
    assert [tag for tag, _ in shown.tags].count("svg") == 4  # cost, quality, and two latencies
    assert squeezed(shown.text).index(document["recommendation"]) < squeezed(shown.text).index("Figures")
    assert ("p", {"class": "verdict open"}) in shown.tags
    said = squeezed(shown.text)
    for each in (
        document["comparisons"][0]["verdict"],
        "SLO: ttft_p95<1s. Met by the arm as a whole: a x1: no; b x1: yes.",
        "tiny turbo no 0.125 0.5 0.75 2.0% 3.21% at 95%",  # what is disclosed of the tier
        "not disclosed",  # of arm a's server
        "McNemar p = 1.",
        "margin 10: undecided",
        "time to the first token, of reasoning or of the answer",  # of the glossary
        "cost per token"[:4],
        '"temperature": 0.0',
        "ssv 1",
        "today, commit 0, c, 2 cores",
        *document["notes"],
    ):
        assert each in said, each
    assert "Partial report" not in said


HOSTILE = "<script>alert('x')</script> & \"q\" {{ 7 * 7 }} [/red] $x$ </p>"


def test_what_others_have_written_is_text_on_the_page() -> None:
    samples = served("a", 1.0, tier=HOSTILE) + served("b", 2.0, error=HOSTILE)
    run = settings(prompts=HOSTILE, arms=(parse_arm("a=grpc://h:1"), Arm("b", "http://h", model=HOSTILE)))
    document = document_of(run, samples, {"a": {**DISCLOSED, "bundle": HOSTILE}}, status=HOSTILE)
    document["comparisons"][0]["verdict"] = document["command"] = HOSTILE
    shown = Page(render(document, samples))
    assert "script" not in {tag for tag, _ in shown.tags}
    assert shown.text.count(HOSTILE) >= 6  # status, verdict, command, tier, bundle, model
    terminal.show(document)


def test_a_page_of_failures_or_of_an_arm_without_its_rival_is_a_page() -> None:
    gone = served("a", 1.0, error="gone", output_tokens=0, tier=None, lossless=None, ttft_s=None, score=None)
    run = settings(concurrency=(1, 4))
    for samples in (served("b", 1.0), [*gone, *served("b", 1.0)]):
        document = document_of(run, samples, status="arm b has gone")
        shown = Page(render(document, samples))
        assert "Partial report. arm b has gone" in squeezed(shown.text)
        terminal.show(document)


def test_examples_of_answers_that_differ_are_on_the_page() -> None:
    samples = served("a", 2.0, text="It is Oslo.") + served("b", 1.0, text=HOSTILE, score=0.0)
    said = squeezed(Page(render(document_of(settings(margin=0.1), samples), samples)).text)
    assert f"It is Oslo. 100% {squeezed(HOSTILE)} 0%" in said


def test_quality_is_one_point_an_arm_at_any_number_of_concurrencies(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[str]] = {}
    forest = page._forest

    def keep(rows: Any, title: str, *rest: Any) -> Any:
        drawn[title] = [name for _, name, *_ in rows]
        return forest(rows, title, *rest)

    monkeypatch.setattr(page, "_forest", keep)
    samples = [*served("a", 2.0), *served("b", 1.0)]
    samples += [replace(s, concurrency=4, block=s.block + 9) for s in samples]
    render(document_of(settings(margin=0.1, concurrency=(1, 4)), samples), samples)
    assert drawn == {"Cost per token, by concurrency": ["b at 1", "b at 4"], "Quality": ["b"]}


def test_nothing_of_a_plot_is_cut_off_however_long_the_names_are() -> None:
    arms = (parse_arm(f"{'long-name-' * 3}-1=grpc://h:1"), parse_arm(f"{'long-name-' * 3}-2=grpc://h:2"))
    samples = [*served(arms[0].name, 2.0), *served(arms[1].name, 1.0)]
    document = document_of(settings(arms=arms, margin=0.1), samples)
    figures = [*page._trade(document), *page._latencies(document, samples)]
    for figure in figures:
        figure.draw_without_rendering()
        within = figure.bbox.padded(1.0)
        (axes,) = figure.axes
        legend = axes.get_legend()
        texts = [*figure.texts, axes.title, axes.xaxis.label, axes.yaxis.label, *axes.get_yticklabels()]
        for text in (*texts, *(legend.get_texts() if legend is not None else ())):
            box = text.get_window_extent()
            assert not text.get_text() or (within.x0 <= box.x0 and box.x1 <= within.x1), text.get_text()
        assert axes.get_position().width > 0.3, "there is room for the plot"
        pyplot.close(figure)


def test_every_cell_has_its_columns_name_for_narrow_screens() -> None:
    samples = served("a", 2.0, text="It is Oslo.") + served("b", 1.0, text=HOSTILE, score=0.0)
    samples += [replace(s, concurrency=4, block=s.block + 9) for s in samples]
    run = settings(margin=0.1, slo="ttft_p95<1s", concurrency=(1, 4))
    text = render(document_of(run, samples, {"b": DISCLOSED}), samples)
    tables = re.findall(r'<table class="stack">(.*?)</table>', text, re.DOTALL)
    assert len(tables) == text.count("<table") == 4
    for table in tables:
        head, *rows = table.split("<tr>")[1:]
        columns = [name.replace("\u200b", "") for name in re.findall(r"<th[^>]*>(.*?)</th>", head)]
        assert rows and columns
        for row in rows:
            assert re.findall(r'<td[^>]* data-label="([^"]*)"', row) == columns and row.count("<td") == len(columns)


def test_differences_of_every_concurrency_are_on_the_page() -> None:
    samples = served("a", 1.0) + served("b", 1.0)
    slim = [s for s in samples if s.block < 3]
    slim = [sample(s.arm, s.block, s.repeat, s.prompt, start=0, end=1, ttft_s=None) for s in slim]
    more = [sample(s.arm, s.block + 9, s.repeat, s.prompt, start=0, end=1, ttft_s=0.1, concurrency=2) for s in samples]
    document = document_of(settings(concurrency=(1, 2)), slim + more)
    assert "ttft_p50" in squeezed(Page(render(document, slim + more)).text)


def test_the_page_of_the_same_samples_is_the_same() -> None:
    samples = served("a", 2.0) + served("b", 1.0)
    document = document_of(settings(), samples)
    assert render(document, samples) == render(document, samples)


def test_the_terminal_shows_figures_differences_verdict_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    samples = served("a", 2.0) + served("b", 1.0)
    document = document_of(settings(margin=0.1), samples, status="cut [short]")
    terminal.show(document)
    said = squeezed(capsys.readouterr().out)
    assert "Partial report: cut [short]" in said
    assert document["comparisons"][0]["verdict"] in said
    assert all(f"Note: {note}" in said for note in document["notes"])
    assert "-50.0% [-50.0%, -50.0%]" in said
    assert "b against a, 95.0% intervals" in said


def test_an_endpoint_may_count_more_or_fewer_tokens_than_chunks(prompts: Path) -> None:
    with http_server(lambda handler, _: send(handler, events(chunk("right"), chunk(reason="stop"), usage(9)))) as url:
        assert ab(prompts, "--num-prompts", "1", a=f"a={url}?model=m", b=f"b={url}?model=m") == 0
    assert {row["output_tokens"] for row in report_of(prompts.parent / "out")["figures"]} == {18}
