"""ssv-eval on a tiny bundle and small tasks of tests/support/tasks: what the harness is told, and what comes of it."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from checkout import ROOT
from lm_eval.api.instance import Instance
from tiny_bundle import build, write_recipe

from ssv.ab.bench_ways import ways
from ssv.ab.evaluation import cli, view
from ssv.ab.evaluation.answers import Answers
from ssv.ab.evaluation.comparison import _cell
from ssv.ab.evaluation.harness import SsvModel, sampling_of
from ssv.ab.evaluation.own_tasks import humaneval_task
from ssv.ab.evaluation.programs import Ran
from ssv.ab.evaluation.tasks import TaskFinder, TaskResult
from ssv.runtime.llm import LLM
from ssv.runtime.request import Request, RequestError, SamplingParams
from ssv.support.progress import silent

TASKS = "tests/support/tasks"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("evaluation")
    build(write_recipe(base), base / "bundle")
    return base / "bundle"


@pytest.fixture(scope="module")
def llm(bundle: Path) -> LLM:
    return LLM.load(bundle, max_length=64)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks name their data as it lies in the repository; what the library keeps of it, it keeps for the test."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def instances(kind: str, *args: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in args]  # type: ignore[arg-type]


# --- the model ------------------------------------------------------------------------------------------------------


def logprobs(llm: LLM, ids: tuple[int, ...]) -> list[float]:
    """Of all tokens but the first, as a request gets them."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate([Request(ids, "autoregressive", params)])
    return [each.logprob for each in output.prompt_logprobs]


@pytest.mark.parametrize("method", ["autoregressive", "premium", "turbo"])
def test_a_likelihood_is_the_targets(llm: LLM, method: str) -> None:
    pairs = [("w1 w2 w3", " w4 w5"), ("w1 w2 w3", " w6"), ("w1 w2 w3 ", "w6"), ("w9", " w1 w2")]
    found = SsvModel(llm, method).loglikelihood(instances("loglikelihood", *pairs))
    for (context, continuation), (logprob, _) in zip(pairs, found, strict=True):
        ids = llm.tokenizer.encode(context + continuation)
        count = len(continuation.split())
        assert logprob == pytest.approx(sum(logprobs(llm, ids)[-count:]), abs=1e-4)
    assert found[1] == found[2]


def test_what_greedy_decoding_gives_is_greedy(llm: LLM) -> None:
    ids = llm.tokenizer.encode("w1 w2 w3")
    (output,) = llm.generate([Request(ids, "autoregressive", SamplingParams(max_tokens=3, ignore_eos=True))])
    own = " ".join(llm.tokenizer.token_bytes(token).decode() for token in output.token_ids)
    other = "w1 w1 w1" if not own.startswith("w1 ") else "w2 w2 w2"
    pairs = instances("loglikelihood", ("w1 w2 w3", f" {own}"), ("w1 w2 w3", f" {other}"))
    assert [is_greedy for _, is_greedy in SsvModel(llm).loglikelihood(pairs)] == [True, False]


def test_a_likelihood_without_a_context_has_what_stands_before_a_text(llm: LLM) -> None:
    model = SsvModel(llm)
    ((logprob, _),) = model.loglikelihood(instances("loglikelihood", ("", "w5 w6")))
    ids = (model.prefix_token_id, *llm.tokenizer.encode("w5 w6"))
    assert logprob == pytest.approx(sum(logprobs(llm, ids)), abs=1e-4)


def test_a_rolling_likelihood_counts_every_token_once(llm: LLM) -> None:
    model = SsvModel(llm)
    short, long = "w5 w6 w7", " ".join(f"w{i % 100}" for i in range(150))
    found = model.loglikelihood_rolling(instances("loglikelihood_rolling", (short,), (long,)))
    ids = (model.prefix_token_id, *llm.tokenizer.encode(short))
    assert found[0] == pytest.approx(sum(logprobs(llm, ids)), abs=1e-4)
    # 150 tokens in windows of 64, each after what fits before it.
    tokens = llm.tokenizer.encode(long)
    before, total = (model.prefix_token_id, *tokens), 0.0
    for start in (0, 64, 128):
        end = min(start + 64, 150)
        window = before[max(0, end - 64) : end + 1]
        total += sum(_all_logprobs(llm, window)[-(end - start) :])
    assert found[1] == pytest.approx(total, abs=1e-4)


