"""A bundle's draft as TensorRT-LLM asks for drafts: its `Drafter`, and the manager that hears of requests that leave.

Written to TensorRT-LLM's interface as published, in tensorrt_llm/_torch/speculative/drafter.py (`Drafter`),
tensorrt_llm/_torch/pyexecutor/resource_manager.py (`BaseResourceManager`), llm_request.py (`LlmRequest`) and
py_executor.py (the order of the calls), main of 2026 between 1.3.0rc26 and 1.4.0rc4. In each of its steps, it

1. sets `py_draft_tokens` of every request that decodes to as many zeros as may be drafted, and makes room for them,
2. calls `prepare_draft_tokens`, which replaces them by the draft, and `pad_draft_tokens_for_cuda_graph`, which fills it
   up again: a shorter draft saves steps of the draft, not width of the pass. Where `should_use_spec_decode` says that
   too many requests run (`max_concurrency`), neither is called, and the pass is one token wide,
3. runs the target over the last token and the draft, keeps what the target chooses too, and one token of the target's,
4. calls `free_resources` of each request that has ended, was cancelled, or is paused to make room.

A drafter sees texts and no hidden states of the target's: the draft has to be a standalone one. With tensor parallelism
each rank has its own, and all have to draft the same: nothing here depends on a clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensorrt_llm._torch.pyexecutor.resource_manager import BaseResourceManager
from tensorrt_llm._torch.speculative.drafter import Drafter

from ssv.bundle.manifest import SCORER, read_manifest
from ssv.bundle.policy import RESERVED_LENGTH
from ssv.bundle.profile import Costs
from ssv.model.checkpoint import load_checkpoint
from ssv.model.decoder import Decoder
from ssv.model.draft import Draft, load_draft, load_draft_head
from ssv.model.scorer import load_scorer
from ssv.model.spec import DecoderSpec
from ssv.runtime.engines.contract import Engine
from ssv.runtime.engines.torch_engine import draft_engine
from ssv.runtime.trtllm.drafting import Drafting, Text, chain_policy, most_drafted_for


@dataclass(frozen=True, slots=True)
class Settings:
    """What a rank needs to draft; it loads the draft itself.

    Attributes:
        tier: of the bundle, whose thresholds say when a draft ends.
        most: tokens of a draft, at most.
        max_rows, max_length: requests at a time, and tokens of prompt and output together.
        costs: of steps there, if somebody has measured them: then drafts end where they would pay no more.
        device: of torch.
    """

    bundle: Path
    tier: str
    most: int
    max_rows: int
    max_length: int
    costs: Costs | None = None
    device: str = "cuda"

    def drafting(self) -> Drafting:
        """Loads the draft.

        Raises:
            BundleError, CheckpointError: the bundle is damaged.
        """
        manifest = read_manifest(self.bundle, verify=False)
        draft = _load_draft(self.bundle, DecoderSpec.from_dict(manifest.target))
        policy = chain_policy(manifest.policies[self.tier], self.most, pays=self.costs is not None)
        engine = self._engine(draft, has_scorer=manifest.has_scorer)
        return Drafting(engine, manifest.eos_token_ids, policy, survival=manifest.survival, costs=self.costs)

    def _engine(self, draft: Draft, *, has_scorer: bool) -> Engine:
        sizes: dict[str, Any] = {"max_batch": self.max_rows, "max_length": self.max_length + RESERVED_LENGTH}
        scorer = load_scorer(self.bundle / SCORER, draft.spec.decoder.hidden_size) if has_scorer else None
        if self.device == "cpu":
            return draft_engine(draft, precision="fp32", scorer=scorer, **sizes)
        from ssv.runtime.engines.cuda.make import cuda_draft_engine, why_not_draft

        if why_not_draft(draft, self.device) is None:
            return cuda_draft_engine(draft, scorer, device=self.device, **sizes)
        return draft_engine(draft, precision="bf16", device=self.device, scorer=scorer, **sizes)


class SsvDrafter(Drafter):
    """Drafts of a bundle's draft and scorer. It goes to TensorRT-LLM's worker processes as its settings."""

    # Its sampler takes back as many entries of the cache as the draft was padded to.
    _needs_padding_kv_extension = True

    def __init__(self, settings: Settings) -> None:
        costs, most = settings.costs, settings.most
        super().__init__(
            max_draft_len=most,
            max_total_draft_tokens=most,
            max_concurrency=most_drafted_for(costs, most, settings.max_rows) if costs is not None else None,
        )
        self._settings = settings
        self._drafting: Drafting | None = None

    @torch.inference_mode()
    def prepare_draft_tokens(self, scheduled_requests: Any, resource_manager: Any = None) -> None:
        """Replaces `py_draft_tokens` of the requests that decode."""
        if self._drafting is None:
            self._drafting = self._settings.drafting()
        requests = {each.py_request_id: each for each in scheduled_requests.generation_requests}
        # In one order on all ranks.
        texts = {number: _text_of(requests[number]) for number in sorted(requests) if not requests[number].is_dummy}
        drafted = self._drafting.propose(texts)
        for number, request in requests.items():
            request.py_draft_tokens = drafted.get(number, [])

    def forget(self, request: int) -> None:
        """A request has left; it may come back with the text that it had."""
        if self._drafting is not None:
            self._drafting.forget(request)


class SsvResources(BaseResourceManager):
    """Tells the drafter which requests have left. The draft's cache has rows for as many as run, so nobody waits."""

    def __init__(self, drafter: SsvDrafter, max_rows: int) -> None:
        self._drafter, self._max_rows = drafter, max_rows

    def get_max_resource_count(self) -> int:
        return self._max_rows

    def get_needed_resource_to_completion(self, request: Any) -> int:
        return 0

    def free_resources(self, request: Any) -> None:
        self._drafter.forget(request.py_request_id)


def _text_of(request: Any) -> Text:
    tokens = request.get_tokens(0)
    # The pass itself gives one token more.
    return Text(tokens, request.py_orig_prompt_len + request.py_max_new_tokens - 1 - len(tokens))


def _load_draft(bundle: Path, spec: DecoderSpec) -> Draft:
    """The bundle's draft; its target's weights are read only if it shares some of them."""
    path = bundle / "draft" / "draft.safetensors"
    own = load_draft_head(path).spec
    if own.own_embedding and (own.own_lm_head or own.ties_own):
        with torch.device("meta"):
            target = Decoder(spec)
    else:
        target = Decoder.from_weights(*load_checkpoint(bundle / "target"), dtype=None)
    return load_draft(path, target, dtype=None)
