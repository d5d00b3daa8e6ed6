"""A client of the server's `ensemble` over gRPC."""

from __future__ import annotations

import json
import queue
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from ssv.runtime.reply import Reply
from ssv.support.errors import UserError
from ssv.support.interruptible import get

MODEL = "ensemble"
ROUTER = "ab_router"
"""A model that hands requests on to arms, whose tiers are theirs to choose."""

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
"""A text, the messages of a conversation, each with "role" and "content", or token ids."""

# What Triton puts before a message, and what our models do.
_BEFORE = re.compile(r"^(in ensemble 'ensemble', |\[request id: [^\]]*\] )+")
_STATUS = re.compile(r"^([A-Z_]+): (.*)$", re.DOTALL)

# What gRPC says where there is no connection, what that is, and what to do. More special ones first.
_UNREACHABLE = (
    (
        r"CERTIFICATE_VERIFY_FAILED(: (?P<why>[^:]+))?",
        "the certificate of {url} is not trusted ({why})",
        "give the PEM that it can be checked with: `--tls-ca FILE`, or `ca` of the client",
    ),
    (
        r"Hostname Verification",
        "the certificate of {url} is valid for another host",
        "give the address by a name that the certificate has",
    ),
    (
        r"Failed to create security handshaker|handshaker factory",
        "the PEM for checking the certificate of {url} has no certificate in it",
        "give another file to `--tls-ca`, or to `ca` of the client",
    ),
    (r"WRONG_VERSION_NUMBER", "{url} does not speak TLS", "give the address as grpc://"),
    (r"errors resolving|DNS resolution failed", "the host of {url} is not known", "check its name"),
    (
        r"Failed parsing HTTP/2|http1\.x server",
        "{url} speaks HTTP/1.1, not gRPC",
        "give the port of gRPC: 8001 unless `ssv-serve` has another --grpc-port",
    ),
    (
        r"failed to connect.*(Socket closed|Connection reset)",
        "{url} closes the connection instead of speaking gRPC",
        "if it is shutting down, ask another one; with TLS give the address as grpcs://, else the port of gRPC: 8001 "
        "unless `ssv-serve` has another --grpc-port",
    ),
    (r"failed to connect|Connection refused", "no server answers at {url}", "start one with `ssv-serve`"),
)


class ServerError(UserError):
    """The server refused or failed, or is not there.

    Attributes:
        status: gRPC's, such as "UNAVAILABLE".
        is_unreachable: whether no server has seen the request.
        is_cut_off: whether the server was gone before it had answered.
    """

    def __init__(
        self, what: str, status: str, cure: str = "", *, is_unreachable: bool = False, is_cut_off: bool = False
    ) -> None:
        super().__init__(what, cure)
        self.status, self.is_unreachable, self.is_cut_off = status, is_unreachable, is_cut_off


@dataclass(frozen=True, slots=True)
class Settings:
    """How one request is to be answered; None leaves a setting to the server.

    Attributes:
        tier: premium, balanced or turbo, or any other method of the bundle, for comparison: autoregressive, lookahead,
            prompt-lookup, suffix, medusa, specinfer, eagle or speculative.
        max_divergence: the fastest tier whose measured divergence stays below it, instead of `tier`.
        policy: what of the tier's policy is to be otherwise, by name: `ssv.runtime.methods.OPTIONS`.
        chat: whether a text is a user's message, or to be continued.
        logprobs, prompt_logprobs: how many of the likeliest tokens stand beside each token of the output, or of the
            prompt, with their log-probabilities; None for none of these.
        fates: how each token came about is wanted (`Reply.fates`).
        tools: functions that the model may call, as OpenAI has them; of a conversation.
        template: how the chat template is used: "add_generation_prompt", "continue_final_message" and "variables"; of a
            conversation.
        guide: form of the output, as kind and guide (`ssv.runtime.grammar.KINDS`); None for any text.
        timeout: seconds after which the answer ends with what there is.
        latency_bound_ms: milliseconds since the last pass after which pending tokens are verified.
        user: who asks; an A/B router has the same user in the same arm, and nobody else is told.
    """

    tier: str | None = None
    max_divergence: float | None = None
    policy: Mapping[str, Any] | None = None
    chat: bool = True
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    template: Mapping[str, Any] | None = None
    guide: tuple[str, str] | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    fates: bool = False
    ignore_eos: bool | None = None
    timeout: float | None = None
    latency_bound_ms: float | None = None
    user: str | None = None