def _all_logprobs(llm: LLM, ids: tuple[int, ...]) -> list[float]:
    """The same in one step, of texts that leave no room for an output."""
    rows = torch.arange(len(ids) - 1)
    out = llm.target.step(torch.tensor([ids[:-1]]), torch.zeros(1, dtype=torch.int32), rows)
    logprob_RV = out.logits_RV.double().log_softmax(dim=1)
    return [float(logprob_RV[i, token]) for i, token in enumerate(ids[1:])]


@pytest.mark.parametrize("method", ["premium", "turbo"])
def test_texts_are_the_methods(llm: LLM, method: str) -> None:
    settings = {"until": ["w3"], "max_gen_toks": 12}
    found = SsvModel(llm, method).generate_until(instances("generate_until", ("w1 w2", settings), ("w7", settings)))
    params = SamplingParams(max_tokens=12, stop=("w3",))
    asked = [Request(llm.tokenizer.encode(text), method, params) for text in ("w1 w2", "w7")]
    assert found == [output.text for output in llm.generate(asked)]


def test_a_long_prompt_loses_its_beginning_and_that_is_counted(llm: LLM) -> None:
    long = " ".join(f"w{i % 100}" for i in range(90))
    model, settings = SsvModel(llm), {"until": [], "max_gen_toks": 14}
    cut = " ".join(f"w{i % 100}" for i in range(40, 90))
    assert model.generate_until(instances("generate_until", (long, settings))) == model.generate_until(
        instances("generate_until", (cut, settings))
    )
    assert model.num_cut == 1
    with pytest.raises(RequestError, match="asks for 64 tokens"):
        model.generate_until(instances("generate_until", ("w1", {"max_gen_toks": 64})))
    assert math.isfinite(model.loglikelihood(instances("loglikelihood", (long, " w1")))[0][0])
    with pytest.raises(RequestError, match="a continuation has 90 tokens"):
        model.loglikelihood(instances("loglikelihood", ("w1", f" {long}")))


SETTINGS: list[tuple[dict[str, Any], SamplingParams]] = [
    ({}, SamplingParams(max_tokens=256)),
    ({"until": "x", "max_gen_toks": 3}, SamplingParams(max_tokens=3, stop=("x",))),
    ({"until": ["x", ""], "max_new_tokens": 3}, SamplingParams(max_tokens=3, stop=("x",))),
    ({"do_sample": False, "temperature": 0.7, "max_tokens": 1}, SamplingParams(max_tokens=1)),
    ({"do_sample": True, "max_tokens": 1}, SamplingParams(temperature=1.0, max_tokens=1)),
    ({"temperature": 0.7, "top_p": 0.9, "max_tokens": 1}, SamplingParams(temperature=0.7, top_p=0.9, max_tokens=1)),
]


@pytest.mark.parametrize(("settings", "params"), SETTINGS, ids=[str(settings) for settings, _ in SETTINGS])
def test_settings_of_a_task(settings: dict[str, Any], params: SamplingParams) -> None:
    assert sampling_of(settings) == params


def test_a_setting_that_is_not_known_is_refused() -> None:
    with pytest.raises(RequestError, match="num_beams, which is not known here"):
        sampling_of({"num_beams": 4})


