"""TensorRT-LLM as far as `ssv.runtime.trtllm` sees it, written from its published interface: names, arguments, fields
of requests and the order of the calls. What it does not have is an error, as there.

The interface is that of the reference pages of 1.3.0rc26 to 1.4.0rc4 (`LLM`, `SamplingParams`, `KvCacheConfig`,
`UserProvidedDecodingConfig`, `RequestOutput`) and of main between them (`Drafter`, `BaseResourceManager`, `LlmRequest`,
`ScheduledRequests`, and what `PyExecutor` calls when).

The target is this project's own engine on the CPU, in fp32, a token after another. Requests are preempted now and then:
they are paused, lose their resources, and come back with the text that they had.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, final
from unittest.mock import patch

import torch

from ssv.model.checkpoint import load_checkpoint
from ssv.model.decoder import Decoder
from ssv.runtime.engines.torch_engine import target_engine

VERSION = "1.4.0rc1"


class LlmRequest:
    """`tensorrt_llm._torch.pyexecutor.llm_request.LlmRequest`."""

    def __init__(self, number: int, tokens: Sequence[int], max_new_tokens: int, is_dummy: bool = False) -> None:
        self.py_request_id = self.request_id = number
        self._tokens = list(tokens)
        self.py_orig_prompt_len, self.py_max_new_tokens = len(tokens), max_new_tokens
        self.py_draft_tokens: list[int] = []
        self.py_batch_idx: int | None = None
        self.is_dummy = is_dummy

    def get_tokens(self, beam: int) -> list[int]:
        assert beam == 0
        return list(self._tokens)

    def add_new_token(self, token: int, beam: int) -> None:
        assert beam == 0
        self._tokens.append(token)


@dataclass
class ScheduledRequests:
    """`tensorrt_llm._torch.pyexecutor.scheduler.ScheduledRequests`."""

    context_requests: list[LlmRequest] = field(default_factory=list)
    generation_requests: list[LlmRequest] = field(default_factory=list)
    paused_requests: list[LlmRequest] = field(default_factory=list)


class BaseResourceManager(ABC):
    """`tensorrt_llm._torch.pyexecutor.resource_manager.BaseResourceManager`."""

    @abstractmethod
    def get_max_resource_count(self) -> int: ...

    @abstractmethod
    def get_needed_resource_to_completion(self, request: LlmRequest) -> int: ...

    def prepare_resources(self, scheduled_batch: ScheduledRequests) -> None:
        return None

    def update_resources(self, scheduled_batch: ScheduledRequests) -> None:
        return None

    def free_resources(self, request: LlmRequest) -> None:
        return None


class Drafter(ABC):
    """`tensorrt_llm._torch.speculative.drafter.Drafter`."""

    _needs_padding_kv_extension = False

    def __init__(
        self,
        max_draft_len: int | None = None,
        max_total_draft_tokens: int | None = None,
        max_concurrency: int | None = None,
        draft_len_schedule: dict[int, int] | None = None,
    ) -> None:
        self.max_draft_len, self.max_total_draft_tokens = max_draft_len, max_total_draft_tokens
        self._static_max_total_draft_tokens = max_total_draft_tokens
        self.max_concurrency, self.draft_len_schedule = max_concurrency, draft_len_schedule

    @abstractmethod
    def prepare_draft_tokens(
        self, scheduled_requests: ScheduledRequests, resource_manager: object | None = None
    ) -> None: ...

    @final
    def should_use_spec_decode(
        self, requests: list[LlmRequest], max_batch_size: int, max_num_tokens: int, max_total_draft_tokens: int
    ) -> bool:
        if self.max_concurrency is None:
            return True
        most = min(len(requests), max_batch_size, max_num_tokens // (1 + max_total_draft_tokens))
        return most <= self.max_concurrency

    @final
    def pad_draft_tokens_for_cuda_graph(
        self, scheduled_requests: ScheduledRequests, resource_manager: object | None = None
    ) -> None:
        assert self._needs_padding_kv_extension, "the cache would be taken back beyond what it has"
        for request in scheduled_requests.generation_requests:
            assert self._static_max_total_draft_tokens is not None
            missing = self._static_max_total_draft_tokens - len(request.py_draft_tokens)
            assert missing >= 0, "more is drafted than there is room for"
            request.py_draft_tokens.extend([0] * missing)


@dataclass
class KvCacheConfig:
    """`tensorrt_llm.llmapi.KvCacheConfig`, the fields that are set here."""

    free_gpu_memory_fraction: float = 0.9
    enable_block_reuse: bool = True


@dataclass
class UserProvidedDecodingConfig:
    """`tensorrt_llm.llmapi.UserProvidedDecodingConfig`."""

    max_draft_len: int
    drafter: Drafter
    resource_manager: BaseResourceManager | None = None


@dataclass(kw_only=True)
class SamplingParams:
    """`tensorrt_llm.SamplingParams`, the fields that are set here."""

    end_id: int | None = None
    max_tokens: int = 32
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    return_perf_metrics: bool = False


@dataclass
class _Drafts:
    total_draft_tokens: int = 0
    total_accepted_draft_tokens: int = 0
    acceptance_rate: float = 0.0


@dataclass
class _Metrics:
    speculative_decoding: _Drafts


@dataclass
class CompletionOutput:
    """`tensorrt_llm.llmapi.CompletionOutput`."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    request_perf_metrics: _Metrics | None = None


