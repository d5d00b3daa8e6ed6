"""What bodies are made of: objects that are checked, in which null is as if it were left out, and the fields that all
requests for an answer have.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from ssv.runtime.request import MAX_BIAS, MAX_LOGPROBS, MAX_PENALTY
from ssv.triton_repo.openai.errors import ApiError, field_name

MAX_STOP = 64
"""Each is looked for at every token; OpenAI takes 4."""


def refuse(message: str) -> PydanticCustomError:
    """What a validator raises for a value that is known and not supported."""
    return PydanticCustomError("unsupported", "{message}", {"message": message})


def only(*neutral: Any) -> AfterValidator:
    """A field of which only values that change nothing are supported."""

    def check(value: Any, info: ValidationInfo) -> Any:
        # True is 1 in Python.
        if value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
            return value
        but = f" but for {' and '.join(json.dumps(one) for one in neutral)}" if neutral else ""
        raise refuse(f"{info.field_name} is not supported{but}: leave it out")

    return AfterValidator(check)


def _biases(given: Any) -> Any:
    """Numbers by token, of an object whose names are the tokens."""
    if not isinstance(given, dict):
        return given
    for token in given:
        if not (isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 10):
            raise PydanticCustomError("token_id", "{token} is no token id", {"token": repr(token)[:40]})
    return {int(token): bias for token, bias in given.items()}


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _cleaned(value: Any, *path: str | int, keeps_nulls: bool = False) -> Any:
    """A body without what is null, which says the same as what is left out.

    Args:
        keeps_nulls: whether it stands in a JSON schema, where null is a value as others.

    Raises:
        ApiError: 400, text that is no text: half of a surrogate pair can be written in JSON.
    """
    if isinstance(value, dict):
        for name in value:
            _check_text(name, path)
        return {
            name: _cleaned(held, *path, name, keeps_nulls=keeps_nulls or name in _SCHEMAS)
            for name, held in value.items()
            if held is not None or keeps_nulls
        }
    if isinstance(value, list):
        return [_cleaned(held, *path, index, keeps_nulls=keeps_nulls) for index, held in enumerate(value)]
    if isinstance(value, str):
        _check_text(value, path)
    return value


_SCHEMAS = ("schema", "parameters", "guided_json", "json")
"""Fields that are JSON schemas: of an output, of a function, and of vLLM's `structured_outputs`."""


def _check_text(text: str, path: tuple[str | int, ...]) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        param = field_name(path) or None
        what = (
            f"{param or 'a name'} is not valid Unicode: character {error.start} is half of a surrogate pair, "
            "leave it out"
        )
        raise ApiError(400, what, param, "invalid_value") from error


class Strict(BaseModel):
    """An object of a body."""

    # Text that could be read as a number is not one, and what is unknown is wrong.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class CleanBody(Strict):
    """A body in which null is as if it were left out."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        try:
            return _cleaned(body)
        except RecursionError as error:
            raise ApiError(400, "the body is nested too deeply: send it flat") from error


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]
_Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Int32 = Annotated[int, Field(lt=2**31)]
_StopText = Annotated[str, Field(min_length=1)]
_StopTexts = Annotated[list[_StopText], BeforeValidator(_listed), Field(max_length=MAX_STOP)]


class AnsweredRequest(CleanBody):
    """The fields that all requests for an answer have: what is to answer, how its tokens are chosen, and who asks."""

    model: str
    min_tokens: Annotated[Int32, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Int32, Field(ge=-1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[dict[int, _Bias], BeforeValidator(_biases), Field(max_length=1024)] | None = None
    stop: _StopTexts | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    bad_words: Annotated[list[str], BeforeValidator(_listed), Field(max_length=MAX_STOP)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Annotated[Any, only("in_memory", "in-memory", "24h")] = None
    ssv_tier: str | None = None
    ssv_max_divergence: Annotated[float, Field(ge=0, le=1)] | None = None
    ssv_policy: dict[str, Any] | None = None
    ssv_timeout: Annotated[float, Field(gt=0)] | None = None
    latency_bound_ms: Annotated[float, Field(gt=0)] | None = None