def test_a_conversation_is_the_templates(llm: LLM) -> None:
    model, user = SsvModel(llm), {"role": "user", "content": "w1"}
    text = llm.tokenizer.render([user])
    assert model.apply_chat_template([user]) == text
    begun = [user, {"role": "assistant", "content": "w2"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == f"{text}w2"
    assert model.chat_template(True) == llm.tokenizer.inner.chat_template


def test_all_ways_are_asked_in_turns_and_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    generate = LLM.generate

    def noted(self: LLM, requests: list[Request], **more: Any) -> Any:
        order.append(requests[0].method)
        return generate(self, requests, **more)

    monkeypatch.setattr(LLM, "generate", noted)
    compared = ways(llm, ["autoregressive", "premium"], (), lambda _: llm)
    answers = Answers(compared, batch=1, num_draft_tokens=5, report=silent)
    asked = [(llm.tokenizer.encode(text), SamplingParams(max_tokens=4)) for text in ("w1", "w2", "w3")]
    found = {way.name: answers.of(way.name, asked) for way in compared}
    warm_up, turns = order[:2], order[2:]
    assert warm_up == ["autoregressive", "premium"]
    assert turns == ["autoregressive", "premium", "premium", "autoregressive", "autoregressive", "premium"]
    assert [o.token_ids for o in found["premium"]] == [o.token_ids for o in found["autoregressive"]]
    assert [len(tally.seconds[0]) for tally in answers.tallies.values()] == [3, 3]


# --- the command ----------------------------------------------------------------------------------------------------


def run(bundle: Path, out: Path, *options: str) -> int:
    return cli.main(["--bundle", str(bundle), "--out", str(out), *options])


@pytest.fixture
def humaneval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, list[str]]]:
    """Two problems, of which the first is solved whatever stands behind its prompt; and the programs that were run."""
    programs: list[str] = []

    def ran(text: str) -> Ran:
        programs.append(text)
        return Ran("return 1" in text, "")

    monkeypatch.setattr("ssv.ab.evaluation.own_tasks.run_program", ran)
    problems = [
        {"task_id": f"T/{i}", "prompt": f"def f(): {body} #", "entry_point": "f", "test": "def check(f): pass", "x": 1}
        for i, body in enumerate(("return 1", "return 2"))
    ]
    path = tmp_path / "problems.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, problems)).encode()))
    yield path, programs


def test_one_command_gives_the_whole_table(
    bundle: Path, tmp_path: Path, humaneval: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "asked.jsonl"
    questions.write_text('{"id": "a", "prompt": "w1", "answer": "w2", "check": "f1"}\n{"prompt": "w3"}\n')
    names = ["choice", "text", "perplexity"]
    given = ",".join(f"{TASKS}/tiny_{name}.yaml" for name in names)
    options = ["--methods", "turbo", "--also", "bf16", "--tasks", given, "--humaneval", str(humaneval[0])]
    options += ["--questions", str(questions), "--max-tokens", "8", "--price-per-hour", "0.5", "--num-fewshot", "0"]
    out = tmp_path / "runs" / "out"
    assert run(bundle, out, *options) == 0
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "report.md", "samples.jsonl"]
    document = json.loads((out / "report.json").read_text())
    tasks = {task["name"]: task for task in document["tasks"]}
    assert list(tasks) == [*(f"tiny_{name}" for name in names), "humaneval", "asked"]
    assert [task["documents"] for task in tasks.values()] == [6, 6, 6, 2, 1]
    assert [task["generates"] for task in tasks.values()] == [False, True, False, True, True]
    assert [task["is_judged"] for task in tasks.values()] == [True, True, False, True, True]
    rows = {row["method"]: row for row in document["rows"]}
    assert list(rows) == ["autoregressive", "turbo", "autoregressive, bf16", "premium, bf16"]
    plain, turbo = rows["autoregressive"], rows["turbo"]
    assert plain["speedup"] == 1 and plain["passes_saved"] == 0 and plain["unverified"] == 0
    assert turbo["tokens"] > 0 and turbo["unverified"] > 0 and not turbo["lossless"]
    for row in rows.values():
        assert row["cost_per_1m_tokens"] == pytest.approx(0.5 / (row["tokens_per_s"] * 3600) * 1e6)
    # The target is the same: so are its likelihoods.
    for name in ("tiny_choice", "tiny_perplexity"):
        assert turbo["tasks"][name]["value"] == plain["tasks"][name]["value"]
    assert turbo["tasks"]["tiny_choice"]["verdict"] == "the same"
    assert rows["premium, bf16"]["tasks"]["tiny_choice"]["verdict"] != "the same"
    assert turbo["tasks"]["humaneval"]["value"] == 0.5
    assert turbo["tasks"]["tiny_perplexity"]["verdict"] is None
    # A program that two methods wrote is run once.
    assert len(humaneval[1]) == len(set(humaneval[1]))
    assert any("asks for likelihoods" in note for note in document["notes"])
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == str(out / "report.html")
    assert "| turbo |" in (out / "report.md").read_text()
    page = (out / "report.html").read_text()
    assert "<svg" in page and "http-equiv" not in page and "src=" not in page
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6 + 6 + 6 + 2 + 1
    assert samples[0]["methods"].keys() == rows.keys()


