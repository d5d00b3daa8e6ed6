"""What the OpenAI API says, in the server's words, and what the server says, in the API's: models and tiers, replies
and responses.
"""

from __future__ import annotations

import json
import secrets
import string
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ssv.bundle.manifest import MANIFEST_NAME, read_manifest
from ssv.client.triton import Prompt, Reply, Settings
from ssv.runtime.methods import baselines
from ssv.runtime.tokenizer_files import read_chat_template
from ssv.runtime.tools import Call, CallParser, Form, form_of
from ssv.triton_repo.openai.access_log import Access
from ssv.triton_repo.openai.errors import ApiError, error_object, json_bytes
from ssv.triton_repo.openai.logprobs import Token, chat_logprobs, completion_logprobs, tokens_of
from ssv.triton_repo.openai.schema import ApiRequest

_ID_LETTERS = string.ascii_letters + string.digits
DEFAULT_TIER = "premium"
"""What a model's name without a suffix stands for, and a request that says nothing."""

_FINISH_REASONS = {"stop": "stop", "length": "length", "deadline": "length"}


@dataclass(frozen=True, slots=True)
class Models:
    """Names under which a bundle can be asked.

    Attributes:
        name: of the bundle.
        tiers: that it has.
        created: Unix time.
        has_heads: whether it can be decoded by Medusa's heads.
        tool_form: in which the model calls functions.
        bounds: largest divergence that each lossy tier is calibrated to; None where nobody measured it.
        max_length: tokens of prompt and output together; None where nobody knows.
        is_premium_only: whether the engine refuses every other way to decode, as TensorRT-LLM does.
    """

    name: str
    tiers: tuple[str, ...]
    created: int
    has_heads: bool = False
    tool_form: Form = "smollm2"
    bounds: Mapping[str, float | None] = field(default_factory=dict)
    max_length: int | None = None
    is_premium_only: bool = False

    @classmethod
    def of_bundle(
        cls,
        bundle: Path,
        max_length: int | None = None,
        chat_template: Path | None = None,
        *,
        is_premium_only: bool = False,
    ) -> Models:
        """Reads the manifest and the chat template.

        Args:
            chat_template: file with the one that is used instead of the bundle's.

        Raises:
            BundleError: see `read_manifest`.
            TokenizerFileError: see `read_chat_template`.
        """
        manifest = read_manifest(bundle, verify=False)
        form = form_of(read_chat_template(bundle / "tokenizer", chat_template))
        created = int((bundle / MANIFEST_NAME).stat().st_mtime)
        bounds = {name: entry.divergence_bound for name, entry in manifest.tiers.items() if not entry.lossless}
        name, tiers, has_heads = manifest.name, tuple(manifest.tiers), manifest.heads is not None
        if is_premium_only:
            tiers = (DEFAULT_TIER,)
        return cls(name, tiers, created, has_heads, form, bounds, max_length, is_premium_only)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names that a request can decode by: the tiers first."""
        return self.tiers if self.is_premium_only else (*self.tiers, *baselines(self.has_heads))

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
        """The entries of all models that are listed: the bundle's name alone, and with each of its tiers."""
        return [self.entry(name) for name in (self.name, *(f"{self.name}:{tier}" for tier in self.tiers))]

    def entry(self, model: str) -> dict[str, Any]:
        """What the API says of a model.

        Raises:
            ApiError: 404, there is no such model.
        """
        method = self.method_of(model) or DEFAULT_TIER
        how = {"tier": method, "lossless": method not in self.bounds, "divergence_bound": self.bounds.get(method, 0.0)}
        about = {"max_model_len": self.max_length, "ssv": how}
        return {"id": model, "object": "model", "created": self.created, "owned_by": "ssv", **about}


@dataclass
class _Choice:
    """One of an answer's choices in the making.

    Attributes:
        echo: the prompt, if it stands before the text; None where the first reply's tokens are its text.
        text: so far.
        output_tokens: so far.
        parser: tells calls of functions from text; None where none may be called.
        calls: so far.
        tokens: with log-probabilities, so far.
        fates: of its tokens, so far.
        num_characters: of these tokens.
        reply: the latest.
        has_begun: whether something of a stream has been sent.
    """

    index: int
    echo: str | None
    parser: CallParser | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    output_tokens: int = 0
    tokens: list[Token] = field(default_factory=list)
    fates: list[dict[str, Any]] = field(default_factory=list)
    num_characters: int = 0
    reply: Reply | None = None
    has_begun: bool = False


