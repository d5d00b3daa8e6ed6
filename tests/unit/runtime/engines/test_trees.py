"""Trees in a step: every node has the logits that its path has as a chain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from interpreted import LIMITS, interpreted_draft, interpreted_target
from quantized_weights import quantized_weights
from tiny import random_draft, relative_error, tiny_decoder, tiny_ids, tiny_spec, tiny_weights
from torch import Tensor
from trees import branches, int32, logits_of_chain, path_to, random_parents, run

from ssv.model.decoder import Decoder
from ssv.runtime.engines import cpu_layers, kv_cache, tensorrt_engine, torch_engine
from ssv.runtime.engines.contract import Branches, Engine, EngineError
from ssv.runtime.engines.torch_engine import draft_engine, target_engine

ODD = {"hidden_size": 90, "num_heads": 9, "num_kv_heads": 3, "head_dim": 10, "intermediate_size": 101}
SIZES: dict[str, Any] = {"max_batch": 3, "max_length": 128}


def int8_target(**shape: Any) -> Engine:
    return target_engine(tiny_decoder(**shape), precision="int8", **SIZES)


def int4_target(**shape: Any) -> Engine:
    return target_engine(tiny_decoder(**shape), precision="int4", **SIZES)


def fp32_target(**shape: Any) -> Engine:
    return target_engine(tiny_decoder(**shape), precision="fp32", **SIZES)


def network_target(precision: str = "fp16", **shape: Any) -> Engine:
    spec = tiny_spec(**shape)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    weights = {name: weight.to(dtype).float() for name, weight in tiny_weights(spec).items()}
    if precision in ("fp8", "int4"):
        weights = quantized_weights(spec, weights, precision)
    return interpreted_target(Decoder.from_weights(spec, weights), dtype)


# The interpreter rounds what it has computed in fp64, so its trees can be asked for the bits of their chains, too.
ENGINES: dict[str, tuple[Callable[..., Engine], float]] = {
    "int8": (int8_target, 0.0),
    "int4": (int4_target, 0.0),
    "fp32": (fp32_target, 1e-5),
    **{f"network-{name}": (partial(network_target, name), 0.0) for name in ("fp16", "bf16", "fp8", "int4")},
}
SHAPES = {"even": {}, "odd": ODD, "qk-norm": {"qk_norm": True, "qkv_bias": True}}
# Queries that see the same keys share a read of them, as far as they do.
WIDE_HEADS = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 32}
CASES = [
    pytest.param(*ENGINES[engine], SHAPES[shape], id=f"{shape}-{engine}")
    for engine in ENGINES
    for shape in SHAPES
    if (engine, shape) != ("network-int4", "odd")  # its groups of 16 weights fill no row of 90
] + [pytest.param(*ENGINES[engine], WIDE_HEADS, id=f"wide-heads-{engine}") for engine in ("int8", "int4")]
any_engine = pytest.mark.parametrize(("make", "tolerance"), ENGINES.values(), ids=ENGINES)


def same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return torch.equal(a, b) if tolerance == 0 else relative_error(a, b) < tolerance


@pytest.mark.parametrize(("make", "tolerance", "shape"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_nodes_have_the_logits_of_their_chains(
    make: Callable[..., Engine], tolerance: float, shape: dict[str, Any], seed: int
) -> None:
    engine = make(**shape)
    sizes = [1 + (seed * 5 + b * 7) % 14 for b in range(3)]
    trees = [random_parents(size, seed * 3 + b) for b, size in enumerate(sizes)]
    prompts = [tiny_ids(1, 3 + (5 * b + seed) % 9, seed=b)[0] for b in range(3)]
    for b, prompt in enumerate(prompts):
        run(engine, prompt[None], [0], first_row=b)
    width = max(sizes)
    ids_BT = tiny_ids(3, width, seed=40 + seed)
    prefixes = [len(prompt) for prompt in prompts]
    tree_step = run(engine, ids_BT, prefixes, branches=branches(prefixes, trees), count_B=int32(sizes))
    row = 0
    alone = make(**shape)
    for b, parents in enumerate(trees):
        for node in range(len(parents)):
            tokens = ids_BT[b, path_to(parents, node)].tolist()
            assert same(tree_step.logits_RV[row], logits_of_chain(alone, prompts[b], tokens), tolerance), (b, node)
            row += 1


@any_engine
def test_a_tree_grows_over_several_steps(make: Callable[..., Engine], tolerance: float) -> None:
    """Ancestors lie in steps before."""
    engine, prompt = make(), tiny_ids(1, 5)[0]
    run(engine, prompt[None], [0])
    parents, tokens = [-1, -1, 0, 1, 0, 3, 2], tiny_ids(1, 7, seed=3)[0]
    whole = branches([5], [parents])
    found = []
    for start, stop in ((0, 2), (2, 5), (5, 7)):
        part = Branches(whole.prefix_B, whole.path_BTD[:, start:stop])
        found.append(run(engine, tokens[None, start:stop], [5 + start], branches=part).logits_RV)
    alone = make()
    for node, logits in enumerate(torch.cat(found)):
        chain = logits_of_chain(alone, prompt, tokens[path_to(parents, node)].tolist())
        assert same(logits, chain, tolerance), node


@any_engine
def test_a_kept_path_is_text(make: Callable[..., Engine], tolerance: float) -> None:
    engine, prompt = make(), tiny_ids(1, 5)[0]
    run(engine, prompt[None], [0])
    parents, tokens = [-1, -1, 0, 1, 3, 0, 4], tiny_ids(1, 7, seed=3)[0]
    run(engine, tokens[None], [5], branches=branches([5], [parents]))
    path = path_to(parents, 4)  # 1, 3, 4
    engine.keep(0, 5, [5 + node for node in path])
    (logits,) = run(engine, torch.tensor([[7]]), [5 + len(path)]).logits_RV
    assert same(logits, logits_of_chain(make(), prompt, [*tokens[path].tolist(), 7]), tolerance)


@any_engine
def test_chains_as_branches_are_chains(make: Callable[..., Engine], tolerance: float) -> None:
    ids_BT, chain = tiny_ids(2, 6), [-1, 0, 1, 2, 3, 4]
    expected = run(make(), ids_BT, [0, 0]).logits_RV
    assert same(run(make(), ids_BT, [0, 0], branches=branches([0, 0], [chain, chain])).logits_RV, expected, tolerance)


@pytest.mark.parametrize("make", [network_target, fp32_target, int8_target])
def test_a_tree_wider_than_a_run(make: Callable[..., Engine]) -> None:
    """TensorRT's engine cuts a step of many tokens into runs of what its plan has a profile for."""
    parents = random_parents(40, 9)
    assert len(parents) > LIMITS.prefill_chunk
    engine, ids_BT = make(), tiny_ids(1, 40, seed=8)
    found = run(engine, ids_BT, [0], branches=branches([0], [parents])).logits_RV
    alone = make()
    for node in (0, 17, 39):
        tokens = ids_BT[0, path_to(parents, node)]
        assert relative_error(found[node], run(alone, tokens[None], [0]).logits_RV[-1]) < 1e-5


