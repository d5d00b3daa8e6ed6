"""What every command says of its users' mistakes, and of bugs of ours.

Mistakes of one command alone are tested with it.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

Main = Callable[[Sequence[str]], int]

MAINS: dict[str, Main] = {
    name: importlib.import_module(f"ssv.{module}").main
    for name, module in (
        ("ssv-build", "builder.cli"),
        ("ssv-generate", "client.cli"),
        ("ssv-bench", "ab.bench"),
        ("ssv-ab", "ab.cli"),
        ("ssv-eval", "ab.evaluation.cli"),
        ("ssv-serve", "triton_repo.serve"),
        ("openai", "triton_repo.openai.process"),
    )
}

FILES = {
    "good.jsonl": b'{"prompt": "hi"}\n',
    "latin.jsonl": b'{"prompt": "\xe9"}\n',
    "words.jsonl": b"hi\n",
    "words.gz": b"hi\n",
    "list.jsonl": b"[1]\n",
    "empty.jsonl": b"",
    "open.yaml": b"a: [1",
    "latin.yaml": b"\xff\xfea",
    "list.yaml": b"- 1",
    "empty.yaml": b"",
    "date.yaml": b"a: 2024-99-99",
    "deep.yaml": b"[" * 3000,
    "tag.yaml": b"a: !!python/object:os.system {}",
    "folder/manifest.json": b"{}",
    "binary/manifest.json": b"\xff\xfe",
    "words/manifest.json": b"hi",
    "key.pem": b"no key",
}

ARMS = ["--a", "a=grpc://127.0.0.1:1", "--b", "b=grpc://127.0.0.1:2"]
RUN = ["run", *ARMS, "--prompts"]

MISTAKES: list[tuple[str, list[str], str]] = [
    ("ssv-build", ["inspect", "--bundle", "nowhere"], "nowhere is not a bundle"),
    ("ssv-build", ["inspect", "--bundle", "good.jsonl"], "good.jsonl is not a bundle"),
    ("ssv-build", ["inspect", "--bundle", "folder"], "folder/manifest.json has schema version None"),
    ("ssv-build", ["inspect", "--bundle", "binary"], "binary/manifest.json is damaged"),
    ("ssv-build", ["inspect", "--bundle", "words"], "words/manifest.json is damaged"),
    ("ssv-build", ["pair", "nowhere.yaml", "--out", "o"], "nowhere.yaml"),
    ("ssv-build", ["pair", "folder", "--out", "o"], "folder cannot be read (Is a directory)"),
    ("ssv-build", ["pair", "open.yaml", "--out", "o"], "open.yaml is not YAML"),
    ("ssv-build", ["pair", "latin.yaml", "--out", "o"], "latin.yaml is not"),
    ("ssv-build", ["pair", "list.yaml", "--out", "o"], "list.yaml: recipe"),
    ("ssv-build", ["pair", "empty.yaml", "--out", "o"], "empty.yaml: recipe"),
    ("ssv-build", ["pair", "tag.yaml", "--out", "o"], "tag.yaml is not YAML"),
    ("ssv-build", ["pair", "date.yaml", "--out", "o"], "date.yaml is not YAML (month must be"),
    ("ssv-build", ["pair", "deep.yaml", "--out", "o"], "deep.yaml is nested too deeply"),
    ("ssv-build", ["quantize", "nowhere", "--role", "target", "--precision", "fp8", "--out", "o"],
     "checkpoint nowhere does not exist"),
    ("ssv-build", ["compile", "--role", "target", "--precision", "fp16", "--compute-capability", "x", "--bundle", "o"],
     "compute_capability.0"),
    ("ssv-build", ["kernels", "--bundle", "nowhere", "--out", "k"], "nowhere is not a bundle"),
    ("ssv-generate", ["hi", "--bundle", "nowhere"], "nowhere is not a bundle"),
    ("ssv-generate", ["hi", "--bundle", "binary"], "binary/manifest.json is damaged"),
    ("ssv-generate", ["hi", "--bundle", "nowhere", "--max-tokens", "0"], "max_tokens 0 must be between 1 and"),
    ("ssv-generate", ["hi", "--bundle", "nowhere", "--temperature", "nan"], "temperature nan must be a number"),
    ("ssv-generate", ["\udcff", "--bundle", "nowhere"], "the prompt is not UTF-8"),
    ("ssv-generate", ["hi", "--bundle", "nowhere", "--stop", ""], "stop: an empty string"),
    ("ssv-generate", ["hi", "--url", "nowhere"], "'nowhere' is not the address of a server"),
    ("ssv-generate", ["hi", "--url", "grpc://h:99999"], "'grpc://h:99999' is not the address of a server"),
    ("ssv-generate", ["hi", "--url", "grpc://[::1"], "'grpc://[::1' is not the address of a server"),
    ("ssv-generate", ["hi", "--url", "grpc://127.0.0.1:1"], "no server answers at grpc://127.0.0.1:1"),
    ("ssv-generate", ["hi", "--url", "grpc://127.0.0.1:1", "--seed", str(2**70)], f"seed {2**70} is not a number"),
    ("ssv-generate", ["hi", "--url", "grpcs://127.0.0.1:1", "--tls-ca", "nowhere"], "nowhere: No such file"),
    ("ssv-bench", ["--bundle", "nowhere", "--prompts", "good.jsonl"], "nowhere is not a bundle"),
    ("ssv-bench", ["--bundle", "folder", "--prompts", "nowhere"], "nowhere cannot be read (No such file"),
    ("ssv-bench", ["--bundle", "folder", "--prompts", "folder"], "folder cannot be read (Is a directory)"),
    ("ssv-bench", ["--bundle", "folder", "--prompts", "latin.jsonl"], "latin.jsonl is not UTF-8"),
    ("ssv-bench", ["--bundle", "folder", "--prompts", "words.jsonl"], "words.jsonl:1: it is not JSON"),
    ("ssv-bench", ["--bundle", "folder", "--prompts", "list.jsonl"], "list.jsonl:1: expected a JSON object"),
    ("ssv-bench", ["--bundle", "folder", "--prompts", "empty.jsonl"], "empty.jsonl holds no prompts"),
    ("ssv-bench", ["--bundle", "folder", "--prompts", "good.jsonl", "--methods", "x"], "unknown method 'x'"),
    ("ssv-bench", ["--bundle", "folder", "--prompts", "good.jsonl", "--plot", "no/x.png"], "--plot no/x.png"),
    ("ssv-ab", [*RUN, "nowhere"], "nowhere cannot be read"),
    ("ssv-ab", [*RUN, "latin.jsonl"], "latin.jsonl is not UTF-8"),
    ("ssv-ab", [*RUN, "words.jsonl"], "words.jsonl:1: "),
    ("ssv-ab", [*RUN, "empty.jsonl"], "empty.jsonl holds no prompts"),
    ("ssv-ab", [*RUN, "good.jsonl", "--slo", "x"], "'x' is no limit"),
    ("ssv-ab", [*RUN, "good.jsonl", "--concurrency", "4"], "1 prompts do not fill a block of 4"),
    ("ssv-ab", [*RUN, "good.jsonl", "--out", "good.jsonl"], "good.jsonl is there already"),
    ("ssv-ab", [*RUN, "good.jsonl", "--out", "new"], "arm a at grpc://127.0.0.1:1 does not answer"),
    ("ssv-ab", [*RUN, "good.jsonl", "--seed", "-1"], "--seed -1 must be a whole number from 0"),
    ("ssv-ab", [*RUN, "good.jsonl", "--seed", str(2**64)], f"--seed {2**64} must be a whole number from 0"),
    ("ssv-ab", ["run", "--a", "x", "--b", "y", "--prompts", "good.jsonl"], "'x' is no arm"),
    ("ssv-ab", ["report", "nowhere"], "nowhere is not the folder of a run"),
    ("ssv-ab", ["compare", "folder", "folder"], "folder is not the folder of a run"),
    ("ssv-ab", ["watch", "nowhere"], "nowhere: No such file"),
    ("ssv-ab", ["watch", "latin.jsonl", "--once"], "latin.jsonl does not begin as a log of ab_router does"),
    ("ssv-eval", ["--bundle", "nowhere"], "there is nothing to ask"),
    ("ssv-eval", ["--bundle", "folder", "--tasks", "x", "--margin", "0"], "--margin 0.0 must be a share"),
    ("ssv-eval", ["--bundle", "folder", "--tasks", "x", "--num-fewshot", "-1"], "--num-fewshot -1 must be 0 or more"),
    ("ssv-eval", ["--bundle", "folder", "--tasks", "x", "--price-per-hour", "0"], "--price-per-hour 0.0 must be above"),
    ("ssv-eval", ["--bundle", "folder", "--tasks", "x", "--include-path", "no"], "--include-path no is no folder"),
    ("ssv-eval", ["--bundle", "folder", "--tasks", "x", "--methods", "y"], "unknown method 'y'"),
    ("ssv-eval", ["--bundle", "folder", "--tasks", "x", "--also", "y"], "--also 'y' is unknown"),
    ("ssv-eval", ["--bundle", "folder", "--tasks", "x", "--out", "folder"], "folder is there already"),
    ("ssv-eval", ["--bundle", "folder", "--questions", "good.jsonl"], "good.jsonl has no prompt with an answer"),
    ("ssv-eval", ["--bundle", "folder", "--questions", "good.jsonl", "--chat"], "--chat is for --tasks"),
    ("ssv-eval", ["--bundle", "folder", "--humaneval", "good.jsonl"], "good.jsonl:1: expected an object with task_id"),
    ("ssv-eval", ["--bundle", "folder", "--humaneval", "nowhere.gz"], "nowhere.gz cannot be read"),
    ("ssv-eval", ["--bundle", "folder", "--humaneval", "words.gz"], "words.gz cannot be read"),
    ("ssv-eval", ["--bundle", "folder", "--tasks", "open.yaml"], "the task 'open.yaml' cannot be loaded"),
    ("ssv-serve", ["--bundle", "nowhere"], "nowhere is not a bundle"),
    ("ssv-serve", ["--bundle", "binary"], "binary/manifest.json is damaged"),
    ("ssv-serve", ["--bundle", "folder", "--http-port", "99999"], "ports [99999, 8001, 8002] must be different"),
    ("ssv-serve", ["--bundle", "folder", "--tls-cert", "key.pem"], "--tls-cert and --tls-key belong together"),
    ("ssv-serve", ["--bundle", "folder", "--admin-key", "x"], "--admin-key is no key"),
    ("ssv-serve", ["--bundle", "folder", "--admin-key-file", "nowhere"], "--admin-key-file nowhere cannot be read"),
    ("openai", ["--url", "x", "--bundle", "folder", "--port", "1"], "'x' is not the address of a server"),
    ("openai", ["--url", "grpc://h:1", "--bundle", "nowhere", "--port", "0"], "nowhere is not a bundle"),
    ("openai", ["--url", "grpcs://h:1", "--bundle", "folder", "--port", "0", "--tls-cert", "key.pem", "--tls-key",
                "key.pem"], "key.pem and key.pem cannot be used"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """A server's commands set up loggers, which is for the rest of a process."""
    loggers = [logging.getLogger(name) for name in ("ssv", "uvicorn")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.parametrize(
    ("name", "arguments", "what"), [pytest.param(*m, id=" ".join([m[0], *map(ascii, m[1])])) for m in MISTAKES]
)
def test_no_mistake_of_a_user_shows_a_traceback(
    name: str,
    arguments: list[str],
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file, data in FILES.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SSV_ADMIN_KEY", raising=False)
    assert MAINS[name](arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert any(line.startswith(f"error: {what}") for line in said.splitlines()), said


BUGS = [
    ("ssv-build", "builder.cli._recipe", ["pair", "r.yaml", "--out", "o"]),
    ("ssv-generate", "client.cli._prompt", ["hi", "--bundle", "b"]),
    ("ssv-bench", "ab.bench._methods", ["--bundle", "b", "--prompts", "p", "--methods", "premium"]),
    ("ssv-ab", "ab.cli.parse_arm", [*RUN, "p"]),
    ("ssv-eval", "ab.evaluation.cli._check", ["--bundle", "b", "--tasks", "x"]),
    ("ssv-serve", "triton_repo.serve.check_options", ["--bundle", "b"]),
    ("openai", "triton_repo.openai.process._check", ["--url", "grpc://h:1", "--bundle", "b", "--port", "0"]),
]


@pytest.mark.parametrize("error", [KeyError("planted"), ValueError("planted: use another")], ids=repr)
@pytest.mark.parametrize(("name", "function", "arguments"), BUGS, ids=[name for name, *_ in BUGS])
def test_a_bug_shows_its_traceback_and_asks_for_a_report(
    name: str,
    function: str,
    arguments: list[str],
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def planted(*_: object) -> None:
        raise error

    monkeypatch.setattr(f"ssv.{function}", planted)
    assert MAINS[name](arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback (most recent call last):" in lines
    assert any(line.startswith(f"{type(error).__name__}: ") and "planted" in line for line in lines)
    assert lines[-1] == f"error: this is a bug in ssv {version('ssv')}: please report it, with all of the above"
