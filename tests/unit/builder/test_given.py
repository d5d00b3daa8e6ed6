"""Bundles of drafts that others made, EAGLE-3 heads and whole language models: they decode losslessly, with a scorer or
without, and go back out as other engines load them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from eagle3_heads import Published, published
from safetensors.torch import load_file
from tiny import relative_error, tiny_decoder
from tiny_bundle import WORDS, build, write_checkpoint, write_recipe

from ssv.builder import given, pair
from ssv.builder.cli import calibrate_bundle, main
from ssv.builder.config import load_recipe
from ssv.bundle.manifest import Manifest, read_manifest
from ssv.bundle.policy import Policy, verify_all
from ssv.model.checkpoint import CheckpointError
from ssv.model.draft import load_draft
from ssv.runtime.llm import LLM
from ssv.runtime.request import Request, RequestError, SamplingParams
from ssv.support.errors import UserError
from ssv.support.progress import silent

RECIPE = """
name: tiny
target: {path: target}
draft: DRAFT
scorer: SCORER
calibration:
  make: {prompts_file: prompts.jsonl, LIMITS}
precision: fp32
"""
FITTED = "{fit: {rows: 128, window: 48, depth: 2}}"


def recipe_of(base: Path, draft: str, *, scorer: str = "null", more: str = "limits: {}") -> Path:
    """Path of a recipe beside its target and prompts."""
    path = write_recipe(base) if not (base / "target").is_dir() else base / "recipe.yaml"
    path.write_text(RECIPE.replace("DRAFT", draft).replace("SCORER", scorer).replace("LIMITS", more))
    return path


def two_taps(layout: str = "eagle3", **options: object) -> Published:
    """A head for the tiny target, which has two layers."""
    head = published(layout, num_taps=2, **options)  # type: ignore[arg-type]
    if layout == "eagle3":
        head.config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [0, 1]}
    else:
        head.config["eagle_aux_hidden_state_layer_ids"] = [1, 2]
    return head


def assert_lossless(out: Path) -> LLM:
    """Chains, static, dynamic and paying trees give plain decoding's tokens, greedily and sampled."""
    llm = LLM.load(out, max_length=96)
    methods = [name for name in llm.methods if name not in ("balanced", "turbo")]
    assert {"speculative", "specinfer", "eagle", "premium"} < set(methods)
    for temperature in (0.0, 0.8):
        params = SamplingParams(max_tokens=16, temperature=temperature, seed=3, ignore_eos=True)
        ids = llm.chat_ids("w1 w2 w3")
        outputs = {name: llm.generate([Request(ids, name, params)])[0] for name in methods}
        assert {output.token_ids for output in outputs.values()} == {outputs["autoregressive"].token_ids}
        assert outputs["eagle"].counters.drafted > 0
    return llm


# --- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
def test_a_published_head_without_a_scorer(layout: str, tmp_path: Path) -> None:
    two_taps(layout, norm_output=True, tap_norm="fc_norm").write(tmp_path / "head")
    manifest = build(recipe_of(tmp_path, "{folder: head}"), tmp_path / "bundle")
    assert not manifest.has_scorer and list(manifest.tiers) == ["premium"]
    llm = assert_lossless(tmp_path / "bundle")
    # What trusts tokens has nothing to go by.
    lossy = Policy(accept_below=0.1, verify_above=0.4, risk_budget=0.6, max_pending=6)
    with pytest.raises(RequestError, match="without a scorer"):
        llm.generate([Request((0, 9), "mine", SamplingParams(max_tokens=2), policy=lossy)])


def test_a_published_head_with_a_scorer_that_is_fitted(tmp_path: Path) -> None:
    two_taps(norm_before_residual=True).write(tmp_path / "head")
    recipe = recipe_of(tmp_path, "{file: head/model.safetensors}", scorer=FITTED, more="num_prompts: null")
    manifest = build(recipe, tmp_path / "bundle")
    assert manifest.has_scorer and list(manifest.tiers) == ["premium", "balanced", "turbo"]
    llm = assert_lossless(tmp_path / "bundle")
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    assert len(llm.generate([Request(llm.chat_ids("w1 w2"), "turbo", params)])[0].token_ids) == 20


