"""What a draft guesses at each place of texts, and what of it the target says: measured by decoding, or drawn from what
a bundle's calibration has seen."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ssv.bundle.policy import verify_all
from ssv.runtime.counters import Counters
from ssv.runtime.decode.drafters.model import ModelDrafter
from ssv.runtime.decode.drafters.suffix import Suffix
from ssv.runtime.decode.growth import Candidate, Guess
from ssv.runtime.decode.round import DecodeBatch
from ssv.runtime.decode.row import Row
from ssv.runtime.decode.tree import ROOT, Tree
from ssv.runtime.methods import PREMIUM
from ssv.runtime.request import SamplingParams

PROBE = verify_all(64, children=(10,), beam=10, max_depth=10)
"""What is drafted at each place: at least what any method drafts there."""

DRAWN_DEPTH, DRAWN_BEAM = 10, 8
"""Of trees that are drawn: levels, and how many of each have guesses behind them."""


@dataclass(frozen=True, slots=True)
class Node:
    """A guess of the draft.

    Attributes:
        token: what is guessed.
        parent: the guess before it, an earlier node; ROOT behind the text.
        rank: which guess for its place it is, the first being 0.
        share: what the draft gives it, not corrected.
        risk: the scorer's of a first guess, 1 - share without one.
        right: whether it and all before it are what the target writes.
    """

    token: int
    parent: int
    rank: int
    share: float
    risk: float
    right: bool


@dataclass(slots=True)
class Position:
    """A place of a text, and what is guessed behind it.

    Attributes:
        rest: tokens that a draft may add to the output there.
        nodes: parents before their children.
        recalled: what followed the same words before, as `premium` finds it, parents before their children.
        is_recalled_right: of each of these, whether it and all before it are what the target writes.
        ends: tokens that end the output.
    """

    rest: int
    nodes: Sequence[Node]
    recalled: Sequence[Candidate] = ()
    is_recalled_right: Sequence[bool] = ()
    ends: Collection[int] = ()
    _children: dict[int, list[int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for number, node in enumerate(self.nodes):
            self._children.setdefault(node.parent, []).append(number)

    def children(self, node: int) -> list[int]:
        """Guesses behind a node, the likeliest first."""
        return self._children.get(node, [])

    def guesses(self, node: int, corrected: Callable[[float, int], float]) -> list[Guess]:
        """The same as a tree takes them.

        Args:
            corrected: of share and rank, what the share is worth.
        """
        found = []
        for number in self.children(node):
            guess = self.nodes[number]
            share = corrected(guess.share, guess.rank)
            found.append(Guess(guess.token, share, guess.risk if guess.rank == 0 else 1 - share))
        return found


Texts = Sequence[Sequence[Position]]
"""Places that follow one another, by text."""


def watch(batch: DecodeBatch, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[Position]]:
    """Decodes prompts greedily, a token at a time, and notes at each what the draft guesses.

    Args:
        batch: over a target and a draft, with nothing corrected.
        prompts: token ids.
        max_tokens: of each output.

    Returns:
        A list for each prompt: the places behind its first token, its second, and so on, but the last.
    """
    drafter = batch.drafters["model"]
    assert isinstance(drafter, ModelDrafter)
    ends = frozenset(batch.eos_ids.tolist())
    recall = Suffix(ends)
    texts = []
    for prompt in prompts:
        row = Row(SamplingParams(max_tokens=max_tokens), PROBE, lambda _: False, Counters())
        batch.members.begin(prompt, row)
        while (token := batch.members.prefill()) is None:
            pass
        row.counters.emitted = 1
        recall.join(0, row)
        seen: list[tuple[int, list[Node], list[Candidate]]] = []
        written: list[int] = []
        while row.rest >= 0 and token not in ends:
            batch.draft()
            recalled = recall.found(0, replace(row, policy=PREMIUM), PREMIUM.max_pending) if row.rest else []
            seen.append((row.rest, _nodes(drafter, row), recalled))
            row.tree = Tree()  # only the target's own token is taken: each place is seen
            ((token,),) = batch.verify()
            written.append(token)
            row.counters.emitted += 1
        batch.members.remove(0, 0)
        texts.append(
            [
                Position(rest, _judged(nodes, written[i:]), recalled, _follows(recalled, written[i:]), ends)
                for i, (rest, nodes, recalled) in enumerate(seen)
            ]
        )
    return texts


def _nodes(drafter: ModelDrafter, row: Row) -> list[Node]:
    if row.rest <= 0:
        return []
    ranks: dict[int, int] = {}
    nodes = []
    for each in drafter.candidates(0):
        rank = ranks[each.parent] = ranks.get(each.parent, -1) + 1
        nodes.append(Node(each.guess.token, each.parent, rank, each.guess.share, each.guess.risk, right=False))
    return nodes


def _judged(nodes: Sequence[Node], text: Sequence[int]) -> list[Node]:
    """Nodes, with what the text says of them."""
    depths: list[int] = []
    for node in nodes:
        depths.append(1 if node.parent == ROOT else depths[node.parent] + 1)
    placed = [(node.token, node.parent, depth) for node, depth in zip(nodes, depths, strict=True)]
    return [replace(node, right=right) for node, right in zip(nodes, _right(placed, text), strict=True)]


def _follows(recalled: Sequence[Candidate], text: Sequence[int]) -> list[bool]:
    """What the text says of what was found before."""
    return _right([(each.guess.token, each.parent, each.depth) for each in recalled], text)


def _right(placed: Sequence[tuple[int, int, int]], text: Sequence[int]) -> list[bool]:
    """Whether tokens and all before them are those of a text.

    Args:
        placed: token, parent and depth of each, parents before their children.
    """
    right: list[bool] = []
    for token, parent, depth in placed:
        follows = parent == ROOT or right[parent]
        right.append(follows and depth <= len(text) and text[depth - 1] == token)
    return right


def drawn(reliability: Sequence[Mapping[str, Any]], num_places: int = 400, seed: int = 0) -> list[list[Position]]:
    """Places as a calibration has seen them: at each, how sure the draft is of its first guess is drawn from what was
    seen, and whether that comes true from how often it did. Places know nothing of one another.

    Args:
        reliability: rows of `SurvivalFit`: of greedy rows, by rank, how many guesses, and how many were chosen.
        num_places: to draw.

    Returns:
        A text of one place for each.
    """
    greedy = [row for row in reliability if row["rows"] == "greedy"]
    firsts = [row for row in greedy if row["rank"] == 0]
    mean = [
        sum(row["chosen"] * row["guesses"] for row in of_rank) / max(sum(row["guesses"] for row in of_rank), 1)
        for rank in range(1 + max((row["rank"] for row in greedy), default=-1))
        if (of_rank := [row for row in greedy if row["rank"] == rank])
    ]
    rng = random.Random(seed)
    return [[Position(DRAWN_DEPTH, _drawn_tree(firsts, mean, rng))] for _ in range(num_places)]


def _drawn_tree(firsts: Sequence[Mapping[str, Any]], mean: Sequence[float], rng: random.Random) -> list[Node]:
    nodes: list[Node] = []
    survival = {ROOT: 1.0}
    level = [ROOT]
    for _ in range(DRAWN_DEPTH):
        following = []
        for parent in level:
            (row,) = rng.choices(firsts, weights=[each["guesses"] for each in firsts])
            # The others share what the first leaves over, as they do on average.
            left = (1 - row["chosen"]) / max(1 - mean[0], 1e-9)
            shares = [row["chosen"], *(share * left for share in mean[1:])]
            at, follows = rng.random(), parent == ROOT or nodes[parent].right
            for rank, share in enumerate(shares):
                right, at = follows and 0 <= at < share, at - share
                survival[len(nodes)] = survival[parent] * share
                following.append(len(nodes))
                nodes.append(Node(rank, parent, rank, share, 1 - share, right))
        level = sorted(following, key=lambda i: -survival[i])[:DRAWN_BEAM]
    return nodes


def acceptance(texts: Texts) -> list[list[float]]:
    """How often a guess is the target's choice where all before it is right, by depth, from 1 on, and by rank."""
    asked: dict[tuple[int, int], int] = {}
    chosen: dict[tuple[int, int], int] = {}
    for position in (each for text in texts for each in text):
        node, depth = ROOT, 1
        while children := position.children(node):
            right = None
            for number in children:
                key = depth, position.nodes[number].rank
                asked[key] = asked.get(key, 0) + 1
                if position.nodes[number].right:
                    chosen[key] = chosen.get(key, 0) + 1
                    right = number
            if right is None:
                break
            node, depth = right, depth + 1
    depths = max((depth for depth, _ in asked), default=0)
    return [
        [
            chosen.get((depth, rank), 0) / asked[depth, rank]
            for rank in range(1 + max(rank for at, rank in asked if at == depth))
        ]
        for depth in range(1, depths + 1)
    ]
