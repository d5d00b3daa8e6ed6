"""Triton's view of `ssv.runtime.serving.service`."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from ssv.bundle.manifest import read_manifest
from ssv.runtime.methods import policy_of
from ssv.runtime.request import Audit, Chunk, Request, RequestError
from ssv.runtime.serving.config import ServerConfig
from ssv.runtime.serving.control import ControlReceiver
from ssv.runtime.serving.intake import Settings
from ssv.runtime.serving.live_audit import LiveAudit, promises_of
from ssv.runtime.serving.log import log_event, log_to_stderr
from ssv.runtime.serving.metrics import DRAINING, Metrics, boards_folder
from ssv.runtime.serving.pieces import Answer, Piece, error_text
from ssv.support.imports import collecting_later

with collecting_later():
    import torch

    from ssv.runtime.decode.generator import Load
    from ssv.runtime.decode.scheduler import QueueFull
    from ssv.runtime.llm import LLM
    from ssv.runtime.memory import keep_large_blocks
    from ssv.runtime.serving.service import Service, ServiceError

log = logging.getLogger("ssv.server")

PROBE_SECONDS = 0.25
"""After so long without a response a request asks whether its client is still there; see `Piece`."""

GPU_SECONDS = 1.0
"""Between two looks at what the GPU holds, which take as long as a round."""

EXIT_ENGINE_FAILED = 70


class TritonPythonModel:
    """The model that decodes."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the bundle of the model's config, and starts the service, which decodes in a thread of its own."""
        log_to_stderr()
        keep_large_blocks()
        config = ServerConfig.from_model_config(json.loads(args["model_config"]))
        # In a thread that ends, and takes the OpenMP threads with it that it has started: with those of the service's
        # thread they would be more than there are cores, and OpenMP then puts threads to sleep after every product,
        # which makes decoding three times slower.
        with ThreadPoolExecutor(1) as loader:
            self._llm = loader.submit(_load, config).result()
        self._streams = _Streams(config.stream_interval_ms / 1000, config.responses_per_s)
        # The server's library does not bear calls from two threads at a time.
        self._ipc = threading.Lock()
        self._metrics = Metrics(boards_folder(), "ssv")
        promises = promises_of(read_manifest(config.bundle, verify=False), self._llm.precision)
        state = Path(config.audit_state) if config.audit_state else None
        self._live_audit = LiveAudit(promises, state, on_change=self._metrics.stands)
        self._has_failed, self._gpu_seen = False, -math.inf
        self._sinks: weakref.WeakValueDictionary[str, _Sink] = weakref.WeakValueDictionary()
        self._service = Service(
            self._llm,
            max_waiting=config.max_waiting,
            prompt_cache_bytes=config.prompt_cache_mb << 20,
            audit_share=config.audit_share,
            on_finish=lambda chunk, method: self._metrics.finished(method, str(chunk.finish_reason), chunk.counters),
            on_audit=self._audited,
            on_round=self._round,
            on_death=self._die,
        )
        self._metrics.load(self._service.load)
        self._show_gpu()
        self._control = ControlReceiver(os.getppid(), self._cancel, self._drain, self._live_audit.reset)
        log_event(log, "ready", bundle=config.bundle, rows=config.max_rows, threads=torch.get_num_threads())

    def execute(self, requests: list[Any]) -> None:
        """Gives requests to the service, whose thread answers them; one that it does not take is refused at once."""
        for request in requests:
            sink = _Sink(request, self._llm, self._live_audit, self._ipc, self._streams, self._metrics)
            self._sinks[sink.key] = sink
            self._metrics.taken(sink.request.method)
            try:
                self._service.submit(sink.request, sink)
            except QueueFull as error:
                sink.refuse(error, "full")
            except ServiceError as error:
                sink.refuse(error, "starting" if self._has_failed else "draining")

    def finalize(self) -> None:
        """Has what runs finish, for five seconds at most, and closes the audit."""
        self._service.drain(timeout=5.0)
        self._live_audit.close()

    def _round(self, load: Load) -> None:
        self._streams.num = load.decoding
        self._metrics.load(load)
        self._show_gpu()

    def _show_gpu(self) -> None:
        if time.monotonic() - self._gpu_seen < GPU_SECONDS:
            return
        if (use := self._llm.gpu_use()) is not None:
            self._metrics.gpu(use)
        self._gpu_seen = time.monotonic()

    def _audited(self, audit: Audit, method: str, tokens: int) -> None:
        self._metrics.audited(audit, method, tokens)
        self._live_audit.take(audit, method, tokens)

    def _cancel(self, key: str) -> None:
        if (sink := self._sinks.get(key)) is not None:
            sink.cancelled = True

    def _drain(self) -> None:
        log_event(log, "draining")
        self._service.refuse(DRAINING)

    def _die(self, error: Exception) -> None:
        # Nothing of an engine that has failed can be trusted. Who supervises the server sees the process end.
        self._has_failed = True
        log_event(log, "engine failed", level=logging.ERROR, error=error)
        self._metrics.load(self._service.load, alive=False)
        time.sleep(1.0)  # the errors shall reach their clients
        os._exit(EXIT_ENGINE_FAILED)


