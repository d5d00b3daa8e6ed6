"""What the round asks of a drafter.

Shapes: T tokens of a row's pass (or of a chunk of a prompt), F features, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ssv.runtime.decode.costs import Prices
from ssv.runtime.decode.row import Row


class Drafter:
    """Proposes tokens that follow what is committed. What a drafter without state has no use for does nothing.

    Attributes:
        needs_features: whether it takes the target's features, of prompts and of passes.
        needs_hidden: whether it takes the target's hidden state of the last token that it has run (`see`).
        has_cache: whether it keeps something of a prompt, which a cache of prompts then has to keep too.
        has_scores: whether its tokens have probabilities of being rejected; without, none of them can be trusted.
    """

    needs_features = False
    needs_hidden = False
    has_cache = False
    has_scores = False

    def propose(self, rows: Sequence[Row], limits: Sequence[int], prices: Prices | None = None) -> None:
        """Gives rows a tree (`Row.tree`), in the shape that each row's policy says.

        Args:
            limits: most nodes of each row's tree; 0 for a row that does not draft, or not with this drafter.
            prices: of drafting and verifying, for policies that pay; None where they are not known.
        """
        raise NotImplementedError

    def begin(self, *, is_beside: bool) -> None:
        """A prompt begins: that of the row that joins behind the others. One joins at a time.

        Args:
            is_beside: whether it is run beside the rounds, by engines of its own.
        """

    def prefill(self, b: int, ids_1T: Tensor, start: int, stop: int, features_BTF: Tensor | None) -> None:
        """The target has run tokens `start` to `stop` of the prompt of the row that joins, in row `b` of the cache that
        prompts are run in."""

    def join(self, b: int, row: Row) -> None:
        """The prompt is run: the row is in use from now on, as row `b`."""

    def observe(self, b: int, row: Row, path: Sequence[int], chosen: Sequence[int], features_TF: Tensor | None) -> None:
        """The target has run a pass over row `b` and kept a path of its tree; the row's text does not have it yet.

        Args:
            chosen: the target's tokens after root and nodes, as far as these were judged: all of them where nothing is
                trusted. Some may be -1, of logits that were no distribution.
            features_TF: of root and nodes, of a target that was asked for them.
        """

    def see(self, b: int, hidden_H: Tensor) -> None:
        """Takes the target's hidden state, before its final norm, of the token after which it chose the last of row
        `b`'s text."""

    def move(self, source: int, dest: int, row: Row) -> None:
        """A row that is in use takes another place."""

    def move_joining(self, source: int, dest: int, done: int) -> None:
        """The row that joins takes another place, with `done` tokens of its prompt run."""

    def snapshot(self, b: int, start: int, stop: int) -> Any:
        """What it keeps of tokens `start` to `stop` of the prompt that joins, all of the last `prefill` in row `b`; has
        `num_bytes`."""

    def restore(self, b: int, start: int, stop: int, block: Any) -> None:
        """Takes such a snapshot of the same tokens, in place of `prefill`."""
