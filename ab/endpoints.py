"""Asks an arm, and takes the time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Protocol

from ssv.ab.answers import Answer, EndpointError, Piece, Sampling, answer_of, check_answer
from ssv.ab.arms import Arm
from ssv.ab.openai_endpoint import OpenAIEndpoint
from ssv.client.triton import Client, ServerError, Settings


class Endpoint(Protocol):
    """A connection to an arm, for one request at a time."""

    def ask(self, prompt: str, sampling: Sampling, seed: int) -> Answer:
        """Raises EndpointError."""
        ...

    def disclosure(self) -> dict[str, Any] | None:
        """What the server says of its tiers and how they were calibrated; None if it says nothing."""
        ...

    def close(self) -> None:
        """Lets go of the connection."""
        ...


def connect(arm: Arm, *, ca: Path | None = None) -> Endpoint:
    """Raises UserError: the address cannot be one. Whether somebody is there shows when it is asked."""
    return OpenAIEndpoint(arm) if arm.is_openai else TritonEndpoint(arm, ca)


class TritonEndpoint:
    """A server of ssv."""

    def __init__(self, arm: Arm, ca: Path | None) -> None:
        self._arm, self._client = arm, Client(arm.url, ca=ca)

    def ask(self, prompt: str, sampling: Sampling, seed: int) -> Answer:
        """Streams an answer; see `Endpoint.ask`."""
        temperature = sampling.temperature if self._arm.temperature is None else self._arm.temperature
        settings = Settings(
            tier=self._arm.tier,
            max_divergence=self._arm.max_divergence,
            max_tokens=sampling.max_tokens,
            temperature=temperature if isinstance(temperature, float | int) else None,
            seed=seed,
        )
        pieces, start = list[Piece](), time.perf_counter()
        try:
            for reply in self._client.stream(prompt, settings, patience=sampling.timeout):
                pieces.append(Piece(time.perf_counter() - start, reply.text, reply.num_output_tokens))
        except ServerError as error:
            raise EndpointError(f"{error.status}: {error}") from error
        except Exception as error:
            raise EndpointError(f"what came is no response of ssv: {type(error).__name__}: {error}") from error
        answer = answer_of(pieces)
        answer.arrivals = [(moment, tokens) for moment, tokens in answer.arrivals if tokens]
        answer.prompt_tokens, answer.cached_tokens = reply.num_input_tokens, reply.cached_tokens
        answer.finish_reason, answer.target_passes = reply.finish_reason, reply.target_passes
        answer.judged, answer.accepted, answer.unverified = reply.judged, reply.accepted, reply.unverified
        answer.tier, answer.lossless = reply.tier, reply.lossless
        return check_answer(answer, sampling)

    def disclosure(self) -> dict[str, Any] | None:
        """What the server says of its bundle and tiers; None where it says nothing that can be read."""
        try:
            found = json.loads(self._client.parameter("ssv_disclosure") or "null")
        except (ServerError, ValueError):
            return None
        return found if isinstance(found, dict) and isinstance(found.get("tiers"), dict) else None

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()
