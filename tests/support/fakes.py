"""Engines and a tokenizer made of tables: the decoding logic without a model.

A fake's logits are a row of a seeded table, chosen by a hash of every token that the query sees in the fake's *own*
cache, each weighted by its position. A token missing, stale or at a wrong position therefore changes the output.

Shapes: see `ssv.runtime.engines.contract`; N states (rows of the table); S slots, or as many positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssv.runtime.engines.contract import Branches, EngineError, StepOutput, check_kept, check_step

EOS = 0
VOCAB_SIZE = 12
NUM_STATES = 1009

_PRIME = 1_048_573  # below 2^20: a hash is exact in fp32
_NUM_FEATURES = 2  # the hash of the prefix, and whether the draft made it itself


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step that was run: the slot where each row began, how many tokens of it, and the gathered (cache row, slot)."""

    first_row: int
    position: tuple[int, ...]
    tokens: int
    gathered: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What tokens see: the slot at each of their positions, and their own position. What lies beyond that is any
    slot."""

    row_M: Tensor
    slot_MS: Tensor
    position_M: Tensor

    def of(self, index_R: Tensor) -> _Seen:
        return _Seen(self.row_M[index_R], self.slot_MS[index_R], self.position_M[index_R])


class _TokenCache:
    """Token ids where a real engine has keys and values."""

    def __init__(self, max_batch: int, max_length: int, vocab_size: int, weight_S: Tensor) -> None:
        self.max_batch, self.max_length, self.vocab_size = max_batch, max_length, vocab_size
        self.weight_S = weight_S
        self.unwritten = vocab_size
        self.tokens_BS = torch.full((max_batch, max_length), self.unwritten)
        self.calls: list[StepRecord] = []

    def write(
        self,
        input_ids_BT: Tensor,
        first_slot_B: Tensor,
        gather_rows_R: Tensor,
        branches: Branches | None,
        count_B: Tensor | None,
        first_row: int,
    ) -> _Seen:
        """Stores a step's tokens; returns what each of them sees.

        Padding is noise: nothing may read it.
        """
        dtypes = (input_ids_BT.dtype, first_slot_B.dtype, gather_rows_R.dtype)
        if dtypes != (torch.int64, torch.int32, torch.int64):
            raise EngineError(f"input_ids, first_slot, gather_rows have dtypes {dtypes}")
        batch, tokens = input_ids_BT.shape
        at_BT = first_slot_B.long()[:, None] + torch.arange(tokens)
        if count_B is not None:
            is_padding_BT = torch.arange(tokens) >= count_B[:, None]
            input_ids_BT = input_ids_BT.masked_fill(is_padding_BT, self.unwritten)
        self.tokens_BS[first_row : first_row + batch].scatter_(1, at_BT, input_ids_BT)
        row_M = torch.arange(first_row, first_row + batch).repeat_interleave(tokens)
        gathered = tuple(zip(row_M[gather_rows_R].tolist(), at_BT.flatten()[gather_rows_R].tolist(), strict=True))
        self.calls.append(StepRecord(first_row, tuple(first_slot_B.tolist()), tokens, gathered))
        slot_MS = torch.arange(self.max_length).repeat(batch * tokens, 1)
        if branches is None:
            return _Seen(row_M, slot_MS, at_BT.flatten())
        for m, path in enumerate(branches.path_BTD.flatten(0, 1).tolist()):
            own = [slot for slot in path if slot >= 0]
            prefix = int(branches.prefix_B[m // tokens])
            slot_MS[m, prefix : prefix + len(own)] = torch.tensor(own)
        return _Seen(row_M, slot_MS, branches.position_BT.flatten().long())

    def hash_RS(self, seen: _Seen) -> Tensor:
        """Hash of the first 1, 2, ... S tokens that are seen."""
        tokens_RS = self.tokens_BS[seen.row_M[:, None], seen.slot_MS]
        return ((tokens_RS + 1) * self.weight_S[: self.max_length]).cumsum(dim=1) % _PRIME

    def hash_R(self, seen: _Seen) -> Tensor:
        """Hash of all that is seen."""
        return self.hash_RS(seen).gather(1, seen.position_M[:, None])[:, 0]

    def check_written(self, seen: _Seen) -> None:
        visible_RS = torch.arange(self.max_length) <= seen.position_M[:, None]
        tokens_RS = self.tokens_BS[seen.row_M[:, None], seen.slot_MS]
        assert not bool((visible_RS & (tokens_RS == self.unwritten)).any()), "reads what was never written"

    def move_row(self, source: int, dest: int, length: int) -> None:
        self.tokens_BS[dest, :length] = self.tokens_BS[source, :length]
        self.tokens_BS[dest, length:] = self.unwritten

    def keep(self, row: int, start: int, slots: Sequence[int]) -> None:
        check_kept(start, slots, self.max_length)
        kept = self.tokens_BS[row, list(slots)]
        self.tokens_BS[row, start:] = self.unwritten
        self.tokens_BS[row, start : start + len(slots)] = kept


class FakeTarget:
    """A target engine.

    Attributes:
        logits_NV: the table.
        calls: the steps that were run.
        steps_B: how many of them each cache row took part in.
    """

    num_features = 0
    token_ids_V: Tensor | None = None
    has_scorer = False

    def __init__(
        self,
        *,
        seed: int = 0,
        vocab_size: int = VOCAB_SIZE,
        max_batch: int = 1,
        max_length: int = 96,
        tap: bool = True,
        eos_bias: float = 0.0,
    ) -> None:
        self.max_batch, self.max_length, self.vocab_size, self.tap = max_batch, max_length, vocab_size, tap
        generator = torch.Generator().manual_seed(seed)
        self.logits_NV = torch.randn(NUM_STATES, vocab_size, generator=generator) * 1.5
        self.logits_NV[:, EOS] += eos_bias
        self.weight_S = torch.randint(1, _PRIME, (max_length + 64,), generator=generator)
        self.cache = _TokenCache(max_batch, max_length, vocab_size, self.weight_S)
        self.steps_B = torch.zeros(max_batch, dtype=torch.long)

    @property
    def calls(self) -> list[StepRecord]:
        return self.cache.calls

    @torch.inference_mode()
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
        check_step(self, input_ids_BT, first_slot_B, gather_rows_R, features_in_BTF, branches, count_B, first_row)
        if features_out and not self.tap:
            raise EngineError("features_out: this engine was made without a tap")
        batch, tokens = input_ids_BT.shape
        seen = self.cache.write(input_ids_BT, first_slot_B, gather_rows_R, branches, count_B, first_row)
        self.steps_B[first_row : first_row + batch] += 1
        self.cache.check_written(seen.of(gather_rows_R))
        hash_M = self.cache.hash_R(seen)
        features_BTF = None
        if features_out:
            features_BTF = torch.stack((hash_M.float(), torch.zeros_like(hash_M).float()), dim=-1)
            features_BTF = features_BTF.view(batch, tokens, _NUM_FEATURES)
        state_R = hash_M[gather_rows_R] % NUM_STATES
        hidden_RH = torch.stack((hash_M[gather_rows_R], seen.position_M[gather_rows_R]), dim=1).float()
        return StepOutput(hidden_RH, self.logits_NV[state_R].clone(), features_BTF)

    def move_row(self, source: int, dest: int, length: int) -> None:
        self.cache.move_row(source, dest, length)
        self.steps_B[dest] = self.steps_B[source]

    def keep(self, row: int, start: int, slots: Sequence[int]) -> None:
        self.cache.keep(row, start, slots)

    def read_cache(self, row: int, start: int, stop: int) -> Tensor:
        return self.cache.tokens_BS[row, start:stop].clone()

    def write_cache(self, row: int, start: int, held: Tensor) -> None:
        self.cache.tokens_BS[row, start : start + len(held)] = held

    def state(self, tokens: Sequence[int]) -> int:
        """Row of the table that gives the token after these."""
        weights = self.weight_S[: len(tokens)].tolist()
        return sum((token + 1) * weight for token, weight in zip(tokens, weights, strict=True)) % _PRIME % NUM_STATES

    def next_logits(self, tokens: Sequence[int]) -> Tensor:
        """What `step` must give for the token after these."""
        return self.logits_NV[self.state(tokens)]


class RepeatingTarget(FakeTarget):
    """What follows a token depends on that token alone: greedy text soon goes in a circle, sampled text repeats
    often."""

    def step(
        self, input_ids_BT: Tensor, first_slot_B: Tensor, gather_rows_R: Tensor, *args: Any, **options: Any
    ) -> Any:
        out = super().step(input_ids_BT, first_slot_B, gather_rows_R, *args, **options)
        states_R = input_ids_BT.flatten()[gather_rows_R]
        return StepOutput(out.hidden_RH, 2 * self.logits_NV[states_R], out.features_BTF)


class FakeDraft:
    """A draft of a `FakeTarget`: in each state it has the target's logits, or others with another argmax.

    A conditioned one takes the prefix from the features that it is given, as a target's feature of token i is the hash
    of the tokens up to i, and its own hidden state the same one token further. It checks every entry that a query sees:
    that the feature is that of the token before the entry's, that it is the target's wherever the target has run since,
    and that it continues the entry before.

    Args:
        agreement: share of the states in which its logits are the target's.
        disagree_at: positions of predicted tokens where it never has them.
        noise: of other logits added to all.
        reject_noise: share of the states in which `reject_prob` says the opposite of the truth; None for no scorer.
        token_ids: the tokens that the head covers, in its order; None for all.

    Attributes:
        wrong_features: entries found wrong.
    """

    def __init__(
        self,
        target: FakeTarget,
        *,
        seed: int = 1,
        conditioned: bool = False,
        agreement: float = 0.7,
        disagree_at: Iterable[int] = (),
        noise: float = 0.0,
        reject_noise: float | None = 0.2,
        token_ids: Sequence[int] | None = None,
    ) -> None:
        self.target, self.conditioned = target, conditioned
        self.max_batch, self.max_length = target.max_batch, target.max_length
        self.num_features = _NUM_FEATURES if conditioned else 0
        self.token_ids_V = torch.tensor(token_ids) if token_ids is not None else None
        self._ids_V = self.token_ids_V if token_ids is not None else torch.arange(target.vocab_size)
        self.vocab_size = len(self._ids_V)
        generator = torch.Generator().manual_seed(seed)
        self.agrees_N = torch.rand(NUM_STATES, generator=generator) < agreement
        noise_NV = torch.randn(target.logits_NV.shape, generator=generator) * noise
        self.same_NV, self.other_NV = target.logits_NV + noise_NV, target.logits_NV.roll(1, dims=1) + noise_NV
        self.disagree_at = torch.tensor(sorted(disagree_at), dtype=torch.long)
        self.has_scorer = reject_noise is not None
        self.lies_N = torch.rand(NUM_STATES, generator=generator) < (reject_noise or 0.0)
        self.jitter_N = torch.rand(NUM_STATES, generator=generator)
        self.cache = _TokenCache(self.max_batch, self.max_length, target.vocab_size, target.weight_S)
        self.features_BSF = torch.zeros(self.max_batch, self.max_length, _NUM_FEATURES)
        self.written_BS = torch.zeros(self.max_batch, self.max_length, dtype=torch.long)
        self.wrong_features = 0

    @property
    def calls(self) -> list[StepRecord]:
        return self.cache.calls

    @torch.inference_mode()
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
        check_step(self, input_ids_BT, first_slot_B, gather_rows_R, features_in_BTF, branches, count_B, first_row)
        assert not features_out, "a draft has no features to give"
        seen = self.cache.write(input_ids_BT, first_slot_B, gather_rows_R, branches, count_B, first_row)
        if features_in_BTF is not None:
            self._keep_features(features_in_BTF, first_slot_B, first_row)
        if not len(gather_rows_R):  # filling the cache
            return StepOutput(torch.empty(0, _NUM_FEATURES), torch.empty(0, len(self._ids_V)))
        seen = seen.of(gather_rows_R)
        self.cache.check_written(seen)
        if features_in_BTF is None:
            hash_R, predicted_R = self.cache.hash_R(seen), seen.position_M + 1
        else:
            hash_R, predicted_R = self._conditioned_hash(seen), seen.position_M + 2
        logits_RV, reject_prob_R = self.predict(hash_R % NUM_STATES, predicted_R)
        hidden_RH = torch.stack((hash_R.float(), torch.ones_like(hash_R).float()), dim=1)
        return StepOutput(hidden_RH, logits_RV, None, reject_prob_R if self.has_scorer else None)

    def move_row(self, source: int, dest: int, length: int) -> None:
        self.cache.move_row(source, dest, length)
        self.features_BSF[dest, :length] = self.features_BSF[source, :length]
        self.written_BS[dest, :length] = self.written_BS[source, :length]

    def keep(self, row: int, start: int, slots: Sequence[int]) -> None:
        self.cache.keep(row, start, slots)
        for held_BS in (self.features_BSF, self.written_BS):
            held_BS[row, start : start + len(slots)] = held_BS[row, list(slots)]

    def read_cache(self, row: int, start: int, stop: int) -> Tensor:
        return torch.cat(
            (self.cache.tokens_BS[row, start:stop, None], self.features_BSF[row, start:stop].long()), dim=1
        )

    def write_cache(self, row: int, start: int, held: Tensor) -> None:
        at = slice(start, start + len(held))
        self.cache.tokens_BS[row, at], self.features_BSF[row, at] = held[:, 0], held[:, 1:].float()
        self.written_BS[row, at] = self.target.steps_B[row]

    def predict(self, state_R: Tensor, predicted_R: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the head and reject_prob for tokens at positions `predicted_R`."""
        agrees_R = self.agrees_N[state_R] & ~torch.isin(predicted_R, self.disagree_at)
        logits_RV = torch.where(agrees_R[:, None], self.same_NV[state_R], self.other_NV[state_R])
        logits_RV = logits_RV[:, self._ids_V]
        mismatch_R = self._ids_V[logits_RV.argmax(dim=1)] != self.target.logits_NV[state_R].argmax(dim=1)
        says_R = mismatch_R ^ self.lies_N[state_R]
        return logits_RV, torch.where(says_R, 0.5, 0.01) + 0.4 * self.jitter_N[state_R] ** 2

    def next(self, tokens: Sequence[int]) -> tuple[Tensor, float]:
        """What `step` must give for the token after these: logits, reject_prob."""
        logits_1V, reject_prob_1 = self.predict(torch.tensor([self.target.state(tokens)]), torch.tensor([len(tokens)]))
        return logits_1V[0], float(reject_prob_1[0])

    def _keep_features(self, features_BTF: Tensor, first_slot_B: Tensor, first_row: int) -> None:
        batch, tokens = features_BTF.shape[:2]
        row_B1 = torch.arange(first_row, first_row + batch)[:, None]
        at_BT = first_slot_B.long()[:, None] + torch.arange(tokens)
        self.features_BSF[row_B1, at_BT] = features_BTF
        self.written_BS[row_B1, at_BT] = self.target.steps_B[row_B1]

    def _conditioned_hash(self, seen: _Seen) -> Tensor:
        """Hash of the tokens up to the entry's own, as its features have it.

        The visible entries that are wrong are counted.
        """
        row_R1, at_R1 = seen.row_M[:, None], seen.position_M[:, None]
        given_RS, own_RS = self.features_BSF[row_R1, seen.slot_MS].unbind(dim=2)
        given_RS, own_RS = given_RS.long(), own_RS.bool()
        visible_RS = torch.arange(self.max_length) <= at_R1
        # Entry i holds the feature of token i and token i + 1.
        weight_S = self.target.weight_S[1 : self.max_length + 1]
        continued_RS = (given_RS + (self.cache.tokens_BS[row_R1, seen.slot_MS] + 1) * weight_S) % _PRIME
        breaks_RS = torch.zeros_like(own_RS)
        breaks_RS[:, 1:] = given_RS[:, 1:] != continued_RS[:, :-1]
        text = _Seen(seen.row_M, torch.arange(self.max_length).expand_as(seen.slot_MS), seen.position_M)
        seen_RS = given_RS == self.target.cache.hash_RS(text)
        outdated_RS = self.written_BS[row_R1, seen.slot_MS] != self.target.steps_B[row_R1]
        wrong_RS = visible_RS & (breaks_RS | torch.where(own_RS, outdated_RS, ~seen_RS))
        self.wrong_features += int(wrong_RS.sum())
        return (continued_RS.gather(1, at_R1)[:, 0] + wrong_RS.sum(dim=1)) % _PRIME