def test_calibrating_without_a_scorer_goes_by_the_drafts_own_shares(tmp_path: Path) -> None:
    two_taps().write(tmp_path / "head")
    recipe = recipe_of(tmp_path, "{folder: head}", more="limits: {}, num_prompts: 3, max_tokens: 16")

    def make(bundle: Path, config: object, report: object) -> object:
        return calibrate_bundle(
            bundle, config, silent, device="cpu", batch=1, precision=None, threads=1  # type: ignore[arg-type]
        )  # fmt: skip

    manifest = build(recipe, tmp_path / "bundle", make)  # type: ignore[arg-type]
    assert manifest.survival is not None and list(manifest.tiers) == ["premium"]
    document = json.loads((tmp_path / "bundle" / "calibration.json").read_text())
    assert document["made_for"]["scorer"] is None
    # Given to another bundle: it fits without a scorer, and not with one.
    (tmp_path / "calibration.json").write_text(json.dumps(document))
    text = recipe.read_text().replace("calibration:", "calibration:\n  file: calibration.json")
    recipe.write_text(text)
    build(recipe, tmp_path / "again")
    recipe.write_text(text.replace("scorer: null", f"scorer: {FITTED}"))
    with pytest.raises(UserError, match="was made for another scorer"):
        build(recipe, tmp_path / "third")


def test_a_scorer_that_goes_leaves_nothing_behind(tmp_path: Path) -> None:
    two_taps().write(tmp_path / "head")
    out = tmp_path / "bundle"
    build(recipe_of(tmp_path, "{folder: head}", scorer=FITTED), out)
    assert (out / "scorer.safetensors").is_file()
    build(recipe_of(tmp_path, "{folder: head}"), out)
    assert not (out / "scorer.safetensors").exists() and not read_manifest(out).has_scorer


def test_a_given_draft_is_taken_over_while_its_files_stay_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, out = two_taps(), tmp_path / "bundle"
    head.write(tmp_path / "head")
    recipe = recipe_of(tmp_path, "{folder: head}")
    first = build(recipe, out)

    def never(*_: object) -> None:
        raise AssertionError("written again")

    monkeypatch.setattr(pair, "write_given", never)
    assert build(recipe, out).files == first.files
    head.config["norm_output"] = True  # config.json is part of it
    head.write(tmp_path / "head")
    with pytest.raises(AssertionError, match="written again"):
        build(recipe, out)


def test_a_pickled_head_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = two_taps().write(tmp_path / "head")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    recipe = recipe_of(tmp_path, "{folder: head}")
    assert main(["pair", str(recipe), "--out", str(tmp_path / "bundle")]) == 2
    said, pickled = capsys.readouterr().err, f"{folder}/pytorch_model.bin"
    assert "is a pickle" in said and f"convert-heads {pickled} --out {folder}/model.safetensors" in said
    assert main(["convert-heads", pickled, "--out", f"{folder}/model.safetensors"]) == 0
    (folder / "pytorch_model.bin").unlink()
    build(recipe, tmp_path / "bundle")
    assert_lossless(tmp_path / "bundle")


# --- language models ------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 48}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"vocab_size": 128},  # padded further than the target
        {"vocab_size": 128, "tie_embeddings": True, "max_positions": 300},
    ],
)
def test_a_language_model_as_a_standalone_draft(changes: dict[str, object], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "small", 9, template=None, **{**SMALL, **changes})  # a base model has no template
    manifest = build(recipe_of(tmp_path, "{checkpoint: small}"), tmp_path / "bundle")
    assert manifest.draft["kind"] == "standalone" and manifest.draft["decoder"]["hidden_size"] == 32
    assert manifest.draft["head_size"] == 112 and manifest.draft["decoder"]["vocab_size"] == 112
    stored = load_file(tmp_path / "bundle" / "draft" / "draft.safetensors")
    assert ("decoder.lm_head.weight" in stored) != bool(changes.get("tie_embeddings"))
    assert_lossless(tmp_path / "bundle")