@pytest.mark.parametrize("kind", ["conditioned", "standalone"])
def test_drafts_take_trees(kind: Any) -> None:
    decoder = tiny_decoder()
    draft = random_draft(decoder, kind)
    engines = [
        draft_engine(draft, precision="fp32", **SIZES),
        draft_engine(draft, precision="int8", **SIZES),
        interpreted_draft(draft, torch.float16, None),
    ]
    parents = [-1, -1, 0, 1, 1, 4]
    ids_BT = tiny_ids(1, 6)
    features = engines[0].num_features
    features_BTF = torch.randn(1, 6, features, generator=torch.Generator().manual_seed(5)) if features else None
    for engine in engines:
        found = run(engine, ids_BT, [0], features_in_BTF=features_BTF, branches=branches([0], [parents])).logits_RV
        for node in range(6):
            path = path_to(parents, node)
            given = None if features_BTF is None else features_BTF[:, path]
            chain = run(engine, ids_BT[:, path], [0], features_in_BTF=given).logits_RV
            assert relative_error(found[node], chain[-1]) < 2e-2


# --- what is wrong is noticed -----------------------------------------------------------------------------------------


COUSINS = [-1, -1, 0, 1]
"""A tree whose nodes 2 and 3 are cousins."""


def sees_a_cousin(visible: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The mask with one more place of a tree: node 3 sees node 2."""

    def mask(slot_BT: Tensor, num_slots: int, branches: Branches | None = None) -> Tensor:
        mask_B1TS = visible(slot_BT, num_slots, branches)
        if branches is not None:
            mask_B1TS[0, 0, 3, slot_BT[0, 2]] = True
        return mask_B1TS

    return mask


class CousinForParent(cpu_layers.Places):
    """What compiled steps go by instead of a mask: the path of node 3 leads over node 2."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.path_MD is not None:
            self.path_MD[3, 0] = self.path_MD[2, 1]


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "fp32": (torch_engine, "visible", sees_a_cousin(kv_cache.visible)),
    "int8": (torch_engine, "Places", CousinForParent),
    "int4": (torch_engine, "Places", CousinForParent),
}
IN_A_NETWORK = (tensorrt_engine, "visible", sees_a_cousin(kv_cache.visible))