class RequestOutput:
    """`tensorrt_llm.llmapi.RequestOutput`: iterates over itself, as it grows."""

    def __init__(self, llm: LLM, number: int) -> None:
        self.request_id, self.outputs, self.finished, self.decoding_iter = number, [CompletionOutput()], False, 0
        self._llm, self._loop = llm, asyncio.get_running_loop()  # asynchronous use needs the loop from the beginning
        self._news: asyncio.Queue[dict[str, Any] | Exception] = asyncio.Queue()

    def tell(self, news: dict[str, Any] | Exception) -> None:
        """From the executor's thread."""
        self._loop.call_soon_threadsafe(self._news.put_nowait, news)

    def abort(self) -> None:
        self._llm.executor.abort(self.request_id)

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        while not self.finished:
            news = await self._news.get()
            if isinstance(news, Exception):
                raise news
            output = self.outputs[0]
            output.token_ids = output.token_ids + news["tokens"]
            self.decoding_iter, output.finish_reason = news["iteration"], news["reason"]
            self.finished = output.finish_reason is not None
            if self.finished and self._llm.executor.params[self.request_id].return_perf_metrics:
                output.request_perf_metrics = _Metrics(news["drafts"])
            yield self


class PyExecutor:
    """The order of the calls of `tensorrt_llm._torch.pyexecutor.py_executor.PyExecutor`, in a thread.

    Attributes:
        error: raised in the next step.
        passes: width of each target pass, drafts and padding included, by request.
        paused: requests that were preempted, so far.
        aborted: requests that were aborted while they ran.
        stops: it is to end.
    """

    def __init__(self, model: str, config: UserProvidedDecodingConfig, max_batch: int, pause_every: int) -> None:
        spec, weights = load_checkpoint(Path(model))
        decoder = Decoder.from_weights(spec, weights)
        self._target = target_engine(decoder, precision="fp32", max_batch=1, max_length=256)
        self._drafter, self._resources, self._max_batch = config.drafter, config.resource_manager, max_batch
        self._pause_every, self._iteration = pause_every, 0
        self.params: dict[int, SamplingParams] = {}
        self.error: Exception | None = None
        self.passes: list[int] = []
        self.paused, self.aborted, self.stops = 0, [], False
        self._active: dict[int, tuple[LlmRequest, RequestOutput, _Drafts, list[int]]] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, prompt: Sequence[int], params: SamplingParams, output: RequestOutput) -> None:
        with self._lock:
            self.params[output.request_id] = params
            request = LlmRequest(output.request_id, prompt, params.max_tokens)
            self._active[output.request_id] = (request, output, _Drafts(), [0])

    def abort(self, number: int) -> None:
        with self._lock:
            if (entry := self._active.pop(number, None)) is not None:
                self.aborted.append(number)
                self._free(entry[0])
                entry[1].tell({"tokens": [], "iteration": entry[3][0], "reason": "cancelled", "drafts": entry[2]})

    def _run(self) -> None:
        while not self.stops:
            with self._lock:
                if self._active:
                    try:
                        self._step()
                    except Exception as error:
                        for _, output, _, _ in self._active.values():
                            output.tell(error)
                        self._active.clear()
            time.sleep(0.0005)

    def _free(self, request: LlmRequest) -> None:
        if self._resources is not None:
            self._resources.free_resources(request)

    def _step(self) -> None:
        if self.error is not None:
            raise self.error
        self._iteration += 1
        scheduled = ScheduledRequests()
        for number, (request, _, _, iterations) in list(self._active.items())[: self._max_batch]:
            if iterations[0] and self._pause_every and (self._iteration + number) % self._pause_every == 0:
                scheduled.paused_requests.append(request)
                self._free(request)
                self.paused += 1
            else:
                (scheduled.generation_requests if iterations[0] else scheduled.context_requests).append(request)
        most = self._drafter._static_max_total_draft_tokens or 0
        active = [entry[0] for entry in self._active.values()]
        speculates = self._drafter.should_use_spec_decode(active, self._max_batch, 8192, most)
        for request in scheduled.generation_requests:
            request.py_draft_tokens = [0] * most if speculates else []
        if self._resources is not None:
            self._resources.prepare_resources(scheduled)
        drafts: dict[int, list[int]] = {}
        if speculates:
            self._drafter.prepare_draft_tokens(scheduled, object())
            drafts = {request.py_request_id: list(request.py_draft_tokens) for request in scheduled.generation_requests}
            self._drafter.pad_draft_tokens_for_cuda_graph(scheduled, object())
        for request in (*scheduled.context_requests, *scheduled.generation_requests):
            self._forward(request, drafts.get(request.py_request_id, []))
        if self._resources is not None:
            self._resources.update_resources(scheduled)

    def _forward(self, request: LlmRequest, draft: list[int]) -> None:
        """What of a draft the target chooses too, and a token of its own."""
        _, output, counts, iterations = self._active[request.py_request_id]
        params, gained, reason = self.params[request.py_request_id], [], None
        iterations[0] += 1
        self.passes.append(1 + len(request.py_draft_tokens))
        for guess in (*draft, None):
            token = self._next(request.get_tokens(0))
            gained.append(token)
            request.add_new_token(token, 0)
            if (token == params.end_id and not params.ignore_eos) or token in (params.stop_token_ids or ()):
                reason = "stop"
                if not params.include_stop_str_in_output and token != params.end_id:
                    gained.pop()
            elif len(request.get_tokens(0)) - request.py_orig_prompt_len >= params.max_tokens:
                reason = "length"
            if reason is not None or token != guess:
                break
            counts.total_accepted_draft_tokens += 1
        counts.total_draft_tokens += len(draft)
        output.tell({"tokens": gained, "iteration": iterations[0], "reason": reason, "drafts": counts})
        if reason is not None:
            del self._active[request.py_request_id]
            self._free(request)

    def _next(self, tokens: Sequence[int]) -> int:
        at, last = torch.zeros(1, dtype=torch.int32), torch.tensor([len(tokens) - 1])
        return int(self._target.step(torch.tensor([tokens]), at, last).logits_RV[0].argmax())


