"""How an answer travels through the server: `ssv` sends pieces of token ids, `postprocessing` makes responses of them.

Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ssv.runtime.fates import Spelling, fate_entry
from ssv.runtime.reply import Reply, outputs
from ssv.runtime.request import Chunk, TokenFate, TokenLogprobs
from ssv.runtime.serving.intake import Settings

_TEXT, _LOGPROBS, _FATES = (
    next(output.name for output in outputs() if output.attribute == name) for name in ("text", "logprobs", "fates")
)

Logged = tuple[tuple[int, float | None, tuple[tuple[int, float], ...]], ...]
"""Tokens with their log-probabilities, and the likeliest ones in their places with theirs."""


@dataclass(frozen=True, slots=True)
class Piece:
    """All of a response but its text, and what its text has to be made with.

    Attributes:
        key: of the answer; `number`: of the piece in it, from 0.
        token_ids: whose text is new since the piece before.
        stop: strings that end the text.
        fields: the other outputs of `ensemble`, by name.
        min_tokens, context: see `ssv.runtime.text.TextStream`; the context is the first piece's.
        logprobs, prompt_logprobs: of the tokens that are new, and in the first piece of the prompt's, if they were
            asked for; the prompt's first token has none.
        fates: of the tokens that are new, if they were asked for.
    """

    key: str
    number: int
    token_ids: tuple[int, ...]
    stop: tuple[str, ...]
    is_last: bool
    fields: dict[str, Any]
    min_tokens: int = 0
    context: tuple[int, ...] = ()
    logprobs: Logged = ()
    prompt_logprobs: Logged = ()
    fates: tuple[TokenFate, ...] = ()

    @property
    def is_probe(self) -> bool:
        """Whether it has no response: `postprocessing` only learns by it whether anybody still waits."""
        return not self.fields

    def outputs(self, text: str, spelling: Spelling) -> dict[str, Any]:
        """All outputs of `ensemble`.

        Args:
            text: that was made of the piece.
        """
        named = {"prompt": self.prompt_logprobs, "output": self.logprobs}
        logged = {name: [_entry(*each, spelling.token_bytes) for each in held] for name, held in named.items() if held}
        told = json.dumps([fate_entry(fate, spelling) for fate in self.fates]) if self.fates else ""
        return {_TEXT: text, _LOGPROBS: json.dumps(logged) if logged else "", _FATES: told, **self.fields}

    def to_json(self) -> str:
        """JSON that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Piece:
        """Reads what `to_json` has written."""
        given = json.loads(text)
        given |= {name: tuple(given[name]) for name in ("token_ids", "stop", "context")}
        for name in ("logprobs", "prompt_logprobs"):
            given[name] = tuple((token, logprob, tuple(map(tuple, top))) for token, logprob, top in given[name])
        given["fates"] = tuple(
            TokenFate(**each | {"dropped": tuple(map(tuple, each["dropped"]))}) for each in given["fates"]
        )
        return cls(**given)


def _entry(
    token: int, logprob: float | None, top: Sequence[tuple[int, float]], token_bytes: Callable[[int], bytes]
) -> dict[str, Any]:
    likeliest = [{"id": each, "bytes": list(token_bytes(each)), "logprob": its} for each, its in top]
    return {"id": token, "bytes": list(token_bytes(token)), "logprob": logprob, "top": likeliest}


def _logged(found: Sequence[TokenLogprobs]) -> Logged:
    return tuple((each.token, each.logprob, each.top) for each in found)


class Answer:
    """The pieces of one request: what has come since the piece before, or a single one at the end."""

    def __init__(
        self,
        key: str,
        settings: Settings,
        lossless: bool,
        context: Sequence[int] = (),
        first_token: int = -1,
        withdrawn_tier: str = "",
    ) -> None:
        """Begins an answer of which nothing has come.

        Args:
            settings: as it is decoded.
            context: the end of the prompt, if the output's text goes on with its text.
            first_token: of the prompt.
            withdrawn_tier: that was asked for; "" where it is the one of the settings.
        """
        self._first_token = first_token
        self._logprobs: list[TokenLogprobs] = []
        self._fates: list[TokenFate] = []
        self._prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self._key, self._settings, self._lossless, self._withdrawn_tier = key, settings, lossless, withdrawn_tier
        self._context = tuple(context)
        self._number = 0
        self._sent_at = -math.inf
        self._held: list[int] = []

    def probe(self) -> Piece:
        """What to send when nothing has been sent for a while."""
        return Piece(self._key, self._number, (), (), False, {})

    def piece(self, chunk: Chunk, now: float, interval: float) -> Piece | None:
        """What to send after a chunk that came at `now` (seconds), if anything: the first tokens and the end always
        are.

        Args:
            interval: seconds between two pieces, at least: each costs the server's processes as much as some tokens are
                worth.
        """
        self._held.extend(chunk.token_ids)
        self._logprobs.extend(chunk.logprobs)
        self._fates.extend(chunk.fates)
        self._prompt_logprobs += chunk.prompt_logprobs
        is_last = chunk.finish_reason is not None
        if not (is_last or (self._settings.stream and now - self._sent_at >= interval)):
            return None
        self._sent_at = now
        token_ids, self._held = tuple(self._held), []
        counters = chunk.counters
        reply = Reply(
            text="",
            finish_reason=chunk.finish_reason or "",
            num_input_tokens=counters.prompt_tokens,
            num_output_tokens=len(token_ids),
            judged=counters.judged,
            accepted=counters.accepted,
            unverified=counters.trusted,
            typical=counters.typical,
            target_passes=counters.target_passes,
            cached_tokens=counters.cached_tokens,
            tier=self._settings.method,
            lossless=self._lossless,
            drafted=counters.drafted,
            kept_per_pass=json.dumps(counters.kept_per_pass) if is_last else "",
            withdrawn_tier=self._withdrawn_tier,
        )
        fields = reply.outputs()
        del fields[_TEXT], fields[_LOGPROBS], fields[_FATES]
        params, context = self._settings.params, self._context if self._number == 0 else ()
        if chunk.finish_reason == "stop" and token_ids and token_ids[-1] in params.stop_token_ids:
            token_ids = token_ids[:-1]  # it ends the output, and is none of its text
        prompt = _logged(self._prompt_logprobs)
        if params.prompt_logprobs is not None and self._number == 0:
            prompt = ((self._first_token, None, ()), *prompt)
        piece = Piece(
            self._key,
            self._number,
            token_ids,
            params.stop,
            is_last,
            fields,
            params.min_tokens,
            context,
            _logged(self._logprobs),
            prompt,
            tuple(self._fates),
        )
        self._number += 1
        self._logprobs, self._prompt_logprobs, self._fates = [], (), []
        return piece


def error_text(status: str, error: Exception | str) -> str:
    """An error's message with its status in front: Triton does not hand the status on to clients of a stream."""
    return f"{status}: {error}"
