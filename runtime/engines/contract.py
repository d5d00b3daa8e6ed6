"""The engine contract: a function over a KV cache, which knows nothing of speculation.

A row of the cache has slots. Where a token's keys and values lie (its slot) and where it stands in its text (its
position) are two things: siblings of a tree have one position and a slot each. In a chain both are the same number.

Shapes: B rows of the step (a run of rows of the cache), T tokens, M = B * T, R gathered rows, H hidden, V vocab
(of the engine's LM head), F features, S slots of a row, D the longest path of a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssv.support.errors import UserError


class EngineError(UserError):
    """A step or an engine that cannot be; the message says what was asked and what is possible."""


@dataclass(frozen=True, slots=True)
class Branches:
    """What the tokens of a step see where they are no chain: the ancestor mask, as slots.

    Token t of row b sees slots 0 to `prefix_B[b]` - 1, which all tokens of its row share, and the slots of its path:
    those of its ancestors beyond the prefix in the order of their positions, then its own. Its position is that of the
    last of them, the prefix plus the path's length - 1. Ancestors may lie in this step or in steps before.

    Attributes:
        prefix_B: int32, on the CPU.
        path_BTD: int32, on the CPU, padded on the right with -1; padding tokens have their own slot alone.
    """

    prefix_B: Tensor
    path_BTD: Tensor

    @property
    def position_BT(self) -> Tensor:
        """Positions of the tokens, int32 [B, T]."""
        return self.prefix_B[:, None] + (self.path_BTD >= 0).sum(dim=2, dtype=torch.int32) - 1


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step returns. All but the hidden states may be overwritten by the engine's next step.

    Attributes:
        hidden_RH: hidden states of the gathered rows before the final norm; of a conditioned draft, what it joins with
            the token that it drafts after each (`Draft.carried`).
        logits_RV: fp32.
        features_BTF: features of all tokens, if they were asked for.
        reject_prob_R: draft with a scorer: probability that the target would reject the row's argmax; otherwise None.
        token_R: vocabulary id of each row's argmax, int64, from an engine that finds it on its way.
    """

    hidden_RH: Tensor
    logits_RV: Tensor
    features_BTF: Tensor | None = None
    reject_prob_R: Tensor | None = None
    token_R: Tensor | None = None


class Engine(Protocol):
    """A decoder over its own KV cache.

    Attributes:
        max_batch, max_length: rows of the cache, and slots of each.
        vocab_size: V.
        num_features: F of `features_in`, for a feature-conditioned draft, otherwise 0.
        has_scorer: whether steps return `reject_prob_R`.
        token_ids_V: vocabulary id of each logit, int64; None where logit i is token i.
    """

    max_batch: int
    max_length: int
    vocab_size: int
    num_features: int
    has_scorer: bool
    token_ids_V: Tensor | None

    def step(
        self,
        input_ids_BT: Tensor,
        first_slot_B: Tensor,
        gather_rows_R: Tensor,
        features_in_BTF: Tensor | None = None,
        *,
        branches: Branches | None = None,
        count_B: Tensor | None = None,
        features_out: bool = False,
        first_row: int = 0,
    ) -> StepOutput:
        """Runs T tokens of B rows and stores their keys and values.

        Token t of row b goes to slot `first_slot_B[b] + t`. Without branches it sees all slots up to its own: prefill,
        decoding, ragged verification and decoding after a rollback are one and the same call. Rows with fewer than T
        tokens are right-padded; what padding writes lies beyond the row's length and is overwritten by its next step.

        Args:
            input_ids_BT: int64.
            first_slot_B: int32, slots of each row that are in use.
            branches: what each token sees, where the tokens of a row are no chain.
            gather_rows_R: int64, rows of the flattened [B * T] hidden states that get logits.
            features_in_BTF: for a feature-conditioned draft.
            count_B: int32, tokens of each row that are no padding, 0 to T; None where all rows have T. An engine may
                leave padding out.
            features_out: whether the features of all tokens are wanted, from a target that has a tap.
            first_row: cache row of the step's first row; the others follow it.

        Raises:
            EngineError: more rows than the cache has, a token beyond its length, or branches that see what is not
                there.
        """
        ...

    def keep(self, row: int, start: int, slots: Sequence[int]) -> None:
        """Moves the entries of ascending `slots` together, to `start` and the slots behind it: a path of a tree becomes
        text.

        Raises:
            EngineError: slots that do not ascend from `start` on, or lie beyond the cache.
        """
        ...

    def move_row(self, source: int, dest: int, length: int) -> None:
        """Copies the first `length` positions of one cache row over another."""
        ...

    def read_cache(self, row: int, start: int, stop: int) -> Tensor:
        """A copy of what a cache row holds of positions `start` to `stop`, in a form of the engine's own, on its
        device."""
        ...

    def write_cache(self, row: int, start: int, held: Tensor) -> None:
        """Puts what `read_cache` gave into a row, from position `start` on."""
        ...


