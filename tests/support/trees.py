"""Random trees of tokens, as steps of an engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssv.runtime.engines.contract import Branches, Engine, StepOutput


def random_parents(num_nodes: int, seed: int) -> list[int]:
    """Parents of the nodes of a random tree, each after its parent; -1 is the text before the tree."""
    rng = random.Random(seed)
    return [rng.randint(max(-1, node - 5), node - 1) for node in range(num_nodes)]


def path_to(parents: Sequence[int], node: int) -> list[int]:
    """The nodes from the tree's beginning to a node, itself last."""
    path: list[int] = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def branches(prefixes: Sequence[int], trees: Sequence[Sequence[int]]) -> Branches:
    """What the nodes of trees see, one tree a row, whose nodes lie in the slots behind its prefix; narrower trees are
    padded."""
    width = max(len(parents) for parents in trees)
    paths = [
        [[prefix + n for n in path_to(parents, t)] if t < len(parents) else [prefix + t] for t in range(width)]
        for prefix, parents in zip(prefixes, trees, strict=True)
    ]
    depth = max(len(path) for row in paths for path in row)
    padded = [[path + [-1] * (depth - len(path)) for path in row] for row in paths]
    return Branches(torch.tensor(list(prefixes), dtype=torch.int32), torch.tensor(padded, dtype=torch.int32))


def int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def run(engine: Engine, ids_BT: Tensor, first_slot: list[int], **options: Any) -> StepOutput:
    """A step that gathers every token that is no padding."""
    batch, tokens = ids_BT.shape
    counts = options["count_B"].tolist() if options.get("count_B") is not None else [tokens] * batch
    rows = [b * tokens + t for b in range(batch) for t in range(counts[b])]
    return engine.step(ids_BT, int32(first_slot), torch.tensor(rows), **options)


def logits_of_chain(engine: Engine, prompt: Tensor, tokens: list[int]) -> Tensor:
    """Logits after prompt and tokens, which are decoded one by one."""
    run(engine, prompt[None], [0])
    for i, token in enumerate(tokens):
        out = run(engine, torch.tensor([[token]]), [len(prompt) + i])
    return out.logits_RV[0]
