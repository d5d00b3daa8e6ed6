"""The OpenAI API's errors: objects with the codes that clients act on, in the words of who asked."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException
from starlette.exceptions import HTTPException as StarletteHTTPException

from ssv.client.triton import ServerError

CONTEXT_LENGTH = "context_length_exceeded"
"""Clients shorten the conversation and ask again."""

# LangChain looks for it in the text where the openai package leaves the code out of that; litellm for "maximum context
# length".
_TOO_LONG = "prompt is too long: "
# What `ssv.runtime.serving.intake` says of a prompt or an output that is too long.
_LONG_PROMPT = re.compile(r"^the prompt has (\d+) tokens, and prompt and output together may have (\d+)")
_MANY_BYTES = re.compile(r"^(?:text_input|ssv_messages) has (\d+) bytes, at most (\d+) are taken")
_LONG_OUTPUT = re.compile(
    r"^max_tokens (\d+): at most (\d+) are possible with this prompt \(limits: (\d+) of output, (\d+) with the prompt\)"
)

# What `ssv.runtime.grammar` says of a form that it cannot give an output.
_FORM = re.compile(r"of the output|^the (JSON schema|grammar|choice) |^outputs ")

# Of pydantic's kinds of errors, what OpenAI calls them; others are of a value.
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "unsupported": "unsupported_value",
}


# What is said of how a conversation goes through the chat template.
_TEMPLATE = re.compile("chat_template_kwargs|continue_final_message")


class ApiError(HTTPException):
    """An answer other than 200.

    Attributes:
        param: field that is wrong; None if it is none, or several.
        code: OpenAI's, for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message, {"Retry-After": "1"} if status == 503 else None)
        self.param, self.code = param, code


@dataclass(frozen=True, slots=True)
class Caller:
    """How a request names what the server has other names for.

    Attributes:
        is_chat: whether its prompt is `messages`, or else `prompt`.
        max_tokens: the name under which it gave the limit of its output.
        messages: the name of its conversation.
        form: the field that gives its output a form.
    """

    is_chat: bool
    max_tokens: str = "max_tokens"
    messages: str = "messages"
    form: str = "response_format"

    @property
    def prompt(self) -> str:
        """The field that has the prompt, by the name that the caller knows it by."""
        return self.messages if self.is_chat else "prompt"


def error_object(error: StarletteHTTPException) -> dict[str, Any]:
    """The body of a response."""
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    param, code = (error.param, error.code) if isinstance(error, ApiError) else (None, None)
    return {"error": {"message": error.detail, "type": kind, "param": param, "code": code}}


def json_bytes(content: object) -> bytes:
    """JSON as it is sent."""
    # ASCII: there are clients that take U+2028 for the end of a line.
    return json.dumps(content, separators=(",", ":")).encode()


def error_bytes(error: StarletteHTTPException) -> bytes:
    """The body of a response, as it is sent."""
    return json_bytes(error_object(error))


def translated(error: ServerError, caller: Caller) -> ApiError:
    """What the server said, as an answer to who asked over this API."""
    if error.status == "INVALID_ARGUMENT":
        return _invalid(str(error), caller)
    if error.is_cut_off:  # what was being answered has not been refused
        return ApiError(500, f"the server broke off while it answered: {error}")
    return ApiError(503 if error.status == "UNAVAILABLE" else 500, str(error))


def _invalid(message: str, caller: Caller) -> ApiError:
    prompt, has, it = caller.prompt, "have" if caller.is_chat else "has", "them" if caller.is_chat else "it"
    if match := _LONG_PROMPT.match(message):
        tokens, most = match.groups()
        text = (
            f"{_TOO_LONG}This model's maximum context length is {most} tokens, and the {prompt} {has} {tokens}: "
            f"shorten {it}"
        )
        return ApiError(400, text, prompt, CONTEXT_LENGTH)
    if match := _MANY_BYTES.match(message):
        num_bytes, most = match.groups()
        text = f"{_TOO_LONG}the {prompt} {has} {num_bytes} bytes, at most {most} are taken: shorten {it}"
        return ApiError(400, text, prompt, CONTEXT_LENGTH)
    if match := _LONG_OUTPUT.match(message):
        asked, possible, limit, most = match.groups()
        if int(asked) > int(limit):
            text = f"{caller.max_tokens} {asked} is too large: give at most {limit}"
            return ApiError(400, text, caller.max_tokens, "invalid_value")
        text = (
            f"This model's maximum context length is {most} tokens, of which the {prompt} "
            f"{'leave' if caller.is_chat else 'leaves'} {possible}: shorten {it}, "
            f"or give {caller.max_tokens} {possible} at most instead of {asked}"
        )
        return ApiError(400, text, caller.max_tokens, CONTEXT_LENGTH)
    # Of each name of the server's: the field that it is here, and the word for it in a sentence.
    names = {
        "ssv_messages": (prompt, prompt),
        "text_input": (prompt, prompt),
        "input_ids": (prompt, prompt),
        "stop_words": ("stop", "stop texts"),
        "guided_decoding_guide": (caller.form, caller.form),
        "ssv_top_logprobs": ("logprobs", "logprobs"),
        "ssv_prompt_logprobs": ("logprobs", "logprobs"),
        "max_tokens": (caller.max_tokens, caller.max_tokens),
        **{name: (name, name) for name in _SAME_HERE},
    }
    known = re.compile(rf"\b({'|'.join(names)})\b")
    first = known.search(message)
    if first is None and (of_template := _TEMPLATE.search(message)):
        return ApiError(400, message, of_template[0], "invalid_value")
    if first is None and _FORM.search(message):
        text = f"{caller.form}: {message.replace('ebnf_grammar', 'grammar')}"
        return ApiError(400, text, caller.form, "invalid_value")
    param = names[first[1]][0] if first else prompt if "prompt" in message or "messages" in message else None
    text = known.sub(lambda found: names[found[1]][1], message)
    if caller.is_chat:
        text = text.replace("the prompt is empty", "the last message is empty: give it a text")
    return ApiError(400, text, param, "invalid_value")


