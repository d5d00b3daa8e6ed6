"""The CUDA engine: what the torch engine computes, and the same bits for a token in whatever company. Needs an
NVIDIA GPU of compute capability 8.0 or above.

make test-gpu
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drive import drive, flat, names
from tiny import random_draft, relative_error, tiny_decoder, tiny_ids
from torch import Tensor
from trees import branches, int32, path_to, random_parents, run

from ssv.model.decoder import Decoder
from ssv.model.draft import Draft
from ssv.model.scorer import Scorer
from ssv.runtime.engines.cuda.engine import CudaEngine
from ssv.runtime.engines.torch_engine import draft_engine, target_engine

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "qwen3": {"qk_norm": True, "family": "qwen3"},
    "biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "family": "qwen2"},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64},
    "one-head-for-eight": {"hidden_size": 128, "num_heads": 8, "num_kv_heads": 1, "head_dim": 128, "vocab_size": 117},
    "long-sums": {"hidden_size": 2048, "intermediate_size": 8192, "num_heads": 16, "num_kv_heads": 4, "head_dim": 128},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
MAX_LENGTH = 512


def rounded(module: Any) -> Any:
    """With the weights that the kernels have, which keep norms in fp32 as the model has them."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(parameter.dtype)
    return module


def cuda(decoder: Decoder, max_batch: int = 3, **parts: Any) -> CudaEngine:
    return CudaEngine(decoder.cuda(), max_batch=max_batch, max_length=MAX_LENGTH, **parts)


@every_shape
def test_target(shape: dict[str, Any]) -> None:
    decoder = rounded(tiny_decoder(**shape))
    expected = drive(target_engine(decoder, precision="fp32", max_batch=3, max_length=MAX_LENGTH))
    found = drive(cuda(decoder))
    for name in names():
        assert relative_error(flat(found, name).cpu(), flat(expected, name)) < 2e-2
    for out in found:
        assert out.token_R is not None and torch.equal(out.token_R, out.logits_RV.argmax(dim=1))


@pytest.mark.parametrize("kind", ["conditioned", "standalone"])
def test_draft_and_features(kind: str) -> None:
    decoder = tiny_decoder(hidden_size=96, num_layers=3)
    draft: Draft = rounded(random_draft(decoder, kind))  # type: ignore[arg-type]
    rounded(decoder)
    torch.manual_seed(3)
    scorer = Scorer(torch.randn(decoder.spec.hidden_size + 3) / 4, torch.tensor(0.1), True)
    sizes: dict[str, Any] = {"precision": "fp32", "max_batch": 3, "max_length": MAX_LENGTH}
    expected = drive(draft_engine(draft, scorer=scorer, **sizes))
    with_tap = draft.tap is not None
    target = drive(target_engine(decoder, draft=draft, **sizes), features_out=with_tap)
    draft.cuda()
    found = drive(cuda(draft.decoder, draft=draft, scorer=scorer.to("cuda")))
    for name in ("hidden_RH", "logits_RV", "reject_prob_R"):
        assert relative_error(flat(found, name).cpu(), flat(expected, name)) < 2e-2
    on_cuda = drive(cuda(decoder, tap=draft.tap), features_out=with_tap)
    for name in names(with_tap):
        assert relative_error(flat(on_cuda, name).cpu(), flat(target, name)) < 2e-2


def bits(engine: CudaEngine, ids_BT: Tensor, first: list[int], **rest: Any) -> list[Tensor]:
    """Logits of all tokens that are no padding."""
    return [row.clone() for row in run(engine, ids_BT, first, **rest).logits_RV]


@every_shape
@pytest.mark.parametrize("length", [5, 250, 300])
def test_a_token_has_the_same_bits_alone_in_a_chain_in_a_tree_and_beside_other_rows(
    shape: dict[str, Any], length: int
) -> None:
    """The text ends before, in and behind the first block of keys."""
    engine = cuda(tiny_decoder(**shape), max_batch=4)
    prompt, tokens = tiny_ids(1, length, seed=1), tiny_ids(1, 12, seed=2)
    for row in range(4):
        run(engine, prompt, [0], first_row=row)
    alone = [bits(engine, tokens[:, t : t + 1], [length + t])[0] for t in range(12)]
    for row, chain in (
        (1, bits(engine, tokens, [length], first_row=1)),
        (2, bits(engine, tokens[:, :7], [length], first_row=2)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(chain, alone, strict=False)), row
    # The chain among others of another length, and as one path of a tree.
    ids_BT = torch.cat((tiny_ids(1, 12, seed=5), tokens, tiny_ids(2, 12, seed=6)))
    beside = bits(engine, ids_BT, [length] * 4, count_B=int32([3, 12, 9, 12]))
    assert all(torch.equal(a, b) for a, b in zip(beside[3:15], alone, strict=True))
    parents = random_parents(40, seed=length)
    nodes = tiny_ids(1, 40, seed=7)
    found = bits(engine, nodes, [length], branches=branches([length], [parents]))
    for node in (3, 17, 39):
        path = path_to(parents, node)
        assert torch.equal(bits(engine, nodes[:, path], [length], first_row=3)[-1], found[node]), node


def test_steps_of_more_tokens_than_a_graph_has_room_for() -> None:
    engine, ids = cuda(tiny_decoder()), tiny_ids(1, 200, seed=3)
    whole = bits(engine, ids, [0])
    singles = [bits(engine, ids[:, t : t + 1], [t], first_row=1)[0] for t in range(200)]
    assert all(torch.equal(a, b) for a, b in zip(whole, singles, strict=True))
    rows = run(engine, ids[:, :90].expand(3, -1), [0, 0, 0])
    assert torch.equal(rows.logits_RV, torch.stack(singles[:90]).repeat(3, 1))


def test_a_row_without_numbers_has_no_token() -> None:
    decoder = tiny_decoder()
    decoder.lm_head.weight.data[7] = float("nan")
    out = run(cuda(decoder), tiny_ids(1, 3), [0])
    assert out.token_R is not None and out.token_R.tolist() == [-1] * 3
