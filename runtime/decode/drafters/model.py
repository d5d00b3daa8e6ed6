"""A draft model proposes a tree, a level at a time, each node with the scorer's probability that the target rejects it.

Every branch is continued from its own tokens: the nodes of a level that get children are one step of the draft, each
behind its ancestors.

Conditioned drafts take the target's features (EAGLE-3, Li et al. 2025, arXiv:2503.01840); standalone ones are language
models of their own.

Shapes: B rows in use, T tokens of a step, R gathered rows, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, takewhile

import torch
from torch import Tensor

from ssv.bundle.policy import MAX_PENDING, Policy
from ssv.bundle.survival import Survival
from ssv.runtime.decode.choice import check_chosen, check_ranked, choices, ranking
from ssv.runtime.decode.costs import Prices
from ssv.runtime.decode.drafters.contract import Drafter
from ssv.runtime.decode.drafters.levels import Levels
from ssv.runtime.decode.drafters.suffix import Suffix
from ssv.runtime.decode.growth import Candidate, Growth, Guess, likely_groups
from ssv.runtime.decode.logits_processor import Columns
from ssv.runtime.decode.row import Row, padded
from ssv.runtime.decode.tree import ROOT, branches_of
from ssv.runtime.engines.contract import (
    MOST_CHILDREN,
    NOT_CORRECTED,
    Corrections,
    Engine,
    EngineError,
    GrowingEngine,
    StepOutput,
    TreeShape,
)

MOST_LEVELS = 12
"""Of trees that an engine grows by itself."""

MANY_ROWS = 16
"""Side by side, among which a row that has not drafted for long is let go: keeping its draft up to date would cost each
round several per cent, and where so many share a pass drafts rarely pay."""


@dataclass(frozen=True, slots=True)
class DraftBlock:
    """What a chunk of a prompt left in the draft.

    Attributes:
        cache: see `Engine.read_cache`.
        last_feature_11F: of the chunk's last token, for a conditioned draft.
    """

    cache: Tensor
    last_feature_11F: Tensor | None

    @property
    def num_bytes(self) -> int:
        """What it takes of memory."""
        parts = (self.cache, self.last_feature_11F)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


class ModelDrafter(Drafter):
    """A draft engine over the rows of a batch.

    A conditioned draft's entry i joins token i + 1 with the features of token i, so its cache runs one token behind.
    """

    has_cache = True

    def __init__(
        self,
        target: Engine,
        engine: Engine,
        eos_ids: Tensor,
        survival: Survival,
        recall: Suffix,
        prompts: Engine | None = None,
    ) -> None:
        """Proposes by a draft that holds no text yet.

        Args:
            engine: with as many rows as the target's.
            eos_ids: int64.
            survival: corrects the shares that the draft gives its guesses.
            recall: finds what followed the same words in rows' texts before, for policies that recall.
            prompts: runs prompts that are run beside the rounds, in its own cache.

        Raises:
            EngineError: the engine has fewer rows.
        """
        if engine.max_batch < target.max_batch:
            raise EngineError(
                f"the draft's cache has {engine.max_batch} rows, the target's {target.max_batch}", "make them the same"
            )
        self._survival, self._recall = survival, recall
        self.engine, self.has_scores, self._beside = engine, engine.has_scorer, prompts
        self._grower = engine if isinstance(engine, GrowingEngine) else None
        self.needs_features = engine.num_features > 0
        self._offset = 1 if self.needs_features else 0
        self._max_batch, self._eos_ids = target.max_batch, frozenset(eos_ids.tolist())
        self._columns = Columns(engine.token_ids_V)
        # Of the tokens of each row's text that have no entry yet.
        self._features_BTF: Tensor | None = None
        self._growing: dict[int, _Growing] = {}
        self._levels: dict[float, Levels] = {}
        self._num_rows = 0
        # What runs the prompt that joins.
        self._prompts = engine
        # Of the last token of the prompt that joins, and of all tokens of its last step, with the first one's number.
        self._last_feature_11F: Tensor | None = None
        self._step_features: tuple[int, Tensor] | None = None

    # --- prompts ----------------------------------------------------------------------------------------------------

    def begin(self, *, is_beside: bool) -> None:
        self._last_feature_11F = self._step_features = None
        self._prompts = self._beside if is_beside and self._beside is not None else self.engine

    def prefill(self, b: int, ids_1T: Tensor, start: int, stop: int, features_BTF: Tensor | None) -> None:
        """Makes the entries up to the one that waits for a token after the chunk."""
        first, last = self._entries(start, stop)
        if self.needs_features:
            assert features_BTF is not None
            held = self._last_feature_11F
            self._last_feature_11F, self._step_features = features_BTF[:, -1:].clone(), (start, features_BTF)
            features_BTF = features_BTF[:, :-1] if held is None else torch.cat((held, features_BTF[:, :-1]), dim=1)
        if last > first:
            ids = ids_1T[:, first + self._offset : last + self._offset]
            no_rows = torch.empty(0, dtype=torch.long)
            at = torch.tensor([first], dtype=torch.int32)
            self._prompts.step(ids, at, no_rows, features_BTF, first_row=b)

    def join(self, b: int, row: Row) -> None:
        row.draft_length = row.target_length - self._offset
        if self._prompts is not self.engine:
            self.engine.write_cache(b, 0, self._prompts.read_cache(0, 0, row.draft_length))
        if row.policy.recalls:
            self._recall.join(b, row)
        if self._last_feature_11F is not None:
            self._hold(b, 0, self._last_feature_11F[0])

    def snapshot(self, b: int, start: int, stop: int) -> DraftBlock:
        last_11F = None
        if self._step_features is not None:
            first, features_BTF = self._step_features
            last_11F = features_BTF[:, stop - 1 - first : stop - first].clone()
        return DraftBlock(self._prompts.read_cache(b, *self._entries(start, stop)), last_11F)

    def restore(self, b: int, start: int, stop: int, block: DraftBlock) -> None:
        self._prompts.write_cache(b, self._entries(start, stop)[0], block.cache)
        self._last_feature_11F = block.last_feature_11F

    def _entries(self, start: int, stop: int) -> tuple[int, int]:
        """Those that tokens `start` to `stop` of a prompt complete."""
        return max(start - self._offset, 0), stop - self._offset

    # --- rounds -----------------------------------------------------------------------------------------------------

    def propose(self, rows: Sequence[Row], limits: Sequence[int], prices: Prices | None = None) -> None:
        self._growing = {
            b: _Growing(self._growth(b, row, limit, prices), row.draft_length)
            for b, (row, limit) in enumerate(zip(rows, limits, strict=True))
            if limit > 0
        }
        self._num_rows = len(rows)
        grown: set[int] = set()
        if self._grower is not None:
            grown = self._grow(self._grower, rows, limits, prices)
        else:
            self._let_wait(rows, prices)
        drafting = [b for b, growing in self._growing.items() if growing.growth.open]
        out = self._step_text(rows, drafting) if drafting else None
        while out is not None:
            guesses = iter(enumerate(self._guesses(rows, drafting, out)))
            for b in drafting:
                growing, row = self._growing[b], rows[b]
                numbered = [next(guesses) for _ in growing.growth.open]
                growing.note_expanded([r for r, _ in numbered])
                growing.growth.add([found for _, found in numbered], len(drafting))
                if self._asks(row, growing.growth, limits[b]):
                    growing.growth.open = []
            drafting = [b for b in drafting if self._growing[b].growth.open]
            out = self._step_level(rows, drafting, out) if drafting else None
        for b in self._growing.keys() - grown:
            rows[b].tree = self._growing[b].growth.tree()

    def _growth(self, b: int, row: Row, limit: int, prices: Prices | None) -> Growth:
        """What a row's tree begins with."""
        # A text knows nothing of a grammar.
        recalls = row.policy.recalls and row.params.grammar is None
        found = self._recall.found(b, row, limit) if recalls else ()
        ends = row.ends(self._eos_ids)
        if prices is not None and not row.policy.lossless:
            prices = prices.alone()
        return Growth(row.policy, limit, row.rest, ends, prices if row.policy.pays else None, found)

    def _grow(
        self, engine: GrowingEngine, rows: Sequence[Row], limits: Sequence[int], prices: Prices | None
    ) -> set[int]:
        """Has the engine grow what trees it can by itself: those that are chosen greedily, with one number of children.
        Rows that draft what pays have no others: a step at a time would not.

        Returns:
            The rows that have their trees.
        """
        alike: dict[tuple[object, ...], list[int]] = {}
        for b, growing in self._growing.items():
            params, policy = rows[b].params, rows[b].policy
            # What a request changes of its logits, such as an end that comes too early, is the host's to change.
            processor = rows[b].processor
            is_plain = processor is None or processor.is_idle(rows[b].output_index(0))
            if params.greedy and is_plain and len(policy.children) == 1 and policy.children[0] <= MOST_CHILDREN:
                alike.setdefault((policy.children, policy.beam, policy.max_depth, policy.pays), []).append(b)
            elif policy.pays:
                growing.growth.open = []
        return {
            b for chosen in alike.values() if self._grow_alike(engine, rows, limits, chosen, prices) for b in chosen
        }

    def _grow_alike(
        self,
        engine: GrowingEngine,
        rows: Sequence[Row],
        limits: Sequence[int],
        chosen: Sequence[int],
        prices: Prices | None,
    ) -> bool:
        """Grows trees of one shape in some rows, if there is room, and it pays where it has to; tells whether."""
        policy = rows[chosen[0]].policy
        beam = min(policy.beam, engine.most_growing // len(chosen), MOST_CHILDREN)
        levels = max(min(rows[b].rest, policy.max_depth or limits[b], limits[b]) for b in chosen)
        levels = min(levels, MOST_LEVELS, 1 + (MAX_PENDING - 1) // max(beam, 1))
        counts = [len(row.tokens) - self._offset - row.draft_length if b in chosen else 0 for b, row in enumerate(rows)]
        if policy.pays and prices is not None:
            levels = self.levels(policy).worth(replace(prices, sharing=len(chosen)), levels, beam)
        if levels < 1 or beam < 1 or sum(counts) > engine.most_growing:
            for b in chosen:
                if policy.pays:
                    self._growing[b].growth.open = []
            return False
        shape, width = TreeShape(levels, beam, policy.children[0]), max(counts)
        found = engine.grow(
            torch.tensor([padded(row.tokens, row.draft_length + self._offset, width) for row in rows]),
            torch.tensor(self._starts(rows, chosen), dtype=torch.int32),
            torch.tensor(counts, dtype=torch.int32),
            self._features_BTF[: len(rows), :width] if self._features_BTF is not None else None,
            shape,
            self.corrections(policy)[0],
        )
        for b in chosen:
            row, growing, grown = rows[b], self._growing[b], found[b]
            assert grown is not None
            row.draft_length += counts[b]
            growing.end = row.draft_length
            groups = likely_groups(grown, shape, row.ends(self._eos_ids), limits[b], row.rest, policy.accept_below)
            for (first, last), of_level in zip(pairwise(shape.firsts), groups, strict=False):
                taken = growing.growth.take(of_level)
                if first:
                    growing.note_grown(taken, grown.parents[first : last : shape.children].tolist())
                if self._asks(row, growing.growth, limits[b]):
                    break
            if not policy.is_chain:  # that of a chain was made when it was asked for
                row.tree = growing.growth.tree()
        if policy.pays:
            self.levels(policy).note(levels, [self._growing[b].growth.survival_by_depth() for b in chosen])
        return True

    def _let_wait(self, rows: Sequence[Row], prices: Prices | None) -> None:
        """Ends the trees of rows that draft what pays with what was found in their texts, if no step of the draft does:
        of lossless rows together, of each lossy one by itself."""
        if prices is None:
            return
        paying = [b for b in self._growing if rows[b].policy.pays]
        lossless = [b for b in paying if rows[b].policy.lossless]
        asked = [([b], prices.alone()) for b in paying if b not in lossless]
        for together, at in [*asked, (lossless, prices)]:
            growths = [self._growing[b].growth for b in together]
            unseen = [len(rows[b].tokens) - self._offset - rows[b].draft_length for b in together]
            kept = [growth.kept_survival() for growth in growths]
            left_over = [growth.left_over(ROOT) for growth in growths]
            if growths and not at.worth_beginning(unseen, kept, left_over):
                for growth in growths:
                    growth.open = []

    def _asks(self, row: Row, growth: Growth, limit: int) -> bool:
        """Whether a row asks for its pass before its tree has its full shape."""
        if not row.policy.is_chain:
            return row.waits_too_long
        row.tree = growth.tree()
        return row.asks_for_pass(limit, self._eos_ids)

    def observe(self, b: int, row: Row, path: Sequence[int], chosen: Sequence[int], features_TF: Tensor | None) -> None:
        if features_TF is not None:
            rows = [0, *(node + 1 for node in path)]
            kept = features_TF[: len(rows)] if rows[-1] == len(path) else features_TF[rows]
            self._hold(b, row.target_length - row.draft_length, kept)
        elif (growing := self._growing.pop(b, None)) is not None:
            # What it made of tokens that are text now is as good as what it would make again.
            slots = growing.slots_of(path)
            self.engine.keep(b, row.draft_length, slots)
            row.draft_length += len(slots)
        if row.target_length + 1 + len(path) - row.draft_length > MAX_PENDING:
            if row.policy.pays and self._num_rows >= MANY_ROWS:
                row.has_lost_draft = True
                return
            self._fill(b, row, [*row.tokens, *(row.tree.tokens[node] for node in path)])

    def move(self, source: int, dest: int, row: Row) -> None:
        self.engine.move_row(source, dest, row.draft_length)
        if row.policy.recalls:
            self._recall.move(source, dest, row)
        if self._features_BTF is not None:
            self._features_BTF[dest] = self._features_BTF[source]

    def move_joining(self, source: int, dest: int, done: int) -> None:
        self.engine.move_row(source, dest, max(done - self._offset, 0))

    # --- rows in the engines' own hands (`ssv.runtime.decode.ahead`) ------------------------------------------------

    def unseen(self, row: Row) -> list[int]:
        """Tokens of a row's text that the draft has no entry for, the root last."""
        return row.tokens[row.draft_length + self._offset :]

    def features(self, num_rows: int) -> Tensor | None:
        """The target's features of the unseen tokens of the first rows, [B, T, F]."""
        return self._features_BTF[:num_rows] if self._features_BTF is not None else None

    def levels(self, policy: Policy) -> Levels:
        """How deep trees are worth growing, where an engine grows them by itself: trusted tokens are worth more."""
        return self._levels.setdefault(policy.accept_below, Levels(MOST_LEVELS))

    def corrections(self, policy: Policy) -> tuple[Corrections, Corrections]:
        """By which shares of guesses are corrected, of greedy rows and of those that sample. A chain goes by its
        risks."""
        if policy.is_chain:
            return NOT_CORRECTED, NOT_CORRECTED
        return self._survival.greedy or NOT_CORRECTED, self._survival.sampled or NOT_CORRECTED

    def catch_up(self, b: int, row: Row) -> None:
        """Makes the entries of all tokens of a row but the root."""
        if len(self.unseen(row)) > 1:
            self._fill(b, row, row.tokens[:-1])

    def take_back(self, rows: Sequence[Row], draft_lengths: Sequence[int], features_BTF: Tensor) -> None:
        """Takes rows back whose rounds somebody else has run.

        Args:
            draft_lengths: entries that the cache has now of each; -1 of rows that will not draft again.
            features_BTF: of the tokens behind them.
        """
        self._make_room(features_BTF.shape[1], features_BTF)
        assert self._features_BTF is not None
        self._features_BTF[: len(rows), : features_BTF.shape[1]] = features_BTF
        for row, draft_length in zip(rows, draft_lengths, strict=True):
            row.has_lost_draft |= draft_length < 0
            row.draft_length = max(draft_length, 0)

    def _step_text(self, rows: Sequence[Row], drafting: Sequence[int]) -> StepOutput:
        """Feeds each drafting row what the draft has not seen yet of its text, the root last; the others are
        padding."""
        starts = self._starts(rows, drafting)
        counts = [
            len(row.tokens) - self._offset - row.draft_length if b in drafting else 0 for b, row in enumerate(rows)
        ]
        width = max(counts)
        windows = [padded(row.tokens, row.draft_length + self._offset, width) for row in rows]
        out = self.engine.step(
            torch.tensor(windows),
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor([b * width + counts[b] - 1 for b in drafting]),
            self._features_BTF[: len(rows), :width] if self._features_BTF is not None else None,
            count_B=torch.tensor(counts, dtype=torch.int32),
        )
        for b in drafting:
            rows[b].draft_length += counts[b]
            self._growing[b].end = rows[b].draft_length
        return out

    def _step_level(self, rows: Sequence[Row], drafting: Sequence[int], before: StepOutput) -> StepOutput:
        """Feeds each drafting row the nodes of its tree that get children, each behind its own ancestors.

        Args:
            before: the step of their parents, whose hidden states they are joined with.
        """
        opened = [self._growing[b].growth.open if b in drafting else [] for b in range(len(rows))]
        ends = [self._end_of(b, row) for b, row in enumerate(rows)]
        width = max(map(len, opened))
        candidates = [self._growing[b].growth.candidates if b in self._growing else [] for b in range(len(rows))]
        ids = [padded([candidates[b][i].guess.token for i in opened[b]], 0, width) for b in range(len(rows))]
        paths = [
            [[*self._growing[b].ancestors(i), ends[b] + t] for t, i in enumerate(opened[b])] for b in range(len(rows))
        ]
        is_chain = all(
            path == list(range(rows[b].draft_length, ends[b] + 1)) and len(row) == 1
            for b, row in enumerate(paths)
            for path in row
        )
        places = [b * width + t for b in range(len(rows)) for t in range(len(opened[b]))]
        features_BTF = None
        if self.needs_features:
            hidden_RH = before.hidden_RH
            flat = hidden_RH.new_zeros(len(rows) * width, hidden_RH.shape[1])
            flat[places] = hidden_RH[
                [self._growing[b].step_rows[candidates[b][i].parent] for b in drafting for i in opened[b]]
            ]
            features_BTF = flat.view(len(rows), width, -1)
        return self.engine.step(
            torch.tensor(ids),
            torch.tensor(ends, dtype=torch.int32),
            torch.tensor(places),
            features_BTF,
            branches=None if is_chain else branches_of([row.draft_length for row in rows], paths, ends),
            count_B=torch.tensor([len(each) for each in opened], dtype=torch.int32),
        )

    def _starts(self, rows: Sequence[Row], drafting: Sequence[int]) -> list[int]:
        """The first slots of a step of texts; the padding of other rows goes behind the trees that have grown in
        them."""
        return [row.draft_length if b in drafting else self._end_of(b, row) for b, row in enumerate(rows)]

    def _end_of(self, b: int, row: Row) -> int:
        """The first slot of a row that is free: behind its tree, or its text."""
        return growing.end if (growing := self._growing.get(b)) else row.draft_length

    def _guesses(self, rows: Sequence[Row], drafting: Sequence[int], out: StepOutput) -> list[list[Guess]]:
        """The likeliest next tokens of each gathered row."""
        growths = {b: self._growing[b].growth for b in drafting}
        opened = [(b, i) for b in drafting for i in growths[b].open]
        ahead = [(b, 0 if i == ROOT else growths[b].candidates[i].depth) for b, i in opened]
        most = max(growths[b].num_children(i) for b, i in opened)
        scored = self._scored(rows, [b for b, _ in opened], out)
        if most == 1 and scored is not None and not any(rows[b].policy.pays or rows[b].processor for b in drafting):
            tokens = choices(rows, out.logits_RV, ahead, self._columns, out.token_R)
            check_chosen(tokens)
            # Nothing is chosen by these shares: a chain goes by its risks.
            return [[Guess(token, 1 - r, r)] for token, (_, r) in zip(tokens, scored, strict=True)]
        ranked = ranking(
            rows, out.logits_RV, ahead, self._columns, most, lambda r: growths[opened[r][0]].text(opened[r][1])
        )
        check_ranked(rows, opened, ranked)
        greedy = [rows[b].params.greedy for b, _ in opened]
        guesses: list[list[Guess]] = []
        for r, (tokens, shares) in enumerate(ranked):
            token, risk = scored[r] if scored is not None else (None, None)
            # The scorer speaks of the draft's likeliest token: of no other, where the request changes the logits.
            risk = risk if token in (None, tokens[0]) else None
            if tokens[0] < 0:  # its head has none of the tokens that may be chosen
                guesses.append([])
                continue
            guesses.append(_shared(tokens, shares, risk, greedy[r], self._survival))
        return guesses

    def _scored(
        self, rows: Sequence[Row], row_R: Sequence[int], out: StepOutput
    ) -> list[tuple[int | None, float]] | None:
        """The scorer's risk of each gathered row, and the token that it is of, for rows whose requests change the
        logits; None without a scorer."""
        if out.reject_prob_R is None:
            return None
        risks = out.reject_prob_R.tolist()
        own = [r for r, b in enumerate(row_R) if rows[b].processor is not None]
        tokens: list[int | None] = [None] * len(risks)
        if own:
            index = out.logits_RV[own].argmax(dim=1)
            ids_V = self._columns.ids_V
            for r, token in zip(own, (index if ids_V is None else ids_V[index]).tolist(), strict=True):
                tokens[r] = token
        return list(zip(tokens, risks, strict=True))

    def guess_of(self, b: int, node: int) -> tuple[int, int, float]:
        """Which guess for its place a node of row `b`'s tree was, the first being 0, its depth, 1 behind the text, and
        the share that it was given."""
        growth = self._growing[b].growth
        own = growth.candidate_of[node]
        it = growth.candidates[own]
        rank = sum(candidate.parent == it.parent for candidate in growth.candidates[:own])
        return rank, it.depth, it.guess.share

    def candidates(self, b: int) -> Sequence[Candidate]:
        """All that has been guessed for row `b` in this round, whether it is kept or not."""
        return self._growing[b].growth.candidates

    def _fill(self, b: int, row: Row, text: Sequence[int]) -> None:
        """Makes the entries of a row that has not drafted for long: a step is no wider than what any row has room
        for."""
        start, stop = row.draft_length, len(text) - self._offset
        features_1TF = None
        if self._features_BTF is not None:
            features_1TF = self._features_BTF[b : b + 1, : stop - start]
        self.engine.step(
            torch.tensor([text[start + self._offset : stop + self._offset]]),
            torch.tensor([start], dtype=torch.int32),
            torch.empty(0, dtype=torch.long),
            features_1TF,
            first_row=b,
        )
        if self._features_BTF is not None:  # that of the last token waits for the one after it
            self._features_BTF[b, 0] = self._features_BTF[b, stop - start]
        row.draft_length = stop

    def _hold(self, b: int, start: int, features_TF: Tensor) -> None:
        """Keeps features of a row's tokens for its next step, behind `start` others."""
        stop = start + len(features_TF)
        self._make_room(stop, features_TF)
        assert self._features_BTF is not None
        self._features_BTF[b, start:stop] = features_TF

    def _make_room(self, width: int, like: Tensor) -> None:
        """For features of so many tokens of each row."""
        held = self._features_BTF
        if held is None or held.shape[1] < width:
            self._features_BTF = like.new_zeros(self._max_batch, width, like.shape[-1])
            if held is not None:
                self._features_BTF[:, : held.shape[1]] = held


@dataclass(slots=True)
class _Growing:
    """A row's tree while it grows, and where the draft's cache has its nodes.

    Attributes:
        end: the first slot that is free.
        slots: of the candidates that the draft has run.
        step_rows: of the candidates that the last step has run, which of its gathered rows each was.
    """

    growth: Growth
    end: int
    slots: dict[int, int] = field(default_factory=dict)
    step_rows: dict[int, int] = field(default_factory=dict)

    def ancestors(self, candidate: int) -> list[int]:
        """Slots of the candidates before one, the text's left out."""
        found = []
        while (candidate := self.growth.candidates[candidate].parent) != ROOT:
            found.append(self.slots[candidate])
        return found[::-1]

    def note_grown(self, taken: Mapping[int, int], parents: Sequence[int]) -> None:
        """An engine has grown a level by itself, behind the first.

        Args:
            taken: which candidates those that it has grown so far are, by their numbers there.
            parents: the numbers of those that got children: their slots follow one another.
        """
        for parent in parents:
            if (candidate := taken.get(parent)) is not None:
                self.slots[candidate] = self.end
            self.end += 1

    def note_expanded(self, gathered: Sequence[int]) -> None:
        """The open candidates have been run, as those gathered rows of a step."""
        self.step_rows = dict(zip(self.growth.open, gathered, strict=True))
        for candidate in self.growth.open:
            if candidate != ROOT:
                self.slots[candidate] = self.end
                self.end += 1

    def slots_of(self, path: Sequence[int]) -> list[int]:
        """Slots of a path's nodes, as far as they have been run."""
        candidates = [self.growth.candidate_of[node] for node in path]
        return [self.slots[candidate] for candidate in takewhile(self.slots.__contains__, candidates)]


def _shared(
    tokens: Sequence[int], shares: Sequence[float], reject_prob: float | None, greedy: bool, survival: Survival
) -> list[Guess]:
    """Guesses of tokens whose shares the draft says; the scorer corrects what it says of the first, the others share
    what is left.

    Sampled tokens are chosen with noise that the scorer does not see: there the draft's shares stand. All are corrected
    then by what came true of such shares before.
    """
    first = 1 - reject_prob if reject_prob is not None and greedy else shares[0]
    left = (1 - first) / max(1 - shares[0], 1e-6)
    said = [first, *(share * left for share in shares[1:])]
    corrected = [survival.corrected(share, rank, greedy=greedy) for rank, share in enumerate(said)]
    return [
        Guess(token, share, reject_prob if k == 0 and reject_prob is not None else 1 - share)
        for k, (token, share) in enumerate(zip(tokens, corrected, strict=True))
    ]
