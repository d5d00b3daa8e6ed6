"""What a caller asks for and what it gets back."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from ssv.bundle.policy import Policy
from ssv.runtime.counters import Counters
from ssv.support.errors import UserError

FinishReason = Literal["stop", "length", "cancelled", "deadline"]

Fate = Literal["trusted", "accepted", "typical", "corrected", "target"]
"""How a token came into an output: drafted and never judged; drafted, and what the target chose; drafted, and kept as
typical of it; the target's choice in place of what was drafted; the target's choice where nothing was drafted."""


NUM_DRAFT_TOKENS = 5
"""Of `speculative`, unless a request says otherwise."""

MAX_COUNT = 2**31 - 1
MAX_TEMPERATURE = 1e4
"""What is asked for becomes tensors of limited types."""

MAX_PENALTY = 2.0
"""OpenAI's, of presence and frequency."""

MAX_REPETITION_PENALTY = 100.0
MAX_LOGPROBS = 20
"""OpenAI's, of the likeliest tokens that stand beside each token."""

MAX_BIAS = 100.0
"""OpenAI's: nothing is chosen that has so much less, and nothing else that has so much more."""


_ID = (int, Integral)
"""Types of token ids; what most are first, as an abstract class answers ten times as slowly."""


class RequestError(UserError):
    """A request that cannot be served; the message says which setting and what is possible."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 keeps all tokens.
        top_p: 1 keeps all tokens.
        min_p: leaves out tokens less probable than so much of the likeliest one's; 0 keeps all.
        repetition_penalty: what the logits of tokens that prompt or output have are divided by, or multiplied with
            where they are below 0; 1 changes nothing.
        presence_penalty: what is taken from the logits of tokens that the output has.
        frequency_penalty: the same, times how often it has them.
        logit_bias: tokens, and what is added to their logits.
        bad_token_ids: sequences of tokens that the output must not have; of words, see `BundleTokenizer.word_ids`.
        grammar: of the output, from `ssv.runtime.grammar.grammar_of`; None for any text.
        seed: of the request's own random numbers; the same request gives the same output whatever it is batched with.
        max_tokens: of the output.
        min_tokens: end-of-sequence and stop tokens are not chosen before, and no stop string that these complete ends
            the output.
        stop: strings that end the output, which does not include them; one that is a special token's text is that
            token.
        stop_token_ids: tokens that end the output as end-of-sequence does, of which its text has nothing.
        ignore_eos: go on after end-of-sequence, for benchmarks.
        logprobs: the log-probability of each token of the output is wanted, and of so many of the likeliest tokens in
            its place; None for none. A tier that trusts tokens computes theirs too, and keeps them until a pass.
        prompt_logprobs: the same of the prompt's tokens but the first; none of them is taken from the prompt cache.
        fates: what became of each token of the output is wanted, and what was dropped in its place.
        latency_bound_ms: milliseconds since the last pass after which pending tokens are verified even if no token asks
            for it; None for no bound.

    Raises:
        RequestError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    grammar: str | None = None
    seed: int = 0
    max_tokens: int = 128
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    fates: bool = False
    latency_bound_ms: float | None = None

    def __post_init__(self) -> None:
        self._check_types()
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise RequestError(f"temperature {self.temperature} must be a number between 0 and {MAX_TEMPERATURE:g}")
        if not 0 <= self.top_k <= MAX_COUNT:
            raise RequestError(f"top_k {self.top_k} must be between 0 (keeps all tokens) and {MAX_COUNT}")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise RequestError(f"min_p {self.min_p} must be between 0 (keeps all tokens) and 1")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -MAX_PENALTY <= (value := getattr(self, name)) <= MAX_PENALTY:
                raise RequestError(f"{name} {value} must be between {-MAX_PENALTY:g} and {MAX_PENALTY:g}")
        if not 1 / MAX_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY:
            raise RequestError(
                f"repetition_penalty {self.repetition_penalty} must be between {1 / MAX_REPETITION_PENALTY:g} and "
                f"{MAX_REPETITION_PENALTY:g}"
            )
        for token, bias in self.logit_bias:
            if not -MAX_BIAS <= bias <= MAX_BIAS:
                raise RequestError(f"logit_bias {bias} of token {token} must be between {-MAX_BIAS:g} and {MAX_BIAS:g}")
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise RequestError("logit_bias has a token twice", "give each once")
        if not all(self.bad_token_ids):
            raise RequestError("bad_token_ids: an empty sequence is in every output")
        if not 1 <= self.max_tokens <= MAX_COUNT:
            raise RequestError(f"max_tokens {self.max_tokens} must be between 1 and {MAX_COUNT}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} must lie between 0 and max_tokens {self.max_tokens}")
        if self.grammar is not None and self.ignore_eos:
            raise RequestError("ignore_eos goes on where an output of a given form has ended", "leave one of them out")
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= MAX_LOGPROBS:
                raise RequestError(f"{name} {value} must be between 0 and {MAX_LOGPROBS}")
        if any(not text for text in self.stop):
            raise RequestError("stop: an empty string would stop every output")
        if self.latency_bound_ms is not None and not self.latency_bound_ms > 0:
            raise RequestError(f"latency_bound_ms {self.latency_bound_ms} must be above 0")

    def _check_types(self) -> None:
        """Refuses what no number, text or list can be said of: comparing it would fail without naming the setting."""
        for name in ("top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            is_unset = value is None and name.endswith("logprobs")
            if not is_unset and (not isinstance(value, int) or isinstance(value, bool)):
                raise RequestError(f"{name} {value!r} must be a whole number")
        numbers = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        for name in (*numbers, "latency_bound_ms"):
            value = getattr(self, name)
            is_unset = value is None and name == "latency_bound_ms"
            if not is_unset and (not isinstance(value, Real) or isinstance(value, bool)):
                raise RequestError(f"{name} {value!r} must be a number")
        for name in ("ignore_eos", "fates"):
            if not isinstance(value := getattr(self, name), bool):
                raise RequestError(f"{name} {value!r} must be True or False")
        if self.grammar is not None and not isinstance(self.grammar, str):
            raise RequestError(
                f"grammar {self.grammar!r} must be text", "`ssv.runtime.grammar.grammar_of` makes it of a schema"
            )
        if isinstance(self.stop, str) or not _all_are(self.stop, str):
            raise RequestError(f"stop {self.stop!r} must be a tuple of strings")
        if not _all_are(self.stop_token_ids, _ID):
            raise RequestError(f"stop_token_ids {self.stop_token_ids!r} must be a tuple of token ids")
        if not _are_biases(self.logit_bias):
            raise RequestError(f"logit_bias {self.logit_bias!r} must be a tuple of pairs, a token id and a number")
        if not _all_are(self.bad_token_ids, Sequence) or not all(_all_are(ids, _ID) for ids in self.bad_token_ids):
            raise RequestError(f"bad_token_ids {self.bad_token_ids!r} must be a tuple of tuples of token ids")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is chosen each time."""
        return self.temperature == 0.0

    @property
    def named_tokens(self) -> dict[str, tuple[int, ...]]:
        """Token ids that it names, by the setting that does."""
        return {
            "logit_bias": tuple(token for token, _ in self.logit_bias),
            "stop_token_ids": self.stop_token_ids,
            "bad_words": tuple(token for ids in self.bad_token_ids for token in ids),
        }


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, a method and its settings.

    Attributes:
        prompt_ids: token ids, at least one.
        method: one of `ssv.runtime.methods.METHODS`.
        num_draft_tokens: of `speculative`.
        policy: what is decoded by, in place of what the method's name stands for: the name then only labels the
            request.
        deadline: time.monotonic() at which the request ends with what it has; None for none.
        arrived: time.monotonic() from which its times are counted; None for that of its submission.

    Raises:
        RequestError: a field of another type.
    """

    prompt_ids: tuple[int, ...]
    method: str
    params: SamplingParams = field(default_factory=SamplingParams)
    num_draft_tokens: int = NUM_DRAFT_TOKENS
    policy: Policy | None = None
    deadline: float | None = None
    arrived: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prompt_ids, str) or not _all_are(self.prompt_ids, _ID):
            raise RequestError(
                f"prompt_ids {reprlib.repr(self.prompt_ids)} must be a tuple of token ids",
                "`LLM.chat_ids` gives those of a message, and `LLM.tokenizer.encode` those of a text",
            )
        if not isinstance(self.params, SamplingParams):
            raise RequestError(f"params {self.params!r} must be `SamplingParams`")
        if not isinstance(self.num_draft_tokens, int) or isinstance(self.num_draft_tokens, bool):
            raise RequestError(f"num_draft_tokens {self.num_draft_tokens!r} must be a whole number")
        for name in ("deadline", "arrived"):
            if (moment := getattr(self, name)) is not None and not isinstance(moment, Real):
                raise RequestError(f"{name} {moment!r} must be a number", "take it from `time.monotonic()`")
        if self.policy is not None and not isinstance(self.policy, Policy):
            raise RequestError(
                f"policy {self.policy!r} must be a `Policy`",
                "the name of a method goes into `method`; `ssv.bundle.policy.verify_all` makes a policy of a shape",
            )


def _all_are(values: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether it is a sequence of nothing but that."""
    return isinstance(values, Sequence) and all(isinstance(value, kind) for value in values)


