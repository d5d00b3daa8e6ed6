"""Our join as a layer of its own, in a head that others load: that it computes the same, over far texts and in bf16
too, and what is too narrow for it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle3_heads import Published, loaded
from tiny import random_draft, relative_error, tiny_decoder, tiny_spec
from torch import Tensor

from ssv.builder.training.passes import CausalAttend
from ssv.model.decoder import Decoder
from ssv.model.draft import Draft
from ssv.model.eagle3 import published
from ssv.model.join_layer import LEAST_MARGIN, own_place_bias, with_join_as_layer
from ssv.support.errors import UserError

LENGTH = 300


@torch.no_grad()
def hidden(draft: Draft, ids: Tensor, features: Tensor, start: int = 0) -> Tensor:
    position_M = torch.arange(start, start + len(ids))
    return draft.run_layers(ids, features, position_M, CausalAttend(1))


def entries(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Tokens, and what the target says of those before them."""
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 112, (LENGTH,), generator=random)
    return ids, torch.randn(LENGTH, 64, generator=random).to(dtype)


SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "shared keys": ({}, 1),
    "a key for each head": ({"num_kv_heads": 4}, 1),
    "wider heads": ({"head_dim": 32}, 1),
    "biases": ({"qkv_bias": True, "mlp_bias": True}, 1),
    "two layers": ({}, 2),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_it_computes_the_same(shape: str) -> None:
    changes, num_layers = SHAPES[shape]
    target = tiny_decoder(num_layers=3, **changes)
    draft = random_draft(target, "conditioned", num_layers=num_layers)
    head = with_join_as_layer(draft)
    assert head.spec.eagle3 is not None and len(head.decoder.layers) == num_layers + 1
    for start in (0, 150):
        found, expected = hidden(head, *entries(), start), hidden(draft, *entries(), start)
        assert relative_error(found, expected) < 1e-5
        assert relative_error(head.logits(found), draft.logits(expected)) < 1e-5


def test_it_computes_the_same_in_bf16() -> None:
    draft = random_draft(tiny_decoder(num_layers=3), "conditioned").to(torch.bfloat16)
    head = with_join_as_layer(draft).to(torch.bfloat16)
    found, expected = (hidden(each, *entries(torch.bfloat16)).float() for each in (head, draft))
    assert relative_error(found, expected) < 5e-3


@pytest.mark.parametrize("changes", [{}, {"rope_theta": 500000.0, "head_dim": 64, "max_positions": 9000}])
def test_the_bias_keeps_every_other_token_out_and_is_no_larger_than_that_takes(changes: dict[str, Any]) -> None:
    spec = tiny_spec(**changes)
    bias = own_place_bias(spec)
    frequency = spec.rope_frequencies().double()
    distance = torch.arange(1, spec.max_positions).double()[:, None]
    score = 2 * bias**2 * (distance * frequency).cos().sum(dim=-1) / math.sqrt(spec.head_dim)
    own = 2 * bias**2 * len(frequency) / math.sqrt(spec.head_dim)
    assert LEAST_MARGIN <= own - float(score.max()) < 4 * LEAST_MARGIN
    assert math.log2(bias).is_integer()


def test_it_comes_back_from_what_vllm_loads(tmp_path: Path) -> None:
    target: Decoder = tiny_decoder(num_layers=3)
    draft = random_draft(target, "conditioned")
    config, tensors = published(
        draft, "speculators", torch.float32, target_layers=3, verifier="v", architecture="LlamaForCausalLM"
    )
    assert config["transformer_layer_config"]["num_hidden_layers"] == 2
    assert config["transformer_layer_config"]["num_key_value_heads"] == 4
    # vLLM gives every layer of a head biases, or none.
    assert {f"layers.{i}.self_attn.{part}_proj.bias" for i in (0, 1) for part in "qkvo"} <= tensors.keys()
    back = loaded(Published(config, tensors), target, tmp_path)
    ids, features = entries()
    expected = draft.logits(hidden(draft, ids, features))[:, draft.token_ids.argsort()]
    assert relative_error(back.logits(hidden(back, ids, features)), expected) < 1e-5


def test_heads_too_narrow_for_the_join_are_refused() -> None:
    draft = random_draft(tiny_decoder(num_layers=3, head_dim=8), "conditioned")
    with pytest.raises(UserError, match=r"4 heads of 8 are too narrow .* hidden size of 64"):
        with_join_as_layer(draft)


def test_norms_of_query_and_key_are_refused() -> None:
    target = tiny_decoder(num_layers=3, family="qwen3", qk_norm=True)
    draft = random_draft(target, "conditioned")
    assert replace(draft.spec.decoder).qk_norm
    with pytest.raises(UserError, match="norms of query and key"):
        published(draft, "speculators", torch.float32, target_layers=3, verifier="v", architecture="A")
