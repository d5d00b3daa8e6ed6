"""Requests that come at the same moment are not held back before they get to the models."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Protocol

from triton_asks import Stream, metric, tensor

BURST = 8
MODEL = {"model": "preprocessing", "version": "1"}
COMPUTE = ("compute_input", "compute_infer", "compute_output")


class Server(Protocol):
    grpc_address: str
    metrics_url: str


def test_nothing_waits_before_preprocessing_but_for_those_ahead(server: Server) -> None:
    """A queue of Triton's that is served as it should be holds a request for as long as the model works for those ahead
    of it, on a machine of any speed: in a burst of n that is (n - 1) / 2 times what the model takes for one, in the
    mean. Triton's dynamic batching held some for half a second more, a hundred times that.
    """

    def microseconds(*names: str) -> float:
        return sum(metric(server.metrics_url, f"nv_inference_{name}_duration_us", **MODEL) for name in names)

    queued, computed = microseconds("queue"), microseconds(*COMPUTE)
    with ExitStack() as stack:
        streams = [stack.enter_context(Stream(server.grpc_address)) for _ in range(BURST)]
        for _ in range(10):
            start = threading.Barrier(BURST)

            def ask(stream: Stream, start: threading.Barrier = start) -> None:
                start.wait()
                stream.send(tensor("text_input", "BYTES", "Once upon a time"), tensor("max_tokens", "INT32", 2))

            threads = [threading.Thread(target=ask, args=(stream,)) for stream in streams]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for stream in streams:
                stream.rest()
    queued, computed = microseconds("queue") - queued, microseconds(*COMPUTE) - computed
    assert 0 < queued < BURST * computed
