"""Medusa's heads: what they compute, by a plain reimplementation; that what is stored comes back, published
layouts too, or is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import random_heads, relative_error, tiny_decoder
from torch import Tensor

from ssv.builder.convert import convert_heads
from ssv.model.checkpoint import CheckpointError
from ssv.model.decoder import Decoder
from ssv.model.heads import HeadsSpec, heads_spec, load_heads, save_heads, start_heads

HIDDEN = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))


def published(num_heads: int = 3, num_layers: int = 2, rows: int = 112, seed: int = 4) -> dict[str, Tensor]:
    """The authors' layout."""
    torch.manual_seed(seed)
    state = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            state[f"{head}.{layer}.linear.weight"] = torch.randn(64, 64) / 8
            state[f"{head}.{layer}.linear.bias"] = torch.randn(64) / 4
        state[f"{head}.{num_layers}.weight"] = torch.randn(rows, 64) / 8
    return state


def by_hand(target: Decoder, state: dict[str, Tensor], head: int, num_layers: int) -> Tensor:
    """`MedusaModel` as its authors wrote it: ResBlocks, then a linear layer, over the target's normed output."""
    eps = target.spec.rms_norm_eps
    x = HIDDEN * torch.rsqrt(HIDDEN.square().mean(-1, keepdim=True) + eps) * target.norm.weight
    for layer in range(num_layers):
        y = x @ state[f"{head}.{layer}.linear.weight"].T + state[f"{head}.{layer}.linear.bias"]
        x = x + y / (1 + torch.exp(-y))
    return x @ state[f"{head}.{num_layers}.weight"].T


# --- what they compute -----------------------------------------------------------------------------------------------


def test_untrained_heads_guess_what_the_target_does() -> None:
    target, token_ids = tiny_decoder(), torch.tensor([5, 111, 0, 7])
    logits_RDV = start_heads(heads_spec(target.spec, 3, 1, 4), target, token_ids).logits(HIDDEN)
    assert logits_RDV.shape == (5, 3, 4)
    for head in range(3):
        assert relative_error(logits_RDV[:, head].detach(), target.logits(HIDDEN)[:, token_ids]) < 1e-6


@pytest.mark.parametrize("num_layers", [1, 2])
def test_published_heads_compute_what_their_authors_do(num_layers: int, tmp_path: Path) -> None:
    target, state = tiny_decoder(), published(num_layers=num_layers)
    save_file(state, tmp_path / "heads.safetensors")
    heads = load_heads(tmp_path / "heads.safetensors", target)
    assert heads.spec == HeadsSpec(3, num_layers, 64, 112, 112, True, target.spec.rms_norm_eps)
    logits_RDV = heads.logits(HIDDEN)
    for head in range(3):
        assert relative_error(logits_RDV[:, head], by_hand(target, state, head, num_layers)) < 1e-6


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
def test_the_layout_of_vllm(prefix: str, tmp_path: Path) -> None:
    """No biases, and a map of the tokens that the LM heads cover."""
    target, state, kept = tiny_decoder(), published(num_layers=1), torch.tensor([9, 3, 70, 111])
    for name in [name for name in state if name.endswith("bias")]:
        state[name].zero_()
    theirs = {"token_map": kept}
    for head in range(3):
        theirs[f"{prefix}blocks.{head}.layers.0.weight"] = state[f"{head}.0.linear.weight"]
        # One that is cut already, and others that are not.
        lm_head = state[f"{head}.1.weight"]
        theirs[f"{prefix}lm_heads.{head}.weight"] = lm_head[kept] if head == 0 else lm_head
    save_file(theirs, tmp_path / "heads.safetensors")
    heads = load_heads(tmp_path / "heads.safetensors", target)
    assert torch.equal(heads.token_ids, kept)
    logits_RDV = heads.logits(HIDDEN)
    for head in range(3):
        assert relative_error(logits_RDV[:, head], by_hand(target, state, head, 1)[:, kept]) < 1e-6


