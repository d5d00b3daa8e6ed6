"""Sends live requests to their arms, hands on what comes, and writes down what became of each."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tritonclient.grpc as grpcclient

from ssv.ab.journal import Journal
from ssv.ab.routing import Fallback, Routing
from ssv.client.triton import ServerError, read_reply
from ssv.client.triton_aio import AsyncClient

log = logging.getLogger("ssv.ab")

CANCEL_SECONDS = 0.25
"""Between two looks at whether the client is still there, while nothing comes."""

METRICS = {
    "ssv_ab_requests": "Requests that ended at an arm (labels of all: arm, role live or shadow; here also reason)",
    "ssv_ab_output_tokens": "Output tokens of an arm",
    "ssv_ab_target_passes": "Target passes of an arm",
    "ssv_ab_unverified_tokens": "Output tokens of an arm that the target never judged",
    "ssv_ab_first_token_seconds": "Seconds to the first token, summed over requests",
    "ssv_ab_request_seconds": "Seconds to the end, summed over requests",
}
"""Counters."""

_DATATYPES = {
    np.dtype(np.bool_): "BOOL",
    np.dtype(np.int32): "INT32",
    np.dtype(np.uint64): "UINT64",
    np.dtype(np.float32): "FP32",
}


class LiveRequest(Protocol):
    """A request as the server gives it, and where its responses go. Calls come from the router's thread alone."""

    id: str
    user: str | None
    tensors: Mapping[str, np.ndarray]

    def send(self, outputs: Mapping[str, np.ndarray], arm: str, is_last: bool) -> None:
        """Sends outputs to the client, by name; the last ones end its request."""
        ...

    def fail(self, message: str) -> None:
        """Ends the request with an error."""
        ...

    def is_cancelled(self) -> bool:
        """Whether the client does not wait any more."""
        ...


