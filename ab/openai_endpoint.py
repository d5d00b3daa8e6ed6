"""Asks an arm that speaks OpenAI's chat completions."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from ssv.ab.answers import Answer, EndpointError, Piece, Sampling, answer_of, check_answer
from ssv.ab.arms import Arm
from ssv.support.errors import UserError
from ssv.support.json_text import parse_json

if TYPE_CHECKING:
    from openai import APIStatusError, DefaultHttpxClient

_T = TypeVar("_T")

_OPENAI = "api.openai.com"

# What a refusal speaks of, and what to add to the arm's address then. More special ones first.
_CURES = (
    (r"max_completion_tokens|(?=.*max_tokens)(?=.*(?:unsupported|not supported))", "max_completion_tokens=yes"),
    (r"stream_options|include_usage", "stream_options=no"),
    (r"(?=.*\btemperature\b)(?=.*unsupported parameter)", "temperature=default"),
    (r"\btemperature\b", "temperature=1"),
    (r"\bseed\b", "seed=no"),
    (r"\bstream(?:ing|ed)?\b", "stream=no"),
)

_PEM_CURE = "set SSL_CERT_FILE to the PEM that the certificate can be checked with, or give a name that it has"


def http_client(**options: Any) -> DefaultHttpxClient:
    """The HTTP client of an endpoint; tests put another in its place."""
    from openai import DefaultHttpxClient

    return DefaultHttpxClient(**options)


def api_key(arm: Arm) -> str | None:
    """The key that an arm is asked with: SSV_AB_KEY_<ARM>'s, or OPENAI_API_KEY's if the arm is at OpenAI or
    OPENAI_BASE_URL's host.

    Raises:
        UserError: what the variable holds cannot be sent; naming the variable, not what it holds.
    """
    hosts = {_OPENAI, urlsplit(os.environ.get("OPENAI_BASE_URL", "")).hostname}
    host = urlsplit(arm.url).hostname or ""
    is_openais = host in hosts or host.endswith("." + _OPENAI)
    for name in (arm.key_variable, *(("OPENAI_API_KEY",) if is_openais else ())):
        if key := os.environ.get(name, "").strip():
            if not (key.isascii() and key.isprintable()):
                raise UserError(f"arm {arm.name}: {name} holds characters that no key has", "give the key alone")
            return key
    return None


class OpenAIEndpoint:
    """Anything that speaks OpenAI's chat completions: vLLM, SGLang, TensorRT-LLM, a hosted API, ssv itself.

    Redirections are not followed: neither prompts nor keys go where nobody sent them.
    """

    def __init__(self, arm: Arm) -> None:
        from openai import OpenAI  # a second; and who compares servers of ssv needs none

        self._arm, self._key = arm, api_key(arm)
        hooks = {"request": [self._sign], "response": [self._look]}
        self._client = OpenAI(
            base_url=arm.url,
            api_key=self._key or "none",
            max_retries=0,
            http_client=http_client(follow_redirects=False, event_hooks=hooks),
        )

    def ask(self, prompt: str, sampling: Sampling, seed: int) -> Answer:
        """Asks for a chat completion; see `Endpoint.ask`."""
        from openai import APIStatusError, OpenAIError

        start = time.perf_counter()
        try:
            made = self._client.chat.completions.create(**self._request(prompt, sampling, seed))
            chunks = made if self._arm.stream else [made]
            return check_answer(self._read(chunks, start), sampling)
        except EndpointError:
            raise
        except APIStatusError as error:
            raise EndpointError(self._refused(error)) from error
        except OpenAIError as error:
            # What was found out of a response before it was read is behind an error of the connection.
            if isinstance(error.__cause__, EndpointError):
                raise error.__cause__ from None
            body = getattr(error, "body", None)  # what a stream says of its end; the package passes on objects alone
            # Of a connection that is not to be had, the package says no more than that.
            why = body if isinstance(body, str) else error.__cause__ or ""
            said = f"{str(error).rstrip('.')}: {why}" if str(why) else str(error)
            cure = _PEM_CURE if "CERTIFICATE_VERIFY_FAILED" in said else ""
            raise EndpointError(self._without_key(f"{type(error).__name__}: {said}"), cure) from error
        except Exception as error:
            # The package takes whatever comes for an answer, and lets through what its HTTP library raises when a
            # stream breaks.
            what = self._without_key(f"{type(error).__name__}: {error}")
            raise EndpointError(f"what came is no stream of chat completions: {what}") from error

    def disclosure(self) -> dict[str, Any] | None:
        """None: OpenAI's API discloses no tiers."""
        return None

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _request(self, prompt: str, sampling: Sampling, seed: int) -> dict[str, Any]:
        arm = self._arm
        temperature = sampling.temperature if arm.temperature is None else arm.temperature
        fields: dict[str, Any] = {
            "model": str(arm.model),
            "messages": [{"role": "user", "content": prompt}],
            "max_completion_tokens" if arm.max_completion_tokens else "max_tokens": sampling.max_tokens,
            "stream": arm.stream,
            "timeout": sampling.timeout,
        }
        if temperature != "default":
            fields["temperature"] = temperature
        if arm.seed:
            fields["seed"] = seed
        if arm.stream and arm.stream_options:
            fields["stream_options"] = {"include_usage": True}
        return fields

    def _read(self, chunks: Iterable[Any], start: float) -> Answer:
        pieces: list[Piece] = []
        usage, own, reason, came = None, dict[str, Any](), "", False
        for chunk in chunks:
            at = time.perf_counter() - start if self._arm.stream else None
            if isinstance(chunk, str) or chunk.choices is None:
                raise EndpointError(f"what came is no stream of chat completions: {_said(chunk)}")
            came = True
            for choice in chunk.choices:
                if getattr(choice, "index", 0):
                    raise EndpointError("several answers came to one question")
                if failed := (choice.model_extra or {}).get("error"):  # OpenRouter: the provider's, under status 200
                    raise EndpointError(f"the answer broke off: {self._without_key(_said(failed))}")
                pieces += _pieces(choice.delta if self._arm.stream else choice.message, at)
                reason = choice.finish_reason or reason
            usage = chunk.usage or usage
            own = (chunk.model_extra or {}).get("ssv") or own
        if not came:
            raise EndpointError(
                "what came is no stream of chat completions", "give the address of an OpenAI API, with its /v1"
            )
        if usage is None:
            cure = (
                f": add stream=no to the address of arm {self._arm.name}, if its server counts them then"
                * self._arm.stream
            )
            raise EndpointError(f"no usage came: tokens cannot be counted{cure}")
        thought = usage.completion_tokens_details and usage.completion_tokens_details.reasoning_tokens
        output, prompt_tokens = int(usage.completion_tokens), int(usage.prompt_tokens)
        if thought and usage.total_tokens == prompt_tokens + output + thought:
            output += thought  # some count what was thought apart
        answer = answer_of(pieces, output_tokens=output, reasoning_tokens=int(thought) if thought else None)
        answer.finish_reason, answer.prompt_tokens = reason, prompt_tokens
        details = usage.prompt_tokens_details
        answer.cached_tokens = int((details and details.cached_tokens) or 0)
        answer.tier, answer.lossless = _known(own, "tier", str), _known(own, "lossless", bool)
        answer.target_passes = _known(own, "target_passes", int)
        answer.unverified = _known(own, "unverified_tokens", int)
        return answer

    def _sign(self, request: Any) -> None:
        """The key, and nothing else of the environment's, goes along."""
        request.headers["authorization"] = f"Bearer {self._key or 'none'}"
        if not (urlsplit(self._arm.url).hostname or "").endswith(_OPENAI):
            for name in ("openai-organization", "openai-project"):
                request.headers.pop(name, None)

    def _look(self, response: Any) -> None:
        """Raises EndpointError: what comes is no answer of an API, whatever its status says."""
        if response.is_redirect:
            target = response.headers.get("location", "?")
            raise EndpointError(self._without_key(f"it redirects to {target}"), "give the address that answers")
        if not response.is_success:
            return
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind in ("text/html", "application/xhtml+xml"):
            response.read()
            raise EndpointError(
                f"a web page came, {_title(response.text)}, as of a login or a proxy",
                "give the address of the API itself, with its /v1",
            )
        if kind == "application/json" and self._arm.stream:
            response.read()
            given = _parsed(response.text)
            if isinstance(given, dict) and "choices" in given:
                raise EndpointError(
                    "plain JSON came instead of a stream", f"add stream=no to the address of arm {self._arm.name}"
                )
            raise EndpointError(self._without_key(f"JSON came that is no chat completion: {_said(given)}"))

    def _refused(self, error: APIStatusError) -> str:
        status, text = error.status_code, error.response.text
        given = _parsed(text)
        said = _said(given) if given is not None else (_title(text) if "<html" in text.lower() else text.strip())
        what = self._without_key(f"{type(error).__name__}: {status}: {said}").rstrip(".")
        if status in (401, 403):
            return f"{what}: give its key in {self._arm.key_variable}"
        if status == 404:
            return f"{what}: give the address of an OpenAI API, with its /v1, and a model that it has"
        if status in (400, 422):
            for pattern, setting in _CURES:
                if re.search(pattern, text, re.IGNORECASE | re.DOTALL) and not self._arm.has(setting):
                    return f"{what}: add {setting} to the address of arm {self._arm.name}"
        return what

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _pieces(message: Any, at: float | None) -> list[Piece]:
    """What a delta, or a whole message, brings."""
    extra = message.model_extra or {}
    if refusal := getattr(message, "refusal", None):
        raise EndpointError(f"the model refused to answer: {refusal}")
    if getattr(message, "tool_calls", None) or getattr(message, "function_call", None):
        raise EndpointError("the model called a tool, and none was given to it")
    parts = [(_reasoning(extra), True)]
    content = message.content
    for part in content if isinstance(content, list) else ():
        thought = part.get("thinking")
        texts = thought if isinstance(thought, list) else [{"text": thought}] if thought else []
        parts += [("".join(each["text"] for each in texts), True), (part.get("text"), False)]
    parts += [] if isinstance(content, list) else [(content, False)]
    if wrong := [text for text, _ in parts if text and not isinstance(text, str)]:
        raise TypeError(f"a text is {type(wrong[0]).__name__}")
    return [Piece(at, text, is_reasoning=is_reasoning) for text, is_reasoning in parts if text]


def _reasoning(extra: dict[str, Any]) -> Any:
    """What a message was thought before, by the names that servers give it; some send the same under several."""
    details = extra.get("reasoning_details")
    return (
        extra.get("reasoning_content")
        or extra.get("reasoning")
        or extra.get("thinking")
        or "".join(each.get("text") or each.get("summary") or "" for each in details or () if isinstance(each, dict))
    )


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None


def _said(given: Any) -> str:
    """The message in what a server sent instead of an answer: an object of any shape, or a text."""
    if hasattr(given, "model_extra"):
        given = given.model_extra or {}
    found = given
    for name in ("error", "message", "detail", "msg"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    if isinstance(found, dict) and found.get("detail"):
        found = found["detail"]
    return found if isinstance(found, str) else json.dumps(found, default=str)


def _title(page: str) -> str:
    match = re.search(r"<title[^>]*>(.*?)</title>", page, re.IGNORECASE | re.DOTALL)
    return repr(" ".join(match[1].split())[:80]) if match else "without a title"


def _known(given: dict[str, Any], name: str, kind: type[_T]) -> _T | None:
    """What an endpoint says under a name, if it can be that."""
    value = given.get(name)
    return value if isinstance(value, kind) else None
