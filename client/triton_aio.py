"""A client of the server's `ensemble` for many streams at a time: one connection, in an event loop."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import grpc
import tritonclient.grpc.aio as grpcclient
from tritonclient.utils import InferenceServerException

from ssv.client.triton import (
    MODEL,
    ROUTER,
    Prompt,
    Reply,
    ServerError,
    Settings,
    read_reply,
    request_inputs,
    server_error,
    split_url,
    user_input,
)

HEALTH_TIMEOUT = 2.0


class AsyncClient:
    """Made where its event loop runs."""

    def __init__(
        self, url: str, *, certificate: Path | None = None, name: str | None = None, is_routed: bool = False
    ) -> None:
        """Makes a connection when it is first used.

        Args:
            is_routed: whether the server's A/B router has the requests of `stream` that leave the tier to the server.
            certificate: PEM of the server's own certificate, with grpcs://.
            name: that it is valid for: the server may be reached by another.
        """
        # Or gRPC ends its polling where the last of its objects is collected, in whatever code that happens, and waits
        # there for what was cancelled in an event loop that does not run any more.
        grpc.aio.init_grpc_aio()
        self._url, self._is_routed = url, is_routed
        address, secure = split_url(url)
        options: list[tuple[str, int | str]] = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_reconnect_backoff_ms", 1000),  # a server that is started again is back in seconds
        ]
        if name is not None:
            options.append(("grpc.ssl_target_name_override", name))
        root = str(certificate) if certificate is not None else None
        self._client = grpcclient.InferenceServerClient(
            address, ssl=secure, root_certificates=root, channel_args=options
        )

    async def stream(
        self, prompt: Prompt, settings: Settings, *, request_id: str, stream: bool
    ) -> AsyncGenerator[Reply, None]:
        """Replies to a prompt, the last with a finish reason; closing the generator cancels the request.

        Raises:
            ServerError: the server refused, failed, or is not there.
        """
        inputs = request_inputs(prompt, settings, stream=stream)
        model = MODEL
        if self._is_routed and settings.tier is None and settings.max_divergence is None and not settings.policy:
            model = ROUTER
            if settings.user is not None:
                inputs.append(user_input(settings.user))
        async with aclosing(self.forward(inputs, request_id=request_id, model=model)) as responses:
            async for result in responses:
                yield read_reply(result)

    async def forward(
        self, inputs: Sequence[grpcclient.InferInput], *, request_id: str, model: str = MODEL
    ) -> AsyncGenerator[grpcclient.InferResult, None]:
        """Streams the responses to tensors as they are, in the way of `stream`."""

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": model, "inputs": list(inputs), "request_id": request_id}

        responses = self._client.stream_infer(requests())
        endings = _endings(responses)
        failure: InferenceServerException | None = None
        is_over = False
        try:
            # To the end, also of what is over: a stream that is left before is cancelled.
            async for result, error in responses:
                failure = failure or error
                if failure is None and not is_over:
                    is_over = bool(result.as_numpy("finish_reason").reshape(-1)[0])
                    yield result
        except grpc.aio.AioRpcError as error:
            failure = endings[0] if endings else InferenceServerException(error.details() or "", str(error.code()))
        finally:
            responses.cancel()
        if is_over:
            return
        if failure is not None:
            raise server_error(failure, self._url) from failure
        raise ServerError("the server ended the stream before the answer was complete", "UNAVAILABLE")

    async def is_ready(self) -> bool:
        """Whether the server and what answers requests are ready; False also where no server answers."""
        try:
            return await self._client.is_server_ready(
                client_timeout=HEALTH_TIMEOUT
            ) and await self._client.is_model_ready(MODEL, client_timeout=HEALTH_TIMEOUT)
        except InferenceServerException:
            return False

    async def aclose(self) -> None:
        """Closes the connection."""
        await self._client.close()


def _endings(responses: Any) -> list[InferenceServerException]:
    """How a stream ends, once it has: noted at the moment when the server's word is there.

    Where the request is still being written then, gRPC puts "Internal error from Core" in the place of that word
    (github.com/grpc/grpc/issues/36066).
    """
    found: list[InferenceServerException] = []

    def note(call: grpc.aio.Call) -> None:
        found.append(InferenceServerException(_known(call.details()) or "", str(_known(call.code()))))

    call = getattr(responses, "_grpc_call", None)  # the library has no other way to it
    if call is not None:
        call.add_done_callback(note)
    return found


T = TypeVar("T")


def _known(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise AssertionError("a call that has ended knows how")
