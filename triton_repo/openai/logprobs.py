"""Log-probabilities as the two kinds of OpenAI's responses have them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ssv.client.triton import Reply


@dataclass(frozen=True, slots=True)
class Token:
    """A token with its log-probability.

    Attributes:
        data: its bytes in the text; of a special token its name.
        logprob: None of a prompt's first token.
        top: the likeliest tokens in its place, the likeliest first.
    """

    data: bytes
    logprob: float | None
    top: tuple[Token, ...] = ()

    @property
    def text(self) -> str:
        """Its text; of half a character its bytes, as OpenAI writes them."""
        try:
            return self.data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.data)


def tokens_of(reply: Reply) -> tuple[list[Token], list[Token]]:
    """The tokens of the prompt and of the output that came with a reply."""
    if not reply.logprobs:
        return [], []
    found = json.loads(reply.logprobs)
    prompt, output = ([_token(entry) for entry in found.get(name, ())] for name in ("prompt", "output"))
    return prompt, output


def chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    """The `logprobs` of a chat completion."""
    return {
        "content": [_named(token) | {"top_logprobs": [_named(each) for each in token.top]} for token in tokens],
        "refusal": None,
    }


def completion_logprobs(tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    """The `logprobs` of a completion.

    Args:
        offset: characters of the tokens before.
    """
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        # With the token itself, also where it is none of the likeliest; special ones may have the text of another.
        "top_logprobs": [
            None
            if token.logprob is None
            else {each.text: each.logprob for each in (token, *token.top[::-1])} | {token.text: token.logprob}
            for token in tokens
        ],
        "text_offset": offsets,
    }


def _token(entry: dict[str, Any]) -> Token:
    return Token(bytes(entry["bytes"]), entry["logprob"], tuple(_token(each) for each in entry.get("top", ())))


def _named(token: Token) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.data)}
