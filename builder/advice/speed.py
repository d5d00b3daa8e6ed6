"""How fast each method is with a pair, by what its steps cost and what of its draft is right: the rounds are gone
through with the rules that decode (`ssv.runtime.decode.growth`, `ssv.runtime.decode.costs`), without an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat

from ssv.builder.advice.positions import Node, Position, Texts
from ssv.bundle.policy import Policy, verify_all
from ssv.bundle.profile import Costs
from ssv.bundle.survival import Survival
from ssv.runtime.decode.costs import Prices
from ssv.runtime.decode.growth import Growth
from ssv.runtime.decode.tree import ROOT, Tree
from ssv.runtime.decode.verify import asks_for_pass
from ssv.runtime.methods import EAGLE, PREMIUM, SPECINFER, TIERS

LONGEST_CHAIN = 10

TREES = {
    f"{nodes} nodes, {wide} wide": verify_all(nodes, children=(wide,), beam=wide, max_depth=8)
    for nodes, wide in ((8, 2), (8, 4), (16, 4), (32, 4), (32, 8))
}
"""Trees of a fixed size that are tried."""

CERTAIN = 1.15
"""A speed-up from which a pair pays even where the prediction is as wrong as it may be, by 15 %."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What a method is expected to do, for one request alone.

    Attributes:
        method: its name, as a request has it; of fixed trees "tree".
        shape: what it drafts, in words.
        tokens_per_pass: emitted, the target's own token included.
        nodes_per_pass: drafted tokens that a pass verifies.
        seconds_per_pass: of a whole round.
        speedup: its tokens per second over plain decoding's.
    """

    method: str
    shape: str
    tokens_per_pass: float
    nodes_per_pass: float
    seconds_per_pass: float
    speedup: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_per_pass / self.seconds_per_pass


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Where drafting chains stops paying.

    Attributes:
        acceptance: of each token, the least with which some chain pays at these costs; None where none does even if
            all are right.
        draft_share: of a draft step in a pass of one token, the most with which some chain pays at this acceptance; 0
            where none does with a draft that costs nothing.
        draft_share_now: the same share, as it is.
    """

    acceptance: float | None
    draft_share: float
    draft_share_now: float


def speeds(
    texts: Texts, costs: Costs, survival: Survival, tiers: Mapping[str, Policy], *, conditioned: bool
) -> list[Speed]:
    """Expected speed of plain decoding and of every method that drafts with a draft model; of chains and fixed trees
    the best.

    Args:
        texts: places, and what the draft guesses there.
        tiers: the bundle's; those that trust tokens need the scorer's risks. Without any, `premium` alone.
        conditioned: whether the draft takes in each token of the text with the target's features, those that it has
            guessed itself included.
    """

    def of(method: str, shape: str, policy: Policy) -> Speed:
        return expected(method, shape, texts, policy, costs, survival, conditioned=conditioned)

    chains = [of("speculative", f"chain of {k}", verify_all(k)) for k in range(1, LONGEST_CHAIN + 1)]
    trees = [of("tree", shape, policy) for shape, policy in TREES.items()]
    published = [of("specinfer", "20 nodes", SPECINFER), of("eagle", "60 nodes", EAGLE)]
    own = {"premium": PREMIUM, **{name: tiers[name] for name in TIERS if name in tiers}}
    tiered = [of(name, "what pays" if policy.pays else "by risk", policy) for name, policy in own.items()]
    plain = of("autoregressive", "nothing", verify_all(0))
    return [plain, max(chains, key=lambda s: s.speedup), max(trees, key=lambda s: s.speedup), *published, *tiered]


def expected(
    method: str, shape: str, texts: Texts, policy: Policy, costs: Costs, survival: Survival, *, conditioned: bool
) -> Speed:
    """Goes through texts with a policy; arguments as for `speeds`."""
    tokens = nodes = passes = 0
    seconds = 0.0
    for text in texts:
        at, unseen = 0, 1
        while at < len(text):
            drafted, kept, spent = _round(text[at], policy, costs, survival, unseen)
            tokens, nodes, passes, seconds = tokens + kept + 1, nodes + drafted, passes + 1, seconds + spent
            at += kept + 1
            unseen = kept + 1 if conditioned or not drafted else 1
    plain = 1 / costs.target.at(1)
    return Speed(method, shape, tokens / passes, nodes / passes, seconds / passes, tokens / seconds / plain)


