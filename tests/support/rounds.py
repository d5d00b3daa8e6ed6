"""Rounds that engines run by themselves, as they are defined: by the host, over any engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from growing import Guesses, grow_by_stepping
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ssv.bundle.policy import MAX_PENDING, Policy
from ssv.runtime.decode.growth import Growth, likely_groups
from ssv.runtime.decode.sampling import Sampling, choose, ranked
from ssv.runtime.decode.tree import ROOT, Tree, branches_of
from ssv.runtime.decode.verify import asks_for_pass, judged_rows, walk
from ssv.runtime.engines.contract import (
    GAIN_SIZES,
    MOST_ENDS,
    MOST_IN_FLIGHT,
    MOST_NODES,
    NOT_CORRECTED,
    Corrections,
    Engine,
    Grown,
    RoundResult,
    RoundRow,
    RoundShape,
    TreeShape,
)
from ssv.runtime.request import SamplingParams


@dataclass(slots=True)
class _State:
    row: RoundRow
    length: int
    root: int
    rest: int
    draft_length: int
    pending: list[int]
    features_TF: Tensor | None
    is_lost: bool = False


def gains_of(state: _State, grown: Grown | None, shape: TreeShape) -> NDArray[np.float32]:
    """See `RoundResult.gains`."""
    assert grown is not None
    survival = {ROOT: 1.0}
    level = {ROOT: -1}
    first_path, trusted = {ROOT}, set[int]()
    for c, (token, parent, share, risk) in enumerate(
        zip(grown.tokens, grown.parents, grown.shares, grown.risks, strict=True)
    ):
        if parent in trusted:
            share = 0.0  # beside a trusted one
        elif parent in first_path and not any(grown.parents[:c] == parent):
            first_path.add(c)
            if risk < state.row.accept_below:
                share = 1.0
                trusted.add(parent)
        level[c] = level[parent] + 1
        ended = parent != ROOT and grown.tokens[parent] in state.row.ends
        is_there = token >= 0 and not ended and level[c] < max(state.rest, 0)
        survival[c] = float(survival[parent] * share) if is_there else 0.0
    best = sorted((c for c in survival if c != ROOT), key=lambda c: -survival[c])
    return np.array(
        [
            [sum(survival[c] for c in [c for c in best if level[c] <= depth][:size]) for size in GAIN_SIZES]
            for depth in range(shape.levels)
        ],
        dtype=np.float32,
    )


class FakeRounds:
    """See `RoundsEngine`: each round is run when it is put behind the others, and kept until it is taken.

    Attributes:
        shapes: of the rounds that were run.
        num_begun: how often rows were taken over.
        begun_with: rows each time, and whether a draft could go on with their features.
        spoils: changes what a round gave, to see that it is noticed.
    """

    most_tokens = 64
    most_pending = 2 * MAX_PENDING

    def __init__(self, target: Engine, draft: Engine, seconds: Callable[[int, RoundShape], float]) -> None:
        self._target, self._draft, self._seconds = target, draft, seconds
        self._given: list[list[RoundResult]] = []
        self._states: list[_State] = []
        self._corrections: tuple[Corrections, Corrections] = (NOT_CORRECTED, NOT_CORRECTED)
        self.shapes: list[RoundShape] = []
        self.num_begun = 0
        self.begun_with: list[tuple[int, bool]] = []

    @property
    def in_flight(self) -> int:
        return len(self._given)

    def seconds(self, num_rows: int, shape: RoundShape) -> float:
        return self._seconds(num_rows, shape)

    def measure(self) -> None:
        pass

    def reset(self) -> None:
        self._given.clear()
        self._states.clear()

    def begin(
        self, rows: Sequence[RoundRow], features_BTF: Tensor | None, corrections: tuple[Corrections, Corrections]
    ) -> None:
        assert not self._states and not self._given
        assert all(len(row.ends) <= MOST_ENDS and len(row.pending) <= self.most_pending for row in rows)
        assert all(row.temperature == 0 or row.accept_below == 0 for row in rows)
        self._states = [
            _State(
                row,
                row.length,
                row.root,
                row.rest,
                row.draft_length,
                list(row.pending),
                features_BTF[b, : len(row.pending)].clone() if features_BTF is not None else None,
            )
            for b, row in enumerate(rows)
        ]
        self._corrections = corrections
        self.num_begun += 1
        self.begun_with.append((len(rows), features_BTF is not None))

    def run(self, shape: RoundShape) -> None:
        assert self.in_flight < MOST_IN_FLIGHT
        assert not self.shapes or not self._given or (self.shapes[-1].tree is None) == (shape.tree is None)
        assert len(self._states) * (1 + shape.nodes) <= self.most_tokens
        assert shape.nodes <= MOST_NODES and (shape.tree is None or shape.tree.has_room)
        assert shape.samples == any(state.row.temperature > 0 for state in self._states)
        self.shapes.append(shape)
        planted = self._trees(shape)
        trees = [tree for tree, _ in planted]
        width = 1 + max(map(len, trees))
        starts = [state.length for state in self._states]
        paths = [
            [[start], *([start, *(start + 1 + n for n in tree.path(node))] for node in range(len(tree)))]
            for tree, start in zip(trees, starts, strict=True)
        ]
        ids = [
            [max(state.root, 0), *tree.tokens, *[0] * (width - 1 - len(tree))]
            for state, tree in zip(self._states, trees, strict=True)
        ]
        out = self._target.step(
            torch.tensor(ids),
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor([b * width + j for b, tree in enumerate(trees) for j in range(len(tree) + 1)]),
            branches=None if shape.is_chain else branches_of(starts, paths, starts),
            count_B=torch.tensor([len(tree) + 1 for tree in trees], dtype=torch.int32),
            features_out=self._states[0].features_TF is not None,
        )
        at = [(b, depth) for b, tree in enumerate(trees) for depth in (0, *tree.depths)]
        chosen = iter(choose(out.logits_RV, self._sampling(at)).tolist())
        self._given.append(
            [
                self._settled(b, tree, [next(chosen) for _ in range(len(tree) + 1)], shape, out.features_BTF, gains)
                for b, (tree, gains) in enumerate(planted)
            ]
        )

    def _sampling(self, at: Sequence[tuple[int, int]]) -> Sampling:
        """Of rows, at places so far behind the one after their roots."""
        rows = [self._states[b].row for b, _ in at]
        params = [
            SamplingParams(temperature=row.temperature, top_k=row.top_k, top_p=row.top_p, seed=row.seed) for row in rows
        ]
        return Sampling.of(params, [self._states[b].length + 1 + depth for b, depth in at])

    def _sampled(self, b: int) -> tuple[Guesses, Corrections] | None:
        """A row's guesses, if it samples."""
        if self._states[b].row.temperature == 0:
            return None

        def guesses(logits_V: Tensor, count: int, depth: int) -> tuple[list[int], list[float]]:
            index_RK, share_RK = ranked(logits_V[None], self._sampling([(b, depth)]), count, self._draft.token_ids_V)
            return index_RK[0].tolist(), share_RK[0].tolist()

        return guesses, self._corrections[1]

    def _trees(self, shape: RoundShape) -> list[tuple[Tree, NDArray[np.float32] | None]]:
        """Each row's, and what its candidates are worth."""
        states, tree = self._states, shape.tree
        if tree is None:
            return [(Tree(), None) for _ in states]
        counts = [len(state.pending) for state in states]
        assert sum(counts) <= self.most_tokens
        width = max(counts)
        features = [state.features_TF for state in states]
        found = grow_by_stepping(
            self._draft,
            torch.tensor([[*state.pending, *[0] * (width - len(state.pending))] for state in states]),
            torch.tensor([state.draft_length for state in states], dtype=torch.int32),
            torch.tensor(counts, dtype=torch.int32),
            torch.stack([torch.cat((x, x.new_zeros(width - len(x), x.shape[1]))) for x in features if x is not None]),
            tree,
            self._corrections[0],
            [self._sampled(b) for b in range(len(states))],
        )
        return [
            (self._chosen(state, grown, shape), None if shape.is_chain else gains_of(state, grown, tree))
            for state, grown in zip(states, found, strict=True)
        ]

    def _chosen(self, state: _State, grown: Grown | None, shape: RoundShape) -> Tree:
        """The nodes of a row's tree."""
        assert grown is not None and shape.tree is not None
        row, ends = state.row, frozenset(state.row.ends)
        most = min(shape.nodes, row.limit if state.rest > 0 else 0)
        policy = Policy(
            accept_below=row.accept_below,
            verify_above=row.verify_above,
            risk_budget=row.risk_budget,
            max_pending=most,
            children=(shape.tree.children,),
            beam=shape.tree.beam,
        )
        growth = Growth(policy, most, max(state.rest, 0), ends)
        for group in likely_groups(grown, shape.tree, ends, most, max(state.rest, 0), row.accept_below):
            growth.take(group)
            made = growth.tree()
            if shape.is_chain and (asks_for_pass(made.risks, policy, most) or made.tokens[-1] in ends):
                return made
        return growth.tree()

    def _settled(
        self,
        b: int,
        tree: Tree,
        chosen: Sequence[int],
        shape: RoundShape,
        features_BTF: Tensor | None,
        gains: NDArray[np.float32] | None,
    ) -> RoundResult:
        state = self._states[b]
        judged = judged_rows(tree, state.row.accept_below)
        verdict = walk(tree, judged, [token for token, is_judged in zip(chosen, judged, strict=True) if is_judged])
        self._target.keep(b, state.length + 1, [state.length + 1 + node for node in verdict.path])
        gained = [*(tree.tokens[node] for node in verdict.path), verdict.next_token]
        if features_BTF is not None:
            kept_TF = features_BTF[b, [0, *(node + 1 for node in verdict.path)]].clone()
            if shape.tree is None:
                assert state.features_TF is not None
                state.pending, state.features_TF = state.pending + gained, torch.cat((state.features_TF, kept_TF))
                if len(state.pending) > self.most_pending:
                    state.is_lost = True
            else:
                state.draft_length += len(state.pending)
                state.pending, state.features_TF = gained, kept_TF
        state.length, state.root, state.rest = state.length + len(gained), gained[-1], state.rest - len(gained)
        return RoundResult(tuple(gained), len(tree), sum(judged), verdict.num_judged, gains)

    def take(self) -> list[RoundResult]:
        return self._given.pop(0)

    def end(self) -> tuple[list[int], Tensor | None]:
        assert not self._given
        lengths = [-1 if state.is_lost else state.draft_length for state in self._states]
        features = [state.features_TF for state in self._states if state.features_TF is not None]
        self._states = []
        return lengths, pad_sequence(features, batch_first=True) if features else None
