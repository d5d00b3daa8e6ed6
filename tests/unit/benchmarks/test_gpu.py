"""`benchmarks/gpu.py` on a CPU: prompts behind other text, and rows that begin together."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import loaded
from tiny_bundle import build, write_recipe

from ssv import LLM, Request, SamplingParams

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu.py"
TEXTS = [" ".join(f"w{(5 * i + j) % 105}" for j in range(3 + i)) for i in range(20)]
OTHERS = [" ".join(f"w{(11 * i + j) % 105}" for j in range(5)) for i in range(12)]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return loaded(SCRIPT, monkeypatch)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    build(write_recipe(folder), folder / "bundle")
    return folder / "bundle"


def load(bundle: Path, rows: int) -> LLM:
    return LLM.load(bundle, max_batch=rows, prefill_chunk=16, threads=1)


def test_prompts_have_other_text_before_them_up_to_a_length(script: ModuleType, bundle: Path) -> None:
    llm = load(bundle, 1)
    for tokens in (40, 120):
        length = script.whole(llm, tokens)
        assert length % llm.prefill_chunk == 1
        assert abs(length - tokens) <= llm.prefill_chunk // 2 + 1
        found = script.longer(llm, TEXTS, OTHERS, length)
        assert {len(ids) for ids in found} == {length}
        for ids, text in zip(found, TEXTS, strict=True):
            own = llm.tokenizer.encode(text)
            alone = llm.chat_ids(text)
            assert ids[-len(own) - 4 :] == (*ids[-len(own) - 4 : -len(alone) + 2], *alone[2:])
        begun = {ids[2:18] for ids in found}
        assert len(begun) == len(TEXTS)
        assert script.longer(llm, TEXTS, OTHERS, length) == found


def test_a_prompt_that_is_as_long_by_itself_stays(script: ModuleType, bundle: Path) -> None:
    llm = load(bundle, 1)
    text = " ".join(f"w{j}" for j in range(90))
    assert script.longer(llm, [text], OTHERS, 33) == [llm.chat_ids(text)]


def test_rows_begin_together_and_are_decoded_as_they_would_be_alone(script: ModuleType, bundle: Path) -> None:
    llm = load(bundle, 4)
    prompts = script.longer(llm, TEXTS[:8], OTHERS, script.whole(llm, 60))
    requests = [Request(ids, "speculative", SamplingParams(max_tokens=12, ignore_eos=True)) for ids in prompts]
    cache = llm.prompt_cache(1 << 30)
    first = script.together(llm, requests, 4, cache)
    run = script.together(llm, requests, 4, cache)
    alone = [llm.generate([request])[0].token_ids for request in requests]
    assert [output.token_ids for output in run.outputs] == [output.token_ids for output in first.outputs] == alone
    assert all(output.counters.cached_tokens == len(prompts[0]) - 1 for output in run.outputs)
    assert run.decoding_per_s > run.tokens_per_s > 0
    assert 0.3 < run.share_of_rows <= 1


def test_a_record_has_each_length_and_each_number_of_rows(
    script: ModuleType, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_cpu(bundle: Path, rows: int, max_length: int) -> LLM:
        assert max_length == 2048
        return load(bundle, rows)

    for name, texts in (("prompts", TEXTS), ("others", OTHERS)):
        (tmp_path / name).write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    monkeypatch.setattr(script, "load", on_cpu)
    monkeypatch.setattr(script.torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(script, "ALONE", 1)
    given: dict[str, Any] = {
        "--bundle": bundle, "--prompts": tmp_path / "prompts", "--others": tmp_path / "others",
        "--methods": "autoregressive,speculative", "--rows": "1,4", "--context": "0,60", "--waves": "1",
        "--max-tokens": "6", "--repeats": "1", "--out": tmp_path / "record.json",
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--no-steps", *(str(word) for pair in given.items() for word in pair)])
    assert script.main() == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert "chosen_ms" not in record
    assert set(record["methods"]) == set(record["methods behind 65"]) == {"1", "4"}
    for key in ("methods", "methods behind 65"):
        for found in record[key].values():
            assert {name: each["same_text"] for name, each in found.items()} == {
                "autoregressive": 16,
                "speculative": 16,
            }
            assert found["autoregressive"]["of_autoregressive"] == 1
            assert ("decoding_tokens_per_s" in found["speculative"]) == (key != "methods")


def test_what_there_is_no_room_for_is_refused(
    script: ModuleType, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "load", lambda bundle, rows, max_length: load(bundle, rows))
    monkeypatch.setattr(script.torch.cuda, "get_device_name", lambda: "none")
    (tmp_path / "prompts").write_text(json.dumps({"prompt": TEXTS[0]}) + "\n")
    options = ["--bundle", str(bundle), "--prompts", str(tmp_path / "prompts"), "--no-steps"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options, "--context", "5000"])
    with pytest.raises(script.UserError, match="prompts and outputs of"):
        script.main()
