"""Lets a target write its own training conversations.

A draft has to predict what its target says, so its best training text is the target's own. A user's turn is a whole
prompt that is given, or the target writes it, warm, many of them begun with a given opening (without such openings a
small target keeps to few subjects). The assistant's turns have a temperature that differs by row from 0 to 1.

All rows advance in lock-step over one KV cache. On CUDA one such step is a graph, replayed for every token of every
shard: launching its kernels one by one would take longer than they do.

Shapes: R rows, T tokens of a window, U choices of a row, G query heads to a key/value head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ssv.builder.tokenizer import control_ids
from ssv.builder.training.compiled import compile_layers
from ssv.model.decoder import Decoder
from ssv.plugins import ops
from ssv.support.errors import UserError
from ssv.support.files import save_whole


@dataclass(frozen=True, slots=True)
class ChatPieces:
    """Token ids of the template's text around the turns.

    Attributes:
        before: from the start to the first user turn (with the default system prompt, if the template has one); at
            least one.
        to_assistant: from the end of the user's turn to where the assistant answers; its first token ends the turn.
        to_user: from the end of the assistant's turn to the start of the user's; begins with `end_of_turn`.
        end_of_turn: what the assistant ends its turn with.
    """

    before: list[int]
    to_assistant: list[int]
    to_user: list[int]
    end_of_turn: int


def chat_pieces(tokenizer: Any) -> ChatPieces:
    """Finds the template's pieces by rendering a question, and a conversation of markers.

    Args:
        tokenizer: of `transformers`.

    Raises:
        UserError: the template does not take, or does not write, a user's, an assistant's and another user's turn.
    """
    first, answer, second = marks = ("<<first>>", "<<second>>", "<<third>>")
    turns = [{"role": role, "content": mark} for role, mark in zip(("user", "assistant", "user"), marks, strict=True)]
    cure = "give the tokenizer a template that writes each message once, in its order"
    try:
        asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # whatever the template's author lets it raise
        raise UserError(
            f"the chat template refuses a conversation of user, assistant and user ({error}), which self-written "
            "conversations need",
            cure,
        ) from error
    if (
        asked.count(first) != 1
        or any(text.count(mark) != 1 for mark in marks)
        or sorted(marks, key=text.find) != [*marks]
    ):
        raise UserError(
            "the chat template does not write the three turns of a conversation one after the other, which "
            "self-written conversations need",
            cure,
        )
    before, to_assistant = asked.split(first)
    to_user = text.partition(answer)[2].partition(second)[0]
    control = control_ids(tokenizer)
    eos = tokenizer.eos_token_id

    def ids(piece: str) -> list[int]:
        # A space before a word belongs to the word's token.
        found: list[int] = tokenizer.encode(piece.rstrip(" ") or piece, add_special_tokens=False)
        at = next((at for at, token in enumerate(found) if token in control), 0)
        # So does one that the template writes before a control token: nobody says it.
        return found[at:] if at and not tokenizer.decode(found[:at]).strip() else found

    pieces = {"before": ids(before), "to_assistant": ids(to_assistant), "to_user": ids(to_user)}
    end = next((token for token in pieces["to_user"] if token in control), eos)
    if end is not None and pieces["to_user"][:1] != [end]:
        # What stands before the end of the turn, or a template without one: the turn ends where the text does.
        at = pieces["to_user"].index(end) if end in pieces["to_user"] else 0
        pieces["to_user"] = [end, *pieces["to_user"][at + (end in pieces["to_user"]) :]]
    if not pieces["before"]:
        pieces["before"] = [token for token in (tokenizer.bos_token_id, eos) if token is not None][:1]
    if not all(pieces.values()):
        raise UserError(
            "the chat template writes nothing between a user's and an assistant's turn, and the tokenizer has no end "
            "of sequence, so that self-written conversations have no end of a turn",
            cure,
        )
    return ChatPieces(**pieces, end_of_turn=pieces["to_user"][0])


@dataclass(frozen=True, slots=True)
class Conversations:
    """Tokens and, for each, whether the assistant wrote it.

    Attributes:
        tokens: int32 [R, T].
        is_assistant: bool [R, T].
    """

    tokens: Tensor
    is_assistant: Tensor

    def save(self, path: Path) -> None:
        """Writes them to a safetensors file, whole or not at all."""
        save_whole({"tokens": self.tokens, "is_assistant": self.is_assistant}, path)

    @classmethod
    def load(cls, path: Path) -> Conversations:
        """Reads what `save` has written."""
        return cls(**load_file(path))


@dataclass(frozen=True, slots=True)
class Turns:
    """What users' turns are made of, as token ids.

    Attributes:
        openings: what turns begin with that the target goes on with.
        first: whole first turns of a conversation.
        later: whole turns after an answer.
    """

    openings: Sequence[Sequence[int]] = ()
    first: Sequence[Sequence[int]] = ()
    later: Sequence[Sequence[int]] = ()


@dataclass(frozen=True, slots=True)
class Writing:
    """How conversations are written.

    Attributes:
        rows, window: conversations written side by side, and the length of each in tokens.
        greedy: all assistant turns at temperature 0, as for fitting a scorer to greedy decoding.
        greedy_share: share of the rows whose assistant turns are at temperature 0; the others' rises to 1.
        user_temperature: lower than 1 keeps small models on a subject.
        prompt_share: share of the user turns that are whole ones, as far as there are any.
        opening_share: share of the other user turns that begin with an opening.
        cut_share: share of those that get only its first tokens, a random number of them: the target goes on
            differently.
        max_user_tokens: a longer user turn that the target writes is ended, small models ramble.
    """

    rows: int
    window: int
    greedy: bool = False
    greedy_share: float = 0.0
    user_temperature: float = 0.85
    prompt_share: float = 0.5
    opening_share: float = 0.85
    cut_share: float = 0.5
    max_user_tokens: int = 96


def write_conversations(
    target: Decoder,
    pieces: ChatPieces,
    openings: Sequence[Sequence[int]],
    *,
    rows: int,
    window: int,
    seed: int,
    **options: Any,
) -> Conversations:
    """Lets the target write `rows` conversations of `window` tokens.

    Args:
        openings: token ids that a share of the user turns begin with.
        options: further settings of `Writing`.

    Returns:
        Conversations on the CPU.
    """
    return Writer(target, pieces, Turns(openings), Writing(rows, window, **options)).write(seed)


class Writer:
    """Writes conversations, a shard at a time."""

    def __init__(
        self, target: Decoder, pieces: ChatPieces, turns: Turns, how: Writing, *, compiled: bool = True
    ) -> None:
        """Prepares a target to write answers.

        Args:
            compiled: on CUDA, whether steps are compiled and captured in a graph, which takes half a minute.
        """
        device = target.embed.weight.device
        self.target, self.pieces, self.how = target, pieces, how
        self._compiled = compiled and device.type == "cuda"
        # What a row is made to say next is a stretch of one list of tokens: a turn, as far as it is given, or what
        # stands between a user's turn and the answer.
        whole_end = list(pieces.to_assistant)
        ways: list[list[int]] = []
        for before, whole in ((pieces.before, turns.first), (pieces.to_user, turns.later)):
            ways.append([*before])
            ways.extend([*before, *opening] for opening in turns.openings)
            ways.extend([*before, *turn, *whole_end] for turn in whole)
        ways.append(whole_end)
        length_W = torch.tensor([len(way) for way in ways])
        self._length_W, self._start_W = length_W, length_W.cumsum(0) - length_W
        # One more: a row with nothing left to be made to say is past its stretch.
        self._said = torch.tensor([*(token for way in ways for token in way), 0], device=device)
        self._firsts = _Kinds(0, len(turns.openings), len(turns.first))
        self._laters = _Kinds(1 + len(turns.openings) + len(turns.first), len(turns.openings), len(turns.later))
        rows, window, spec = how.rows, how.window, target.spec
        # No row has more turns of a user: each takes at least these tokens.
        self._num_choices = 2 + window // (len(pieces.to_user) + len(pieces.to_assistant))
        dtype = target.embed.weight.dtype
        shape = (spec.num_layers, rows, spec.num_kv_heads, window, spec.head_dim)

        def room(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # Filled in place by every step, so that a graph of one can be replayed.
        self._keys, self._values = room(dtype, *shape), room(dtype, *shape)
        self._logits_RV = room(dtype, rows, spec.vocab_size)
        self._tokens_RT, self._is_assistant_RT = room(torch.int32, rows, window), room(torch.bool, rows, window)
        self._at_1, self._seed_R = room(torch.int64, 1), room(torch.int64, rows)
        self._start_RU, self._length_RU = (room(torch.int64, rows, self._num_choices) for _ in range(2))
        self._is_whole_RU = room(torch.bool, rows, self._num_choices)
        self._start_R, self._left_R, self._choice_R, self._turn_R = (room(torch.int64, rows) for _ in range(4))
        self._in_user_R, self._is_whole_R = room(torch.bool, rows), room(torch.bool, rows)
        greedy = 1.0 if how.greedy else how.greedy_share
        num_warm = rows - round(greedy * rows)
        temperature_R = torch.zeros(rows)
        temperature_R[rows - num_warm :] = torch.linspace(0, 1, num_warm)
        self._temperature_R = temperature_R.to(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def write(self, seed: int) -> Conversations:
        """Conversations on the CPU; the same seed gives the same, on the same machine."""
        if self._compiled and self._graph is None:
            self._capture()
        self._begin(seed)
        for t in range(self.how.window):
            if self._graph is not None:
                self._graph.replay()
            else:
                self._step(t)
        # Copies: the next shard is written where this one was.
        return Conversations(*(x.to("cpu", copy=True) for x in (self._tokens_RT, self._is_assistant_RT)))

    def _capture(self) -> None:
        with compile_layers(self.target):
            self._begin(0)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # compiles, and makes what is made once
                    self._step(0)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._step(0)

    def _begin(self, seed: int) -> None:
        """Chooses what users say, and puts all rows to their start."""
        rows, device = self.how.rows, self._at_1.device
        generator = torch.Generator().manual_seed(seed)
        way_RU, length_RU, is_whole_RU = self._chosen(self._laters, generator)
        first = self._chosen(self._firsts, generator)
        for chosen, firsts in zip((way_RU, length_RU, is_whole_RU), first, strict=True):
            chosen[:, 0] = firsts[:, 0]
        self._start_RU.copy_(self._start_W[way_RU])
        self._length_RU.copy_(length_RU)
        self._is_whole_RU.copy_(is_whole_RU)
        self._seed_R.copy_(torch.arange(rows) + seed * rows)
        self._start_R.copy_(self._start_RU[:, 0])
        self._left_R.copy_(self._length_RU[:, 0])
        self._is_whole_R.copy_(self._is_whole_RU[:, 0])
        self._in_user_R.fill_(True)
        for state in (self._at_1, self._choice_R, self._turn_R, self._logits_RV):
            state.zero_()
        assert device == self._left_R.device

    def _chosen(self, kinds: _Kinds, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Ways for the users' turns, how much is said of each, and whether it is a whole turn, all [R, U]."""
        how, shape = self.how, (self.how.rows, self._num_choices)

        def uniform() -> Tensor:
            return torch.rand(shape, generator=generator)

        opening = 1 + (uniform() * kinds.num_openings).long().clamp(max=max(kinds.num_openings - 1, 0))
        begins = (uniform() <= how.opening_share) & (kinds.num_openings > 0)
        way = torch.where(begins, opening, 0) + kinds.start
        whole = (uniform() * kinds.num_whole).long().clamp(max=max(kinds.num_whole - 1, 0))
        is_whole = (uniform() < how.prompt_share) & (kinds.num_whole > 0)
        way = torch.where(is_whole, kinds.start + 1 + kinds.num_openings + whole, way)
        length, least = self._length_W[way], self._length_W[kinds.start]
        cut = least + (uniform() * (length - least)).ceil().long()
        is_cut = (uniform() < how.cut_share) & ~is_whole
        return way, torch.where(is_cut, cut, length), is_whole

    def _step(self, t: int) -> None:
        """Says one token of each row. Of `t`, the number of those before, a graph knows only `_at_1`."""
        how, pieces, at_1 = self.how, self.pieces, self._at_1
        sampled_R = self._sampled()
        end_of_user = pieces.to_assistant[0]
        in_user_R = self._in_user_R.clone()
        too_long_R = in_user_R & (self._turn_R >= how.max_user_tokens)
        # A user who ends the turn as an assistant does has ended it.
        user_ends_R = too_long_R | (in_user_R & (sampled_R == pieces.end_of_turn))
        sampled_R = torch.where(user_ends_R, end_of_user, sampled_R)
        forced_R = self._left_R > 0
        token_R = torch.where(forced_R, self._said[self._start_R], sampled_R)
        self._tokens_RT.index_copy_(1, at_1, token_R.int()[:, None])
        self._is_assistant_RT.index_copy_(1, at_1, (~forced_R & ~in_user_R)[:, None])
        self._start_R += forced_R
        self._left_R -= forced_R.long()
        self._turn_R += 1

        whole_over_R = forced_R & self._is_whole_R & (self._left_R == 0)
        ended_R = ~forced_R & (token_R == torch.where(in_user_R, end_of_user, pieces.end_of_turn))
        user_ended_R, assistant_ended_R = ended_R & in_user_R, ended_R & ~in_user_R
        self._choice_R += assistant_ended_R
        self._choice_R.clamp_(max=self._num_choices - 1)
        choice_R1 = self._choice_R[:, None]
        # The first token of either piece, which ended the turn, has just been said.
        for state_R, of_assistant, of_user_RU in (
            (self._start_R, int(self._start_W[-1]) + 1, self._start_RU + 1),
            (self._left_R, int(self._length_W[-1]) - 1, self._length_RU - 1),
        ):
            state_R.copy_(torch.where(assistant_ended_R, of_user_RU.gather(1, choice_R1)[:, 0], state_R))
            state_R.masked_fill_(user_ended_R, of_assistant)
        is_whole_R = torch.where(assistant_ended_R, self._is_whole_RU.gather(1, choice_R1)[:, 0], self._is_whole_R)
        self._is_whole_R.copy_(is_whole_R & ~whole_over_R)
        self._in_user_R.copy_(in_user_R ^ (ended_R | whole_over_R))
        self._turn_R.masked_fill_(ended_R | whole_over_R, 0)

        if self._graph is None and t + 1 == how.window and not self._compiled:
            return  # nobody asks for what comes next
        position_R = at_1.expand(how.rows)
        hidden_RH, _ = self.target.run_layers(self.target.embed(token_R), position_R, _CacheAttend(self, t))
        self._logits_RV.copy_(self.target.logits(hidden_RH))
        at_1 += 1

    def _sampled(self) -> Tensor:
        """What each row would say next, int64 [R]."""
        scale_R = torch.where(self._in_user_R, self.how.user_temperature, self._temperature_R)
        x_RV = self._logits_RV / scale_R.clamp(min=1e-4)[:, None]
        position_R = self._at_1.expand(self.how.rows).contiguous()
        drawn_R = ops.on(x_RV.device).choose(x_RV.float(), self._seed_R, position_R)
        return torch.where(scale_R > 0, drawn_R.long(), self._logits_RV.argmax(-1))