def test_shared_lm_heads_compute_what_own_ones_of_the_same_rows_do() -> None:
    target = tiny_decoder()
    heads = random_heads(target, num_layers=2)
    state = {f"{name.removeprefix('blocks.')}": value for name, value in heads.own_state().items()}
    mine = {
        **{
            f"{head}.{layer}.linear.{kind}": state[f"{head}.{layer}.{kind}"]
            for head in range(3)
            for layer in range(2)
            for kind in ("weight", "bias")
        },
        **{f"{head}.2.weight": target.lm_head.weight[heads.token_ids] for head in range(3)},
    }
    for head in range(3):
        assert relative_error(heads.logits(HIDDEN)[:, head], by_hand(target, mine, head, 2)) < 1e-6


# --- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_size", [48, None])
def test_round_trip(head_size: int | None, tmp_path: Path) -> None:
    target = tiny_decoder()
    heads = random_heads(target, 2, head_size)
    save_heads(heads, tmp_path / "heads.safetensors", torch.float32)
    assert not [name for name in load_file(tmp_path / "heads.safetensors") if "lm_head" in name or "norm" in name]
    loaded = load_heads(tmp_path / "heads.safetensors", target)
    assert loaded.spec == heads.spec and torch.equal(loaded.token_ids, heads.token_ids)
    assert torch.equal(loaded.logits(HIDDEN), heads.logits(HIDDEN))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_own_lm_heads_are_stored_too(tmp_path: Path) -> None:
    target = tiny_decoder()
    save_file(published(), tmp_path / "theirs.safetensors")
    heads = load_heads(tmp_path / "theirs.safetensors", target)
    save_heads(heads, tmp_path / "ours.safetensors", torch.float32)
    again = load_heads(tmp_path / "ours.safetensors", target)
    assert again.spec == heads.spec
    assert torch.equal(again.logits(HIDDEN), heads.logits(HIDDEN))


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    save_heads(random_heads(tiny_decoder()), tmp_path / "heads.safetensors")
    return tmp_path / "heads.safetensors"


def rewrite(path: Path, spec: dict[str, Any] | str | None = None, **tensors: Tensor | None) -> None:
    """Changes fields of the spec (or all of its text), and tensors; None removes one."""
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["ssv_heads"])
    text = spec if isinstance(spec, str) else json.dumps({k: v for k, v in (facts | (spec or {})).items() if v != "-"})
    state = {name: value for name, value in (load_file(path) | tensors).items() if value is not None}
    save_file(state, path, metadata={"ssv_heads": text})


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("no json", "its metadata cannot be read"),
        ({"num_heads": 0}, "num_heads 0 must be a number from 1 on"),
        ({"num_heads": True}, "num_heads True must be"),
        ({"num_heads": 2}, "weight blocks.2.0.bias of shape .* is unknown"),
        ({"num_heads": 4}, "weight blocks.3.0.bias is missing"),
        ({"num_heads": 10**12}, "are not all there"),
        ({"num_layers": 2}, "weight blocks.0.1.bias is missing"),
        ({"head_size": 200}, "head_size 200 exceeds vocab_size 112"),
        ({"own_lm_heads": True}, "weight lm_heads.0.weight is missing"),
        ({"own_lm_heads": 1}, "own_lm_heads must be true or false"),
        ({"rms_norm_eps": 0}, "rms_norm_eps a number above 0"),
        ({"colour": "red"}, "malformed .*colour"),
        ({"num_heads": "-"}, "malformed .*num_heads"),
        ({"vocab_size": 113}, "vocab_size 113 != target vocab_size 112: distill heads"),
        ({"hidden_size": 32}, "hidden_size 32 != target hidden_size 64: distill heads"),
    ],
)
def test_wrong_spec(stored: Path, spec: Any, named: str) -> None:
    rewrite(stored, spec)
    with pytest.raises(CheckpointError, match=named):
        load_heads(stored, tiny_decoder())


