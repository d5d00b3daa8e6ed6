"""Lets a target write its own training conversations.

A draft has to predict what its target says, so its best training text is the target's own. Both sides of a
conversation are sampled: the user's turns warm, many of them begun with a given opening (without such openings a small
target keeps to few subjects), the assistant's at a temperature that differs by row from 0 to 1.

All rows advance in lock-step over one KV cache, so no step needs a mask.

Shapes: R rows, T tokens, Q tokens of a forced piece of the chat template.
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
from ssv.model.decoder import Decoder
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
        save_whole({"tokens": self.tokens, "is_assistant": self.is_assistant}, path)

    @classmethod
    def load(cls, path: Path) -> Conversations:
        return cls(**load_file(path))


class _LockStepCache:
    """KV cache of rows that all have the same length: [layers, R, K, S, D], K key/value heads, S window."""

    def __init__(self, decoder: Decoder, rows: int, window: int, dtype: torch.dtype) -> None:
        spec = decoder.spec
        shape = (spec.num_layers, rows, spec.num_kv_heads, window, spec.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=decoder.embed.weight.device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def attend(self, layer: int, q_MND: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
        _, rows, kv_heads, _, dim = self.keys.shape
        self.keys[layer, :, :, self.length] = k_MKD
        self.values[layer, :, :, self.length] = v_MKD
        seen = slice(0, self.length + 1)
        # Query heads of one key/value head become queries of one attention: no copy of the cache per query head.
        out = F.scaled_dot_product_attention(
            q_MND.view(rows, kv_heads, -1, dim), self.keys[layer, :, :, seen], self.values[layer, :, :, seen]
        )
        return out.reshape(rows, -1)


@torch.inference_mode()
def write_conversations(
    target: Decoder,
    pieces: ChatPieces,
    openings: Sequence[Sequence[int]],
    *,
    rows: int,
    window: int,
    seed: int,
    greedy: bool = False,
    user_temperature: float = 0.85,
    opening_share: float = 0.85,
    cut_share: float = 0.5,
    max_user_tokens: int = 96,
) -> Conversations:
    """Lets the target write `rows` conversations of `window` tokens.

    Args:
        openings: token ids that a share of the user turns begin with.
        user_temperature: lower than 1 keeps small models on a subject.
        greedy: all assistant turns at temperature 0, as for fitting a scorer to greedy decoding.
        opening_share: share of the user turns that begin with an opening.
        cut_share: share of those that get only its first tokens, a random number of them: the target goes on
            differently.
        max_user_tokens: a longer user turn is ended, small models ramble.

    Returns:
        Conversations on the CPU.
    """
    device, dtype = target.embed.weight.device, target.embed.weight.dtype
    generator = torch.Generator(device=device).manual_seed(seed)
    cache = _LockStepCache(target, rows, window, dtype)
    temperature_R = torch.linspace(0, 0 if greedy else 1, rows, device=device)

    end_of_user = pieces.to_assistant[0]
    # What a row is made to say next: a queue of tokens each, and how many of them are left.
    starts = [pieces.before + list(opening) for opening in ([], *openings)]
    turns = [pieces.to_user + list(opening) for opening in ([], *openings)]
    width = max(len(ids) for ids in (*starts, *turns, pieces.to_assistant))
    start, to_user, to_assistant = (_padded(t, width, device) for t in (starts, turns, [pieces.to_assistant]))

    def choose(table: _Table) -> tuple[Tensor, Tensor]:
        # Entry 0 is the one without an opening.
        pick_R = torch.randint(len(table.length), (rows,), generator=generator, device=device)
        plain_R = torch.rand(rows, generator=generator, device=device) > opening_share
        pick_R = torch.where(plain_R, 0, pick_R)
        whole_R, least = table.length[pick_R], table.length[0]
        cut_R = torch.rand(rows, generator=generator, device=device) < cut_share
        kept_R = torch.rand(rows, generator=generator, device=device) * (whole_R - least)
        return table.tokens[pick_R], torch.where(cut_R, least + kept_R.ceil().long(), whole_R)

    queue_RQ, queue_length_R = choose(start)
    queue_position_R = torch.zeros(rows, dtype=torch.long, device=device)
    in_user_R = torch.ones(rows, dtype=torch.bool, device=device)
    turn_length_R = torch.zeros(rows, dtype=torch.long, device=device)
    tokens_RT = torch.empty(rows, window, dtype=torch.int32, device=device)
    is_assistant_RT = torch.empty(rows, window, dtype=torch.bool, device=device)
    logits_RV = torch.zeros(rows, target.spec.vocab_size, device=device)
    for t in range(window):
        scale_R = torch.where(in_user_R, user_temperature, temperature_R)
        # argmax(logits + T * gumbel) samples from softmax(logits / T), and is greedy at T = 0.
        gumbel = torch.empty_like(logits_RV).exponential_(generator=generator).log_().neg_()
        sampled_R = torch.addcmul(logits_RV, gumbel, scale_R[:, None]).argmax(dim=-1)
        too_long_R = in_user_R & (turn_length_R >= max_user_tokens)
        # A user who ends the turn as an assistant does has ended it.
        user_ends_R = too_long_R | (in_user_R & (sampled_R == pieces.end_of_turn))
        sampled_R = torch.where(user_ends_R, end_of_user, sampled_R)
        forced_R = queue_position_R < queue_length_R
        queued_R = queue_RQ.gather(1, queue_position_R.clamp(max=width - 1)[:, None])[:, 0]
        token_R = torch.where(forced_R, queued_R, sampled_R)
        tokens_RT[:, t] = token_R
        is_assistant_RT[:, t] = ~forced_R & ~in_user_R
        queue_position_R += forced_R
        turn_length_R += 1

        ended_R = ~forced_R & (token_R == torch.where(in_user_R, end_of_user, pieces.end_of_turn))
        user_ended_R, assistant_ended_R = ended_R & in_user_R, ended_R & ~in_user_R
        next_user, next_user_length = choose(to_user)
        queue_RQ = torch.where(user_ended_R[:, None], to_assistant.tokens, queue_RQ)
        queue_RQ = torch.where(assistant_ended_R[:, None], next_user, queue_RQ)
        queue_length_R = torch.where(user_ended_R, to_assistant.length, queue_length_R)
        queue_length_R = torch.where(assistant_ended_R, next_user_length, queue_length_R)
        # The first token of either piece, which ended the turn, has just been said.
        queue_position_R = torch.where(ended_R, 1, queue_position_R)
        in_user_R = in_user_R ^ ended_R
        turn_length_R = torch.where(ended_R, 0, turn_length_R)

        if t + 1 < window:
            position_R = torch.full((rows,), t, device=device)
            hidden_RH, _ = target.run_layers(target.embed(token_R), position_R, cache.attend)
            cache.length += 1
            if t >= len(pieces.before) - 1:  # before that every token is forced
                logits_RV = target.logits(hidden_RH).float()
    return Conversations(tokens_RT.cpu(), is_assistant_RT.cpu())


@dataclass(frozen=True, slots=True)
class _Table:
    tokens: Tensor
    length: Tensor


def _padded(lists: list[list[int]], width: int, device: torch.device) -> _Table:
    table = torch.zeros(len(lists), width, dtype=torch.long)
    for row, ids in enumerate(lists):
        table[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return _Table(table.to(device), torch.tensor([len(ids) for ids in lists], device=device))
