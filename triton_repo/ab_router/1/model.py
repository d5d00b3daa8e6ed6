"""Triton's view of `ssv.ab.router`."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from ssv.ab.router import METRICS, Outcome, Router
from ssv.ab.routing import Routing
from ssv.runtime.request import RequestError
from ssv.runtime.serving.intake import declared_inputs, parameter_tensors
from ssv.runtime.serving.log import log_to_stderr
from ssv.runtime.serving.pieces import error_text


class TritonPythonModel:
    """The model that routes requests to the arms of a comparison."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads the arms from the model's config, and connects to them in a thread of its own."""
        log_to_stderr()
        given = {n: entry["string_value"] for n, entry in json.loads(args["model_config"])["parameters"].items()}
        routing = Routing.model_validate_json(given["routing"])
        # The server's library does not bear calls from two threads at a time.
        self._ipc = threading.Lock()
        self._metrics = _Metrics(self._ipc, routing)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ssv router", daemon=True)
        self._thread.start()
        certificate = Path(given["certificate"]) if given["certificate"] else None
        self._router = self._run(self._make_router(routing, given["own_url"], certificate))

    async def _make_router(self, routing: Routing, own_url: str, certificate: Path | None) -> Router:
        return Router(
            routing,
            own_url,
            certificate=certificate,
            on_outcome=self._metrics.ended,
            on_fallback=self._metrics.fallen,
        )

    def execute(self, requests: list[Any]) -> None:
        """Hands each request to the router, which answers it from its thread; one whose parameters cannot be is refused
        at once."""
        for request in requests:
            live = _Request(request, self._ipc)
            try:
                live.take_parameters()
            except RequestError as error:
                live.fail(error_text("INVALID_ARGUMENT", error))
            else:
                asyncio.run_coroutine_threadsafe(self._router.serve(live), self._loop)

    def finalize(self) -> None:
        """Closes the router, and ends its thread."""
        self._run(self._router.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


class _Request:
    """A `LiveRequest` of Triton's."""

    def __init__(self, request: Any, ipc: threading.Lock) -> None:
        self._request, self._sender, self._ipc = request, request.get_response_sender(), ipc
        self.id = request.request_id()
        found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in (*declared_inputs(), "ssv_user")}
        tensors = {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}
        user = tensors.pop("ssv_user", None)
        self.user = user.reshape(-1)[0].decode(errors="replace") if user is not None and user.size else None
        self.tensors: Mapping[str, np.ndarray] = tensors
        self._is_over = False

    def take_parameters(self) -> None:
        """Has what came beside the tensors go to the arm with them.

        Raises:
            RequestError: it is unknown, or was sent as a tensor too.
        """
        given = parameter_tensors(json.loads(self._request.parameters()))
        if twice := sorted(given.keys() & self.tensors.keys()):
            raise RequestError(f"{twice[0]} is given twice, as an input and as a parameter", "give it once")
        self.tensors = {**self.tensors, **given}

    def send(self, outputs: Mapping[str, np.ndarray], arm: str, is_last: bool) -> None:
        labelled = {**outputs, "ssv_arm": np.array([[arm.encode()]], dtype=np.object_)}
        self._send(pb_utils.InferenceResponse([pb_utils.Tensor(n, array) for n, array in labelled.items()]), is_last)

    def fail(self, message: str) -> None:
        self._send(pb_utils.InferenceResponse(error=pb_utils.TritonError(message)), True)

    def is_cancelled(self) -> bool:
        if self._is_over:  # asked of a request that has had its last response, the server crashes (Triton 2.51)
            return False
        with self._ipc:
            return self._request.is_cancelled()

    def _send(self, response: Any, is_last: bool) -> None:
        self._is_over = self._is_over or is_last
        with self._ipc:
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0)


class _Metrics:
    """The arms' metrics."""

    def __init__(self, ipc: threading.Lock, routing: Routing) -> None:
        self._ipc, self._arms = ipc, tuple(routing.arms)
        kinds = pb_utils.MetricFamily
        self._families = {n: kinds(name=n, description=d, kind=kinds.COUNTER) for n, d in METRICS.items()}
        self._fallback = kinds(name="ssv_ab_fallback", description="1 for an arm out of service", kind=kinds.GAUGE)
        self._gauges = {arm: self._fallback.Metric(labels={"arm": arm}) for arm in self._arms}
        self._metrics: dict[tuple[str, ...], Any] = {}

    def ended(self, outcome: Outcome) -> None:
        role = "shadow" if outcome.is_shadow else "live"
        with self._ipc:
            for name, value in outcome.counts().items():
                labels = {"arm": outcome.arm, "role": role}
                if name == "ssv_ab_requests":
                    labels["reason"] = "error" if outcome.error else outcome.finish_reason
                key = (name, *labels.values())
                if key not in self._metrics:
                    self._metrics[key] = self._families[name].Metric(labels=labels)
                self._metrics[key].increment(value)

    def fallen(self, arms: Mapping[str, str]) -> None:
        with self._ipc:
            for arm in self._arms:
                self._gauges[arm].set(float(arm in arms))
