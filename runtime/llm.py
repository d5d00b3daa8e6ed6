"""A bundle that answers: requests in, text out."""

from __future__ import annotations

import gc
import logging
import math
import os
import reprlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from ssv.bundle.manifest import SCORER, Manifest, read_manifest, unused_files, verify_files
from ssv.bundle.policy import RESERVED_LENGTH, Policy
from ssv.bundle.profile import Costs
from ssv.bundle.survival import Survival
from ssv.model.checkpoint import load_checkpoint, read_safetensors
from ssv.model.decoder import Decoder
from ssv.model.draft import Draft, load_draft, load_draft_head
from ssv.model.heads import read_heads
from ssv.model.scorer import Scorer, load_scorer
from ssv.runtime.counters import GpuUse
from ssv.runtime.decode.costs import DRAFT_SIZES, PASS_SIZES, REPEATS, SECONDS_AT_LOAD, SIZES_AT_LOAD, measure, place
from ssv.runtime.decode.generator import Generator, Host
from ssv.runtime.decode.loop import DecodeLoop
from ssv.runtime.decode.membership import PREFILL_CHUNK, PromptBlock
from ssv.runtime.decode.pace import Pace
from ssv.runtime.decode.prompt_cache import PromptCache
from ssv.runtime.decode.round import DecodeBatch
from ssv.runtime.engines.contract import BlockEngine, Engine, EngineError, HeadsEngine, PromptLane, RoundsEngine
from ssv.runtime.engines.gpu_memory import GpuShare, gpu_use, torch_bytes
from ssv.runtime.engines.heads_on_demand import HeadsOnDemand
from ssv.runtime.engines.tensorrt_engine import choose_entry, load_engine
from ssv.runtime.engines.torch_engine import (
    TorchEngine,
    cpu_threads,
    draft_engine,
    one_thread,
    target_engine,
)
from ssv.runtime.memory import drop_mapped_pages, give_back
from ssv.runtime.methods import TIERS, baselines, policy_of
from ssv.runtime.request import Chunk, Output, Request, RequestError, TokenFate, TokenLogprobs
from ssv.runtime.threads import ThreadCount
from ssv.runtime.tokenizer import BundleTokenizer
from ssv.support.background import begun
from ssv.support.precisions import TORCH_PRECISIONS
from ssv.support.waiting import Say, say_nothing, waiting

log = logging.getLogger(__name__)

EngineName = Literal["torch", "tensorrt", "tensorrt_llm"]
ENGINES: tuple[str, ...] = get_args(EngineName)

GPU_PREFILL_CHUNK, LANE_CHUNK = 512, 64
"""Tokens of a prompt that are run at a time, as more fill a GPU better; and what a cache of prompts keeps at a time
where a lane's steps hold several such chunks."""

CPU_PASS_TOKENS = 8
"""On two cores a target pass of eight tokens costs 1.5 times one of a single token, and each further one a twelfth of
it."""