@pytest.mark.parametrize(
    ("name", "tensor", "named"),
    [
        ("blocks.1.0.weight", None, "weight blocks.1.0.weight is missing"),
        (
            "blocks.1.0.weight",
            torch.zeros(64, 32),
            r"weight blocks.1.0.weight has shape \(64, 32\), expected \(64, 64\)",
        ),
        ("more", torch.zeros(1), "weight more of shape .* is unknown"),
        ("token_ids", torch.zeros(48, dtype=torch.int32), "token_ids name a token twice"),
        ("token_ids", torch.arange(70, 118, dtype=torch.int32), "token_ids outside the vocabulary of 112"),
        ("token_ids", torch.arange(-1, 47, dtype=torch.int32), "token_ids outside"),
    ],
)
def test_wrong_tensors(stored: Path, name: str, tensor: Tensor | None, named: str) -> None:
    rewrite(stored, **{name: tensor})
    with pytest.raises(CheckpointError, match=named):
        load_heads(stored, tiny_decoder())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fc.weight": torch.zeros(2, 2)}, "holds fc.weight, which no known layout"),
        ({"0.0.linear.weight": None}, "holds no Medusa heads"),
        ({"0.2.weight": None}, "holds no Medusa heads"),
        ({"1.0.linear.weight": None}, "weight blocks.1.0.weight is missing"),
        ({"2.2.weight": None}, "weight lm_heads.2.weight is missing"),
        ({"99999999.0.linear.weight": torch.zeros(64, 64)}, "are not all there"),
        ({"1.2.weight": torch.zeros(100, 64)}, r"weight lm_heads.1.weight has shape \(100, 64\), expected \(112, 64\)"),
        ({"token_map": torch.tensor([3, 112])}, "token_map names tokens that lm_heads.0.weight has no row for"),
    ],
)
def test_published_heads_that_cannot_be(changes: dict[str, Tensor | None], named: str, tmp_path: Path) -> None:
    state = {name: value for name, value in (published() | changes).items() if value is not None}
    save_file(state, tmp_path / "heads.safetensors")
    with pytest.raises(CheckpointError, match=named):
        load_heads(tmp_path / "heads.safetensors", tiny_decoder())


def test_heads_of_another_target(tmp_path: Path) -> None:
    save_file(published(rows=96), tmp_path / "heads.safetensors")
    with pytest.raises(CheckpointError, match="vocab_size 96 != target vocab_size 112"):
        load_heads(tmp_path / "heads.safetensors", tiny_decoder())


def test_no_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "heads.safetensors").write_bytes(b"half of something")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        load_heads(tmp_path / "heads.safetensors", tiny_decoder())


# --- pickles ---------------------------------------------------------------------------------------------------------


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    torch.save(published(), tmp_path / "medusa_lm_head.pt")
    with pytest.raises(CheckpointError, match=r"ssv-build convert-heads .*medusa_lm_head.pt --out"):
        load_heads(tmp_path / "medusa_lm_head.pt", tiny_decoder())
    convert_heads(tmp_path / "medusa_lm_head.pt", tmp_path / "heads.safetensors")
    target, found = tiny_decoder(), load_heads(tmp_path / "heads.safetensors", tiny_decoder())
    assert relative_error(found.logits(HIDDEN)[:, 2], by_hand(target, published(), 2, 2)) < 1e-6


class _Bomb:
    ran = False

    def __reduce__(self) -> Any:
        return _boom, ()


def _boom() -> Tensor:
    _Bomb.ran = True
    return torch.zeros(1)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (
            lambda path: torch.save({**published(), "x": _Bomb()}, path),
            r"holds more than tensors, and is not read \(Unsupported global: GLOBAL \S*_boom\)",
        ),
        (lambda path: path.write_bytes(pickle.dumps(_Bomb())), "holds more than tensors, and is not read"),
        (lambda path: path.write_bytes(b"# text\n"), r"is not read \(Unsupported operand 35\)"),
        (lambda path: path.write_bytes(b""), r"damaged or holds more .*\(EOFError\)"),
        (lambda path: path.write_bytes(b"PK\x03\x04 no archive"), "damaged or holds more"),
        (lambda path: torch.save([torch.zeros(1)], path), "no table of tensors by name"),
        (lambda path: torch.save({"model": published()}, path), "no table of tensors by name"),
        (lambda path: torch.save({"fc.weight": F.relu(torch.zeros(2))}, path), "which no known layout"),
        (lambda path: None, "does not exist"),
    ],
)
def test_pickles_that_are_not_converted(make: Any, named: str, tmp_path: Path) -> None:
    make(tmp_path / "heads.pt")
    with pytest.raises(CheckpointError, match=named):
        convert_heads(tmp_path / "heads.pt", tmp_path / "heads.safetensors")
    assert not _Bomb.ran and not (tmp_path / "heads.safetensors").exists()