class Answer:
    """An answer in the making, in the shape of what was asked.

    Attributes:
        id: of the response.
        created: Unix time.
        access: what the log will say.
        end: what a stream ends with, after its last event.
    """

    end = b"data: [DONE]\n\n"

    def __init__(
        self, body: ApiRequest, asked: Sequence[tuple[Prompt, Settings]], access: Access, models: Models
    ) -> None:
        """Begins an answer.

        Args:
            asked: of the server, for each choice.
        """
        self._bounds = models.bounds
        self.access, self._model, self._is_chat, self._usage = access, body.model, body.caller().is_chat, body.usage()
        self.created, self._num_of_prompt = int(time.time()), body.n or 1
        self._logs = body.num_logprobs() is not None
        self._echoes, self._tells_fates = body.echoes(), bool(body.ssv_fates)
        self._only_echoes = body.only_echoes()
        self.id = f"{'chatcmpl' if self._is_chat else 'cmpl'}-{secrets.token_hex(16)}"
        echoes = [(prompt if isinstance(prompt, str) else None) if self._echoes else "" for prompt, _ in asked]
        names = [tool["function"]["name"] for tool in body.callable_tools()]
        self._choices = [
            _Choice(index, echo, CallParser(models.tool_form, names) if names else None)
            for index, echo in enumerate(echoes)
        ]

    @staticmethod
    def encoded(event: dict[str, Any]) -> bytes:
        """An event as it is sent."""
        return b"data: " + json_bytes(event) + b"\n\n"

    def failed(self, error: ApiError) -> dict[str, Any]:
        """The event of an error in a stream that has begun."""
        return error_object(error)

    def take(self, index: int, reply: Reply) -> list[dict[str, Any]]:
        """Takes the next reply for a choice; returns the chunks of a stream that it makes."""
        choice = self._choices[index]
        self.access.take(reply)
        prompt, output = tokens_of(reply)
        if self._only_echoes:
            reason = reply.finish_reason and "length"
            output, reply = [], replace(reply, text="", fates="", num_output_tokens=0, finish_reason=reason)
        new = [*(prompt if self._echoes else ()), *output] if self._logs else []
        fates = json.loads(reply.fates) if reply.fates else []
        text = reply.text
        if choice.reply is None and self._echoes:
            echo = choice.echo
            if echo is None:
                echo = b"".join(token.data for token in prompt).decode(errors="replace")
            text = echo + text
        calls: list[dict[str, Any]] = []
        if choice.parser is not None:
            text, found = choice.parser.push(text)
            if reply.finish_reason:
                rest, more = choice.parser.flush()
                text, found = text + rest, found + more
            calls = [_called(call) for call in found]
        offset = choice.num_characters
        choice.num_characters += sum(len(token.text) for token in new)
        choice.tokens += new
        choice.fates += fates
        choice.text, choice.reply = choice.text + text, reply
        choice.output_tokens += reply.num_output_tokens
        chunks = []
        if not choice.has_begun and self._is_chat:
            chunks.append(self._chunk(choice, {"delta": {"role": "assistant", "content": ""}}, num_tokens=0))
        choice.has_begun = True
        if text or new or fates:
            content = {"delta": {"content": text}} if self._is_chat else {"text": text}
            chunks.append(self._chunk(choice, content | self._told(fates), logprobs=self._logged(new, offset)))
        for call in calls:
            delta = {"delta": {"tool_calls": [{"index": len(choice.calls), **call}]}}
            chunks.append(self._chunk(choice, delta))
            choice.calls.append(call)
        if reply.finish_reason:
            end: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
            # With usage asked for, its chunk is the last one, and has the metrics.
            told: dict[str, Any] = {} if self._usage.include_usage else {"metrics": self._metrics()}
            chunks.append(self._chunk(choice, end, _reason(choice), ssv=self._disclosure([reply]), **told))
        return chunks

    def whole(self) -> dict[str, Any]:
        """The response that is no stream."""
        choices = []
        for choice in self._choices:
            message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
            if choice.calls:
                message |= {"content": choice.text or None, "tool_calls": choice.calls}
            content = {"message": message} if self._is_chat else {"text": choice.text}
            content |= self._told(choice.fates)
            logged = self._logged(choice.tokens, 0)
            choices.append({"index": choice.index, **content, "logprobs": logged, "finish_reason": _reason(choice)})
        kind = "chat.completion" if self._is_chat else "text_completion"
        replies = [choice.reply for choice in self._choices if choice.reply is not None]
        head, metrics = self._head(kind), self._metrics()
        return {
            **head,
            "choices": choices,
            "usage": self._counted(),
            "metrics": metrics,
            "ssv": self._disclosure(replies),
        }

    def closing(self) -> list[dict[str, Any]]:
        """The chunks that a stream ends with, after those of its choices."""
        if not self._usage.include_usage:
            return []
        return [{**self._chunk_head(), "choices": [], "usage": self._counted(), "metrics": self._metrics()}]

    def _metrics(self) -> dict[str, Any] | None:
        """What aiperf and others read of vLLM's `--per-request-spec-decode-metrics summary`; None for several choices,
        as there.
        """
        reply = self._choices[0].reply
        if len(self._choices) > 1 or reply is None:
            return None
        speculation = speculation_metrics(reply)
        return None if speculation is None else {"speculative_decoding": speculation}

    def _disclosure(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """What was done for choices: they have one tier, unless it was withdrawn between them."""
        judged = sum(reply.judged for reply in replies)
        worst = next((reply for reply in replies if not reply.lossless), replies[0])
        return {
            "tier": worst.tier,
            "lossless": worst.lossless,
            "divergence_bound": 0.0 if worst.lossless else self._bounds.get(worst.tier),
            "withdrawn_tier": next((reply.withdrawn_tier for reply in replies if reply.withdrawn_tier), None),
            "arm": replies[0].arm or None,
            "unverified_tokens": sum(reply.unverified for reply in replies),
            "typical_tokens": sum(reply.typical for reply in replies),
            "target_passes": sum(reply.target_passes for reply in replies),
            "acceptance_rate": sum(reply.accepted for reply in replies) / judged if judged else 0.0,
        }

    def _logged(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        if not self._logs:
            return None
        return chat_logprobs(tokens) if self._is_chat else completion_logprobs(tokens, offset)

    def _told(self, fates: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"ssv_fates": fates} if self._tells_fates else {}

    def _chunk(
        self,
        choice: _Choice,
        content: dict[str, Any],
        reason: str | None = None,
        num_tokens: int | None = None,
        logprobs: dict[str, Any] | None = None,
        **extra: Any,
    ) -> dict[str, Any]:
        entry = {"index": choice.index, **content, "logprobs": logprobs, "finish_reason": reason}
        usage: dict[str, Any] = {"usage": None} if self._usage.include_usage else {}
        if self._usage.continuous_usage_stats:
            usage = {"usage": self._counted(num_tokens)}
        return {**self._chunk_head(), "choices": [entry], **usage, **extra}

    def _chunk_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self._is_chat else "text_completion")

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self._model}

    def _counted(self, num_tokens: int | None = None) -> dict[str, Any]:
        """Usage after so many tokens of the output; None for all that have come. A prompt counts once."""
        if num_tokens is None:
            num_tokens = sum(choice.output_tokens for choice in self._choices)
        asked = [choice.reply for choice in self._choices[:: self._num_of_prompt] if choice.reply is not None]
        num_input = sum(reply.num_input_tokens for reply in asked)
        return {
            "prompt_tokens": num_input,
            "completion_tokens": num_tokens,
            "total_tokens": num_input + num_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(reply.cached_tokens for reply in asked)},
        }


