"""Heads of zeros for models whose heads so many GPUs cannot share: the same function, read by others and by us."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import relative_error, tiny_decoder, tiny_ids, tiny_spec
from tiny_bundle import build, write_checkpoint, write_recipe
from transformers import AutoModelForCausalLM

from ssv.builder.cli import main
from ssv.builder.export import export_for
from ssv.builder.pad_heads import pad_weights, padded_spec
from ssv.builder.training.passes import CausalAttend
from ssv.model.checkpoint import load_checkpoint
from ssv.model.decoder import Decoder
from ssv.model.draft import load_draft, write_draft
from ssv.model.eagle3 import read_eagle3

# Three heads that share one of keys and values, which two GPUs cannot have alike.
ODD = {"hidden_size": 96, "num_heads": 3, "num_kv_heads": 1, "head_dim": 32}
JOINS = {"join: input": (4, 4), "join: eagle3": (6, 2)}
"""Heads of a draft for two GPUs. The layer that makes our join has as many of keys and values."""


@pytest.fixture(scope="module", params=JOINS)
def odd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[int, int]]:
    folder = tmp_path_factory.mktemp("bundle")
    recipe = write_recipe(folder)
    shutil.rmtree(folder / "target")
    write_checkpoint(folder / "target", **ODD)
    recipe.write_text(recipe.read_text().replace("distill: {layers", f"distill: {{{request.param}, layers"))
    build(recipe, folder / "bundle")
    return folder / "bundle", JOINS[request.param]


@pytest.fixture
def bundle(odd: tuple[Path, tuple[int, int]]) -> Path:
    return odd[0]


def export(bundle: Path, out: Path, gpus: int) -> Path:
    export_for("vllm", bundle, out, tensor_parallel=gpus, pad_heads=gpus > 1)
    return out


@torch.no_grad()
def test_transformers_sees_the_same_target(bundle: Path, tmp_path: Path) -> None:
    ids = tiny_ids(40)[None]
    models = []
    for gpus, heads in ((1, (3, 1)), (2, (6, 2))):
        folder = export(bundle, tmp_path / str(gpus), gpus) / "target"
        config = json.loads((folder / "config.json").read_text())
        assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (*heads, 32)
        models.append(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    own, padded = (model(ids).logits for model in models)
    assert models[1].model.layers[0].self_attn.q_proj.weight.shape == (192, 96)
    assert relative_error(padded, own) < 1e-5
    load_checkpoint(bundle / "target")  # whose file the export would share without padding, and is as it was


@torch.no_grad()
def test_the_draft_computes_the_same(odd: tuple[Path, tuple[int, int]], tmp_path: Path) -> None:
    bundle, heads = odd
    target = Decoder.from_weights(*load_checkpoint(bundle / "target"))
    drafts = []
    for gpus in (1, 2):
        stored = read_eagle3(export(bundle, tmp_path / str(gpus), gpus) / "draft", target)
        write_draft(stored.spec, stored.state, tmp_path / "draft.safetensors")
        drafts.append(load_draft(tmp_path / "draft.safetensors", target))
    own, padded = drafts
    assert (padded.spec.decoder.num_heads, padded.spec.decoder.num_kv_heads) == heads
    features = torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    found, expected = (
        draft.run_layers(tiny_ids(40), features, torch.arange(40), CausalAttend(1)) for draft in (padded, own)
    )
    assert relative_error(found, expected) < 1e-5
    assert relative_error(padded.logits(found), own.logits(expected)) < 1e-5


def test_no_heads_where_none_are_needed(bundle: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    export_for("vllm", bundle, out, tensor_parallel=3, pad_heads=True)
    export_for("vllm", bundle, plain, tensor_parallel=3)
    assert (out / "target" / "model.safetensors").samefile(bundle / "target" / "model.safetensors")
    given, padded = (load_file(each / "draft" / "model.safetensors") for each in (plain, out))
    assert given.keys() == padded.keys() and all(torch.equal(given[name], padded[name]) for name in given)


@pytest.mark.parametrize(
    ("changes", "gpus", "heads"),
    [
        ({"num_heads": 9, "num_kv_heads": 3, "hidden_size": 576}, 2, (12, 4)),
        ({"num_heads": 9, "num_kv_heads": 9, "hidden_size": 576}, 2, (12, 12)),  # 576 is no multiple of 10
        ({"num_heads": 14, "num_kv_heads": 2, "hidden_size": 896}, 4, (28, 4)),
        ({"num_heads": 8, "num_kv_heads": 2}, 4, (8, 2)),  # a head of keys and values may be repeated
        ({"num_heads": 4, "num_kv_heads": 4}, 3, None),  # 64 is no multiple of 6, 9, 12 ...
        ({"num_heads": 9, "num_kv_heads": 3, "hidden_size": 576, "intermediate_size": 97}, 2, None),
    ],
)
def test_the_fewest_heads_that_can_be_shared(changes: dict[str, int], gpus: int, heads: tuple[int, int] | None) -> None:
    found = padded_spec(tiny_spec(**changes), gpus)
    assert (found and (found.num_heads, found.num_kv_heads)) == heads


def test_biases_get_zeros_and_the_outputs_stays(tmp_path: Path) -> None:
    decoder = tiny_decoder(qkv_bias=True, output_bias=True)
    weights = {f"model.layers.0.self_attn.{part}_proj.bias": torch.ones(64) for part in "qo"}
    wider = replace(decoder.spec, num_heads=6, num_kv_heads=3)
    found = pad_weights(weights, wider)
    assert found["model.layers.0.self_attn.q_proj.bias"].tolist() == [1.0] * 64 + [0.0] * 32
    assert found["model.layers.0.self_attn.o_proj.bias"].tolist() == [1.0] * 64


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["vllm", "--tp", "2"], "choose --tp from 1, 3, or add heads of zeros with --pad-heads"),
        (["vllm", "--tp", "5", "--pad-heads"], "choose --tp from 1, 2, 3"),  # 5 does not divide the 96 rows
        (["sglang", "--tp", "2", "--pad-heads"], "--pad-heads is not for SGLang"),
        (["speculators", "--pad-heads"], "--pad-heads is for an engine"),
    ],
)
def test_what_cannot_be_padded(
    arguments: list[str], named: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *arguments, "--bundle", str(bundle), "--out", str(tmp_path / "out")]) == 2
    assert named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