def request_inputs(prompt: Prompt, settings: Settings, *, stream: bool) -> list[grpcclient.InferInput]:
    """The tensors of a request.

    Raises:
        UserError: a number that its type cannot hold.
    """
    is_text, is_ids = isinstance(prompt, str), bool(prompt) and isinstance(prompt[0], int)
    messages = None if is_text or is_ids else json.dumps(list(prompt), ensure_ascii=False)
    bias = settings.logit_bias
    values: list[tuple[str, str, Any]] = [
        ("text_input", "BYTES", prompt if is_text else ""),
        ("ssv_messages", "BYTES", messages),
        ("ssv_tools", "BYTES", json.dumps(list(settings.tools), ensure_ascii=False) if settings.tools else None),
        ("ssv_template", "BYTES", json.dumps(dict(settings.template)) if settings.template else None),
        ("input_ids", "INT32", list(prompt) if is_ids else None),
        ("ssv_chat", "BOOL", settings.chat if is_text else None),
        ("stream", "BOOL", stream),
        ("ssv_tier", "BYTES", settings.tier),
        ("ssv_max_divergence", "FP32", settings.max_divergence),
        ("ssv_policy", "BYTES", json.dumps(dict(settings.policy)) if settings.policy else None),
        ("max_tokens", "INT32", settings.max_tokens),
        ("min_tokens", "INT32", settings.min_tokens),
        ("temperature", "FP32", settings.temperature),
        ("top_k", "INT32", settings.top_k),
        ("top_p", "FP32", settings.top_p),
        ("min_p", "FP32", settings.min_p),
        ("repetition_penalty", "FP32", settings.repetition_penalty),
        ("presence_penalty", "FP32", settings.presence_penalty),
        ("frequency_penalty", "FP32", settings.frequency_penalty),
        ("logit_bias", "BYTES", json.dumps(dict(bias)) if bias else None),
        ("bad_words", "BYTES", list(settings.bad_words) or None),
        ("guided_decoding_guide_type", "BYTES", settings.guide[0] if settings.guide else None),
        ("guided_decoding_guide", "BYTES", settings.guide[1] if settings.guide else None),
        ("seed", "UINT64", settings.seed),
        ("stop_words", "BYTES", list(settings.stop) or None),
        ("stop_token_ids", "INT32", list(settings.stop_token_ids) or None),
        ("ssv_top_logprobs", "INT32", settings.logprobs),
        ("ssv_prompt_logprobs", "INT32", settings.prompt_logprobs),
        ("ssv_return_fates", "BOOL", settings.fates or None),
        ("ignore_eos", "BOOL", settings.ignore_eos),
        ("ssv_timeout", "FP32", settings.timeout),
        ("latency_bound_ms", "FP32", settings.latency_bound_ms),
    ]
    return [_tensor(name, datatype, value) for name, datatype, value in values if value is not None]


def user_input(user: str) -> grpcclient.InferInput:
    """The tensor that tells a router who asks."""
    return _tensor("ssv_user", "BYTES", user)


def read_reply(result: grpcclient.InferResult) -> Reply:
    """Reads a response's tensors."""
    return Reply.read(lambda name: result.as_numpy(name).reshape(-1)[0])


def split_url(url: str) -> tuple[str, bool]:
    """Address and whether TLS is spoken.

    Raises:
        UserError: not grpc://host:port or grpcs://host:port.
    """
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("grpc", "grpcs") and bool(parts.hostname) and not parts.path.strip("/")
        is_address = is_address and parts.port is not None
    except ValueError:  # half an IPv6 address, or a port that no port can be
        is_address = False
    if not is_address:
        raise UserError(
            f"{url!r} is not the address of a server", "give grpc://host:port, or grpcs://host:port for TLS"
        )
    return parts.netloc, parts.scheme == "grpcs"