def _load(config: ServerConfig) -> LLM:
    on_gpu = config.device == "cuda" and config.engine == "torch"
    llm = LLM.load(
        config.bundle,
        engine=config.engine,
        precision=config.precision or None,
        device=config.device,
        max_batch=config.max_rows,
        max_length=config.max_length,
        prefill_chunk=config.prefill_chunk or None,
        threads=config.threads or None,
        tensor_parallel=config.tensor_parallel,
        gpu_memory_share=config.gpu_memory_share if on_gpu else None,
        gpu_memory_spare=config.prompt_cache_mb << 20,
        verified=json.loads(config.verified or "{}"),
    )
    llm.know_costs()  # before there are requests: see there
    return llm


class _Streams:
    """How often a stream may have a response: seldom enough that all together do not take the cores from the engines.

    Attributes:
        num: streams that decode now.
    """

    def __init__(self, interval: float, responses_per_s: int) -> None:
        self._interval, self._responses_per_s = interval, responses_per_s
        self.num = 0

    @property
    def interval(self) -> float:
        return max(self._interval, self.num / self._responses_per_s) if self._responses_per_s else self._interval


class _Sink:
    """Sends a request's output to its client."""

    def __init__(
        self,
        request: Any,
        llm: LLM,
        live_audit: LiveAudit,
        ipc: threading.Lock,
        streams: _Streams,
        metrics: Metrics,
    ) -> None:
        self._sender, self._ipc, self._id = request.get_response_sender(), ipc, request.request_id()
        self._streams, self._metrics = streams, metrics
        self.key, self.cancelled, self._sent_at = secrets.token_hex(16), False, time.monotonic()
        asked = Settings.from_json(pb_utils.get_input_tensor_by_name(request, "settings").as_numpy()[0, 0])
        settings = replace(asked, method=live_audit.method_for(asked.method))
        withdrawn_tier = asked.method if settings.method != asked.method else ""
        prompt_ids = pb_utils.get_input_tensor_by_name(request, "prompt_ids").as_numpy()[0]
        arrived = self._sent_at
        deadline = None if settings.timeout is None else arrived + settings.timeout
        self.request = Request(
            tuple(prompt_ids.tolist()),
            settings.method,
            settings.params,
            policy=settings.policy,
            deadline=deadline,
            arrived=arrived,
        )
        lossless = policy_of(self.request, llm.tiers).lossless_for(greedy=settings.params.greedy)
        ids = self.request.prompt_ids
        self._answer = Answer(self.key, settings, lossless, llm.tokenizer.context(ids), ids[0], withdrawn_tier)

    def is_cancelled(self) -> bool:
        if time.monotonic() - self._sent_at > PROBE_SECONDS:
            self._send_piece(self._answer.probe())
        return self.cancelled

    def send(self, chunk: Chunk) -> None:
        if (piece := self._answer.piece(chunk, time.monotonic(), self._streams.interval)) is not None:
            self._send_piece(piece)
        if chunk.finish_reason is not None:
            self._log(logging.INFO, reason=chunk.finish_reason, **chunk.counters.to_dict())

    def fail(self, error: Exception) -> None:
        """Tells the client of a request that had been taken."""
        if isinstance(error, QueueFull):
            self.refuse(error, "full")
        elif isinstance(error, RequestError):
            self._metrics.withdrawn(self.request.method)
            self._metrics.invalid()
            self._send_error("INVALID_ARGUMENT", pb_utils.TritonError.INVALID_ARG, error)
            self._log(logging.WARNING, reason="invalid", error=error)
        else:
            self._metrics.ended(self.request.method, "error")
            self._send_error("UNAVAILABLE", pb_utils.TritonError.UNAVAILABLE, error)
            self._log(logging.ERROR, reason="error", error=error)

    def refuse(self, error: Exception, reason: str) -> None:
        """Tells the client of a request that is not taken; why is one of `ssv.runtime.serving.metrics.REFUSALS`."""
        self._metrics.withdrawn(self.request.method)
        self._metrics.refused(reason)
        self._send_error("UNAVAILABLE", pb_utils.TritonError.UNAVAILABLE, error)
        self._log(logging.WARNING, reason="refused", error=error)

    def _send_error(self, status: str, code: int, error: Exception) -> None:
        text = error_text(status, error)
        self._send(pb_utils.InferenceResponse(error=pb_utils.TritonError(text, code)), True)

    def _send_piece(self, piece: Piece) -> None:
        tensor = pb_utils.Tensor("piece", np.array([[piece.to_json().encode()]], dtype=np.object_))
        self._send(pb_utils.InferenceResponse([tensor]), piece.is_last)

    def _send(self, response: Any, is_last: bool) -> None:
        self._sent_at = time.monotonic()
        with self._ipc:
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0)

    def _log(self, level: int, **fields: object) -> None:
        log_event(log, "request", level=level, id=self._id, key=self.key, tier=self.request.method, **fields)
