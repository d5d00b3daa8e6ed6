"""Suffix decoding (Oliaro et al. 2024, arXiv:2411.04975): a tree of what followed the text's last tokens wherever they
stood before.

Needs no model. It wins where prompt lookup does, and where the same words were followed by several things, of which it
tries the most frequent. What is looked up is the request's own text; the article also keeps the outputs of other
requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

from ssv.runtime.decode.drafters.from_text import TextDrafter
from ssv.runtime.decode.drafters.match_rates import MatchRates
from ssv.runtime.decode.growth import Candidate, Guess
from ssv.runtime.decode.row import Row
from ssv.runtime.decode.tree import ROOT


class Suffix(TextDrafter["SuffixText"]):
    """Proposes, of all suffixes of the text that stood before, the continuations of the one that promises most."""

    def __init__(self, eos_ids: frozenset[int]) -> None:
        super().__init__(eos_ids, lambda given, policy: SuffixText(given, policy.lengths_of_match[1]))

    def found(self, b: int, row: Row, limit: int) -> list[Candidate]:
        """The same continuations of the text of row `b`, for a tree that others add to."""
        text = self._texts[b]
        text.extend(row.tokens)
        return [
            Candidate(Guess(node.token, node.share, 1 - node.share), node.parent, node.depth, node.survival)
            for node in self._best(text, row, limit)
        ]

    def draft(self, row: Row, text: SuffixText, limit: int) -> None:
        for node in self._best(text, row, limit):
            row.tree.add(node.token, 1 - node.share, node.parent)

    def _best(self, text: SuffixText, row: Row, limit: int) -> list[Node]:
        """The nodes of the suffix whose nodes' probabilities have the largest sum; of several suffixes the longest."""
        best: list[Node] = []
        best_score = 0.0
        for length, state in text.suffixes():
            most = min(limit, length)
            if most <= best_score:  # no shorter one can have more
                break
            nodes = self._grow(text, length, state, row, most)
            if (score := sum(node.probability for node in nodes)) > best_score:
                best, best_score = nodes, score
        return best

    def _grow(self, text: SuffixText, length: int, state: int, row: Row, limit: int) -> list[Node]:
        """The likeliest continuations of a suffix of `length` tokens: each after its parent, the likeliest first."""
        policy, ends = row.policy, row.ends(self._eos_ids)
        max_depth = min(row.rest, policy.max_depth or row.rest)
        nodes: list[Node] = []
        num_opened: Counter[int] = Counter()
        heap: list[tuple[float, int, Node]] = []
        order = count()
        node, index = Node(-1, state, ROOT, 0, 1.0, 1.0, 1.0), ROOT
        while True:
            depth = node.depth
            if depth < max_depth and node.token not in ends and num_opened[depth] < policy.beam:
                num_opened[depth] += 1
                total = text.count(node.state)
                # The text's own end is one that nothing follows.
                rate = text.rates.rate(length + depth) * total / (total - (depth == 0))
                found = text.followers(node.state, policy.least_probability * total / node.probability)
                for occurrences, token, state in found[: policy.children_of(depth)]:
                    share = occurrences / total
                    child = Node(
                        token,
                        state,
                        index,
                        depth + 1,
                        node.probability * share,
                        rate * share,
                        node.survival * rate * share,
                    )
                    heappush(heap, (-child.probability, next(order), child))
            if not heap or len(nodes) == limit:
                return nodes
            node, index = heappop(heap)[-1], len(nodes)
            nodes.append(node)


@dataclass(frozen=True, slots=True)
class Node:
    """A token that may follow.

    Attributes:
        state: of the text, with this token behind the suffix.
        parent: index of an earlier node, or ROOT.
        probability: of its path, as the article has it: occurrences over those of what comes before.
        share: probability that the target chooses it, given that all before it is right: how often it followed where
            something that is known did, times how often that is the case.
        survival: product of the shares along its path.
    """

    token: int
    state: int
    parent: int
    depth: int
    probability: float
    share: float
    survival: float


class SuffixText:
    """A text, all strings in it up to a length, how often each occurs, and what follows it: a suffix automaton (Blumer
    et al. 1985).

    A state is a set of strings that end at the same places, each a suffix of the longest. Its link is the state of the
    longest of its suffixes that ends elsewhere too. A text of n tokens has at most 2n states; a further token costs a
    constant on average.

    Attributes:
        rates: learnt from what follows the first `num_given` tokens.
    """

    def __init__(self, num_given: int, longest: int) -> None:
        """Begins without tokens.

        Args:
            longest: tokens of the longest suffix that is looked up.
        """
        self.rates = MatchRates()
        # A suffix gives no more nodes than it has tokens, the published factor of 1: so strings of twice as many are
        # counted, 64 of 32 as published.
        self._longest, self._depth = longest, 2 * longest
        self._num_given, self._num_tokens = num_given, 0
        # Of each state: where a token leads, its link, tokens of its longest string, occurrences. State 0 is that of
        # the empty string.
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length, self._count = [-1], [0], [0]
        # States of the whole text, and of as many of its last tokens as are counted.
        self._whole, self._end, self._end_length = 0, 0, 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Takes what the text has more now; `tokens` is all of it."""
        for i in range(self._num_tokens, len(tokens)):
            match = self._link[self._whole]
            if i >= self._num_given and match > 0:
                self.rates.note(self._length[match], tokens[i] in self._next[match])
            self._append(tokens[i])
        self._num_tokens = len(tokens)

    def suffixes(self) -> Iterator[tuple[int, int]]:
        """Tokens and state of the text's suffixes up to the longest that stood before, one for each set of places, the
        longest first."""
        state = self._end
        while state > 0:
            if self._count[state] > 1 and self._length[self._link[state]] < self._longest:
                yield min(self._length[state], self._end_length, self._longest), state
            state = self._link[state]

    def count(self, state: int) -> int:
        """Occurrences of a state's strings."""
        return self._count[state]

    def followers(self, state: int, least: float) -> list[tuple[int, int, int]]:
        """Occurrences, token and state of what follows a state's strings at least so often, the most frequent first."""
        count = self._count
        found = [(count[to], token, to) for token, to in self._next[state].items() if count[to] >= least]
        found.sort(key=lambda each: -each[0])
        return found

    def _append(self, token: int) -> None:
        following, link, length = self._next, self._link, self._length
        whole = self._add({}, 0, length[self._whole] + 1, 0)
        state = self._whole
        while state >= 0 and token not in following[state]:
            following[state][token] = whole
            state = link[state]
        if state >= 0:
            link[whole] = self._state_behind(state, token)
        self._whole = whole
        # Whatever the text ends with has occurred once more.
        self._end, self._end_length = following[self._end][token], min(self._end_length + 1, self._depth)
        while length[link[self._end]] >= self._end_length:
            self._end = link[self._end]
        state = self._end
        while state > 0:
            self._count[state] += 1
            state = link[state]

    def _state_behind(self, state: int, token: int) -> int:
        """The state of a state's longest string and a token behind it, parted from those of longer strings."""
        following, link, length = self._next, self._link, self._length
        longer = following[state][token]
        if length[longer] == length[state] + 1:
            return longer
        parted = self._add(dict(following[longer]), link[longer], length[state] + 1, self._count[longer])
        link[longer] = parted
        while state >= 0 and following[state].get(token) == longer:
            following[state][token] = parted
            state = link[state]
        return parted

    def _add(self, following: dict[int, int], link: int, length: int, count: int) -> int:
        self._next.append(following)
        self._link.append(link)
        self._length.append(length)
        self._count.append(count)
        return len(self._link) - 1