def test_a_lossless_method_is_the_same(bundle: Path, tmp_path: Path) -> None:
    options = ["--methods", "premium", "--tasks", f"{TASKS}/tiny_text.yaml", "--limit", "2"]
    assert run(bundle, tmp_path / "out", *options) == 0
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    (_, premium) = document["rows"]
    assert premium["lossless"]
    assert premium["tasks"]["tiny_text"]["verdict"] == "the same"
    assert document["tasks"][0]["documents"] == 2
    assert "only the first 2 documents of each task were asked (--limit)" in document["notes"]


def test_a_folder_of_tasks_and_the_chat_template(bundle: Path, tmp_path: Path) -> None:
    options = ["--methods", "premium", "--include-path", TASKS, "--tasks", "tiny_text", "--chat", "--limit", "1"]
    assert run(bundle, tmp_path / "out", *options) == 0
    assert run(bundle, tmp_path / "plain", *options[:-3], "--limit", "1") == 0
    first, second = (json.loads((tmp_path / name / "samples.jsonl").read_text()) for name in ("out", "plain"))
    assert first["methods"] != second["methods"]


MISTAKES = {
    "a task that runs programs": ([f"{TASKS}/tiny_unsafe.yaml"], "without protection"),
    "two of one name": ([f"{TASKS}/tiny_text.yaml,{TASKS}/tiny_text.yaml"], "two tasks are called tiny_text"),
}


