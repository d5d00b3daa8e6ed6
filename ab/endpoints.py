"""Asks an arm, and takes the time.

May import: ssv.ab.arms; ssv.client.triton.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ssv.ab.arms import Arm
from ssv.client.triton import Client, ServerError, Settings

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionChunk

_T = TypeVar("_T")


class EndpointError(RuntimeError):
    """An endpoint is not there, refused, broke off, or sent what cannot be an answer; the message says which."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Of all requests of a run.

    Attributes:
        timeout: seconds that a response may take to come.
    """

    max_tokens: int
    temperature: float
    timeout: float


@dataclass(slots=True)
class Answer:
    """Attributes:
    arrivals: seconds from the request to each response, and the tokens in it.
    cached_tokens: of the prompt, computed before.
    target_passes, judged, accepted, unverified, tier, lossless: None where the endpoint does not say; see `ssv.client.triton.Reply`.
    """

    text: str = ""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    output_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str = ""
    target_passes: int | None = None
    judged: int | None = None
    accepted: int | None = None
    unverified: int | None = None
    tier: str | None = None
    lossless: bool | None = None


class Endpoint(Protocol):
    """A connection to an arm, for one request at a time."""

    def ask(self, prompt: str, sampling: Sampling, seed: int) -> Answer:
        """Raises EndpointError."""
        ...

    def disclosure(self) -> dict[str, Any] | None:
        """What the server says of its tiers and how they were calibrated; None if it says nothing."""
        ...

    def close(self) -> None: ...


def connect(arm: Arm, *, ca: Path | None = None) -> Endpoint:
    """Raises ValueError: the address cannot be one. Whether somebody is there shows when it is asked."""
    return OpenAIEndpoint(arm) if arm.is_openai else TritonEndpoint(arm, ca)


class TritonEndpoint:
    """A server of ssv."""

    def __init__(self, arm: Arm, ca: Path | None) -> None:
        self._arm, self._client = arm, Client(arm.url, ca=ca)

    def ask(self, prompt: str, sampling: Sampling, seed: int) -> Answer:
        settings = Settings(
            tier=self._arm.tier,
            max_divergence=self._arm.max_divergence,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=seed,
        )
        answer, start = Answer(), time.perf_counter()
        try:
            for reply in self._client.stream(prompt, settings, patience=sampling.timeout):
                answer.text += reply.text
                if reply.num_output_tokens:
                    answer.arrivals.append((time.perf_counter() - start, reply.num_output_tokens))
        except ServerError as error:
            raise EndpointError(f"{error.status}: {error}") from error
        except Exception as error:
            raise EndpointError(f"what came is no response of ssv: {type(error).__name__}: {error}") from error
        answer.output_tokens = sum(tokens for _, tokens in answer.arrivals)
        answer.prompt_tokens, answer.cached_tokens = reply.num_input_tokens, reply.cached_tokens
        answer.finish_reason, answer.target_passes = reply.finish_reason, reply.target_passes
        answer.judged, answer.accepted, answer.unverified = reply.judged, reply.accepted, reply.unverified
        answer.tier, answer.lossless = reply.tier, reply.lossless
        return _checked(answer, sampling)

    def disclosure(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._client.parameter("ssv_disclosure") or "null")
        except (ServerError, ValueError):
            return None
        return found if isinstance(found, dict) and isinstance(found.get("tiers"), dict) else None

    def close(self) -> None:
        self._client.close()


class OpenAIEndpoint:
    """Anything that speaks OpenAI's chat completions, streamed with usage: vLLM, SGLang, TensorRT-LLM, a hosted API, ssv itself.

    The key is taken from SSV_AB_KEY_<ARM>, in capitals, or OPENAI_API_KEY; without either none is sent that counts.
    """

    def __init__(self, arm: Arm) -> None:
        from openai import OpenAI  # a second; and who compares servers of ssv needs none

        own = os.environ.get(f"SSV_AB_KEY_{arm.name.upper().replace('-', '_').replace('.', '_')}")
        key = own or os.environ.get("OPENAI_API_KEY") or "none"
        self._arm, self._client = arm, OpenAI(base_url=arm.url, api_key=key, max_retries=0)

    def ask(self, prompt: str, sampling: Sampling, seed: int) -> Answer:
        from openai import OpenAIError

        start = time.perf_counter()
        try:
            chunks = self._client.chat.completions.create(
                model=str(self._arm.model),
                messages=[{"role": "user", "content": prompt}],
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                seed=seed,
                stream=True,
                stream_options={"include_usage": True},
                timeout=sampling.timeout,
            )
            return _checked(self._read(iter(chunks), start), sampling)
        except EndpointError:
            raise
        except OpenAIError as error:
            raise EndpointError(f"{type(error).__name__}: {error}") from error
        except Exception as error:
            # The package takes whatever comes for an answer, and lets through what its HTTP library raises when a stream breaks.
            raise EndpointError(
                f"what came is no stream of chat completions: {type(error).__name__}: {error}"
            ) from error

    def _read(self, chunks: Iterator[ChatCompletionChunk], start: float) -> Answer:
        answer = Answer()
        moments: list[float] = []
        usage, own = None, dict[str, Any]()
        for chunk in chunks:
            for choice in chunk.choices:
                if choice.delta.content:
                    answer.text += choice.delta.content
                    moments.append(time.perf_counter() - start)
                answer.finish_reason = choice.finish_reason or answer.finish_reason
            usage = chunk.usage or usage
            own = (chunk.model_extra or {}).get("ssv") or own
        if usage is None:
            raise EndpointError("no usage came: tokens cannot be counted")
        answer.output_tokens, answer.prompt_tokens = int(usage.completion_tokens), int(usage.prompt_tokens)
        details = usage.prompt_tokens_details
        answer.cached_tokens = int((details and details.cached_tokens) or 0)
        # Who sends text does not say how many tokens it is: they are shared out evenly.
        for number, moment in enumerate(moments):
            until, before = (round(answer.output_tokens * n / len(moments)) for n in (number + 1, number))
            answer.arrivals.append((moment, until - before))
        answer.tier, answer.lossless = _known(own, "tier", str), _known(own, "lossless", bool)
        answer.target_passes = _known(own, "target_passes", int)
        answer.unverified = _known(own, "unverified_tokens", int)
        return answer

    def disclosure(self) -> dict[str, Any] | None:
        return None

    def close(self) -> None:
        self._client.close()


def _known(given: dict[str, Any], name: str, kind: type[_T]) -> _T | None:
    """What an endpoint says under a name, if it can be that."""
    value = given.get(name)
    return value if isinstance(value, kind) else None


def _checked(answer: Answer, sampling: Sampling) -> Answer:
    if not answer.finish_reason:
        raise EndpointError("the stream ended before the answer did")
    # Endpoints differ in whether they count the token that ends an answer, and some in more.
    if answer.output_tokens > 2 * sampling.max_tokens:
        raise EndpointError(f"{answer.output_tokens} tokens cannot be, of {sampling.max_tokens} at most")
    if answer.output_tokens < 0 or (answer.text and not answer.output_tokens):
        raise EndpointError(f"{answer.output_tokens} tokens for {len(answer.text)} characters cannot be")
    return answer