@dataclass(slots=True)
class Outcome:
    """What became of a request at an arm: a record of the log.

    Attributes:
        unit: hash of who was assigned, which the log can do without knowing.
        is_shadow: whether it was a copy; `is_fallback`: whether it was meant for another arm.
        without: arms that were out of service when it began.
        pair: of an answer and its copy, the same; "" where none was made. Clients choose the `id`, which need not be
            the only one.
        ttft_s, e2e_s: seconds to the first token, and to the last response; of one that was not answered, to where it
            ended.
        error: "" if it was answered.
        first_tokens: that the first response brought; `output_tokens`: all.
        text_sha: of the answer, to tell whether two are the same.
    """

    id: str
    unit: str
    arm: str
    is_shadow: bool = False
    is_fallback: bool = False
    without: tuple[str, ...] = ()
    pair: str = ""
    at: float = 0.0
    ttft_s: float | None = None
    e2e_s: float = 0.0
    error: str = ""
    finish_reason: str = ""
    output_tokens: int = 0
    first_tokens: int = 0
    prompt_tokens: int = 0
    target_passes: int = 0
    judged: int = 0
    accepted: int = 0
    unverified: int = 0
    tier: str = ""
    lossless: bool | None = None
    text_sha: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A line of the log: the attributes by name, and `event`."""
        return {"event": "outcome", **{name: getattr(self, name) for name in self.__slots__}}

    def counts(self) -> Mapping[str, float]:
        """What it adds to the metrics."""
        return {
            "ssv_ab_requests": 1,
            "ssv_ab_output_tokens": self.output_tokens,
            "ssv_ab_target_passes": self.target_passes,
            "ssv_ab_unverified_tokens": self.unverified,
            "ssv_ab_first_token_seconds": self.ttft_s or 0.0,
            "ssv_ab_request_seconds": self.e2e_s,
        }


class Router:
    """Lives in one event loop."""

    def __init__(
        self,
        routing: Routing,
        own_url: str,
        *,
        certificate: Path | None = None,
        on_outcome: Callable[[Outcome], None] = lambda outcome: None,
        on_fallback: Callable[[Mapping[str, str]], None] = lambda arms: None,
    ) -> None:
        """Makes a router for a server's own address; it runs in the event loop that makes it.

        Args:
            own_url: of the server that routes, for arms without a url.
            certificate: PEM of that server, with grpcs://.
            on_outcome: called after each request and each copy.
            on_fallback: called with the arms that are out of service when they have changed.

        Raises:
            OSError: the log cannot be written.
        """
        self._routing, self._on_outcome, self._on_fallback = routing, on_outcome, on_fallback
        self._clients = {
            name: AsyncClient(arm.url) if arm.url else AsyncClient(own_url, certificate=certificate)
            for name, arm in routing.arms.items()
        }
        self._fallback = Fallback(routing.fallback_path)
        self._fallen: Mapping[str, str] = {}
        self._shadows: set[asyncio.Task[None]] = set()
        self._live: set[asyncio.Task[None]] = set()
        self._journal = Journal(routing.log)
        self._journal.append({"event": "start", "at": time.time(), "routing": routing.model_dump(mode="json")})

    async def serve(self, request: LiveRequest) -> None:
        """Answers a request; whatever happens, it ends with a last response or an error."""
        task = asyncio.current_task()
        assert task is not None
        self._live.add(task)
        try:
            outcome = self._assign(request)
        except Exception as error:
            log.exception("a request could not be assigned")
            request.fail(f"INTERNAL: {type(error).__name__}: {error}")
        else:
            await self._ask(outcome, request.tensors, request)
        finally:
            self._live.discard(task)

    def _assign(self, request: LiveRequest) -> Outcome:
        """To its arm; sends the copy, if there is to be one, on its way."""
        unit = request.user or request.id or uuid.uuid4().hex
        fallen = self._look_for_fallback()
        assigned = self._routing.arm_of(unit)
        arm = self._routing.first if assigned in fallen else assigned
        key = request.id or uuid.uuid4().hex
        hashed = hashlib.sha256(unit.encode()).hexdigest()[:16]
        outcome = Outcome(key, hashed, arm, is_fallback=arm != assigned, without=tuple(fallen))
        shadow = self._routing.shadow
        if shadow is not None and shadow not in fallen and self._routing.is_shadowed(unit):
            outcome.pair = uuid.uuid4().hex
            copy = Outcome(key, hashed, shadow, is_shadow=True, without=outcome.without, pair=outcome.pair)
            task = asyncio.create_task(self._ask(copy, request.tensors, None))
            self._shadows.add(task)
            task.add_done_callback(self._shadows.discard)
        return outcome

    async def close(self) -> None:
        """Ends what still runs, each with an error."""
        running = [*self._shadows, *self._live]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for client in self._clients.values():
            await client.aclose()
        self._journal.close()

    def _look_for_fallback(self) -> Mapping[str, str]:
        fallen = self._fallback.arms()
        if fallen != self._fallen:
            self._fallen = dict(fallen)
            self._write({"event": "fallback", "at": time.time(), "arms": self._fallen})
            self._on_fallback(self._fallen)
        return fallen

    async def _ask(self, outcome: Outcome, tensors: Mapping[str, np.ndarray], request: LiveRequest | None) -> None:
        outcome.at, start = time.time(), time.perf_counter()
        text, is_over = hashlib.sha256(), False
        try:
            arm = self._routing.arms[outcome.arm]
            inputs = _inputs(tensors, tier=arm.tier, max_divergence=arm.max_divergence)
            responses = self._clients[outcome.arm].forward(inputs, request_id=outcome.id)
            async with aclosing(responses):
                while (result := await self._next(responses, request)) is not None:
                    reply = read_reply(result)
                    outcome.e2e_s = time.perf_counter() - start
                    if reply.num_output_tokens and outcome.ttft_s is None:
                        outcome.ttft_s, outcome.first_tokens = outcome.e2e_s, reply.num_output_tokens
                    text.update(reply.text.encode())
                    outcome.output_tokens += reply.num_output_tokens
                    outcome.finish_reason, outcome.tier, outcome.lossless = (
                        reply.finish_reason,
                        reply.tier,
                        reply.lossless,
                    )
                    outcome.prompt_tokens, outcome.target_passes = reply.num_input_tokens, reply.target_passes
                    outcome.judged, outcome.accepted, outcome.unverified = (
                        reply.judged,
                        reply.accepted,
                        reply.unverified,
                    )
                    if request is not None:
                        request.send(_outputs(result), outcome.arm, bool(reply.finish_reason))
                    is_over = bool(reply.finish_reason)
            if not is_over:
                outcome.finish_reason = "cancelled"
                if request is not None:
                    request.fail("CANCELLED: the client is gone")
        except asyncio.CancelledError:
            if not is_over:
                outcome.finish_reason = "cancelled"
                if request is not None:
                    request.fail("UNAVAILABLE: the server is being stopped")
            raise
        except Exception as error:
            status = error.status if isinstance(error, ServerError) else f"INTERNAL: {type(error).__name__}"
            if is_over or not isinstance(error, ServerError):
                log.exception("a request could not be routed")
            if not is_over:  # else nothing may follow its last response
                outcome.error = f"{status}: {error}"
                if request is not None:
                    request.fail(outcome.error)
        finally:
            if not is_over:
                outcome.e2e_s = time.perf_counter() - start
            outcome.text_sha = text.hexdigest()[:16]
            self._write(outcome.to_dict())
            self._on_outcome(outcome)

    async def _next(self, responses: Any, request: LiveRequest | None) -> grpcclient.InferResult | None:
        """The next response; None when there is none any more, or nobody to send it to."""
        waiting = asyncio.ensure_future(anext(responses, None))
        try:
            while True:
                done, _ = await asyncio.wait([waiting], timeout=CANCEL_SECONDS)
                if request is not None and request.is_cancelled():
                    return None
                if done:
                    return waiting.result()
        finally:
            if not waiting.done():
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)

    def _write(self, record: Mapping[str, Any]) -> None:
        try:
            self._journal.append(record)
        except OSError:  # a full disk must not stop the traffic
            log.exception("the log of outcomes cannot be written")


def _inputs(
    tensors: Mapping[str, np.ndarray], *, tier: str | None, max_divergence: float | None
) -> Sequence[grpcclient.InferInput]:
    """A request's tensors, with the arm's settings in them.

    Raises:
        ServerError: the request brings settings of its own.
    """
    if own := [name for name in ("ssv_tier", "ssv_max_divergence", "ssv_policy") if name in tensors]:
        raise ServerError(f"{own[0]} is the arm's to set", "INVALID_ARGUMENT", "ask `ensemble` for it, or leave it out")
    given = dict(tensors)
    if tier is not None:
        given["ssv_tier"] = np.array([[tier.encode()]], dtype=np.object_)
    if max_divergence is not None:
        given["ssv_max_divergence"] = np.array([[max_divergence]], dtype=np.float32)
    inputs = []
    for name, array in given.items():
        tensor = grpcclient.InferInput(name, list(array.shape), _DATATYPES.get(array.dtype, "BYTES"))
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def _outputs(result: grpcclient.InferResult) -> dict[str, np.ndarray]:
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}
