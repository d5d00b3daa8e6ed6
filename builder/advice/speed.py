"""How fast each method is with a pair, by what its steps cost and what of its draft is right: the rounds are gone
through with the rules that decode (`ssv.runtime.decode.growth`, `ssv.runtime.decode.costs`), without an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, repeat

from ssv.builder.advice.positions import Position, Texts
from ssv.builder.advice.rounds import NOTHING, Overhead, Timed, fitted
from ssv.bundle.policy import MAX_PENDING, Policy, verify_all
from ssv.bundle.profile import Costs
from ssv.bundle.survival import Survival
from ssv.runtime.decode.costs import Prices
from ssv.runtime.decode.growth import Growth, Guess
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


UNSEEN_SHARE = 1e-6
"""Of a guess behind those that nobody has watched, as they hardly survive: what is drafted there is taken to be wrong,
but takes its time."""

ENOUGH = 2 * MAX_PENDING
"""Tokens that an output may still have, where its end is far."""


@dataclass(frozen=True, slots=True)
class Basis:
    """What a prediction stands on, beside texts.

    Attributes:
        costs: of steps.
        survival: corrects the shares of guesses.
        conditioned: whether the draft takes in each token of the text with the target's features, those that it has
            guessed itself included.
        recorded: costs that lossy rows draft by: the bundle's; None where it has none.
        overhead: of rounds beside their steps.
    """

    costs: Costs
    survival: Survival
    conditioned: bool
    recorded: Costs | None = None
    overhead: Overhead = NOTHING

    @property
    def plain_seconds(self) -> float:
        """Seconds of a round of plain decoding."""
        return self.costs.target.at(1) + self.overhead.of(0, 0)

    def timed(self, rounds: Sequence[tuple[Policy, float]]) -> Basis:
        """The same with the overhead that explains what rounds of some shapes have taken.

        Args:
            rounds: from `ssv.builder.advice.rounds.seconds_of_rounds`.
        """
        found = []
        for shape, seconds in rounds:
            drafted = _round(Position(ENOUGH, ()), shape, self, 1)
            found.append(Timed(drafted.levels, drafted.guesses, seconds, drafted.steps))
        return replace(self, overhead=fitted(found))

    def with_free_draft(self) -> Basis:
        """The same with a draft whose steps cost nothing."""
        return replace(self, costs=self.costs.with_free_draft(), overhead=Overhead(self.overhead.round))


@dataclass(frozen=True, slots=True)
class _Round:
    """What a round comes to.

    Attributes:
        nodes, kept: of its tree, verified and turned into text.
        levels, guesses: see `Overhead.of`.
        steps: seconds of its steps.
    """

    nodes: int
    kept: int
    levels: int
    guesses: int
    steps: float


@dataclass(frozen=True, slots=True)
class Speed:
    """What a method is expected to do, for one request alone.

    Attributes:
        method: its name, as a request has it; of fixed trees "tree".
        shape: what it drafts, in words.
        tokens_per_pass: emitted, the target's own token included.
        nodes_per_pass: drafted tokens that a pass verifies.
        seconds_per_pass: of a whole round, what it takes beside its steps included.
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
        """Output tokens per second, behind the first."""
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


def speeds(texts: Texts, basis: Basis, tiers: Mapping[str, Policy]) -> list[Speed]:
    """Expected speed of plain decoding and of every method that drafts with a draft model; of chains and fixed trees
    the best.

    Args:
        texts: places, and what the draft guesses there.
        tiers: the bundle's; those that trust tokens need the scorer's risks. Without any, `premium` alone.
    """

    def of(method: str, shape: str, policy: Policy) -> Speed:
        return expected(method, shape, texts, policy, basis)

    chains = [of("speculative", f"chain of {k}", verify_all(k)) for k in range(1, LONGEST_CHAIN + 1)]
    trees = [of("tree", shape, policy) for shape, policy in TREES.items()]
    published = [of("specinfer", "20 nodes", SPECINFER), of("eagle", "60 nodes", EAGLE)]
    own = {"premium": PREMIUM, **{name: tiers[name] for name in TIERS if name in tiers}}
    tiered = [of(name, "what pays" if policy.pays else "by risk", policy) for name, policy in own.items()]
    plain = of("autoregressive", "nothing", verify_all(0))
    return [plain, max(chains, key=lambda s: s.speedup), max(trees, key=lambda s: s.speedup), *published, *tiered]


def expected(method: str, shape: str, texts: Texts, policy: Policy, basis: Basis) -> Speed:
    """Goes through texts with a policy."""
    tokens = nodes = passes = 0
    seconds = 0.0
    for text in texts:
        at, unseen = 0, 1
        while at < len(text):
            done = _round(text[at], policy, basis, unseen)
            tokens, nodes, passes = tokens + done.kept + 1, nodes + done.nodes, passes + 1
            seconds += done.steps + basis.overhead.of(done.levels, done.guesses)
            at += done.kept + 1
            unseen = done.kept + 1 if basis.conditioned or not done.nodes else 1
    speedup = tokens * basis.plain_seconds / seconds if nodes else 1.0
    return Speed(method, shape, tokens / passes, nodes / passes, seconds / passes, speedup)


