"""What the tests of a real server ask it with: tensors, a gRPC stream, its metrics."""

from __future__ import annotations

import queue
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol
from urllib.request import urlopen

import numpy as np
import tritonclient.grpc as grpcclient
from prometheus_text import Series, samples
from tritonclient.utils import InferenceServerException

DTYPES = {"BYTES": np.object_, "BOOL": np.bool_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32}
SECONDS = 120.0
"""For what has to happen at all: how fast is for no test to say, beside whatever else the machine does."""


def tensor(name: str, datatype: str, *values: Any, shape: Sequence[int] | None = None) -> grpcclient.InferInput:
    """An input, [1, n] unless told otherwise."""
    held = [v.encode() if isinstance(v, str) else v for v in values]
    shape = list(shape) if shape is not None else [1, len(held)]
    made = grpcclient.InferInput(name, shape, datatype)
    made.set_data_from_numpy(np.array(held, dtype=DTYPES[datatype]).reshape(shape))
    return made


def is_final(result: grpcclient.InferResult) -> bool:
    parameters = result.get_response().parameters
    return "triton_final_response" in parameters and parameters["triton_final_response"].bool_param


def value(result: grpcclient.InferResult, name: str) -> Any:
    """The one value of an output, text as text."""
    array = result.as_numpy(name)
    assert array is not None and array.size == 1, f"{name}: {array}"
    held = array.reshape(-1)[0]
    return held.decode() if isinstance(held, bytes) else held.item()


def texts(results: Sequence[grpcclient.InferResult]) -> str:
    return "".join(value(result, "text_output") for result in results)


class Stream:
    """A gRPC stream, as most clients use it."""

    def __init__(self, address: str) -> None:
        self._client = grpcclient.InferenceServerClient(address)
        self._found: queue.Queue[grpcclient.InferResult | InferenceServerException] = queue.Queue()
        # Never with the header triton_grpc_error: errors of such streams end Triton 2.51 with SIGSEGV now and then.
        self._client.start_stream(lambda result, error: self._found.put(error or result))

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        self._client.close()

    def cancel(self) -> None:
        self._client.stop_stream(cancel_requests=True)

    def send(self, *inputs: grpcclient.InferInput, model: str = "ensemble", **options: Any) -> None:
        self._client.async_stream_infer(model, list(inputs), **options)

    def next(self, seconds: float = SECONDS) -> grpcclient.InferResult:
        """The next response; raises what the server says is wrong, and queue.Empty when it says nothing."""
        found = self._found.get(timeout=seconds)
        if isinstance(found, InferenceServerException):
            raise found
        return found

    def rest(self) -> list[grpcclient.InferResult]:
        """Responses up to the one with a finish reason."""
        results = [self.next()]
        while not value(results[-1], "finish_reason"):
            results.append(self.next())
        return results

    def is_silent(self, seconds: float = 0.5) -> bool:
        """Whether nothing more comes."""
        try:
            self.next(seconds)
        except queue.Empty:
            return True
        return False


def read_metrics(url: str) -> dict[Series, float]:
    """Value of each metric, by name and labels."""
    with urlopen(url, timeout=SECONDS) as response:
        text = response.read().decode()
    return samples(text)


def metric(url: str, name: str, **labels: str) -> float:
    """Value of a metric, 0 as long as nothing has been counted."""
    return read_metrics(url).get((name, frozenset(labels.items())), 0.0)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


class Busy(Protocol):
    """What is used of a server that is filled."""

    @property
    def grpc_address(self) -> str: ...
    @property
    def metrics_url(self) -> str: ...
    @property
    def max_rows(self) -> int: ...
    @property
    def max_waiting(self) -> int: ...


def endless(stream: bool = True) -> list[grpcclient.InferInput]:
    """A request that is still decoded when the test has seen what it wants."""
    return [
        tensor("text_input", "BYTES", "Once upon a time"),
        tensor("max_tokens", "INT32", 1000),
        tensor("ignore_eos", "BOOL", True),
        tensor("stream", "BOOL", stream),
    ]


@contextmanager
def full(server: Busy) -> Iterator[None]:
    """The server with all rows taken and its queue full, by requests that leave at the end."""
    with ExitStack() as stack:
        for _ in range(server.max_rows + server.max_waiting):
            stack.enter_context(Stream(server.grpc_address)).send(*endless())
        wait_until(
            lambda: metric(server.metrics_url, "ssv_requests_waiting") == server.max_waiting, "the queue is full"
        )
        yield


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
