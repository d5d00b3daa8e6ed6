"""What comes back from an arm, whichever protocol it speaks, and what of it is an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ssv.ab import scoring
from ssv.support.errors import UserError

_STOPPED = (
    "stop", "eos", "eos_token", "end_turn", "end_of_turn", "stop_sequence", "stop_word", "stop_words", "stop_token",
    "complete",
)  # fmt: skip
_LIMITED = ("length", "max_tokens", "max_output_tokens", "max_length", "model_length")

ENDINGS = frozenset((*_STOPPED, *_LIMITED))
"""How an answer ends: `stop` and `length`, as servers name them, in any letter case.

Whatever else ends a response (`abort`, `error`, `content_filter`, `tool_calls` where no tools were given, `deadline`,
names nobody knows) leaves no answer.
"""


class EndpointError(UserError):
    """An endpoint is not there, refused, broke off, or sent what cannot be an answer; the message says which."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How all requests of a run are sampled.

    Attributes:
        timeout: seconds that a response may take to come.
    """

    max_tokens: int
    temperature: float
    timeout: float


@dataclass(frozen=True, slots=True)
class Piece:
    """A response of a stream, or the only one.

    Attributes:
        at: seconds since the request; None of an answer that was not streamed.
        tokens: None where the endpoint does not say how many a piece is.
        is_reasoning: whether the endpoint sent it as what was thought before the answer.
    """

    at: float | None
    text: str
    tokens: int | None = None
    is_reasoning: bool = False


@dataclass(slots=True)
class Answer:
    """What came of one request.

    Attributes:
        text: of the answer, with what the model wrote between tags of thinking.
        reasoning: what the endpoint sent apart from it.
        arrivals: seconds from the request to each response, and the tokens in it, reasoning included; none of an answer
            that was not streamed.
        ttfo_s: seconds to the first token of the answer itself; None without one.
        output_tokens: reasoning included; `reasoning_tokens`: of them.
        cached_tokens: of the prompt, computed before.
        target_passes, judged, accepted, unverified, tier, lossless: None where the endpoint does not say; see
            `ssv.client.triton.Reply`.
    """

    text: str = ""
    reasoning: str = ""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    ttfo_s: float | None = None
    output_tokens: int = 0
    reasoning_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str = ""
    target_passes: int | None = None
    judged: int | None = None
    accepted: int | None = None
    unverified: int | None = None
    tier: str | None = None
    lossless: bool | None = None


def answer_of(
    pieces: Sequence[Piece], *, output_tokens: int | None = None, reasoning_tokens: int | None = None
) -> Answer:
    """Texts, times and tokens of an answer, from what came.

    Args:
        output_tokens: of the pieces together, the reasoning included; None where each says its own.
        reasoning_tokens: of them, as the endpoint says, also of reasoning that it keeps to itself; None where it does
            not: they are then those of the pieces that are reasoning.
    """
    text = "".join(piece.text for piece in pieces if not piece.is_reasoning)
    thought = _thought(pieces, scoring.thinking(text))
    tokens = [piece.tokens or 0 for piece in pieces]
    if output_tokens is not None:
        tokens = _shared_out(thought, output_tokens, reasoning_tokens)
    counted = sum(count for count, is_thought in zip(tokens, thought, strict=True) if is_thought)
    first = next(
        (p.at for p, is_thought in zip(pieces, thought, strict=True) if p.text.strip() and not is_thought), None
    )
    return Answer(
        text=text,
        reasoning="".join(piece.text for piece in pieces if piece.is_reasoning),
        arrivals=[(piece.at, count) for piece, count in zip(pieces, tokens, strict=True) if piece.at is not None],
        ttfo_s=first,
        output_tokens=output_tokens if output_tokens is not None else sum(tokens),
        reasoning_tokens=counted if reasoning_tokens is None else reasoning_tokens,
    )


def check_answer(answer: Answer, sampling: Sampling) -> Answer:
    """The answer, if it is one. Raises EndpointError: saying why not."""
    if not answer.finish_reason:
        raise EndpointError("the stream ended before the answer did")
    if answer.finish_reason.casefold() not in ENDINGS:
        raise EndpointError(f"the response ended by {answer.finish_reason!r}, which is no end of an answer")
    # Endpoints differ in whether they count the token that ends an answer, and some in more; and in whether reasoning
    # is limited, too.
    if answer.output_tokens - answer.reasoning_tokens > 2 * sampling.max_tokens:
        raise EndpointError(f"{answer.output_tokens} tokens cannot be, of {sampling.max_tokens} at most")
    texts = answer.text + answer.reasoning
    if not 0 <= answer.reasoning_tokens <= answer.output_tokens or (texts and not answer.output_tokens):
        raise EndpointError(f"{answer.output_tokens} tokens for {len(texts)} characters cannot be")
    return answer


def _thought(pieces: Sequence[Piece], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each piece is reasoning: sent as such, or wholly within where the text is thinking."""
    found, start = [], 0
    for piece in pieces:
        end = start + (0 if piece.is_reasoning else len(piece.text))
        found.append(piece.is_reasoning or any(low <= start < end <= high for low, high in spans))
        start = end
    return found


def _shared_out(thought: Sequence[bool], output_tokens: int, reasoning_tokens: int | None) -> list[int]:
    """Tokens of each piece: evenly, as who sends text does not say how many tokens it is."""
    if reasoning_tokens is None or not 0 <= reasoning_tokens <= output_tokens:
        return _evenly(output_tokens, len(thought))
    of_thought = _evenly(reasoning_tokens, sum(thought))
    of_answer = _evenly(output_tokens - reasoning_tokens, len(thought) - sum(thought))
    if not of_thought and of_answer:
        of_answer[0] += reasoning_tokens  # it was thought in secret, before the first piece came
    return [of_thought.pop(0) if is_thought else of_answer.pop(0) for is_thought in thought]


def _evenly(tokens: int, num: int) -> list[int]:
    bounds = [round(tokens * n / num) for n in range(num + 1)] if num else [0]
    return [high - low for low, high in pairwise(bounds)]