@runtime_checkable
class BlockEngine(Engine, Protocol):
    """An engine that runs a step in blocks, each of which takes as long as if it were full."""

    def blocks(self, num_tokens: int) -> Sequence[int]:
        """Tokens that the blocks of a step of so many have room for."""
        ...


MOST_CHILDREN = 16
"""Of a node, and nodes of a level that get children, that engines which grow trees by themselves have room for."""

MOST_GUESSES = 1024
"""Of such a tree, whether they are kept or not."""

MOST_NODES = 63
"""Beside the root, of a tree that such an engine has verified without the host."""


@dataclass(frozen=True, slots=True)
class TreeShape:
    """What an engine grows without asking: a tree of guesses that are chosen greedily.

    Attributes:
        levels: most tokens of a path.
        beam: most nodes of a level that get children: those that survive most probably.
        children: of each of them.
    """

    levels: int
    beam: int
    children: int

    def opened(self, level: int) -> int:
        """How many nodes of a level get children; of level 0 it is the root."""
        return min(self.beam, self.children**level)

    @property
    def has_room(self) -> bool:
        """Whether every engine that grows trees by itself can grow this one, if it has not too many levels for it."""
        return max(self.beam, self.children) <= MOST_CHILDREN and self.firsts[-1] <= MOST_GUESSES

    @property
    def firsts(self) -> list[int]:
        """The number of each level's first guess, counted through all levels; at last, how many guesses there are."""
        return list(accumulate((self.opened(level) * self.children for level in range(self.levels)), initial=0))


@dataclass(frozen=True, slots=True)
class Grown:
    """Candidates of a row's tree, level by level; those of a level in the order of their parents.

    Attributes:
        tokens, parents: int32, of each; -1 is a token that there is none of, and the parent of one that follows the
            text.
        shares: fp32, probability that the target chooses it, given that all before it is right; corrected.
        risks: fp32, of the first child of a node, the scorer's; of the others 1 - share.
    """

    tokens: NDArray[np.int32]
    parents: NDArray[np.int32]
    shares: NDArray[np.float32]
    risks: NDArray[np.float32]


Corrections = Sequence[tuple[float, float]]
"""Of shares of guesses: log odds become offset + slope * log odds, (offset, slope) by rank. The last one is that of all
further ranks."""

NOT_CORRECTED: Corrections = ((0.0, 1.0),)


