"""The CUDA engine: what the torch engine computes, and the same bits for a token in whatever company. Needs an
NVIDIA GPU of compute capability 8.0 or above.

make test-gpu
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from drive import drive, flat, names
from growing import grow_by_stepping
from tiny import random_draft, relative_error, tiny_decoder, tiny_ids
from torch import Tensor
from trees import branches, int32, path_to, random_parents, run
from wide import wide_draft

from ssv.model.decoder import Decoder
from ssv.model.draft import Draft
from ssv.model.scorer import Scorer
from ssv.runtime.engines.contract import EngineError, GrowingEngine, TreeShape
from ssv.runtime.engines.cuda.engine import CudaEngine
from ssv.runtime.engines.torch_engine import draft_engine, target_engine

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "qwen3": {"qk_norm": True, "family": "qwen3"},
    "biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "family": "qwen2"},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64},
    "one-head-for-eight": {"hidden_size": 128, "num_heads": 8, "num_kv_heads": 1, "head_dim": 128, "vocab_size": 117},
    "sixteen-for-one": {"hidden_size": 128, "num_heads": 16, "num_kv_heads": 1, "head_dim": 24},
    "heads-of-80": {"hidden_size": 160, "num_heads": 4, "num_kv_heads": 2, "head_dim": 80},
    "heads-of-256": {"hidden_size": 256, "num_heads": 2, "num_kv_heads": 1, "head_dim": 256},
    "many-channels": {"vocab_size": 5003},
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


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_draft_of_five_taps_with_a_corrected_head(num_layers: int) -> None:
    decoder = rounded(tiny_decoder(hidden_size=96, num_layers=7))
    draft: Draft = rounded(wide_draft(decoder, num_layers)[0])
    torch.manual_seed(3)
    scorer = Scorer(torch.randn(96 + 3) / 4, torch.tensor(0.1), True)
    sizes: dict[str, Any] = {"precision": "fp32", "max_batch": 3, "max_length": MAX_LENGTH}
    expected = drive(draft_engine(draft, scorer=scorer, **sizes))
    target = drive(target_engine(decoder, draft=draft, **sizes), features_out=True)
    draft.cuda()
    found = drive(cuda(draft.decoder, draft=draft, scorer=scorer.to("cuda")))
    for name in ("hidden_RH", "logits_RV", "reject_prob_R"):
        assert relative_error(flat(found, name).cpu(), flat(expected, name)) < 2e-2
    on_cuda = drive(cuda(decoder, tap=draft.tap), features_out=True)
    for name in names(True):  # through twice as many layers as elsewhere
        assert relative_error(flat(on_cuda, name).cpu(), flat(target, name)) < 4e-2


GROWN = {
    "chain": TreeShape(6, 1, 1),
    "one of two": TreeShape(2, 1, 2),
    "bushy": TreeShape(5, 8, 4),
    "eagle": TreeShape(7, 10, 10),
}


@pytest.mark.parametrize("kind", ["conditioned", "standalone"])
@pytest.mark.parametrize("shape", GROWN.values(), ids=GROWN)
def test_trees_that_grow_are_those_of_steps(shape: TreeShape, kind: str) -> None:
    """Alone, and in three rows of five whose texts go on by different numbers of tokens."""
    draft: Draft = random_draft(tiny_decoder(hidden_size=96), kind).cuda()  # type: ignore[arg-type]
    torch.manual_seed(3)
    weight = torch.randn(96 + 3) / 4
    scorer = Scorer(weight, torch.tensor(0.1), True).to("cuda") if kind == "conditioned" else None
    grower, stepper = (cuda(draft.decoder, max_batch=5, draft=draft, scorer=scorer) for _ in range(2))
    assert isinstance(grower, GrowingEngine)
    generator = torch.Generator().manual_seed(5)
    starts = [3, 250, 40, 20, 255]
    for engine in (grower, stepper):
        for b, start in enumerate(starts):
            features = torch.randn(1, start, 96, generator=torch.Generator().manual_seed(b))
            given = features if kind == "conditioned" else None
            engine.step(tiny_ids(1, start, seed=b), int32([0]), torch.arange(0), given, first_row=b)
    corrections = ((0.2, 0.9), (-0.3, 1.1), (0.1, 1.0))
    for counts in ([1, 0, 0, 0, 0], [0, 3, 0, 1, 2]):
        ids_BT, features_BTF = tiny_ids(5, max(counts), seed=9), None
        if kind == "conditioned":
            features_BTF = torch.randn(5, max(counts), 96, generator=generator).cuda()
        args = (ids_BT, int32(starts), int32(counts), features_BTF, shape, corrections)
        found, expected = grower.grow(*args), grow_by_stepping(stepper, *args)
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                assert mine.tokens.tolist() == theirs.tokens.tolist()
                assert mine.parents.tolist() == theirs.parents.tolist()
                assert np.allclose(mine.shares, theirs.shares, atol=1e-4)
                assert np.allclose(mine.risks, theirs.risks, atol=1e-4)


def test_trees_that_there_is_no_room_for_are_refused() -> None:
    draft: Draft = random_draft(tiny_decoder(), "standalone").cuda()
    engine = cuda(draft.decoder, draft=draft)
    for shape, says in (
        (TreeShape(17, 1, 1), "levels 17"),
        (TreeShape(3, 30, 4), "beam 30"),
        (TreeShape(8, 16, 16), "guesses"),
    ):
        with pytest.raises(EngineError, match=says):
            engine.grow(tiny_ids(1, 1), int32([0]), int32([1]), None, shape, ((0.0, 1.0),))


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


@pytest.mark.parametrize("size", [6, 16, 48])
def test_many_tokens_of_a_deep_model_have_the_same_bits_together(size: int) -> None:
    """What rounds differently once in a hundred thousand numbers is seen only in many of them."""
    engine = cuda(tiny_decoder(**SHAPES["smollm2"] | {"num_layers": 12}))
    ids = tiny_ids(1, 384, seed=4)
    singles = torch.stack([bits(engine, ids[:, t : t + 1], [t])[0] for t in range(384)])
    for start in range(0, 384, size):
        part = bits(engine, ids[:, start : start + size], [start], first_row=1)
        assert torch.equal(torch.stack(part), singles[start : start + size]), start


def test_a_row_without_numbers_has_no_token() -> None:
    decoder = tiny_decoder()
    decoder.lm_head.weight.data[7] = float("nan")
    out = run(cuda(decoder), tiny_ids(1, 3), [0])
    assert out.token_R is not None and out.token_R.tolist() == [-1] * 3


def test_a_row_without_numbers_has_no_risk() -> None:
    """So it is not trusted: nothing is below a limit."""
    draft: Draft = random_draft(tiny_decoder(), "standalone").cuda()
    scorer = Scorer(torch.zeros(draft.decoder.spec.hidden_size + 3), torch.tensor(0.1), True)
    found = run(cuda(draft.decoder, draft=draft, scorer=scorer), tiny_ids(1, 3), [0]).reject_prob_R
    assert found is not None and torch.allclose(found.cpu(), torch.tensor(0.1).sigmoid())
    draft.decoder.lm_head.weight.data[7] = float("nan")
    found = run(cuda(draft.decoder, draft=draft, scorer=scorer), tiny_ids(1, 3), [0]).reject_prob_R
    assert found is not None and found.isnan().all()