def speculation_metrics(reply: Reply) -> dict[str, Any] | None:
    """A finished request's speculation in vLLM's shape; None where nothing was drafted.

    A step is a pass of the target after the prompt's. What a pass kept counts as accepted, trusted tokens included: so
    the mean length is tokens per pass. Drafts have no fixed length here: `num_spec_tokens` is the most that one kept.

    Source: vLLM, docs/features/speculative_decoding/acceptance_metrics.md.
    """
    histogram = json.loads(reply.kept_per_pass) if reply.kept_per_pass else []
    num_steps = sum(histogram)
    if not (reply.drafted and num_steps):
        return None
    accepted = sum(kept * passes for kept, passes in enumerate(histogram))
    return {
        "mean_acceptance_length": 1 + accepted / num_steps,
        "draft_acceptance_rate": accepted / reply.drafted,
        "acceptance_histogram": histogram,
        "num_spec_steps": num_steps,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": reply.drafted,
        "num_spec_tokens": len(histogram) - 1,
    }


def _called(call: Call) -> dict[str, Any]:
    # Nine letters and digits: the templates of Mistral's models take no other ids.
    name = "".join(secrets.choice(_ID_LETTERS) for _ in range(9))
    return {"id": name, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _reason(choice: _Choice) -> str | None:
    """Why a choice ended, in OpenAI's words."""
    if choice.reply is None:
        return None
    reason = _FINISH_REASONS[choice.reply.finish_reason]
    return "tool_calls" if choice.calls and reason == "stop" else reason
