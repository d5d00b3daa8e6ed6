"""What the OpenAI API says, in the server's words, and what the server says, in the API's: models and tiers, replies
and responses.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssv.bundle.manifest import MANIFEST_NAME, read_manifest
from ssv.client.triton import Reply
from ssv.runtime.methods import baselines
from ssv.triton_repo.openai.access_log import Access
from ssv.triton_repo.openai.errors import ApiError
from ssv.triton_repo.openai.schema import ApiRequest, StreamOptions

_FINISH_REASONS = {"stop": "stop", "length": "length", "deadline": "length"}


@dataclass(frozen=True, slots=True)
class Models:
    """Names under which a bundle can be asked.

    Attributes:
        name: of the bundle.
        tiers: that it has.
        created: Unix time.
        has_heads: whether it can be decoded by Medusa's heads.
    """

    name: str
    tiers: tuple[str, ...]
    created: int
    has_heads: bool = False

    @classmethod
    def of_bundle(cls, bundle: Path) -> Models:
        """Reads the manifest and nothing else.

        Raises:
            BundleError: see `read_manifest`.
        """
        manifest = read_manifest(bundle, verify=False)
        created = int((bundle / MANIFEST_NAME).stat().st_mtime)
        return cls(manifest.name, tuple(manifest.tiers), created, manifest.heads is not None)

    @property
    def methods(self) -> tuple[str, ...]:
        return (*self.tiers, *baselines(self.has_heads))

    def method_of(self, model: str) -> str | None:
        """What a model's suffix says; None without one.

        Raises:
            ApiError: 404, there is no such model.
        """
        if model == self.name:
            return None
        method = model.removeprefix(f"{self.name}:")
        if method == model or method not in self.methods:
            known = ", ".join((self.name, *(f"{self.name}:{method}" for method in self.methods)))
            raise ApiError(404, f"there is no model {model!r}; known: {known}", "model", "model_not_found")
        return method

    def tier_of(self, request: ApiRequest) -> str | None:
        """What the request's model and its `ssv_tier` say together; None leaves it to the server.

        Raises:
            ApiError: 404, there is no such model; 400, there is no such tier, or they contradict each other.
        """
        suffix, tier = self.method_of(request.model), request.ssv_tier
        if tier is not None and tier not in self.methods:
            what = f"there is no tier {tier!r}; known: {', '.join(self.methods)}"
            raise ApiError(400, what, "ssv_tier", "invalid_value")
        if None not in (suffix, tier) and suffix != tier:
            what = f"the model says {suffix} and ssv_tier says {tier}: give one of them"
            raise ApiError(400, what, "ssv_tier", "invalid_value")
        return suffix or tier

    def listed(self) -> list[dict[str, Any]]:
        return [self.entry(name) for name in (self.name, *(f"{self.name}:{tier}" for tier in self.tiers))]

    def entry(self, model: str) -> dict[str, Any]:
        return {"id": model, "object": "model", "created": self.created, "owned_by": "ssv"}


@dataclass
class Answer:
    """An answer in the making, in the shape of what was asked.

    Attributes:
        is_chat: else it is a completion.
        usage: which of a stream's chunks have it.
        access: what the log will say.
        output_tokens: so far.
        reply: the latest.
    """

    model: str
    is_chat: bool
    usage: StreamOptions
    access: Access
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()), init=False)
    output_tokens: int = field(default=0, init=False)
    reply: Reply = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(16)}"

    def take(self, reply: Reply) -> None:
        self.output_tokens += reply.num_output_tokens
        self.reply = reply
        self.access.take(reply)

    def whole(self, text: str) -> dict[str, Any]:
        """The response that is no stream."""
        content = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {"text": text}
        )
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": self._finish_reason()}
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self._head(kind), "choices": [choice], "usage": self._counted(), "ssv": self._disclosure()}

    def opening(self) -> list[dict[str, Any]]:
        """The chunks that a stream begins with."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}, num_tokens=0)] if self.is_chat else []

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk of a stream."""
        return self._chunk({"delta": {"content": text}} if self.is_chat else {"text": text})

    def closing(self) -> list[dict[str, Any]]:
        """The chunks that a stream ends with."""
        content: dict[str, Any] = {"delta": {}} if self.is_chat else {"text": ""}
        chunks = [self._chunk(content, self._finish_reason(), ssv=self._disclosure())]
        if self.usage.include_usage:
            chunks.append({**self._chunk_head(), "choices": [], "usage": self._counted()})
        return chunks

    def _chunk(
        self, content: dict[str, Any], reason: str | None = None, num_tokens: int | None = None, **extra: Any
    ) -> dict[str, Any]:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        usage: dict[str, Any] = {"usage": None} if self.usage.include_usage else {}
        if self.usage.continuous_usage_stats:
            usage = {"usage": self._counted(num_tokens)}
        return {**self._chunk_head(), "choices": [choice], **usage, **extra}

    def _chunk_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self.is_chat else "text_completion")

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _finish_reason(self) -> str:
        return _FINISH_REASONS[self.reply.finish_reason]

    def _counted(self, num_tokens: int | None = None) -> dict[str, Any]:
        """Usage after so many tokens of the output; None for all that have come."""
        num_tokens = self.output_tokens if num_tokens is None else num_tokens
        return {
            "prompt_tokens": self.reply.num_input_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": self.reply.num_input_tokens + num_tokens,
            "prompt_tokens_details": {"cached_tokens": self.reply.cached_tokens},
        }

    def _disclosure(self) -> dict[str, Any]:
        reply = self.reply
        return {
            "tier": reply.tier,
            "lossless": reply.lossless,
            "unverified_tokens": reply.unverified,
            "typical_tokens": reply.typical,
            "target_passes": reply.target_passes,
            "acceptance_rate": reply.acceptance_rate,
        }
