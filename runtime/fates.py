"""How the tokens of an output came about, as it is told to clients: texts in place of token ids."""

from __future__ import annotations

from typing import Protocol, TypedDict

from ssv.runtime.request import Fate, TokenFate

FateEntry = TypedDict(
    "FateEntry",
    {
        "token": str,
        "bytes": list[int] | None,
        "fate": Fate,
        "pass": int,
        "risk": float | None,
        "dropped": list[list[str]],
    },
)
"""`TokenFate` as JSON has it, in texts. A special token has its name, and null for bytes, as it is no part of the
output's text. Where a token is part of a character, its bytes tell which."""


class Spelling(Protocol):
    """What tokens stand for: `BundleTokenizer`."""

    def token_bytes(self, token: int) -> bytes:
        """In a text; a special token's own name."""

    def is_special(self, token: int) -> bool:
        """Whether texts leave it out."""


def fate_entry(fate: TokenFate, spelling: Spelling) -> FateEntry:
    """A fate as clients are told of it."""

    def text(token: int) -> str:
        return spelling.token_bytes(token).decode(errors="replace")

    return {
        "token": text(fate.token),
        "bytes": None if spelling.is_special(fate.token) else list(spelling.token_bytes(fate.token)),
        "fate": fate.fate,
        "pass": fate.target_pass,
        "risk": fate.risk,
        "dropped": [list(map(text, branch)) for branch in fate.dropped],
    }
