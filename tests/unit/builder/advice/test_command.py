"""`ssv-build advise`, from the command line on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import WORDS, build, write_checkpoint, write_recipe

from ssv.builder import cli
from ssv.builder.advice.gpus import GPUS, gpu_named
from ssv.builder.advice.shapes import place_pair, read_shape
from ssv.support.errors import UserError

LLAMA_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
LLAMA_1B = LLAMA_70B | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "tie_word_embeddings": True,
}  # fmt: skip
EAGLE_3 = LLAMA_70B | {"num_hidden_layers": 1, "draft_vocab_size": 32000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("advise")
    build(write_recipe(found), found / "bundle")
    prompts = [json.dumps({"prompt": f"w{i} w{i + 1}"}) for i in range(3)]
    (found / "few.jsonl").write_text("\n".join(prompts) + "\n")
    return found


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    for name, config in (("70b", LLAMA_70B), ("1b", LLAMA_1B), ("head", EAGLE_3)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    return tmp_path


def advise(capsys: pytest.CaptureFixture[str], *options: object) -> dict[str, Any]:
    assert cli.main(["advise", "--json", *map(str, options)]) == 0
    return json.loads(capsys.readouterr().out)


def of_shapes(capsys: pytest.CaptureFixture[str], shapes: Path, draft: str, *options: object) -> dict[str, Any]:
    pair = ("--target", shapes / "70b.json", "--draft", shapes / f"{draft}.json")
    return advise(capsys, *pair, "--gpu", "H100-SXM", *options)


def test_a_bundle_on_prompts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = advise(capsys, "--bundle", folder / "bundle", "--prompts", folder / "few.jsonl", "--max-tokens", 12)
    methods = [row["method"] for row in found["speeds"]]
    assert methods[:5] == ["autoregressive", "speculative", "tree", "specinfer", "eagle"]
    assert found["speeds"][0]["speedup"] == 1.0 and found["acceptance"] and found["verdict"]
    assert "measured on 3 prompts of few.jsonl" in found["basis"]


def test_a_bundle_that_has_no_table_needs_prompts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["advise", "--bundle", str(folder / "bundle")]) == 2
    assert "give --prompts" in capsys.readouterr().err


def test_a_pair_that_is_no_bundle(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draft = folder / "bundle" / "draft" / "draft.safetensors"
    options = ("--prompts", folder / "few.jsonl", "--max-tokens", 8, "--threads", 1)
    found = advise(capsys, "--target", folder / "target", "--draft", draft, *options)
    assert found["speeds"] and found["break_even"]["draft_share_now"] > 0


def test_other_tokens_are_told_in_words(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "other", words=[*WORDS[:-1], "another"])
    options = ("--target", folder / "target", "--draft", tmp_path / "other", "--prompts", folder / "few.jsonl")
    found = advise(capsys, *options)
    assert found["verdict"] == "wrong vocabulary" and "another" in found["why"] and not found["speeds"]


def test_shapes_say_memory_degree_and_what_is_needed(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = of_shapes(capsys, shapes, "1b")
    # 70.6e9 weights of two bytes: two H100 have too little memory for them.
    assert found["facts"]["tensor parallel"] == 4
    assert found["verdict"] == "not known" and not found["speeds"], "no acceptance is made up"
    assert found["facts"]["needed for a chain to pay"].startswith("more than")
    assert of_shapes(capsys, shapes, "1b", "--precision", "fp8")["facts"]["tensor parallel"] == 2


def test_shapes_with_an_acceptance(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = of_shapes(capsys, shapes, "1b", "--acceptance", "0.7,0.1")
    assert good["verdict"] == "good"
    assert of_shapes(capsys, shapes, "70b", "--acceptance", "0.99")["verdict"] == "too strong"
    assert of_shapes(capsys, shapes, "1b", "--acceptance", "0.05")["verdict"] == "too weak"
    assert of_shapes(capsys, shapes, "head", "--acceptance", "0.7")["verdict"] == "good"


def test_shapes_of_another_vocabulary(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shapes / "1b.json").write_text(json.dumps(LLAMA_1B | {"vocab_size": 32000}))
    assert of_shapes(capsys, shapes, "1b", "--acceptance", "0.9")["verdict"] == "wrong vocabulary"


def test_a_step_reads_its_weights_and_computes_its_tokens(shapes: Path) -> None:
    shape, gpu = read_shape(shapes / "70b.json"), GPUS["H100-SXM"]
    weights = 69.5e9  # without the embedding, of which a token takes one row
    assert shape.multiplied == pytest.approx(weights, rel=0.01)
    placed = place_pair(shape, shape, gpu, "bf16", degree=8, context=1, rows=1)
    one, many = placed.costs.target.at(1), placed.costs.target.at(128)
    assert one == pytest.approx((2 * weights / 3.35e12 + 2 * weights / 989.5e12) / 8, rel=0.02)
    assert many - one == pytest.approx(127 * 2 * weights / 989.5e12 / 8, rel=0.02)
    assert placed.costs.draft.at(1) == pytest.approx(8 * one)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpu", "TPU"], "choose one of: A100"),
        ([], "name its GPU with --gpu"),
        (["--gpu", "A100-80GB", "--precision", "fp8"], "no FP8 units"),
        (["--gpu", "H100-SXM", "--tensor-parallel", "3"], "cannot share 64 heads"),
        (["--gpu", "H100-SXM", "--acceptance", "0.9,0.2"], "add up to at most 1"),
        (["--gpu", "H100-SXM", "--acceptance", "much"], "no list of shares"),
    ],
)
def test_refused(shapes: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    pair = ["--target", str(shapes / "70b.json"), "--draft", str(shapes / "1b.json")]
    assert cli.main(["advise", *pair, *options]) == 2
    assert said in capsys.readouterr().err


def test_gpus_are_found_in_any_case() -> None:
    assert gpu_named("h200") is GPUS["H200"]
    with pytest.raises(UserError, match="H100-PCIe"):
        gpu_named("H100")