class FakeHeads:
    """Medusa's heads of a `FakeTarget`, whose hidden state is the hash of what it has seen and the last position of it.

    Each head has the logits that the target will have if it chooses greedily up to there, with noise added.

    Args:
        noise: of other logits, added to all.
        token_ids: the tokens that the heads cover, in their order; None for all.

    Attributes:
        seen: hidden states that were given, of each call.
    """

    def __init__(
        self,
        target: FakeTarget,
        *,
        num_heads: int = 4,
        seed: int = 1,
        noise: float = 0.0,
        token_ids: Sequence[int] | None = None,
    ) -> None:
        self.target, self.num_heads = target, num_heads
        self.token_ids_V = torch.tensor(token_ids) if token_ids is not None else None
        generator = torch.Generator().manual_seed(seed)
        self.noise_DNV = torch.randn(num_heads, *target.logits_NV.shape, generator=generator) * noise
        self.seen: list[Tensor] = []

    def logits(self, hidden_RH: Tensor) -> Tensor:
        self.seen.append(hidden_RH)
        hash_R, position_R = hidden_RH.long().unbind(dim=1)
        found = []
        for head in range(self.num_heads):
            token_R = self.target.logits_NV[hash_R % NUM_STATES].argmax(dim=1)
            position_R = position_R + 1
            hash_R = (hash_R + (token_R + 1) * self.target.weight_S[position_R]) % _PRIME
            state_R = hash_R % NUM_STATES
            found.append(self.target.logits_NV[state_R] + self.noise_DNV[head, state_R])
        logits_RDV = torch.stack(found, dim=1)
        return logits_RDV if self.token_ids_V is None else logits_RDV[:, :, self.token_ids_V]


