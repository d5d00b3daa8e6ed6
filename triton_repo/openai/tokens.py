"""Texts to token ids and back, over HTTP, as vLLM has it: /tokenize and /detokenize."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ssv.bundle.manifest import read_manifest
from ssv.runtime.request import RequestError
from ssv.runtime.serving.intake import template_options
from ssv.runtime.tokenizer import BundleTokenizer
from ssv.triton_repo.openai.conversation import Message, TemplateOptions, Tool
from ssv.triton_repo.openai.errors import ApiError
from ssv.triton_repo.openai.fields import CleanBody, TokenId


class TokenizeRequest(TemplateOptions):
    """Body of /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(CleanBody):
    """Body of /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


class Tokens:
    """A bundle's tokenizer, read when it is first asked for."""

    def __init__(self, bundle: Path, max_length: int | None, chat_template: Path | None = None) -> None:
        """Notes which tokenizer is meant; nothing is read yet.

        Args:
            max_length: tokens of prompt and output together; None where nobody knows.
            chat_template: file with the template that is used instead of the bundle's.
        """
        self._bundle, self._max_length, self._template = bundle, max_length, chat_template

    @cached_property
    def _tokenizer(self) -> BundleTokenizer:
        ends = read_manifest(self._bundle, verify=False).eos_token_ids
        return BundleTokenizer.load(self._bundle, ends, self._template)

    def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        """Answers /tokenize.

        Raises:
            ApiError: 400, it has no prompt or two, or one that cannot be encoded.
        """
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "prompt and messages: give one of them", "prompt", "invalid_value")
        ids = self._said(lambda: self._ids(body), "prompt" if body.messages is None else "messages")
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": self._max_length, "tokens": ids}
        strings = [self._tokenizer.token_bytes(token).decode(errors="replace") for token in ids]
        return {**answer, "token_strs": strings if body.return_token_strs else None}

    def detokenize(self, body: DetokenizeRequest) -> dict[str, str]:
        """Answers /detokenize: the text of tokens, special ones by their names; nothing of those that are unknown."""
        return {"prompt": b"".join(map(self._tokenizer.token_bytes, body.tokens)).decode(errors="replace")}

    def _ids(self, body: TokenizeRequest) -> list[int]:
        tokenizer = self._tokenizer
        if body.messages is not None:
            tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
            options = template_options(json.dumps(given) if (given := body.template()) else "")
            said = [each.as_template_has_it() for each in body.messages]
            return list(tokenizer.chat_ids(said, tools or None, **options))
        if body.add_special_tokens is False:
            return list(tokenizer.inner.encode(body.prompt, add_special_tokens=False))
        return list(tokenizer.encode(body.prompt or ""))

    @staticmethod
    def _said(ids: Callable[[], list[int]], param: str) -> list[int]:
        try:
            return ids()
        except RequestError as error:
            raise ApiError(400, str(error), param, "invalid_value") from error