class Client:
    """One stream at a time, over a connection of its own."""

    def __init__(self, url: str, *, ca: Path | None = None) -> None:
        """Makes a connection when it is first used.

        Args:
            ca: PEM that the server's certificate is checked with; None for the system's.

        Raises:
            UserError: see `split_url`.
            OSError: `ca` cannot be read.
        """
        self._url = url
        address, secure = split_url(url)
        if ca is not None:
            ca.open("rb").close()  # of a file that is not there, the library's client would complain twice
        self._client = grpcclient.InferenceServerClient(
            address, ssl=secure, root_certificates=str(ca) if ca is not None else None
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    def stream(
        self,
        prompt: Prompt,
        settings: Settings,
        *,
        request_id: str = "",
        stream: bool = True,
        patience: float | None = None,
    ) -> Iterator[Reply]:
        """Responses as they come; leaving the iteration cancels the request.

        Args:
            stream: False for one response, at the end.
            patience: seconds to wait for each response; None for as long as it takes.

        Raises:
            ServerError: the server refused, failed, or is not there.
        """
        is_over = False
        replies: queue.Queue[grpcclient.InferResult | InferenceServerException] = queue.Queue()
        try:
            self._client.start_stream(lambda result, error: replies.put(error or result))
            inputs = request_inputs(prompt, settings, stream=stream)
            try:
                self._client.async_stream_infer(MODEL, inputs, request_id=request_id)
            except InferenceServerException as error:  # the stream has ended already: why, it says at the same moment
                try:
                    why = replies.get(timeout=1.0)
                except queue.Empty:
                    raise error from None
                raise why if isinstance(why, InferenceServerException) else error from None
            while True:
                result = get(replies, patience)
                if isinstance(result, InferenceServerException):
                    raise result
                reply = read_reply(result)
                yield reply
                if reply.finish_reason:
                    is_over = True
                    return
        except InferenceServerException as error:
            is_over = True
            raise server_error(error, self._url) from error
        except queue.Empty:
            raise ServerError(f"no response came in {patience:g} s", "DEADLINE_EXCEEDED") from None
        finally:
            self._client.stop_stream(cancel_requests=not is_over)

    def parameter(self, name: str) -> str | None:
        """What the server's config has under a name; None for nothing.

        Raises:
            ServerError: the server is not there.
        """
        try:
            parameters = self._client.get_model_config(MODEL).config.parameters
        except InferenceServerException as error:
            raise server_error(error, self._url) from error
        return parameters[name].string_value if name in parameters else None


def server_error(error: InferenceServerException, url: str) -> ServerError:
    """What an error of the client's library says.

    A stream's errors have their status in their text (`ssv.runtime.serving.pieces`).
    """
    message, status = error.message() or "", (error.status() or "").removeprefix("StatusCode.")
    for pattern, what, cure in _UNREACHABLE:
        if match := re.search(pattern, message, re.DOTALL):
            what = what.format(url=url, why=match.groupdict().get("why"))
            return ServerError(what, "UNAVAILABLE", cure, is_unreachable=True)
    message = _BEFORE.sub("", message)
    if match := _STATUS.match(message):
        status, message = match.groups()
    elif status == "UNAVAILABLE":  # not said by the server: it is gone, and so is what it did
        return ServerError(message, status, is_cut_off=True)
    return ServerError(message, status or "UNKNOWN")


def _tensor(name: str, datatype: str, value: Any) -> grpcclient.InferInput:
    kinds = {"BYTES": np.object_, "BOOL": np.bool_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32}
    values = value if isinstance(value, list) else [value]
    if datatype == "BYTES":
        values = [text.encode() for text in values]
    tensor = grpcclient.InferInput(name, [1, len(values)], datatype)
    try:
        tensor.set_data_from_numpy(np.array([values], dtype=kinds[datatype]))
    except OverflowError as error:
        raise UserError(f"{name} {value} is not a number that can be sent", f"give one that fits {datatype}") from error
    return tensor