def _round(position: Position, policy: Policy, basis: Basis, unseen: int) -> _Round:
    """A round at a place.

    Args:
        unseen: tokens of the text that the draft takes in first.
    """
    costs = basis.costs
    prices = Prices(costs, 1, recorded=basis.recorded)
    if not policy.lossless:
        prices = prices.alone()
    limit = policy.max_pending
    if policy.is_chain or position.rest <= 0:
        limit = min(limit, max(position.rest, 0))
    recalled = position.recalled if policy.recalls else ()
    growth = Growth(policy, limit, position.rest, position.ends, prices if policy.pays else None, recalled)
    if policy.pays and growth.open:
        kept, left_over = growth.kept_survival(), growth.left_over(ROOT)
        if not prices.worth_beginning([unseen], [kept], [left_over]):
            growth.open = []
    watched = _Watched(position, growth, position.is_recalled_right if policy.recalls else ())
    levels, steps = 0, costs.begin + costs.text * (unseen - 1) if growth.open else 0.0

    def corrected(share: float, rank: int) -> float:
        return share if policy.is_chain else basis.survival.corrected(share, rank, greedy=True)

    while growth.open:
        levels, steps = levels + 1, steps + costs.draft.at(len(growth.open))
        growth.add([watched.guesses(i, corrected) for i in growth.open])
        watched.note()
        if policy.is_chain and asks_for_pass(growth.tree().risks, policy, limit):
            growth.open = []
    tree = growth.tree()
    right = [watched.is_right[i] for i in growth.candidate_of]
    guesses = len(growth.candidates) - len(recalled)
    kept_tokens = _kept(tree, right, policy.accept_below)
    return _Round(len(tree), kept_tokens, levels, guesses, steps + costs.target.at(1 + len(tree)))


class _Watched:
    """What was watched of the candidates of a tree that grows.

    Attributes:
        is_right: of each candidate.
    """

    def __init__(self, position: Position, growth: Growth, is_recalled_right: Sequence[bool]) -> None:
        """Begins with what was found in the text.

        Args:
            is_recalled_right: of the candidates that the tree begins with.
        """
        self._position, self._growth, self._is_recalled_right = position, growth, is_recalled_right
        # Of each candidate its node; None where nobody watched.
        self._node_of: dict[int, int | None] = {ROOT: ROOT}
        self.is_right: list[bool] = []
        self.note()

    def note(self) -> None:
        """Takes in the candidates that have come."""
        position = self._position
        for i in range(len(self.is_right), len(self._growth.candidates)):
            candidate = self._growth.candidates[i]
            parent = self._node_of[candidate.parent]
            children = [] if parent is None else position.children(parent)
            node = next((n for n in children if position.nodes[n].token == candidate.guess.token), None)
            self._node_of[i] = node
            is_right = node is not None and position.nodes[node].right
            self.is_right.append(self._is_recalled_right[i] if i < len(self._is_recalled_right) else is_right)

    def guesses(self, candidate: int, corrected: Callable[[float, int], float]) -> list[Guess]:
        """What the draft guesses behind a candidate."""
        node = self._node_of[candidate]
        if node is not None and (found := self._position.guesses(node, corrected)):
            return found
        return [Guess(-1 - rank, UNSEEN_SHARE, 1.0) for rank in range(self._growth.num_children(candidate))]


def _kept(tree: Tree, right: Sequence[bool], accept_below: float) -> int:
    """How many tokens of a tree become text: those that are right, and those that are trusted. Behind a trusted token
    that is wrong nothing is known of what is judged: the walk is taken to end there."""
    kept, at, follows = 0, ROOT, True
    first_path = set(tree.first_path)
    while True:
        children = [n for n, parent in enumerate(tree.parents) if parent == at]
        chosen = next((n for n in children if n in first_path and tree.risks[n] < accept_below), None)
        if chosen is None and follows:
            chosen = next((n for n in children if right[n]), None)
        if chosen is None:
            return kept
        kept, at, follows = kept + 1, chosen, right[chosen]


def break_even(texts: Texts, basis: Basis) -> BreakEven:
    """Finds where chains stop paying; arguments as for `speeds`."""
    costs, overhead, one = basis.costs, basis.overhead, basis.plain_seconds

    def tokens_of(k: int) -> float:
        return expected("", "", texts, verify_all(k), basis).tokens_per_pass

    shares = [
        (tokens_of(k) * one - costs.target.at(1 + k) - overhead.of(k, k)) / (k * costs.target.at(1))
        for k in range(1, LONGEST_CHAIN + 1)
    ]
    return BreakEven(least_acceptance(costs, overhead), max(0.0, *shares), costs.draft.at(1) / costs.target.at(1))


def least_acceptance(costs: Costs, overhead: Overhead = NOTHING) -> float | None:
    """The least acceptance of each token with which some chain pays; None where none does even if all are right."""
    if not _pays(1.0, costs, overhead):
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if _pays(middle, costs, overhead) else (middle, high)
    return high


def _pays(acceptance: float, costs: Costs, overhead: Overhead) -> bool:
    one = costs.target.at(1) + overhead.of(0, 0)
    tokens = list(accumulate(repeat(acceptance, LONGEST_CHAIN), lambda total, a: 1 + a * total, initial=1.0))
    return any(
        tokens[k] * one > costs.begin + k * costs.draft.at(1) + costs.target.at(1 + k) + overhead.of(k, k)
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