@pytest.mark.parametrize("name", ENGINES)
def test_a_node_that_sees_a_cousin_is_another_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, tolerance = ENGINES[name]
    assert unlike_their_chains(make, tolerance, COUSINS) == []
    monkeypatch.setattr(*FAULTS.get(name, IN_A_NETWORK))
    assert unlike_their_chains(make, tolerance, COUSINS) == [3]


def unlike_their_chains(make: Callable[..., Engine], tolerance: float, parents: list[int]) -> list[int]:
    """The nodes of a tree behind a prompt that have other logits than their chains."""
    prompt, tokens = tiny_ids(1, 5)[0], tiny_ids(1, len(parents), seed=3)[0]
    engine, alone = make(), make()
    run(engine, prompt[None], [0])
    found = run(engine, tokens[None], [5], branches=branches([5], [parents])).logits_RV
    chains = [logits_of_chain(alone, prompt, tokens[path_to(parents, node)].tolist()) for node in range(len(parents))]
    return [node for node, chain in enumerate(chains) if not same(found[node], chain, tolerance)]


@pytest.mark.parametrize(
    ("prefix", "path", "named"),
    [
        ([5], [[[4, 5]]], "prefix 5 must lie between 0 and first_slot 4"),
        ([-1], [[[4]]], "prefix -1"),
        ([2], [[[3]]], r"path \[3\] of token 0 of row 0 must end at its own slot 4"),
        ([2], [[[-1]]], r"path \[-1\] of token 0 of row 0 must end at its own slot 4"),
        ([2], [[[-1, 4]]], "must end at its own slot 4"),
        ([2], [[[4, 3]]], "must end at its own slot 4"),
        ([2], [[[1, 4]]], r"path \[1, 4\] of token 0 of row 0 must ascend from the prefix 2 on"),
        ([2], [[[3, 3, 4]]], "must ascend"),
        ([2, 2], [[[4]]], r"branches have shapes \(2,\) and \(1, 1, 1\), the step has 1 rows of 1 tokens"),
        ([2], [[4]], "branches have shapes"),
    ],
)
@pytest.mark.parametrize("make", [fp32_target, int8_target, network_target])
def test_branches_that_cannot_be(make: Callable[..., Engine], prefix: list[int], path: Any, named: str) -> None:
    engine = make()
    with pytest.raises(EngineError, match=named):
        run(engine, tiny_ids(1, 1), [4], branches=Branches(int32(prefix), int32(path)))
    with pytest.raises(EngineError, match="branches must be int32"):
        run(engine, tiny_ids(1, 1), [4], branches=Branches(torch.tensor([2]), int32([[[4]]])))


@pytest.mark.parametrize("slots", [[3], [5, 5], [6, 5], [4, 128]])
def test_slots_that_cannot_be_kept(slots: list[int]) -> None:
    with pytest.raises(EngineError, match=r"must ascend from 4 on, below 128"):
        int8_target().keep(0, 4, slots)