def _are_biases(values: Any) -> bool:
    pairs = _all_are(values, Sequence) and all(len(pair) == 2 for pair in values)
    return pairs and all(isinstance(token, _ID) and isinstance(bias, Real) for token, bias in values)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probability of a token under the target, before anything that the request changes.

    Attributes:
        top: the likeliest tokens in its place and theirs, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Audit:
    """Emitted tokens that the target, given the same prefix and, of sampled output, the same noise, would not have
    chosen.

    Attributes:
        strict: any other choice.
        margin: only where it prefers its own by more than 1 nat, which leaves near-ties out.
    """

    strict: int
    margin: int

    @classmethod
    def of(cls, gaps: Iterable[float]) -> Audit:
        """The audit of tokens that the target's choices are ahead of by so much: `ssv.runtime.decode.sampling.gaps`."""
        found = list(gaps)
        return cls(sum(gap > 0 for gap in found), sum(gap > 1 for gap in found))


@dataclass(frozen=True, slots=True)
class TokenFate:
    """How a token came into the output.

    Attributes:
        target_pass: the pass of the target with which it came, from 1; 0 of the prompt's.
        risk: the probability, as the draft had it, that the target would not choose it; None of what was not drafted.
        dropped: what else was drafted in its place, each to the end of its branch: token ids.
    """

    token: int
    fate: Fate
    target_pass: int
    risk: float | None = None
    dropped: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a request's output.

    Attributes:
        index: of the request among those given.
        text: new text, never half a character.
        token_ids: new tokens.
        counters: of the whole request so far.
        finish_reason: set in the last chunk of a request.
        logprobs: of the new tokens, if they were asked for.
        prompt_logprobs: of the prompt's tokens but the first, in the first chunk, if they were asked for.
        audit: of the whole output, in the last chunk of a request that was to be audited.
        fates: of the new tokens, if they were asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    counters: Counters
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    audit: Audit | None = None
    fates: tuple[TokenFate, ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """The whole output of a request; log-probabilities and fates as in `Chunk`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    counters: Counters
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    fates: tuple[TokenFate, ...] = ()