class FakeTokenizer:
    """Byte pieces, as a byte-level BPE has them: some tokens have several characters, some only a part of one."""

    pieces = (b"<end>", b"a", b"b", b"ab", b" c", b"E", b"ND", b"aE", b"\xe2", b"\x82\xac", b"x\xc3", b"\xa9y")

    def __init__(self, special_ids: Iterable[int] = (EOS,)) -> None:
        self.special_ids = frozenset(special_ids)

    def decode(
        self, token_ids: Sequence[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        assert not clean_up_tokenization_spaces, "cleaning up changes the text of the tokens before"
        kept = [t for t in token_ids if not (skip_special_tokens and t in self.special_ids)]
        return b"".join(self.pieces[t] for t in kept).decode(errors="replace")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Longest piece first."""
        assert not add_special_tokens, "a chat template has them already"
        data, ids = text.encode(), []
        while data:
            ids.append(
                max((i for i, p in enumerate(self.pieces) if data.startswith(p)), key=lambda i: len(self.pieces[i]))
            )
            data = data[len(self.pieces[ids[-1]]) :]
        return ids

    def apply_chat_template(
        self, conversation: Sequence[dict[str, str]], add_generation_prompt: bool = False, tokenize: bool = True
    ) -> str:
        assert not tokenize
        text = "".join(f"{message['content']}<end>" for message in conversation)
        return text + "ab" if add_generation_prompt else text