def test_a_draft_padded_less_than_its_target(tmp_path: Path) -> None:
    """The target may choose a token that the draft has no row for: it has zeros then, and never proposes it."""
    write_recipe(tmp_path)
    shutil.rmtree(tmp_path / "target")
    write_checkpoint(tmp_path / "target", vocab_size=128)
    write_checkpoint(tmp_path / "small", 9, **SMALL)
    manifest = build(recipe_of(tmp_path, "{checkpoint: small}"), tmp_path / "bundle")
    assert manifest.draft["head_size"] == 112 and manifest.draft["decoder"]["vocab_size"] == 128
    llm = assert_lossless(tmp_path / "bundle")
    params = SamplingParams(max_tokens=40, temperature=2.0, seed=1, ignore_eos=True)
    output = llm.generate([Request(llm.chat_ids("w1"), "eagle", params)])[0]
    assert max(output.token_ids) >= 112


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([*WORDS[:50], "else", *WORDS[51:]], "token 50 is 'else', the target's is 'w43'"),
        (WORDS[:-1], "token 111 is no token, the target's is 'w104'"),
        ([*WORDS[:-1], "w104", "more"], "token 112 is 'more', the target's is no token"),
    ],
)
def test_the_first_token_that_differs_is_named(words: list[str], named: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "small", 9, words, vocab_size=128, **SMALL)
    with pytest.raises(CheckpointError, match=f"small: {named}: a standalone draft needs"):
        build(recipe_of(tmp_path, "{checkpoint: small}"), tmp_path / "bundle")


def test_padding_tokens_of_a_gguf_file_are_padding(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "small", 9, [*WORDS, "[PAD112]", "[PAD113]"], vocab_size=114, **SMALL)
    build(recipe_of(tmp_path, "{checkpoint: small}"), tmp_path / "bundle")


def test_an_embedding_smaller_than_the_vocabulary(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "small", 9, vocab_size=100, **SMALL)
    with pytest.raises(CheckpointError, match="has token 111, and the embeddings have 100 and 112 rows"):
        build(recipe_of(tmp_path, "{checkpoint: small}"), tmp_path / "bundle")