@runtime_checkable
class GrowingEngine(Engine, Protocol):
    """A draft's engine that grows trees by itself, without waiting for anybody between their levels.

    Attributes:
        most_growing: nodes of a level that get children, of all rows together.
    """

    most_growing: int

    def grow(
        self,
        input_ids_BT: Tensor,
        first_slot_B: Tensor,
        count_B: Tensor,
        features_in_BTF: Tensor | None,
        shape: TreeShape,
        corrections: Corrections,
    ) -> list[Grown | None]:
        """Runs tokens of rows as `step` does, and grows a tree behind the last one of each row that has any.

        A node's first guess has the share 1 - r, with the scorer's r, the others share what is left as their
        probabilities do (without a scorer all have their probabilities); then the log odds of the k-th become
        offset + slope * log odds. Nodes that get children take the slots behind the row's text, level by level, in the
        order in which their children are listed.

        Args:
            count_B: 0 for rows whose trees do not grow.
            corrections: see `Corrections`.

        Returns:
            Of each row; None where nothing grew.

        Raises:
            EngineError: see `step`; or a shape or a number of tokens that there is no room for.
        """
        ...


@dataclass(frozen=True, slots=True)
class RoundShape:
    """What the engines draft and verify in a round that they run by themselves.

    Attributes:
        tree: None of plain decoding.
        nodes: most nodes of a row's tree that are verified: those that survive most probably. Of a chain, the first
            ones, up to the one at which its policy asks for a pass.
        samples: whether rows may sample.
    """

    tree: TreeShape | None
    nodes: int
    samples: bool = False

    @property
    def depth(self) -> int:
        """Most drafted tokens that a row can gain."""
        return min(self.tree.levels, self.nodes) if self.tree is not None else 0

    @property
    def is_chain(self) -> bool:
        """Whether its trees have no branches."""
        return self.tree is None or self.tree.children == 1


@dataclass(frozen=True, slots=True)
class RoundRow:
    """A row as it is when such rounds begin.

    Attributes:
        length: tokens of its text that the target has seen.
        root: the token behind them.
        rest: tokens that a draft may add to the output.
        limit: most nodes of its tree.
        accept_below: see `Policy`.
        verify_above, risk_budget: see `Policy`; of chains.
        ends: tokens that end its output, at most `MOST_ENDS`.
        draft_length: entries of the draft's cache.
        pending: tokens of the text that have none yet, the root last; none in rows that do not draft.
        temperature: above 0 a row samples, by `choose` of `ssv.runtime.decode.sampling`; its tree is lossless.
        top_k, top_p, seed: of such rows, see `SamplingParams`. The place of the token behind the root is `length` + 1.
    """

    length: int
    root: int
    rest: int
    limit: int = 0
    accept_below: float = 0.0
    verify_above: float = 1.0
    risk_budget: float = 1.0
    ends: Sequence[int] = ()
    draft_length: int = 0
    pending: Sequence[int] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class RoundResult(NamedTuple):
    """What a round gave a row.

    Attributes:
        tokens: those of the tree that are kept, and the target's own choice behind them, or -1 where the logits are no
            distribution.
        num_nodes: of its tree.
        num_judged_rows: of the pass, the root's among them.
        num_judged: kept nodes that were judged.
        gains: fp32 [levels, GAIN_SIZES], of trees with branches: the sum of the survivals of its best so many
            candidates that are no deeper than a level, from the first on.
    """

    tokens: Sequence[int]
    num_nodes: int
    num_judged_rows: int
    num_judged: int
    gains: NDArray[np.float32] | None