def _round(position: Position, policy: Policy, costs: Costs, survival: Survival, unseen: int) -> tuple[int, int, float]:
    """Nodes of a round's pass, how many of them are kept, and the round's seconds.

    Args:
        unseen: tokens of the text that the draft takes in first.
    """
    prices = Prices(costs, 1)
    limit = policy.max_pending
    if policy.is_chain or position.rest <= 0:
        limit = min(limit, max(position.rest, 0))
    growth = Growth(policy, limit, position.rest, (), prices if policy.pays else None)
    if policy.pays and growth.open and not prices.worth_beginning([unseen], [[]], [1.0]):
        growth.open = []
    number_of = {ROOT: ROOT}  # of each candidate, its node
    spent = costs.begin + costs.text * (unseen - 1) if growth.open else 0.0

    def corrected(share: float, rank: int) -> float:
        return share if policy.is_chain else survival.corrected(share, rank, greedy=True)

    while growth.open:
        spent += costs.draft.at(len(growth.open))
        known = len(growth.candidates)
        growth.add([position.guesses(number_of[i], corrected) for i in growth.open])
        for i in range(known, len(growth.candidates)):
            candidate = growth.candidates[i]
            children = position.children(number_of[candidate.parent])
            number_of[i] = next(n for n in children if position.nodes[n].token == candidate.guess.token)
        if policy.is_chain and asks_for_pass(growth.tree().risks, policy, limit):
            growth.open = []
    tree = growth.tree()
    nodes = [position.nodes[number_of[i]] for i in growth.candidate_of]
    return len(tree), _kept(tree, nodes, policy.accept_below), spent + costs.target.at(1 + len(tree))


def _kept(tree: Tree, nodes: Sequence[Node], accept_below: float) -> int:
    """How many tokens of a tree become text: those that are right, and those that are trusted. Behind a trusted token
    that is wrong nothing is known of what is judged: the walk is taken to end there."""
    kept, at, follows = 0, ROOT, True
    first_path = set(tree.first_path)
    while True:
        children = [n for n, parent in enumerate(tree.parents) if parent == at]
        chosen = next((n for n in children if n in first_path and tree.risks[n] < accept_below), None)
        if chosen is None and follows:
            chosen = next((n for n in children if nodes[n].right), None)
        if chosen is None:
            return kept
        kept, at, follows = kept + 1, chosen, nodes[chosen].right


def break_even(texts: Texts, costs: Costs, survival: Survival, *, conditioned: bool) -> BreakEven:
    """Finds where chains stop paying; arguments as for `speeds`."""
    one = costs.target.at(1)

    def tokens_of(k: int) -> float:
        chain = verify_all(k)
        return expected("", "", texts, chain, costs, survival, conditioned=conditioned).tokens_per_pass

    shares = [(tokens_of(k) * one - costs.target.at(1 + k)) / (k * one) for k in range(1, LONGEST_CHAIN + 1)]
    return BreakEven(least_acceptance(costs), max(0.0, *shares), costs.draft.at(1) / one)


def least_acceptance(costs: Costs) -> float | None:
    """The least acceptance of each token with which some chain pays; None where none does even if all are right."""
    if not _pays(1.0, costs):
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if _pays(middle, costs) else (middle, high)
    return high


def _pays(acceptance: float, costs: Costs) -> bool:
    one = costs.target.at(1)
    tokens = list(accumulate(repeat(acceptance, LONGEST_CHAIN), lambda total, a: 1 + a * total, initial=1.0))
    return any(
        tokens[k] * one > costs.begin + k * costs.draft.at(1) + costs.target.at(1 + k)
        for k in range(1, LONGEST_CHAIN + 1)
    )


def verdict(found: Sequence[Speed], costs: Costs, free: Sequence[Speed]) -> tuple[str, str]:
    """A verdict on a pair, and why, in words.

    Args:
        found: of `speeds`.
        free: the same with a draft whose steps cost nothing.
    """
    best = max((s for s in found if s.method in ("speculative", "tree")), key=lambda s: s.speedup)
    if best.speedup >= CERTAIN:
        return (
            "good",
            f"drafts of one shape ({best.shape}) are expected at {best.speedup:.2f} times plain decoding's speed",
        )
    if best.speedup > 1:
        return "doubtful", (
            f"{best.speedup:.2f} times plain decoding's speed is expected of the best shape, less than what the "
            "prediction may be wrong by"
        )
    at_no_cost = max(s.speedup for s in free if s.method in ("speculative", "tree"))
    share = costs.draft.at(1) / costs.target.at(1)
    if at_no_cost >= CERTAIN:
        return "too strong", (
            f"a draft step costs {share:.0%} of a pass, more than its guesses save: with steps that cost nothing the "
            f"same guesses would give {at_no_cost:.2f} times plain decoding's speed. Take a smaller draft"
        )
    return "too weak", (
        f"too few of its guesses are right: even with steps that cost nothing they would give {at_no_cost:.2f} times "
        "plain decoding's speed. Take a better draft, or train this one on such prompts"
    )
