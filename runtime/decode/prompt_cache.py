"""Beginnings of prompts that have been computed before: which are held, and which go first when room is short. Imports
no torch.

A prompt is cut into blocks of as many tokens as a prefill chunk, so that a prompt that was found is computed on in the
very steps in which it would have been computed whole: its output is the same to the last bit. Only whole blocks of
prompts are kept; an answer is kept when it comes back as a part of the next turn's prompt.

A block is named by a hash of all tokens up to its end (SHA-256: what one request finds must be what it asked for).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What a cache holds, and how often it was of use.

    Attributes:
        blocks, num_bytes: held now.
        hits, misses: blocks of prompts that were found, and that were not.
        evicted: blocks that had to go.
    """

    blocks: int
    num_bytes: int
    hits: int
    misses: int
    evicted: int


class PromptCache(Generic[T]):
    """Blocks of prompts, the least recently used of which are dropped beyond `max_bytes`."""

    def __init__(self, block_tokens: int, max_bytes: int) -> None:
        self.block_tokens, self.max_bytes = block_tokens, max_bytes
        self._blocks: OrderedDict[bytes, tuple[T, int]] = OrderedDict()
        self._num_bytes = self._hits = self._misses = self._evicted = 0

    @property
    def stats(self) -> CacheStats:
        """What it holds now, and how often it was of use so far."""
        return CacheStats(len(self._blocks), self._num_bytes, self._hits, self._misses, self._evicted)

    def find(self, tokens: Sequence[int], drafts: bool) -> list[T]:
        """The blocks that these tokens begin with, as far as they are held without a gap.

        Args:
            drafts: whether blocks must have the draft's part; those with and without it are kept apart.
        """
        names = self._names(tokens, drafts)
        found = []
        for name in names:
            if name not in self._blocks:
                break
            found.append(name)
        self._hits += len(found)
        self._misses += len(names) - len(found)
        # A block is of no use without those before it: they are used last, so that they go after it.
        for name in reversed(found):
            self._blocks.move_to_end(name)
        return [self._blocks[name][0] for name in found]

    def knows(self, tokens: Sequence[int], drafts: bool) -> bool:
        """Whether `find` would find something."""
        return any(name in self._blocks for name in self._names(tokens[: self.block_tokens], drafts))

    def wants(self, tokens: Sequence[int], drafts: bool) -> bool:
        """Whether the last block of these tokens, a multiple of `block_tokens`, is not held, and those before it
        are."""
        *before, own = self._names(tokens, drafts)
        return own not in self._blocks and all(name in self._blocks for name in before)

    def put(self, tokens: Sequence[int], drafts: bool, block: T, num_bytes: int) -> None:
        """Keeps the last block of these tokens, where `wants` says so."""
        if num_bytes > self.max_bytes:
            return
        *before, own = self._names(tokens, drafts)
        self._blocks[own] = (block, num_bytes)
        self._num_bytes += num_bytes
        for name in (own, *reversed(before)):
            self._blocks.move_to_end(name)
        while self._num_bytes > self.max_bytes:
            _, (_, freed) = self._blocks.popitem(last=False)
            self._num_bytes -= freed
            self._evicted += 1

    def _names(self, tokens: Sequence[int], drafts: bool) -> list[bytes]:
        digest = hashlib.sha256(b"target and draft" if drafts else b"target")
        names = []
        for start in range(0, len(tokens) - self.block_tokens + 1, self.block_tokens):
            digest.update(array("q", tokens[start : start + self.block_tokens]).tobytes())
            names.append(digest.digest())
        return names