class RoundsEngine(Protocol):
    """A target and a draft that run rounds by themselves, each behind the one before: the host hears of them
    while the next one runs.

    Between `begin` and `end` nobody else may step the two engines.

    Attributes:
        most_tokens: of a pass, all rows together, and of a step of the draft.
        most_pending: tokens of a row's text that may wait for a draft.
    """

    most_tokens: int
    most_pending: int

    @property
    def in_flight(self) -> int:
        """Rounds that were run and not taken."""
        ...

    def seconds(self, num_rows: int, shape: RoundShape) -> float:
        """What such a round takes while the next one waits for it. Measured when it is asked for first, or by
        `measure`."""
        ...

    def measure(self) -> None:
        """Measures what rounds take, if they were not. The engines must be idle, and what their caches hold is lost."""
        ...

    def begin(
        self,
        rows: Sequence[RoundRow],
        features_BTF: Tensor | None,
        corrections: tuple[Corrections, Corrections],
    ) -> None:
        """Takes over rows, the first ones of the caches.

        Args:
            features_BTF: of their pending tokens; None if no row drafts.
            corrections: of greedy rows, and of those that sample.
        """
        ...

    def run(self, shape: RoundShape) -> None:
        """Puts another round behind those in flight; at most `MOST_IN_FLIGHT` may be.

        Shapes with a tree and without must not follow one another between `begin` and `end`.

        Raises:
            EngineError: a shape that there is no room for.
        """
        ...

    def take(self) -> list[RoundResult]:
        """What the oldest round in flight gave, of each row; waits for it."""
        ...

    def end(self) -> tuple[list[int], Tensor | None]:
        """Gives the rows back once all rounds have been taken.

        Returns:
            Of each the entries of the draft's cache, or -1 where more tokens than `most_pending` wait for one, and the
            features of the text's tokens behind them, [B, T, F], padded on the right; None if no row drafts.
        """
        ...

    def reset(self) -> None:
        """Drops the rows, and the rounds in flight, after something has failed; waits for these."""
        ...


class PromptLane(Protocol):
    """Engines for prompts, beside a target and a draft that are in use: the same weights, over a cache of their own.

    Attributes:
        most_rows, most_tokens: that one step of prompts has room for: several short prompts may share it. The draft's
            cache has one row.
        least: tokens of the shortest prompt that is run while rounds are. Shorter ones are run between two rounds, but
            the host need not wait for them either.
        target, draft: engines whose steps are run within `work`.
        num_under_way: pieces of work that have not ended.
    """

    least: int
    most_rows: int
    most_tokens: int

    @property
    def target(self) -> Engine:
        """What runs prompts through the target."""
        ...

    @property
    def draft(self) -> Engine | None:
        """What runs prompts through the draft; None without one."""
        ...

    @property
    def num_under_way(self) -> int:
        """Chunks that have been started and not ended."""
        ...

    def work(self) -> AbstractContextManager[None]:
        """What steps these engines, and everything else that reads or writes their caches: a piece of work, which may
        end after the host has gone on. Pieces follow one another."""
        ...

    def wait(self) -> None:
        """Until one more piece of work has ended."""
        ...

    def reset(self) -> None:
        """Waits for all work under way, after something has failed."""
        ...

    def hand_over(self, num_tokens: int) -> None:
        """The next pieces of work are those of a prompt of so many tokens, and of those that share its step, and begin
        behind what the caller has begun so far, such as copies of what work has left."""
        ...


GAIN_SIZES = (1, 3, 7, 15, 31, 63)
"""Nodes of trees that fill a pass of some rows: with their root a power of two."""

MOST_ENDS = 8
"""Tokens that may end the output of a row in rounds that engines run by themselves."""

MOST_IN_FLIGHT = 3
"""Of such rounds."""


class HeadsEngine(Protocol):
    """Medusa's heads (`ssv.model.heads`), which guess several next tokens from one hidden state of the target.

    Attributes:
        num_heads: head d, from 0, guesses the token d + 1 places behind the target's own choice.
        token_ids_V: vocabulary id of each logit, int64; None where logit i is token i.
    """

    num_heads: int
    token_ids_V: Tensor | None

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """Logits of every head, fp32 [R, D, V]; hidden states as `StepOutput.hidden_RH` has them."""
        ...


