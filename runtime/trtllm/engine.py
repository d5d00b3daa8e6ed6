"""Requests over TensorRT-LLM's LLM API: target, cache and batches are TensorRT-LLM's.

Written to its published interface: `tensorrt_llm.LLM` and `tensorrt_llm.llmapi` (`KvCacheConfig`, `SamplingParams`,
`UserProvidedDecodingConfig`, `RequestOutput` with `outputs[0].token_ids`, `finish_reason`, `request_perf_metrics` and
`decoding_iter`, and `abort`), reference pages of 1.3.0rc26 to 1.4.0rc4.

TensorRT-LLM judges every drafted token, and its sampler has noise of its own: the text of a seed is not the one that
this project's engines give.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch

from ssv.bundle.manifest import Manifest
from ssv.bundle.policy import RESERVED_LENGTH, Policy
from ssv.runtime.decode.costs import place
from ssv.runtime.engines.contract import EngineError
from ssv.runtime.request import Request, RequestError, SamplingParams
from ssv.runtime.trtllm.hosted import Gain, HostedGenerator
from ssv.runtime.trtllm.install import load_trtllm

TIER = "premium"

CACHE_SHARE = 0.8
"""Of the memory that is free once the target is loaded, for its cache: the draft is loaded after it."""

MOST_DRAFTED = 8
"""Tokens of a draft, at most: a pass is always as wide as the longest draft may be."""

_UNSET = SamplingParams()
_REFUSED = {
    "min_p": "its sampler is not asked for it here",
    "repetition_penalty": "its speculative sampling has no penalties",
    "presence_penalty": "its speculative sampling has no penalties",
    "frequency_penalty": "its speculative sampling has no penalties",
    "logit_bias": "its sampler is not asked for it here",
    "bad_token_ids": "its sampler is not asked for it here",
    "grammar": "outputs of a given form are made by this project's engines alone",
    "logprobs": "it gives none with speculative decoding",
    "prompt_logprobs": "it gives none with speculative decoding",
    "fates": "it tells how many drafted tokens were kept, and not which",
}
"""Settings of a request that are not handed on, and why."""


class TrtllmEngine:
    """A bundle's target in TensorRT-LLM, with the bundle's draft beside it: a `StreamingEngine`.

    Attributes:
        max_rows, max_length, vocab_size: requests at a time, tokens of prompt and output together, and the target's
            vocabulary.
        eos_ids: tokens that end an output.
        methods: what it decodes by.
        place: where it runs, as the key of a profile.
    """

    methods: tuple[str, ...] = (TIER,)

    def __init__(
        self, bundle: Path, manifest: Manifest, *, max_rows: int, max_length: int, tensor_parallel: int
    ) -> None:
        """Starts the engine.

        Args:
            max_length: cut to what target and draft have positions for.
            tensor_parallel: GPUs that share the target.

        Raises:
            TrtllmError: TensorRT-LLM is missing or another version.
            EngineError: it cannot do what the bundle asks for.
        """
        if manifest.draft["kind"] != "standalone":
            raise EngineError(
                "the bundle's draft takes hidden states of the target, which TensorRT-LLM hands to no drafter but its "
                "own",
                "let TensorRT-LLM run the draft (`ssv-build export trtllm`), or build the bundle with a standalone "
                "draft",
            )
        if TIER not in manifest.tiers:
            raise EngineError(f"the bundle has no tier {TIER!r}", "calibrate it with `ssv-build calibrate`")
        if (heads := manifest.target["num_heads"]) % tensor_parallel:
            raise EngineError(f"{heads} attention heads cannot be shared by {tensor_parallel} GPUs", "choose a divisor")
        trtllm = load_trtllm()
        from ssv.runtime.trtllm.drafter import Settings, SsvDrafter, SsvResources

        positions = min(int(spec["max_positions"]) for spec in (manifest.target, manifest.draft["decoder"]))
        self.max_rows, self.max_length = max_rows, min(max_length, positions - RESERVED_LENGTH)
        self.vocab_size, self.eos_ids = int(manifest.target["vocab_size"]), frozenset(manifest.eos_token_ids)
        self._loop: asyncio.AbstractEventLoop | None = None
        most = min(manifest.policies[TIER].max_pending, MOST_DRAFTED)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.place = place(f"tensorrt_llm tp{tensor_parallel}", "bf16", device, 1)
        costs = manifest.profiles.get(self.place)
        drafter = SsvDrafter(Settings(bundle.resolve(), TIER, most, max_rows, self.max_length, costs, device))
        api = trtllm.llmapi
        self._params = trtllm.SamplingParams
        self._llm = trtllm.LLM(
            model=str(bundle.resolve() / "target"),
            skip_tokenizer_init=True,
            tensor_parallel_size=tensor_parallel,
            max_batch_size=max_rows,
            max_seq_len=self.max_length + most + 1,
            disable_overlap_scheduler=True,  # a drafter of a user's needs the text of the step before
            kv_cache_config=api.KvCacheConfig(free_gpu_memory_fraction=CACHE_SHARE),
            speculative_config=api.UserProvidedDecodingConfig(
                max_draft_len=most, drafter=drafter, resource_manager=SsvResources(drafter, max_rows)
            ),
        )

    def generator(self, max_waiting: int | None) -> HostedGenerator:
        """Who decodes; there may be one at a time."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="ssv TensorRT-LLM", daemon=True).start()
        return HostedGenerator(self, self._loop, max_waiting)

    def check(self, request: Request, policy: Policy) -> None:
        """Raises RequestError if a request cannot run here."""
        params, prompt_ids = request.params, request.prompt_ids
        if request.method != TIER or not policy.lossless or request.policy is not None:
            raise RequestError(
                f"{request.method}: TensorRT-LLM judges every drafted token, and drafts for every request alike: here "
                f"is {TIER} alone",
                f"ask for {TIER}, or serve the bundle with another engine",
            )
        for name, why in _REFUSED.items():
            if getattr(params, name) != getattr(_UNSET, name):
                raise RequestError(f"{name} cannot be had from TensorRT-LLM: {why}", "leave it out")
        if not prompt_ids:
            raise RequestError("the prompt is empty")
        if not all(0 <= token < self.vocab_size for token in (*prompt_ids, *params.stop_token_ids)):
            raise RequestError(f"there are token ids outside the target's vocabulary of {self.vocab_size}")
        if len(prompt_ids) + params.max_tokens > self.max_length:
            raise RequestError(
                f"prompt of {len(prompt_ids)} tokens and max_tokens {params.max_tokens} exceed the cache of "
                f"{self.max_length}",
                "shorten one of them or load with a larger max length",
            )

    def start(self, request: Request) -> _Stream:
        """Takes a request; called in the event loop."""
        sampling = self._sampling(request.params)
        return _Stream(self._llm.generate_async(list(request.prompt_ids), sampling, streaming=True))

    def _sampling(self, params: SamplingParams) -> Any:
        ends = sorted(self.eos_ids)
        settings: dict[str, Any] = {} if params.greedy else {"temperature": params.temperature, "seed": params.seed}
        if not params.greedy:
            settings |= {"top_p": params.top_p, "top_k": params.top_k}
        return self._params(
            **settings,
            max_tokens=params.max_tokens,
            min_tokens=max(params.min_tokens, 1),
            end_id=ends[0],
            ignore_eos=params.ignore_eos,
            stop_token_ids=[*(() if params.ignore_eos else ends), *params.stop_token_ids] or None,
            include_stop_str_in_output=True,  # the token that ends an output counts as one of it
            detokenize=False,
            return_perf_metrics=True,
        )


class _Stream:
    """A `RequestOutput` that streams, as what the request gains."""

    def __init__(self, output: Any) -> None:
        self._output = output

    async def __aiter__(self) -> AsyncIterator[Gain]:
        seen = 0
        async for output in self._output:
            first = output.outputs[0]
            gained = list(first.token_ids[seen:])
            seen = len(first.token_ids)
            if not output.finished:
                yield Gain(gained)
                continue
            # Of drafted tokens the metrics tell; the prompt's own step counts as the first.
            drafts = getattr(first.request_perf_metrics, "speculative_decoding", None)
            judged = drafts.total_draft_tokens if drafts is not None else 0
            accepted = drafts.total_accepted_draft_tokens if drafts is not None else 0
            yield Gain(gained, first.finish_reason, max(output.decoding_iter - 1, 0), judged, accepted)

    def abort(self) -> None:
        self._output.abort()