@pytest.mark.parametrize(("given", "what"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(
    bundle: Path, tmp_path: Path, given: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(bundle, tmp_path / "out", "--tasks", *given) == 2
    assert what in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_name_that_nobody_knows(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is looked for among the harness's own, which takes long: here it has none."""
    manager = TaskFinder._manager
    monkeypatch.setattr(TaskFinder, "_manager", lambda self, include_defaults: manager(self, include_defaults=False))
    assert run(bundle, tmp_path / "out", "--tasks", "no_such_task") == 2
    assert "the task 'no_such_task' is unknown" in capsys.readouterr().err


def test_without_the_harness_the_cure_is_said(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ssv.ab.evaluation.tasks.missing_packages", lambda names: ["lm_eval"])
    assert run(bundle, tmp_path / "out", "--tasks", "x") == 2
    said = capsys.readouterr().err
    assert "ssv-eval needs lm_eval" in said and "pip install 'ssv[eval]'" in said


def test_a_problem_is_asked_without_the_white_space_at_its_end(
    tmp_path: Path, humaneval: tuple[Path, list[str]]
) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"task_id": "T", "prompt": "\ndef f():\n    ", "entry_point": "f", "test": "tested"}))
    task = humaneval_task(path, 8)
    (doc,) = task["custom_dataset"]()["test"]
    assert task["doc_to_text"](doc) == "\ndef f():"
    assert task["process_results"](doc, ["\n    return 1"]) == {"pass@1": 1.0}
    assert humaneval[1][-1] == "\ndef f():\n    return 1\ntested\ncheck(f)\n"


def test_programs_are_tried_before_anything_is_decoded(tmp_path: Path, humaneval: tuple[Path, list[str]]) -> None:
    humaneval_task(humaneval[0], 8)
    assert humaneval[1] == ["pass"]


# --- what is shown --------------------------------------------------------------------------------------------------


def cell(value: float, verdict: str | None = None, low: float = 0.0, high: float = 0.0) -> dict[str, Any]:
    interval = {"estimate": (low + high) / 2, "low": low, "high": high, "level": 0.95}
    quality = None if verdict is None else {"interval": interval}
    return {"value": value, "verdict": verdict, "quality": quality, "identical": 1.0}


def made_up() -> dict[str, Any]:
    """A document of three methods and two tasks, one with a name that is markup."""

    def row(method: str, speedup: float, cells: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "method": method, "precision": "int8", "lossless": False, "tokens": 10, "tokens_per_s": 10 * speedup,
            "speedup": speedup, "speedup_low": speedup - 0.1, "speedup_high": speedup + 0.1, "passes_per_token": 0.5,
            "passes_saved": 0.5, "unverified": 0.25, "cost_per_1m_tokens": None,
            "tasks": dict(zip(("<b>|$x", "good"), cells, strict=True)),
        }  # fmt: skip

    return {
        "baseline": "autoregressive", "margin": 0.05, "level": 0.99, "notes": ["a <note>"],
        "tasks": [{"name": name, "metric": "acc", "documents": 9, "generates": True, "is_judged": True}
                  for name in ("<b>|$x", "good")],
        "rows": [
            row("autoregressive", 1.0, [cell(0.5), cell(0.7)]),
            row("premium", 1.4, [cell(0.5, "the same"), cell(0.7, "the same")]),
            row("turbo", 1.6, [cell(0.4, "inferior", -0.2, -0.06), cell(0.7, "undecided", -0.06, 0.1)]),
        ],
        "machine": {"cpu": "a CPU", "cores": 2}, "versions": {"python": "3"}, "commit": "c", "date": "d",
        "command": "ssv-eval", "settings": {"x": 1},
    }  # fmt: skip


def test_the_table_says_difference_interval_and_verdict() -> None:
    headers, rows = view.table(made_up())
    assert headers == ["method", "speed-up", "tokens/s", "<b>|$x (acc)", "good (acc)", "passes saved", "unverified"]
    assert rows[1][:4] == ["premium", "1.40x (1.30 to 1.50)", "14.0", "50.0%, the same"]
    assert rows[2][3:5] == ["40.0% (-13.0 [-20.0, -6.0]), inferior", "70.0% (+2.0 [-6.0, +10.0]), undecided"]
    assert view.verdicts(made_up()) == [
        ("yes", "premium", "the same in <b>|$x, good"),
        ("no", "turbo", "inferior in <b>|$x; undecided in good"),
    ]


@pytest.mark.parametrize(("by_construction", "verdict"), [(True, "the same"), (False, "undecided")])
def test_it_is_the_same_by_construction_and_not_by_chance(by_construction: bool, verdict: str) -> None:
    """A lossy method that happens to answer a few documents alike has shown little."""
    result = TaskResult("acc", 1.0, {"a": 1.0, "b": 0.0}, {"a": ["x"], "b": ["y"]})
    other = TaskResult("acc", 1.0, result.scores, {"a": ["x"], "b": ["z"]})
    settings: dict[str, Any] = {"margin": 0.05, "level": 0.95, "same_by_construction": by_construction}
    assert _cell(result, result, is_baseline=False, **settings).verdict == verdict
    assert _cell(other, result, is_baseline=False, **settings).verdict == "undecided"
    assert _cell(result, result, is_baseline=True, **settings).verdict is None


def test_names_are_no_markup() -> None:
    document = made_up()
    assert r"<b>\|$x (acc)" in view.markdown(document)
    page = view.page(document)
    assert "<b>" not in page and "<note>" not in page
    assert page.count("<svg") == 2
    assert page == view.page(made_up())


def test_the_frontier_is_what_nobody_beats_in_both() -> None:
    assert view.frontier([(1, 0.5), (1.4, 0.5), (1.6, 0.4), (1.2, 0.45), (1.5, 0.4)]) == [(1.4, 0.5), (1.6, 0.4)]