def check_step(
    engine: Engine,
    input_ids_BT: Tensor,
    first_slot_B: Tensor,
    gather_rows_R: Tensor,
    features_in_BTF: Tensor | None,
    branches: Branches | None,
    count_B: Tensor | None,
    first_row: int,
) -> None:
    """Raises EngineError for a step that the cache has no room for, that lacks its features, or whose indices point
    elsewhere: compiled code reads and writes where they say."""
    batch, tokens = input_ids_BT.shape
    # Plain numbers: at one token a step a reduction costs several times its list.
    slots, gathered = first_slot_B.tolist(), gather_rows_R.tolist()
    if first_slot_B.shape != (batch,):
        raise EngineError(f"first_slot has shape {tuple(first_slot_B.shape)}, the step has {batch} rows")
    if first_slot_B.dtype != torch.int32 or min(slots) < 0:
        raise EngineError(f"first_slot must be int32 and not negative, got {first_slot_B.dtype} {slots}")
    if gathered and not 0 <= min(gathered) <= max(gathered) < batch * tokens:
        raise EngineError(f"gather_rows {gathered} lie outside the step's {batch * tokens} rows")
    if count_B is not None:
        counts = count_B.tolist()
        if count_B.shape != (batch,) or count_B.dtype != torch.int32 or not 0 <= min(counts) <= max(counts) <= tokens:
            raise EngineError(
                f"count must be int32, 0 to {tokens} for each of {batch} rows, got {count_B.dtype} {counts}"
            )
        if padding := [row for row in gathered if row % tokens >= counts[row // tokens]]:
            raise EngineError(f"gather_rows {padding} are padding: the rows have {counts} tokens of {tokens}")
    last_slot = max(slots) + tokens - 1
    if first_row < 0:
        raise EngineError(f"first_row {first_row} is negative")
    if first_row + batch > engine.max_batch:
        raise EngineError(
            f"step of rows {first_row} to {first_row + batch - 1}, the engine's cache has {engine.max_batch}"
        )
    if last_slot >= engine.max_length:
        raise EngineError(
            f"step writes slot {last_slot}, the cache holds {engine.max_length}",
            "build or load the engine with a larger max length",
        )
    if branches is not None:
        _check_branches(branches, slots, tokens, None if count_B is None else counts)
    given = None if features_in_BTF is None else tuple(features_in_BTF.shape)
    wanted = (batch, tokens, engine.num_features) if engine.num_features else None
    if given != wanted:
        raise EngineError(f"features_in has shape {given}, expected {wanted}")


def _check_branches(branches: Branches, slots: Sequence[int], tokens: int, counts: Sequence[int] | None) -> None:
    """Raises EngineError for paths that see slots which are not written, or do not end at the token's own."""
    prefix_B, path_BTD = branches.prefix_B, branches.path_BTD
    if prefix_B.shape != (len(slots),) or path_BTD.dim() != 3 or path_BTD.shape[:2] != (len(slots), tokens):
        shapes = f"{tuple(prefix_B.shape)} and {tuple(path_BTD.shape)}"
        raise EngineError(f"branches have shapes {shapes}, the step has {len(slots)} rows of {tokens} tokens")
    if prefix_B.dtype != torch.int32 or path_BTD.dtype != torch.int32:
        raise EngineError(f"branches must be int32, got {prefix_B.dtype} and {path_BTD.dtype}")
    for b, (first, prefix, row) in enumerate(zip(slots, prefix_B.tolist(), path_BTD.tolist(), strict=True)):
        if not 0 <= prefix <= first:
            raise EngineError(f"branches of row {b}: prefix {prefix} must lie between 0 and first_slot {first}")
        for t in range(tokens if counts is None else counts[b]):
            path = [slot for slot in row[t] if slot >= 0]
            if row[t][: len(path)] != path or path[-1:] != [first + t]:
                raise EngineError(f"path {row[t]} of token {t} of row {b} must end at its own slot {first + t}")
            if any(slot < prefix for slot in path) or any(a >= b for a, b in pairwise(path)):
                raise EngineError(f"path {path} of token {t} of row {b} must ascend from the prefix {prefix} on")


def check_kept(start: int, slots: Sequence[int], max_length: int) -> None:
    """Raises EngineError for slots that `Engine.keep` cannot move together."""
    if start < 0 or any(a >= b for a, b in pairwise((start - 1, *slots, max_length))):
        raise EngineError(f"kept slots {list(slots)} must ascend from {start} on, below {max_length}")
