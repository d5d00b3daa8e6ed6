"""Trees that trust: what is trusted counts as certain, on the first path alone, however the tree grows."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from fakes import EOS, FakeDraft, FakeTarget
from ssv.bundle.policy import MAX_PENDING, Policy
from ssv.bundle.profile import Costs, Curve
from ssv.runtime.decode.costs import Prices
from ssv.runtime.decode.growth import Growth, Guess, likely_groups
from ssv.runtime.decode.loop import DecodeLoop
from ssv.runtime.decode.pace import Pace
from ssv.runtime.decode.round import DecodeBatch
from ssv.runtime.decode.verify import judged_rows
from ssv.runtime.engines.contract import Grown, TreeShape
from ssv.runtime.methods import PREMIUM, SUFFIX
from ssv.runtime.request import Request, SamplingParams


class Never(Pace):
    """Lets no row draft."""

    def begin(self, *_: object, **__: object) -> bool:
        return False


TRUSTING = PREMIUM.model_copy(update={"accept_below": 0.3, "pays": False, "children": (2,), "beam": 2})
COSTS = Costs(
    target=Curve(tokens=(1, 101), seconds=(1.0, 6.0)), draft=Curve(tokens=(1, 64), seconds=(0.05, 0.1)), text=0.001
)


def guesses(*shares: float, first: int = 10) -> list[Guess]:
    return [Guess(first + i, share, 1 - share) for i, share in enumerate(shares)]


def test_a_trusted_token_is_certain_and_has_no_siblings() -> None:
    growth = Growth(TRUSTING, 8, 20, [EOS])
    growth.add([guesses(0.8, 0.15)])  # trusted: 0.2 is below 0.3
    assert [c.survival for c in growth.candidates] == [1.0] and growth.open == [0]
    growth.add([guesses(0.5, 0.4, first=20)])  # gray
    assert [c.survival for c in growth.candidates] == [1.0, 0.5, 0.4]
    growth.add([guesses(0.9, 0.05, first=30), guesses(0.95, 0.02, first=40)])
    # Behind the gray one it is trusted again; beside the first path it is not.
    assert [c.survival for c in growth.candidates][3:] == pytest.approx([0.5, 0.38, 0.008])
    tree = growth.tree()
    assert [tree.tokens[node] for node in tree.first_path] == [10, 20, 30]
    trusted = [not flag for flag in judged_rows(tree, TRUSTING.accept_below)]
    assert trusted == [True, False, True, *[False] * (len(tree) - 2)]
    assert tree.risks[0] == pytest.approx(0.2)  # what the scorer said of it stands


def test_nothing_is_trusted_by_a_lossless_policy() -> None:
    growth = Growth(TRUSTING.model_copy(update={"accept_below": 0.0}), 8, 20, [EOS])
    growth.add([guesses(1.0, 0.0)])
    assert [c.survival for c in growth.candidates] == [1.0, 0.0]


def random_grown(rng: random.Random, shape: TreeShape) -> Grown:
    """What an engine might have grown: it continues some nodes of each level, the likeliest token first."""
    tokens, parents, shares, risks = [], [], [], []
    for first, last in pairwise(shape.firsts):
        num_open = (last - first) // shape.children
        level = range(shape.firsts[shape.firsts.index(first) - 1], first) if first else [-1]
        for parent in sorted(rng.sample(list(level), num_open)):
            risk = rng.random()
            rest = sorted((rng.random() * risk / shape.children for _ in range(shape.children - 1)), reverse=True)
            for k, share in enumerate([1 - risk, *rest]):
                tokens.append(rng.choice([EOS, *range(20, 90)]) if rng.random() < 0.9 else -1)
                parents.append(parent)
                shares.append(share)
                risks.append(risk if not k else 1 - share)
    return Grown(
        tokens=np.array(tokens, dtype=np.int32),
        parents=np.array(parents, dtype=np.int32),
        shares=np.array(shares, dtype=np.float32),
        risks=np.array(risks, dtype=np.float32),
    )


@pytest.mark.parametrize("seed", range(40))
def test_candidates_that_an_engine_grew_are_preselected_as_the_tree_would_choose(seed: int) -> None:
    """The trees of the few that are told apart are those of all."""
    rng = random.Random(seed)
    shape, most = TreeShape(rng.randint(1, 5), rng.randint(1, 3), rng.randint(1, 4)), rng.randint(1, 12)
    threshold = rng.choice([0.0, 0.3, 0.6])
    policy = TRUSTING.model_copy(update={"accept_below": threshold, "children": (shape.children,), "beam": shape.beam})
    grown = random_grown(rng, shape)
    trees = []
    for asked in (most, len(grown.tokens)):
        growth = Growth(policy, most, 20, [EOS])
        for group in likely_groups(grown, shape, [EOS], asked, 20, threshold):
            growth.take(group)
        trees.append(growth.tree())
    few, every = trees
    assert (few.tokens, few.parents) == (every.tokens, every.parents)
    assert judged_rows(few, threshold) == judged_rows(every, threshold)


def test_a_lossy_trees_size_does_not_go_by_its_company() -> None:
    policy = PREMIUM.model_copy(update={"accept_below": 0.3})
    sizes = []
    for sharing in (1, 8):
        growth = Growth(policy, 32, 20, [EOS], Prices(COSTS, 1))
        growth.add([guesses(0.5, 0.3)], sharing)
        sizes.append((len(growth.open), len(growth.tree())))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("sampled", [False, True])
def test_a_lossy_row_says_the_same_alone_and_in_any_company(sampled: bool) -> None:
    """Its trees go by what steps cost a row by itself."""
    lossy = PREMIUM.model_copy(update={"accept_below": 0.4})
    settings = {"temperature": 0.8, "seed": 5} if sampled else {}
    prompts = [[1 + (7 * n + 3 * i) % 8 for i in range(n)] for n in (5, 9, 14)]

    def decoded(policies: list[Policy], pace: Pace | None = None, costs: Costs = COSTS) -> tuple[int, ...]:
        target = FakeTarget(max_batch=3, max_length=200 + 2 * MAX_PENDING, eos_bias=-9.0)
        draft = FakeDraft(target, conditioned=True, noise=0.3)
        loop = DecodeLoop(DecodeBatch(target, draft, [EOS], 200, costs=costs, pace=pace), frozenset([EOS]))
        for i, policy in enumerate(policies):
            params = SamplingParams(max_tokens=60, **(settings if not i else {}))
            loop.submit(i, Request(tuple(prompts[i]), "own", params, policy=policy), policy, None)
        found: list[int] = []
        while loop.has_work:
            for chunk in loop.step():
                if not chunk.index:
                    found += chunk.token_ids
        return tuple(found)

    alone = decoded([lossy])
    assert alone != decoded([PREMIUM])  # it does trust
    assert decoded([lossy, PREMIUM]) == decoded([lossy, lossy, SUFFIX]) == alone
    assert decoded([lossy, PREMIUM], Never(None)) == alone  # lossless rows may be told not to draft, lossy ones not
    dear = Costs(target=COSTS.target, draft=Curve(tokens=(1, 64), seconds=(0.9, 9.0)))
    assert decoded([lossy], costs=dear) == alone  # what was measured at load is none of its business