class LLM:
    """A target and its draft, ready to decode.

    Attributes:
        tokenizer: the bundle's.
        tiers: policies by name.
        limits: largest divergence that each lossy tier's calibration promises.
        max_length: tokens of prompt and output together.
        prefill_chunk: tokens of a prompt that a round runs.
        precision: of target and draft.
        place: where the engines run, as the key of a profile (`ssv.runtime.decode.costs.place`).
        threads: that the engines have at the most.
        rounds: what runs rounds by itself, over the same engines; None where the host runs them all.
        lane: where prompts run beside the rounds; None where rounds wait for them.
        heads: Medusa's; None where the bundle has none, or its engine is TensorRT's.
        costs: of steps here; None as long as nobody knows them (`know_costs`).
        measured: whether they were measured when they were needed, as the bundle has no profile of this place.
        pass_tokens, survival: see `DecodeBatch`.
        grammars: over its vocabulary; None with a tokenizer that cannot say them, or an engine that takes none.
    """

    def __init__(
        self,
        target: Engine,
        draft: Engine | None,
        tokenizer: BundleTokenizer,
        *,
        eos_token_ids: Sequence[int],
        tiers: Mapping[str, Policy],
        max_length: int,
        prefill_chunk: int = PREFILL_CHUNK,
        pass_tokens: int | None = None,
        limits: Mapping[str, float] | None = None,
        precision: str = "",
        place: str = "",
        threads: int = 1,
        costs: Costs | None = None,
        measures_costs: bool = False,
        survival: Survival | None = None,
        heads: HeadsEngine | None = None,
        rounds: RoundsEngine | None = None,
        lane: PromptLane | None = None,
        host: Host | None = None,
    ) -> None:
        """Takes engines that have been loaded; `load` loads a bundle's.

        Args:
            measures_costs: whether costs that are not given are measured when a request needs them.
            rounds: the same engines, where they run rounds by themselves.
            lane: for prompts, beside the rounds.
            host: who decodes in place of the engines.
        """
        self.limits = dict(limits or {})
        self.target, self.draft, self.heads, self.tokenizer = target, draft, heads, tokenizer
        self.rounds, self._host, self._pace, self.lane = rounds, host, Pace(), lane
        self.eos_token_ids, self.tiers, self.max_length = frozenset(eos_token_ids), dict(tiers), max_length
        self.prefill_chunk, self.pass_tokens = prefill_chunk, pass_tokens
        self.precision, self.place, self.threads = precision, place, threads
        self.costs, self.survival = costs, survival
        self._measures_costs, self.measured = measures_costs, False
        self.grammars = tokenizer.grammars(target.vocab_size, eos_token_ids) if host is None else None
        self._streaming = False

    @classmethod
    def load(
        cls,
        bundle: Path | str,
        *,
        engine: EngineName = "torch",
        precision: str | None = None,
        device: str = "cpu",
        max_batch: int = 1,
        max_length: int = 2048,
        prefill_chunk: int | None = None,
        threads: int | None = None,
        tensor_parallel: int = 1,
        gpu_memory_share: float | None = None,
        gpu_memory_spare: int = 0,
        verify: bool = True,
        verified: Mapping[str, str] | None = None,
        say: Say = say_nothing,
    ) -> LLM:
        """Loads a bundle.

        Args:
            engine: `tensorrt` for the bundle's compiled engines, on this machine's GPU; max_batch must not exceed
                theirs, max_length is cut to it. `tensorrt_llm` for TensorRT-LLM, which runs the target in bf16 on one
                or several GPUs, with the bundle's draft beside it if that is a standalone one.
            precision: None for the bundle's default on a CPU and bf16 on CUDA; with `tensorrt`, for whatever is
                compiled.
            max_length: tokens of prompt and output together; cut to what target and draft have positions for.
            prefill_chunk: tokens of a prompt that are run at a time, and that a cache of prompts keeps; None for 64 on
                a CPU, and for 512 on a GPU, of which the cache keeps 64 where kernels are compiled.
            threads: of the torch engine on a CPU; None for as many as there are cores that nobody else uses, which int8
                and int4 follow while they decode. `OMP_NUM_THREADS`, or another number than torch's own set before, is
                kept.
            tensor_parallel: GPUs that share the target, with `tensorrt_llm`.
            gpu_memory_share: of the GPU's whole memory, that this process may take; checked before anything is
                allocated. None for as much as there is. Of the torch engine on CUDA.
            gpu_memory_spare: bytes of that share that are left free, such as for a prompt cache.
            verify: check the hash of every file that is loaded first.
            verified: files that another process has checked (see `verify_files`): those not touched since are not
                hashed again.
            say: called with what is being done.

        Raises:
            BundleError, CheckpointError: the bundle is damaged.
            EngineError: engine, precision or device not to be had, or a size out of range.
            TrtllmError: TensorRT-LLM is missing or another version.
        """
        if not isinstance(bundle, (str, os.PathLike)):
            raise EngineError(f"bundle {bundle!r} must be a path", "give the folder that `ssv-build pair` has made")
        bundle = Path(bundle)
        if engine not in ENGINES:
            raise EngineError(f"engine {engine!r} is unknown; known: {', '.join(ENGINES)}")
        on_cpu = _device_type(device) == "cpu"
        for name, size in (("max_batch", max_batch), ("max_length", max_length), ("prefill_chunk", prefill_chunk)):
            if size is not None and (not isinstance(size, int) or size < 1):
                raise EngineError(f"{name} {size!r} must be a whole number from 1 on")
        if threads is not None and not (engine == "torch" and on_cpu):
            raise EngineError("threads are of the torch engine on a CPU", "leave them out for another engine or device")
        # Before the files are read: while they are, the machine shows how many cores are free.
        thread_count = cpu_threads(threads) if engine == "torch" and on_cpu else None
        if tensor_parallel != 1 and engine != "tensorrt_llm":
            raise EngineError("several GPUs share a target in TensorRT-LLM alone", "use the engine tensorrt_llm")
        share = None
        if gpu_memory_share is not None:
            if engine != "torch" or on_cpu:
                raise EngineError("a share of GPU memory is of the torch engine on CUDA", "leave it out")
            if not 0 < gpu_memory_share <= 1:
                raise EngineError(f"gpu_memory_share {gpu_memory_share!r} must be above 0, and 1 at most")
            share = GpuShare(gpu_memory_share, device, gpu_memory_spare)
        manifest = read_manifest(bundle, verify=False)
        check = partial(verify_files, bundle, manifest, verified=verified or {}, unused=unused_files(manifest, engine))
        if engine == "tensorrt":
            if verify:  # first: TensorRT does not bear every damaged plan
                check(say=say)
            say(f"loading {bundle}")
            return cls._load_tensorrt(bundle, manifest, precision, max_batch, max_length, prefill_chunk)
        if engine == "tensorrt_llm":
            if verify:
                check(say=say)
            say(f"loading {bundle}")
            return cls._load_trtllm(bundle, manifest, precision, max_batch, max_length, prefill_chunk, tensor_parallel)
        say(f"loading {bundle}")
        checked = begun(check) if verify else dict
        try:
            loaded = cls._load_torch(
                bundle, manifest, precision, device, max_batch, max_length, prefill_chunk, thread_count, share, say
            )
        except Exception:
            checked()  # a damaged file is named, rather than what came of it
            raise
        say(f"checking {bundle}")
        checked()
        give_back()  # what tokenizer and hashes were made from
        return loaded

    @classmethod
    def _load_torch(
        cls,
        bundle: Path,
        manifest: Manifest,
        precision: str | None,
        device: str,
        max_batch: int,
        max_length: int,
        prefill_chunk: int | None,
        thread_count: ThreadCount | None,
        share: GpuShare | None,
        say: Say,
    ) -> LLM:
        import torch

        on_cpu = torch.device(device).type == "cpu"
        if precision is not None and precision not in TORCH_PRECISIONS:
            raise EngineError(f"precision {precision!r} is unknown; known: {', '.join(TORCH_PRECISIONS)}")
        if not on_cpu and not torch.cuda.is_available():
            raise EngineError(f"device {device!r}: torch finds no CUDA GPU on this machine", "use the device cpu")
        precision = precision or (manifest.default_precision if on_cpu else "bf16")
        # As they are stored: the engines make of each layer what they need, one after the other.
        with one_thread():
            spec, weights = load_checkpoint(bundle / "target")
            decoder = Decoder.from_weights(spec, weights, dtype=None)
            del weights
            drop_mapped_pages(decoder.embed.weight)  # layers are copies
            draft = load_draft(bundle / "draft" / "draft.safetensors", decoder, dtype=None)
            heads = read_heads(bundle / "heads.safetensors", spec) if manifest.heads is not None else None
        positions = min(spec.max_positions, draft.spec.decoder.max_positions)
        max_length = min(max_length, positions - RESERVED_LENGTH)
        sizes: dict[str, Any] = {
            "precision": precision,
            "device": device,
            "max_batch": max_batch,
            "max_length": max_length + RESERVED_LENGTH,
            "threads": thread_count,
        }
        ranges = read_safetensors(bundle / "activation_ranges.safetensors")
        draft_ranges = {name.removeprefix("draft."): r for name, r in ranges.items() if name.startswith("draft.")}
        target_ranges = {name.removeprefix("target."): r for name, r in ranges.items() if name.startswith("target.")}
        if thread_count is not None:
            thread_count.follow()
        scorer = load_scorer(bundle / SCORER, draft.spec.decoder.hidden_size) if manifest.has_scorer else None
        if share is not None and heads is not None:  # they are made later
            share = replace(share, spare=share.spare + heads.num_numbers * torch.bfloat16.itemsize)
        compiled = cls._cuda_engines(decoder, draft, scorer, sizes, prefill_chunk, share, say)
        if compiled is None and share is not None:
            dtype = torch.float32 if precision == "fp32" else torch.bfloat16
            _take_share(share, partial(torch_bytes, decoder, draft, dtype), max_batch, max_length)
        engines = compiled or (
            target_engine(decoder, draft=draft, ranges=target_ranges, **sizes),
            draft_engine(draft, scorer=scorer, ranges=draft_ranges, **sizes),
            None,
            None,
        )
        on_demand = None
        if heads is not None:
            parts = heads.of(decoder, holds_embedding=on_cpu)
            on_demand = HeadsOnDemand(parts, precision=sizes["precision"], device=device)
        drop_mapped_pages(decoder.embed.weight)  # all of it was read for the LM head
        del decoder, draft, ranges, draft_ranges, target_ranges
        give_back()
        threads = thread_count.most if thread_count is not None else torch.get_num_threads()
        key = place("torch" if compiled is None else "cuda", precision, device, threads)
        return cls(
            engines[0],
            engines[1],
            BundleTokenizer.load(bundle, manifest.eos_token_ids),
            eos_token_ids=manifest.eos_token_ids,
            tiers=manifest.policies,
            limits=manifest.divergence_limits,
            max_length=max_length,
            prefill_chunk=prefill_chunk or (PREFILL_CHUNK if on_cpu else LANE_CHUNK if compiled else GPU_PREFILL_CHUNK),
            pass_tokens=CPU_PASS_TOKENS if on_cpu else None,
            precision=precision,
            place=key,
            threads=threads if on_cpu else 1,
            costs=manifest.profiles.get(key),
            measures_costs=True,
            survival=manifest.survival,
            heads=on_demand,
            rounds=engines[2],
            lane=engines[3],
        )

    @staticmethod
    def _cuda_engines(
        decoder: Decoder,
        draft: Draft,
        scorer: Scorer | None,
        sizes: Mapping[str, Any],
        prefill_chunk: int | None,
        share: GpuShare | None,
        say: Say,
    ) -> tuple[Engine, Engine, RoundsEngine, PromptLane] | None:
        """Engines of compiled kernels, the same as what runs rounds, and what runs prompts beside these, where there
        are kernels for the device, the precision and the pair."""
        if sizes["device"] == "cpu" or sizes["precision"] != "bf16":
            return None
        from ssv.runtime.engines.cuda.lane import CudaLane
        from ssv.runtime.engines.cuda.make import bytes_needed, cuda_engines, why_not
        from ssv.runtime.engines.cuda.places import MANY_TOKENS
        from ssv.runtime.engines.cuda.rounds import CudaRounds

        if (reason := why_not(decoder, draft, sizes["device"])) is not None:
            say(f"decoding by PyTorch's own operations, many times slower than by compiled kernels: {reason}")
            return None
        if share is not None:
            text_length = sizes["max_length"] - RESERVED_LENGTH
            _take_share(share, partial(bytes_needed, decoder, draft), sizes["max_batch"], text_length)
        say("compiling kernels for this GPU and model, unless they are kept from before")
        chosen = {name: sizes[name] for name in ("device", "max_batch", "max_length")}
        target, drafting = cuda_engines(decoder, draft, scorer, **chosen)
        lane = CudaLane(target, drafting, prefill_chunk or MANY_TOKENS)
        return target, drafting, CudaRounds(target, drafting), lane

    @classmethod
    def _load_tensorrt(
        cls,
        bundle: Path,
        manifest: Manifest,
        precision: str | None,
        max_batch: int,
        max_length: int,
        prefill_chunk: int | None,
    ) -> LLM:
        entries = [choose_entry(bundle, manifest, role, precision) for role in ("target", "draft")]
        draft = load_draft_head(bundle / "draft" / "draft.safetensors")  # its weights are in its engine
        engines = [
            load_engine(bundle, manifest, entries[0], max_batch=max_batch),
            load_engine(bundle, manifest, entries[1], draft, max_batch=max_batch),
        ]
        key = place("tensorrt", entries[0].precision, "cuda", 1)
        return cls(
            engines[0],
            engines[1],
            BundleTokenizer.load(bundle, manifest.eos_token_ids),
            eos_token_ids=manifest.eos_token_ids,
            tiers=manifest.policies,
            limits=manifest.divergence_limits,
            max_length=min(max_length, *(entry.max_length - RESERVED_LENGTH for entry in entries)),
            prefill_chunk=prefill_chunk or GPU_PREFILL_CHUNK,
            precision=entries[0].precision,
            place=key,
            costs=manifest.profiles.get(key),
            measures_costs=True,
            survival=manifest.survival,
        )

    @classmethod
    def _load_trtllm(
        cls,
        bundle: Path,
        manifest: Manifest,
        precision: str | None,
        max_batch: int,
        max_length: int,
        prefill_chunk: int | None,
        tensor_parallel: int,
    ) -> LLM:
        from ssv.runtime.trtllm.engine import TrtllmEngine
        from ssv.runtime.trtllm.hosted import HostedTarget

        if precision not in (None, "bf16"):
            raise EngineError(
                f"precision {precision}: TensorRT-LLM runs a bundle's target in bf16", "leave it out, or choose bf16"
            )
        if prefill_chunk is not None:
            raise EngineError("TensorRT-LLM cuts prompts as it likes", "leave the prefill chunk out")
        host = TrtllmEngine(
            bundle, manifest, max_rows=max_batch, max_length=max_length, tensor_parallel=tensor_parallel
        )
        return cls(
            HostedTarget(max_batch, host.max_length, host.vocab_size),
            None,
            BundleTokenizer.load(bundle, manifest.eos_token_ids),
            eos_token_ids=manifest.eos_token_ids,
            tiers=manifest.policies,
            limits=manifest.divergence_limits,
            max_length=host.max_length,
            precision="bf16",
            place=host.place,
            host=host,
        )

    @property
    def methods(self) -> tuple[str, ...]:
        """What it can decode by, in the order of `METHODS`."""
        if self._host is not None:
            return self._host.methods
        return (*baselines(self.heads is not None), *(name for name in TIERS if name in self.tiers))

    def gpu_use(self) -> GpuUse | None:
        """What it has on its GPU now; None where it runs somewhere else, or by an engine that allocates for
        itself. Asking takes a part of a millisecond."""
        device = getattr(self.target, "device", None)
        if device is None or device.type != "cuda":
            return None
        lane = () if self.lane is None else (self.lane.target, self.lane.draft)
        capturing = (self.target, self.draft, self.rounds, *lane)
        return gpu_use(device, sum(getattr(each, "num_graphs", 0) for each in capturing))

    def recover(self) -> None:
        """Makes its engines ready for new rows after a step has failed for want of memory, whatever was under way."""
        import torch

        self._reset_engines()
        self._pace.forget()
        gc.collect()  # what the failed step has held
        give_back()
        torch.cuda.empty_cache()

    def _reset_engines(self) -> None:
        """Ends what the engines do by themselves for rows that nobody has any more."""
        if self.lane is not None:
            self.lane.reset()
        if self.rounds is not None:
            self.rounds.reset()

    def know_costs(self) -> Costs | None:
        """What steps cost here: the bundle's profile of this place or, without one, measured now, once, at fewer sizes.

        The engines must be idle. `loop` does this for whoever needs it. A server does it before it says that it is
        ready: its first request by what pays would wait for it otherwise, beside others whose steps it would measure.

        Returns:
            None where the costs were not given, nor are to be measured.
        """
        if self.rounds is not None:
            self.rounds.measure()
        if self.costs is None and self._measures_costs:
            log.info("the bundle has no profile of %s, `ssv-build profile` gives it one", self.place)
            # Of blocks all sizes are measured, which differ by steps: a straight line through a few would be far off.
            sizes = PASS_SIZES if isinstance(self.target, BlockEngine) else SIZES_AT_LOAD
            self.costs = self.measure_costs(pass_sizes=sizes, draft_sizes=SIZES_AT_LOAD, within=SECONDS_AT_LOAD)
            self.measured = True
            if self.costs.conditions is not None and (doubts := self.costs.conditions.doubts):
                log.warning(
                    "what steps cost here may be measured wrong: %s. Run `ssv-build profile` on an idle machine", doubts
                )
        return self.costs

    def measure_costs(
        self,
        *,
        pass_sizes: Sequence[int] = PASS_SIZES,
        draft_sizes: Sequence[int] = DRAFT_SIZES,
        repeats: int = REPEATS,
        within: float = math.inf,
    ) -> Costs:
        """Measures steps of its engines (see `ssv.runtime.decode.costs.measure`), which must be idle."""
        assert self.draft is not None
        with self._around():
            return measure(
                self.target,
                self.draft,
                pass_sizes=pass_sizes,
                draft_sizes=draft_sizes,
                repeats=repeats,
                within=within,
                threads=self.threads,
            )

    def _around(self) -> AbstractContextManager[None]:
        """What the host's own operations run within, beside steps of the engines."""
        has_own_threads = isinstance(self.target, TorchEngine) and self.target.fused is not None
        return one_thread() if has_own_threads else nullcontext()

    def chat_ids(self, prompt: str, system: str | None = None) -> tuple[int, ...]:
        """Token ids of a user's message in the model's chat template, behind a system message if there is one, up to
        where the assistant answers.

        Raises:
            RequestError: a message is no text, or empty; see `BundleTokenizer.chat_ids`.
        """
        if not isinstance(prompt, str):
            what = f"{reprlib.repr(prompt)} must be the text of a message"
            raise RequestError(what, "`LLM.tokenizer.chat_ids` takes the messages of a conversation")
        messages = [] if system is None else [{"role": "system", "content": system}]
        return self.tokenizer.chat_ids([*messages, {"role": "user", "content": prompt}])

    def prompt_cache(self, num_bytes: int) -> PromptCache[PromptBlock]:
        """Memory for beginnings of prompts, for this LLM alone."""
        return PromptCache[PromptBlock](self.prefill_chunk, num_bytes)

    def stream(
        self, requests: Sequence[Request], *, prompt_cache: PromptCache[PromptBlock] | None = None
    ) -> Iterator[Chunk]:
        """Decodes requests side by side, as many at a time as the cache has rows; yields their output as it comes.

        Args:
            prompt_cache: what earlier requests have left of their prompts, and where these leave theirs.

        Raises:
            RequestError: one of them cannot be served, or another stream is not finished; raised before any is started.
        """
        if self._streaming:
            raise RequestError(
                "another stream of this LLM is not finished and holds its cache",
                "exhaust or close it first, or give all requests to one call",
            )
        self._streaming = True
        try:
            yield from self._run(requests, prompt_cache)
        finally:
            self._reset_engines()  # a stream may be left before its end
            self._streaming = False

    def _run(self, requests: Sequence[Request], cache: PromptCache[PromptBlock] | None) -> Iterator[Chunk]:
        _check_requests(requests)
        policies = [policy_of(request, self.tiers) for request in requests]
        generator: Generator
        if self._host is not None:
            if cache is not None:
                raise RequestError("this engine keeps beginnings of prompts by itself", "leave the prompt cache out")
            generator = self._host.generator(None)
        else:
            generator = self._loop(None, cache, priced=any(policy.pays for policy in policies))
        for request, policy in zip(requests, policies, strict=True):
            generator.check(request, policy)  # what is no token has no text either
        for index, (request, policy) in enumerate(zip(requests, policies, strict=True)):
            text = self.tokenizer.text_stream(request.prompt_ids, request.params)
            generator.submit(index, request, policy, text)
        while generator.has_work:
            yield from generator.step()

    def generator(self, *, max_waiting: int | None = None, prompt_cache_bytes: int = 0) -> Generator:
        """Who decodes requests for a service; there may be one at a time.

        Args:
            max_waiting: requests that may wait beside those that are decoded; None for no bound.
            prompt_cache_bytes: memory for beginnings of prompts; 0 for none. An engine that keeps them by itself does
                so in its own.
        """
        if self._host is not None:
            return self._host.generator(max_waiting)
        return self.loop(max_waiting=max_waiting, prompt_cache_bytes=prompt_cache_bytes)

    def loop(self, *, max_waiting: int | None = None, prompt_cache_bytes: int = 0, priced: bool = True) -> DecodeLoop:
        """A decoding loop over the engines; there may be one at a time, as they have one cache.

        Args:
            max_waiting: see `Scheduler`.
            prompt_cache_bytes: memory for beginnings of prompts; 0 for none.
            priced: whether it may be given policies that draft what pays: without, costs need not be known.
        """
        cache = self.prompt_cache(prompt_cache_bytes) if prompt_cache_bytes else None
        return self._loop(max_waiting, cache, priced=priced)

    def _loop(self, max_waiting: int | None, cache: PromptCache[PromptBlock] | None, *, priced: bool) -> DecodeLoop:
        batch = DecodeBatch(
            self.target,
            self.draft,
            sorted(self.eos_token_ids),
            self.max_length,
            prefill_chunk=self.prefill_chunk,
            prompt_cache=cache,
            pass_tokens=self.pass_tokens,
            costs=self.know_costs() if priced else self.costs,
            recorded_costs=None if self.measured else self.costs,
            survival=self.survival,
            heads=self.heads,
            grammars=self.grammars,
            rounds=self.rounds,
            lane=self.lane,
            around=self._around,
            pace=self._pace,
        )
        return DecodeLoop(batch, self.eos_token_ids, max_waiting)

    def generate(
        self,
        requests: Sequence[Request],
        *,
        prompt_cache: PromptCache[PromptBlock] | None = None,
        watch: Callable[[Chunk], object] | None = None,
    ) -> list[Output]:
        """Decodes requests and returns their outputs, in their order; see `stream`.

        Args:
            watch: called with each chunk as it comes.
        """
        _check_requests(requests)
        texts: list[list[str]] = [[] for _ in requests]
        tokens: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in requests]
        prompt_logprobs: list[list[TokenLogprobs]] = [[] for _ in requests]
        fates: list[list[TokenFate]] = [[] for _ in requests]
        outputs: list[Output | None] = [None] * len(requests)
        for chunk in self.stream(requests, prompt_cache=prompt_cache):
            if watch is not None:
                watch(chunk)
            texts[chunk.index].append(chunk.text)
            tokens[chunk.index].extend(chunk.token_ids)
            logprobs[chunk.index].extend(chunk.logprobs)
            prompt_logprobs[chunk.index].extend(chunk.prompt_logprobs)
            fates[chunk.index].extend(chunk.fates)
            if chunk.finish_reason is not None:
                outputs[chunk.index] = Output(
                    "".join(texts[chunk.index]),
                    tuple(tokens[chunk.index]),
                    chunk.finish_reason,
                    chunk.counters,
                    tuple(logprobs[chunk.index]),
                    tuple(prompt_logprobs[chunk.index]),
                    tuple(fates[chunk.index]),
                )
        assert all(output is not None for output in outputs)
        return [output for output in outputs if output is not None]