_SAME_HERE = (
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "bad_words",
    "stop_token_ids",
    "seed",
    "ssv_tier",
    "ssv_max_divergence",
    "ssv_policy",
    "ssv_timeout",
    "latency_bound_ms",
)


def invalid_body(errors: Sequence[Mapping[str, Any]], body: object, fields: Collection[str]) -> ApiError:
    """What is wrong with a body, of all that is: what is not supported before what is missing for it.

    Args:
        errors: pydantic's.
        body: that they are of.
        fields: that the body may have, for one that is misspelt.
    """
    error = next((one for one in errors if one["type"] in ("unsupported", "extra_forbidden")), None)
    if error is None:
        # Of a field that may be of several kinds, what is wrong with the one that was meant: it reaches furthest.
        same = [one for one in errors if one["loc"][:2] == errors[0]["loc"][:2]]
        is_of_kinds = any(len(one["loc"]) > 1 + len(_place_of(one, body)) for one in same)
        error = max(same, key=lambda one: _reach(_place_of(one, body))) if is_of_kinds else errors[0]
    _, *path = error["loc"]
    kind = error["type"]
    if kind == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {error['ctx']['error']} at character {path[0]}")
    if not path:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    place = _place_of(error, body)
    param = field_name(place)
    code = _CODES.get(kind, "invalid_type" if kind.endswith("_type") else "invalid_value")
    if kind == "extra_forbidden":
        # Less alike than this are other fields, not misspelt ones.
        near = difflib.get_close_matches(param, fields, 1, cutoff=0.75) if len(place) == 1 else []
        cure = f"use {near[0]}, or leave it out" if near else "leave it out"
        return ApiError(400, f"{param or 'a field without a name'} is unknown or not supported: {cure}", param, code)
    if kind == "missing":
        return ApiError(400, f"{param} is missing: give it", param, code)
    said = "must be an object" if kind in _OBJECTS else error["msg"].replace(" after validation", "")
    return ApiError(400, said if kind == "unsupported" else f"{param}: {said}", param, code)


_OBJECTS = ("dict_type", "model_type", "model_attributes_type")
"""Pydantic's kinds of errors for what is no object."""


def _reach(place: Sequence[str | int]) -> tuple[int, list[int]]:
    return len(place), [step for step in place if isinstance(step, int)]


def _place_of(error: Mapping[str, Any], body: object) -> list[str | int]:
    """The place in the body of an error of pydantic's, whose path also names the kinds that it took values for."""
    place: list[str | int] = []
    _, *path = error["loc"]
    is_missing = error["type"] == "missing"  # the last step then is not there
    steps = path[:-1] if is_missing else path
    for step in steps:
        if isinstance(body, dict) and (step in body or str(step) in body):
            body = body[step] if step in body else body[str(step)]
        elif isinstance(body, list) and isinstance(step, int) and step < len(body):
            body = body[step]
        else:
            continue
        place.append(step)
    return [*place, *path[-1:]] if is_missing else place


def nothing_there(path: str, method: str, doors: Collection[str], allowed: str | None) -> ApiError:
    """What is said of an address that is none, or of one that takes another method.

    Args:
        doors: all addresses, for one that is misspelt or lacks a part.
        allowed: methods of this one; None where there is nothing.
    """
    shown = path if len(path) <= _SHOWN_PATH else f"{path[:_SHOWN_PATH]}..."
    if allowed is not None:
        return ApiError(405, f"{shown} does not take {method}: use {allowed}")
    # As clients make them of a base without or with two /v1.
    near = [door for door in doors if door == f"/v1{path}" or path.endswith(door)]
    near = near or difflib.get_close_matches(path, doors, 1, cutoff=0.8)
    return ApiError(404, f"there is nothing at {shown}: use {near[0] if near else ', '.join(sorted(doors))}")


_SHOWN_PATH = 100


def unreadable_body(error: BaseException | None) -> ApiError:
    """What is wrong with a body that could not be parsed at all.

    Args:
        error: of the parser.
    """
    if isinstance(error, UnicodeDecodeError):
        what = f"the body is not valid UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        return ApiError(400, f"{what}, send JSON as UTF-8")
    if isinstance(error, RecursionError):
        return ApiError(400, "the body is nested too deeply: send it flat")
    return ApiError(400, "the body cannot be read as JSON: send a JSON object, with numbers of at most 4300 digits")


def field_name(path: Sequence[str | int]) -> str:
    """A place in a body, such as `messages[0].content`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
