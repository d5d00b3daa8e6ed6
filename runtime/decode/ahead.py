"""Rounds that the engines run by themselves (`RoundsEngine`): the host hands its rows over, reads what a round gave
while the next one runs, and takes the rows back before any of them comes or goes.

What such rounds cannot do is left to the host's own (`ssv.runtime.decode.round`): sampled rows of lossy tiers, changed
logits, audits, rows of several policies side by side, what was found in the text, rows that tell how their tokens came
about. Lossless text is the same either way, and so is that of lossy greedy chains: they are cut by the same numbers.
Trees of lossy tiers have the shape that pays at the load of the moment, and text that goes with it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssv.bundle.policy import Policy
from ssv.runtime.decode.choice import check_chosen
from ssv.runtime.decode.drafters.levels import FADING, FIRST_SURVIVAL, beam_for
from ssv.runtime.decode.drafters.model import MANY_ROWS, ModelDrafter
from ssv.runtime.decode.pace import MOST_COMPANIES, Mean
from ssv.runtime.decode.row import Row
from ssv.runtime.decode.sampling import LEAST_TEMPERATURE
from ssv.runtime.engines.contract import (
    GAIN_SIZES,
    MOST_CHILDREN,
    MOST_ENDS,
    MOST_NODES,
    NOT_CORRECTED,
    RoundResult,
    RoundRow,
    RoundsEngine,
    RoundShape,
    TreeShape,
)

IN_FLIGHT = 2
"""Rounds under way while the host waits for the first of them."""

MOST_DEPTH = 16
"""Tokens of a path."""

ROUNDS_OF_A_CHOICE = 8
"""Rounds that trees keep their shape for, as their graphs have to be captured; a single node, which may be a trial,
stays for two."""


class _HostShare:
    """What the host takes of a round, a row: a running mean, as nobody waits for a host that is faster than the
    engines, and engines wait for one that is slower."""

    def __init__(self) -> None:
        self._mean = Mean()
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        return self._mean.seconds

    def begins(self) -> None:
        """A round has come."""
        self._since = time.perf_counter()

    def ends(self, num_rows: int) -> None:
        """The host waits for the next one."""
        if self._since is None:
            return
        self._mean.note((time.perf_counter() - self._since) / num_rows)
        self._since = None

    def forget(self) -> None:
        """What the host does now belongs to no round."""
        self._since = None


class Ahead:
    """Rows of one policy in the hands of the engines.

    Attributes:
        is_under_way: whether they are.
    """

    def __init__(self, rounds: RoundsEngine, drafter: ModelDrafter | None, eos_ids: frozenset[int]) -> None:
        """Begins with no rows in the engines' hands.

        Args:
            drafter: over the same draft; None where there is none.
        """
        self._rounds, self._drafter, self._eos_ids = rounds, drafter, eos_ids
        self._host = _HostShare()
        self.is_under_way = False
        self._drafts = self._samples = False
        self._shapes: list[RoundShape] = []
        self._chosen: RoundShape | None = None
        self._chosen_for: tuple[int, int, int, bool] | None = None
        self._rounds_until_choice = 0
        self._seconds_by_trees: dict[tuple[int, ...], NDArray[np.float64]] = {}

    def plain_seconds(self, rows: Sequence[Row]) -> float:
        """What a round of these rows without a draft takes."""
        return self._seconds(len(rows), RoundShape(None, 0, _sample(rows)))

    def step(self, rows: Sequence[Row], *, may_draft: bool = True) -> list[list[int]] | None:
        """Keeps rounds under way; returns the tokens that each row has gained by the oldest one, or by all of them if
        the rows go back to the host. None where it has none of them, and the host has to run the round.

        Args:
            may_draft: whether rows may that draft what pays.

        Raises:
            EngineError: logits that were no distribution.
        """
        shape = self._shape(rows, may_draft)
        if self.is_under_way and (shape is None or (shape.tree is not None) != self._drafts):
            return self.settle(rows)
        if shape is None:
            return None
        if not self.is_under_way:
            self._begin(rows, shape)
        while self._rounds.in_flight < IN_FLIGHT and (not self._rounds.in_flight or self._goes_on(rows)):
            self._rounds.run(shape)
            self._shapes.append(shape)
        self._host.ends(len(rows))
        gained = self._take(rows)
        self._host.begins()
        return gained

    def settle(self, rows: Sequence[Row]) -> list[list[int]]:
        """Takes the rows back; returns what they have gained since."""
        gained: list[list[int]] = [[] for _ in rows]
        self._host.forget()
        if not self.is_under_way:
            return gained
        while self._rounds.in_flight:
            for tokens, more in zip(gained, self._take(rows), strict=True):
                tokens += more
        self.is_under_way = False
        lengths, features_BTF = self._rounds.end()
        if features_BTF is not None:
            assert self._drafter is not None
            # Rows that the draft model has no part in have lost nothing.
            lengths = [length if self._has_draft(row) else 0 for row, length in zip(rows, lengths, strict=True)]
            self._drafter.take_back(rows, lengths, features_BTF)
        return gained

    def _begin(self, rows: Sequence[Row], shape: RoundShape) -> None:
        if shape.tree is None and len(rows) >= MANY_ROWS and any(row.has_lost_draft for row in rows):
            # Nobody drafts before all of those have left, which are replaced by others of their kind: features for the
            # few who could would lengthen every pass.
            for row in rows:
                row.has_lost_draft |= row.policy.pays
        drafter = self._drafter if any(map(self._has_draft, rows)) else None
        features_BTF = None
        if drafter is not None:
            if shape.tree is not None and sum(len(drafter.unseen(row)) for row in rows) > self._rounds.most_tokens:
                for b, row in enumerate(rows):
                    drafter.catch_up(b, row)
            features_BTF = drafter.features(len(rows))
        corrections = (NOT_CORRECTED, NOT_CORRECTED) if drafter is None else drafter.corrections(rows[0].policy)
        self._rounds.begin([self._handed_over(row, drafter) for row in rows], features_BTF, corrections)
        self._drafts, self.is_under_way = shape.tree is not None, True

    def _handed_over(self, row: Row, drafter: ModelDrafter | None) -> RoundRow:
        policy, params = row.policy, row.params
        settings: dict[str, Any] = {}
        if not params.greedy:
            temperature = max(params.temperature, LEAST_TEMPERATURE)
            settings |= {"temperature": temperature, "top_k": params.top_k, "top_p": params.top_p, "seed": params.seed}
        if drafter is not None and self._has_draft(row):
            settings |= {
                "limit": policy.max_pending,
                "accept_below": policy.accept_below,
                "verify_above": policy.verify_above,
                "risk_budget": policy.risk_budget,
                "draft_length": row.draft_length,
                "pending": drafter.unseen(row),
            }
        return RoundRow(row.target_length, row.tokens[-1], row.rest, ends=sorted(row.ends(self._eos_ids)), **settings)

    def _take(self, rows: Sequence[Row]) -> list[list[int]]:
        """What the oldest round gave."""
        results = self._rounds.take()
        shape = self._shapes.pop(0)
        check_chosen([result.tokens[-1] for result in results])
        now = time.monotonic()
        gained: list[list[int]] = []
        for row, result in zip(rows, results, strict=True):
            if row.ended:  # while the round was under way
                gained.append([])
                continue
            _count(row, result)
            row.tokens += result.tokens
            row.last_commit = now
            gained.append(list(result.tokens))
        if self._drafts and rows[0].policy.pays:
            assert self._drafter is not None and shape.tree is not None
            gains = [result.gains for result in results if result.gains is not None]
            if gains:
                self._drafter.levels(rows[0].policy).note_gains(shape.tree.levels, gains)
        return gained

    def _goes_on(self, rows: Sequence[Row]) -> bool:
        """Whether some row goes on after the rounds under way, however much they give, if no token ends it."""
        most = sum(1 + shape.depth for shape in self._shapes)
        return any(row.params.max_tokens - row.counters.emitted > most for row in rows)

    # --- what is drafted --------------------------------------------------------------------------------------------

    def _shape(self, rows: Sequence[Row], may_draft: bool) -> RoundShape | None:
        """The shape of the next round; None where the host has to run it."""
        policy, num = rows[0].policy, len(rows)
        is_plain = all(self._is_plain(row, may_draft) for row in rows)
        if not is_plain and not all(row.policy == policy and self._drafts_here(row) for row in rows):
            return None
        if not self.is_under_way and not all(map(self._suits, rows)):
            return None
        self._samples = _sample(rows)
        most = min(self._rounds.most_tokens // num - 1, MOST_NODES)
        if most < 0:
            return None
        if is_plain or any(row.has_lost_draft for row in rows):
            return self._round(None, 0)
        if policy.pays:
            return self._what_pays(rows[0], num, most)
        levels = min(policy.max_depth or policy.max_pending, policy.max_pending, MOST_DEPTH)
        nodes = levels if policy.is_chain else policy.max_pending
        if policy.lossless and policy.is_chain and most < levels:  # its text is the same however long it is
            nodes = levels = most if self._may_pay(num, most) else 0
        if not nodes:
            return self._round(None, 0)
        tree = TreeShape(levels, policy.beam, policy.children[0])
        if nodes > most or num * tree.opened(levels) > self._rounds.most_tokens or not tree.has_room:
            return None
        return self._round(tree, nodes)

    def _round(self, tree: TreeShape | None, nodes: int) -> RoundShape:
        return RoundShape(tree, nodes, self._samples)

    def _seconds(self, num_rows: int, shape: RoundShape) -> float:
        """What a round takes, of the engines or of the host, whoever is slower: they work side by side."""
        return max(self._rounds.seconds(num_rows, shape), num_rows * self._host.seconds)

    def _may_pay(self, num_rows: int, levels: int) -> bool:
        """Whether a short chain beats plain decoding if its draft is a good one."""
        if not levels:
            return False
        gain = sum(FIRST_SURVIVAL * FADING**depth for depth in range(levels))
        drafted = self._seconds(num_rows, self._round(TreeShape(levels, 1, 1), levels))
        return 1 + gain > drafted / self._seconds(num_rows, self._round(None, 0))

    def _what_pays(self, row: Row, num_rows: int, most_nodes: int) -> RoundShape:
        """The shape with the most tokens per second, of all that the rows' policy allows.

        Args:
            row: one of them.
            most_nodes: that there is room for in each row.
        """
        assert self._drafter is not None
        self._rounds_until_choice -= 1
        policy, wanted_for = row.policy, (row.policy_hash, num_rows, most_nodes, self._samples)
        # Also where the rows were taken back since, as they are before a draft is tried behind rounds without.
        if self._chosen is not None and self._chosen_for == wanted_for and self._rounds_until_choice > 0:
            return self._chosen
        before, host_s = self._chosen, num_rows * self._host.seconds
        levels, nodes = self._drafter.levels(policy).worth_nodes(
            num_rows,
            np.maximum(self._seconds_of_trees(policy, num_rows, min(policy.max_pending, most_nodes)), host_s),
            self._seconds(num_rows, self._round(None, 0)),
            (before.tree.levels, before.nodes) if before is not None and before.tree else None,
        )
        chosen = self._tree_round(policy, num_rows, levels, nodes) if levels else self._round(None, 0)
        self._chosen, self._chosen_for = chosen, wanted_for
        self._rounds_until_choice = ROUNDS_OF_A_CHOICE if nodes > 1 else 1 + levels
        return chosen

    def _tree_round(self, policy: Policy, num_rows: int, levels: int, nodes: int) -> RoundShape:
        # With branches also where they are not verified: what these would be worth is told.
        beam, children = min(policy.beam, beam_for(nodes), self._rounds.most_tokens // num_rows), policy.children[0]
        while beam > 1 and not TreeShape(levels, beam, children).has_room:
            beam -= 1
        return self._round(TreeShape(levels, beam, children), nodes)

    def _seconds_of_trees(self, policy: Policy, num_rows: int, most_nodes: int) -> NDArray[np.float64]:
        """What rounds take the engines, by levels, from 1 on, and by `GAIN_SIZES`; infinite where there can be none."""
        most = min(policy.max_depth or MOST_DEPTH, MOST_DEPTH)
        key = policy.beam, policy.children[0], most, num_rows, most_nodes, int(self._samples)
        if (known := self._seconds_by_trees.get(key)) is not None:
            return known
        if len(self._seconds_by_trees) >= MOST_COMPANIES:  # requests may bring policies of their own
            self._seconds_by_trees.clear()
        seconds = self._seconds_by_trees[key] = np.full((most, len(GAIN_SIZES)), np.inf)
        for i, nodes in enumerate(GAIN_SIZES):
            for level in range(min(most, nodes) if nodes <= most_nodes else 0):
                shape = self._tree_round(policy, num_rows, level + 1, nodes)
                seconds[level, i] = self._rounds.seconds(num_rows, shape)
        return seconds

    @staticmethod
    def _is_plain(row: Row, may_draft: bool) -> bool:
        """Whether a row is to be decoded plainly."""
        return not row.policy.max_pending or (row.policy.pays and not may_draft)

    def _has_draft(self, row: Row) -> bool:
        """Whether the draft model takes part in what a row drafts, now or later."""
        return row.policy.max_pending > 0 and self._is_by_model(row) and not row.has_lost_draft

    def _is_by_model(self, row: Row) -> bool:
        """Whether a row's policy drafts by the draft that the engines run."""
        return row.policy.drafter == "model" and self._drafter is not None and self._drafter.needs_features

    def _drafts_here(self, row: Row) -> bool:
        """Whether rounds of the engines can draft as a row's policy wants it."""
        return (
            self._is_by_model(row)
            and (row.params.greedy or row.policy.lossless_for(greedy=False))
            and len(row.policy.children) == 1
            and row.policy.children[0] <= MOST_CHILDREN
        )

    def _suits(self, row: Row) -> bool:
        """Whether a row asks for nothing that the host alone can do."""
        params, processor = row.params, row.processor
        return (
            params.logprobs is None
            and row.audited is None
            and not params.fates
            and params.latency_bound_ms is None
            and (processor is None or processor.is_idle(row.output_index(0)))
            and len(row.ends(self._eos_ids)) <= MOST_ENDS
        )


def _sample(rows: Sequence[Row]) -> bool:
    """Whether some row does: a round has one shape for all of them."""
    return any(not row.params.greedy for row in rows)


def _count(row: Row, result: RoundResult) -> None:
    counters, kept, nodes = row.counters, len(result.tokens) - 1, result.num_nodes
    counters.judged += result.num_judged_rows - 1  # one of them is the bonus
    counters.drafted += nodes
    counters.accepted += result.num_judged
    counters.trusted += kept - result.num_judged
    counters.rolled_back += nodes - kept
    counters.target_passes += 1
    counters.target_tokens += nodes + 1
    counters.passes_by_kept[kept] += 1