def _check_requests(requests: Any) -> None:
    is_list = isinstance(requests, Sequence) and all(isinstance(request, Request) for request in requests)
    if not is_list:
        raise RequestError(
            f"{reprlib.repr(requests)} must be a list of `Request`",
            "each has the token ids of a prompt (`LLM.chat_ids`) and a method",
        )


def _take_share(share: GpuShare, needed: Callable[[int, int], int], max_batch: int, max_length: int) -> None:
    """See `GpuShare.take`; rows have some slots more than their text has tokens."""
    share.take(lambda rows, length: needed(rows, length + RESERVED_LENGTH), max_batch, max_length)


def _device_type(device: str) -> str:
    """`cpu` or `cuda`.

    Raises:
        EngineError: it is another one, or none.
    """
    import torch

    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise EngineError(f"device {device!r} is unknown; known: cpu, cuda")
    return kind


def load_for(args: Namespace, max_batch: int = 1) -> LLM:
    """Loads what a command's options name (bundle, engine, precision, device, threads), and says what takes long."""
    with waiting(f"loading {args.bundle}") as say:
        return LLM.load(
            args.bundle,
            engine=args.engine,
            precision=args.precision,
            device=args.device,
            threads=args.threads,
            max_batch=max_batch,
            say=say,
        )