class LLM:
    """`tensorrt_llm.LLM`, with the arguments that are given here, each of them needed.

    Attributes:
        pause_every: steps after which a request is preempted; 0 for never. Of the class.
        made: those made so far. Of the class.
    """

    pause_every = 0
    made: ClassVar[list[LLM]] = []

    def __init__(
        self,
        *,
        model: str,
        skip_tokenizer_init: bool,
        tensor_parallel_size: int,
        max_batch_size: int,
        max_seq_len: int,
        disable_overlap_scheduler: bool,
        kv_cache_config: KvCacheConfig,
        speculative_config: UserProvidedDecodingConfig,
    ) -> None:
        assert skip_tokenizer_init and disable_overlap_scheduler, "a drafter of a user's needs both"
        self.tensor_parallel_size, self.max_seq_len = tensor_parallel_size, max_seq_len
        self.executor = PyExecutor(model, speculative_config, max_batch_size, self.pause_every)
        self._numbers = itertools.count(1)
        LLM.made.append(self)

    def generate_async(
        self, inputs: list[int], sampling_params: SamplingParams | None = None, streaming: bool = False
    ) -> RequestOutput:
        assert streaming and sampling_params is not None
        assert not sampling_params.detokenize, "there is no tokenizer"
        output = RequestOutput(self, next(self._numbers))
        self.executor.add(inputs, sampling_params, output)
        return output


@contextmanager
def installed(found: str | None = VERSION, *, pause_every: int = 0, stub: bool = False) -> Iterator[None]:
    """TensorRT-LLM as if it were installed.

    Args:
        found: its version; None for none.
        stub: the package of the public index, which has nothing in it.
    """
    from importlib.metadata import PackageNotFoundError

    def version(name: str) -> str:
        if name != "tensorrt-llm" or found is None:
            raise PackageNotFoundError(name)
        return found

    modules = {name: ModuleType(name) for name in _CONTENTS}
    for name, contents in {} if stub else _CONTENTS.items():
        for each in contents:
            setattr(modules[name], each.__name__, each)
    root = modules["tensorrt_llm"]
    if not stub:
        root.llmapi = modules["tensorrt_llm.llmapi"]  # type: ignore[attr-defined]
    LLM.pause_every, LLM.made = pause_every, []
    own = "ssv.runtime.trtllm.drafter"
    with patch.dict(sys.modules, modules), patch("ssv.runtime.trtllm.install.version", version):
        sys.modules.pop(own, None)  # its classes are of what is installed
        try:
            yield
        finally:
            sys.modules.pop(own, None)
            for llm in LLM.made:
                llm.executor.stops = True


_CONTENTS: dict[str, tuple[type, ...]] = {
    "tensorrt_llm": (LLM, SamplingParams),
    "tensorrt_llm.llmapi": (KvCacheConfig, UserProvidedDecodingConfig),
    "tensorrt_llm._torch": (),
    "tensorrt_llm._torch.pyexecutor": (),
    "tensorrt_llm._torch.pyexecutor.resource_manager": (BaseResourceManager,),
    "tensorrt_llm._torch.speculative": (),
    "tensorrt_llm._torch.speculative.drafter": (Drafter,),
}
