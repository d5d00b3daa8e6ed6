"""Trees on CUDA: nodes have the logits of their chains, a kept path is text, and rounds of trees give the text of
plain decoding. Needs any NVIDIA GPU.

make test-gpu
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import random_draft, random_heads, relative_error, tiny_decoder, tiny_ids
from trees import branches, int32, logits_of_chain, path_to, random_parents, run

from ssv.bundle.policy import MAX_PENDING, Policy, verify_all
from ssv.model.scorer import Scorer
from ssv.runtime.decode.loop import DecodeLoop
from ssv.runtime.decode.round import DecodeBatch
from ssv.runtime.engines.contract import Engine
from ssv.runtime.engines.cuda.make import cuda_engines
from ssv.runtime.engines.torch_engine import TorchEngine, draft_engine, heads_engine, target_engine
from ssv.runtime.methods import AUTOREGRESSIVE, MEDUSA
from ssv.runtime.request import Request, SamplingParams

DEVICE = "cuda"
SIZES: dict[str, Any] = {"max_batch": 3, "max_length": 128, "device": DEVICE}

any_precision = pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 4e-2)])


def target(precision: Any, **shape: Any) -> TorchEngine:
    return target_engine(tiny_decoder(**shape), precision=precision, **SIZES)


@any_precision
@pytest.mark.parametrize("shape", [{}, {"qk_norm": True, "qkv_bias": True}], ids=["plain", "qk-norm"])
@pytest.mark.parametrize("seed", range(2))
def test_nodes_have_the_logits_of_their_chains(
    precision: str, tolerance: float, shape: dict[str, Any], seed: int
) -> None:
    engine, alone = target(precision, **shape), target(precision, **shape)
    sizes = [1 + (seed * 5 + b * 7) % 14 for b in range(3)]
    trees = [random_parents(size, seed * 3 + b) for b, size in enumerate(sizes)]
    prompts = [tiny_ids(1, 3 + (5 * b + seed) % 9, seed=b)[0] for b in range(3)]
    for b, prompt in enumerate(prompts):
        run(engine, prompt[None], [0], first_row=b)
    ids_BT, prefixes = tiny_ids(3, max(sizes), seed=40 + seed), [len(prompt) for prompt in prompts]
    found = iter(run(engine, ids_BT, prefixes, branches=branches(prefixes, trees), count_B=int32(sizes)).logits_RV)
    for b, parents in enumerate(trees):
        for node in range(len(parents)):
            tokens = ids_BT[b, path_to(parents, node)].tolist()
            assert relative_error(next(found), logits_of_chain(alone, prompts[b], tokens)) < tolerance, (b, node)


@any_precision
def test_a_kept_path_is_text(precision: str, tolerance: float) -> None:
    engine, prompt = target(precision), tiny_ids(1, 5)[0]
    run(engine, prompt[None], [0])
    parents, tokens = [-1, -1, 0, 1, 3, 0, 4], tiny_ids(1, 7, seed=3)[0]
    run(engine, tokens[None], [5], branches=branches([5], [parents]))
    path = path_to(parents, 4)
    assert path == [1, 3, 4]
    engine.keep(0, 5, [5 + node for node in path])
    (logits,) = run(engine, torch.tensor([[7]]), [5 + len(path)]).logits_RV
    expected = logits_of_chain(target(precision), prompt, [*tokens[path].tolist(), 7])
    assert relative_error(logits, expected) < tolerance


TREES = {
    "static": verify_all(20, children=(1, 1, 3, 1), beam=3, max_depth=8),
    "bushy": verify_all(12, children=(4,), beam=3, max_depth=3),
    "eagle": verify_all(60, children=(10,), beam=10, max_depth=7),
    "medusa": MEDUSA,
}


@any_precision
def test_heads(precision: Any, tolerance: float) -> None:
    heads, hidden = random_heads(tiny_decoder(), 2), torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    found = heads_engine(heads, precision=precision, device=DEVICE)
    assert found.token_ids_V is not None and torch.equal(found.token_ids_V.cpu(), heads.token_ids)
    assert relative_error(found.logits(hidden.to(DEVICE)).cpu(), heads.logits(hidden)) < tolerance


@pytest.mark.parametrize("compiled", [False, True], ids=["torch", "compiled"])
@pytest.mark.parametrize("kind", ["conditioned", "standalone"])
@pytest.mark.parametrize("shape", TREES)
def test_rounds_of_trees_give_the_text_of_plain_decoding(shape: str, kind: Any, compiled: bool) -> None:
    """Greedy and sampled, alone and side by side, by PyTorch in fp32 and by compiled kernels in bf16."""
    params = [
        SamplingParams(max_tokens=24, temperature=t, top_p=p, seed=7, ignore_eos=True)
        for t, p in ((0.0, 1.0), (0.8, 1.0), (0.8, 0.9), (0.0, 1.0))
    ]
    requests = [Request((5, 6, 7 + b), "premium", each) for b, each in enumerate(params)]
    plain, _ = decoded(requests, AUTOREGRESSIVE, kind, compiled)
    together, accepted = decoded(requests, TREES[shape], kind, compiled)
    assert together == plain
    assert accepted > 0  # paths were kept, or this would show nothing
    for request, expected in zip(requests, plain, strict=True):
        assert decoded([request], TREES[shape], kind, compiled)[0] == [expected]


def decoded(requests: list[Request], policy: Policy, kind: Any, compiled: bool) -> tuple[list[tuple[int, ...]], int]:
    """The outputs' tokens, and how many of them were drafted ones."""
    decoder = tiny_decoder()
    draft = random_draft(decoder, kind, None)
    torch.manual_seed(3)
    scorer = Scorer(torch.randn(decoder.spec.hidden_size + 3) / 4, torch.tensor(0.1), True)
    sizes: dict[str, Any] = {"max_batch": 3, "max_length": 64 + 2 * MAX_PENDING, "device": DEVICE}
    precision: Any = "bf16" if compiled else "fp32"
    if compiled:
        engines: tuple[Engine, Engine] = cuda_engines(decoder, draft, scorer, **sizes)
    else:
        sizes["precision"] = precision
        engines = target_engine(decoder, draft=draft, **sizes), draft_engine(draft, scorer=scorer, **sizes)
    heads = heads_engine(random_heads(decoder), precision=precision, device=DEVICE)
    loop = DecodeLoop(DecodeBatch(*engines, [1], 64, heads=heads), frozenset([1]))
    for index, request in enumerate(requests):
        loop.submit(index, request, policy, None)
    tokens: dict[int, tuple[int, ...]] = {}
    accepted = {}
    while loop.has_work:
        for chunk in loop.step():
            tokens[chunk.index] = tokens.get(chunk.index, ()) + chunk.token_ids
            accepted[chunk.index] = chunk.counters.accepted
    return [tokens[index] for index in range(len(requests))], sum(accepted.values())