# --- out again ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["speculators", "eagle3"])
def test_a_draft_goes_out_and_comes_back(layout: str, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "bundle"
    recipe.write_text(recipe.read_text().replace("depth: 2}\nscorer", "depth: 2, join: eagle3}\nscorer"))
    first = build(recipe, out)
    folder = tmp_path / "out" / layout
    arguments = ["export", layout, "--bundle", str(out), "--out", str(folder)]
    assert main(arguments) == 0
    config = json.loads((folder / "config.json").read_text())
    if layout == "speculators":
        verifier = {"name_or_path": str(out / "target"), "architectures": ["LlamaForCausalLM"]}
        assert config["speculators_config"]["verifier"] == verifier
    back = build(recipe_of(tmp_path, f"{{folder: out/{layout}}}"), tmp_path / "back")
    assert back.draft["own_lm_head"] and back.draft["eagle3"] == first.draft["eagle3"]
    target = tiny_decoder()
    drafts = [load_draft(each / "draft" / "draft.safetensors", target) for each in (out, tmp_path / "back")]
    assert all(draft.tap is not None for draft in drafts)
    order = drafts[0].token_ids.argsort()
    logits = []
    for draft in drafts:
        features_MF = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
        hidden_MH = draft.run_layers(torch.arange(6), features_MF, torch.arange(6), lambda _l, q, _k, _v: q.flatten(1))
        logits.append(draft.logits(hidden_MH))
    assert torch.equal(drafts[0].token_ids[order], drafts[1].token_ids)
    assert relative_error(logits[1], logits[0][:, order]) < 1e-2  # the LM head went out as bf16
    assert main(arguments) == 2  # it is there


def test_a_draft_that_joins_in_our_way_leaves_with_its_join_as_a_layer_or_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    layers = build(write_recipe(tmp_path), bundle).draft["decoder"]["num_layers"]
    assert main(["export", "speculators", "--bundle", str(bundle), "--out", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["transformer_layer_config"]["num_hidden_layers"] == layers + 1
    assert main(["export", "eagle3", "--bundle", str(bundle), "--out", str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert "joins token and features before its first layer" in said and "join: eagle3" in said
    assert not (tmp_path / "other").exists()


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draft", "scorer", "more", "named"),
    [
        ("{}", "null", "limits: {}", "give `distill`, how a draft is made"),
        ("{folder: head, file: head/model.safetensors}", "null", "limits: {}", "file and folder are both given"),
        ("{folder: none}", "null", "limits: {}", "draft.folder: .*none is not there"),
        ("{file: none.safetensors}", "null", "limits: {}", "draft.file: .* is not there"),
        ("{checkpoint: none}", "null", "limits: {}", "none does not exist"),
        ("{file: plain.safetensors}", "null", "limits: {}", "is not a draft of ours, and has no config.json beside it"),
        ("{folder: target}", "null", "limits: {}", "target is no EAGLE-3 head"),
        ("{folder: head}", "null", "num_prompts: 200", "scorer is null, and balanced and turbo trust tokens"),
        (
            "{distill: {kind: standalone, join: eagle3, layers: [0]}}",
            "null",
            "limits: {}",
            "join eagle3 is for a conditioned draft",
        ),
    ],
)
def test_recipes_that_cannot_be(draft: str, scorer: str, more: str, named: str, tmp_path: Path) -> None:
    two_taps().write(tmp_path / "head")
    (tmp_path / "plain.safetensors").write_bytes((tmp_path / "head" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=named):
        build(recipe_of(tmp_path, draft, scorer=scorer, more=more), tmp_path / "bundle")


def test_nothing_is_distilled_for_a_recipe_that_gives_its_draft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_taps().write(tmp_path / "head")
    recipe = recipe_of(tmp_path, "{folder: head}")
    assert main(["distill", str(recipe), "--out", str(tmp_path / "draft.safetensors")]) == 2
    assert "draft.distill is left out" in capsys.readouterr().err
    assert main(["scorer", str(recipe), "--draft", "x", "--out", str(tmp_path / "scorer.safetensors")]) == 2
    assert "scorer is null" in capsys.readouterr().err


def test_made_as_tells_copies_from_conversions(tmp_path: Path) -> None:
    """A calibration that names the draft's file by hash can be checked before anything is built only for a copy."""
    two_taps().write(tmp_path / "head")
    manifest: Manifest = build(write_recipe(tmp_path), tmp_path / "bundle")
    assert "draft/draft.safetensors" in manifest.files
    ours = load_recipe(recipe_of(tmp_path, "{file: bundle/draft/draft.safetensors}")).draft
    assert given.made_as(ours) == ours.file
    theirs = load_recipe(recipe_of(tmp_path, "{file: head/model.safetensors}")).draft
    assert given.made_as(theirs) is None and [file.name for file in given.given_files(theirs)] == [
        "model.safetensors",
        "config.json",
    ]


def test_what_is_drafted_without_a_scorer_by_a_chain(tmp_path: Path) -> None:
    """Risks of a chain are the draft's own doubts."""
    two_taps().write(tmp_path / "head")
    build(recipe_of(tmp_path, "{folder: head}"), tmp_path / "bundle")
    llm, params = LLM.load(tmp_path / "bundle", max_length=96), SamplingParams(max_tokens=12, ignore_eos=True)
    output = llm.generate([Request(llm.chat_ids("w5 w6"), "mine", params, policy=verify_all(4))])[0]
    plain = llm.generate([Request(llm.chat_ids("w5 w6"), "autoregressive", params)])[0]
    assert output.token_ids == plain.token_ids and output.counters.drafted > 0