@dataclass(frozen=True, slots=True)
class _Kinds:
    """Where ways of saying a user's turn begin in the list of all: one without anything, openings, whole turns."""

    start: int
    num_openings: int
    num_whole: int


class _CacheAttend:
    """Attention of one token a row over a writer's cache, which all rows have filled equally far."""

    def __init__(self, writer: Writer, t: int) -> None:
        self._writer, self._t = writer, t

    def __call__(self, layer: int, q_MND: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
        writer = self._writer
        keys, values, at_1 = writer._keys[layer], writer._values[layer], writer._at_1
        keys.index_copy_(2, at_1, k_MKD[:, :, None])
        values.index_copy_(2, at_1, v_MKD[:, :, None])
        rows, kv_heads, window, dim = keys.shape
        groups = q_MND.shape[1] // kv_heads
        if keys.is_cuda:
            from ssv.builder.training import kernels

            if kernels.can_attend(dim, groups):
                return kernels.attend_cache(q_MND.contiguous(), keys, values, at_1)
        # Query heads of one key/value head become queries of one attention: no copy of the cache per query head.
        q_RKGD = q_MND.reshape(rows, kv_heads, groups, dim)
        if writer._compiled:
            mask_S = torch.arange(window, device=keys.device) <= at_1
            return F.scaled_dot_product_attention(q_RKGD, keys, values, attn_mask=mask_S[None, None, None]).reshape(
                rows, -1
            )
        seen = slice(0, self._t + 1)
        return F.scaled_dot_product_attention(q_RKGD, keys[:, :, seen], values[:, :, seen]).reshape(rows, -1)
