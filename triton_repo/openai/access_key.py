"""The middleware of the OpenAI API that asks for a key."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ssv.triton_repo.openai.access_log import Access
from ssv.triton_repo.openai.errors import ApiError, error_bytes

OPEN_PATHS = ("/health", "/live")
"""What asks for no key: whoever watches over the server has none."""


class AccessKey:
    """ASGI middleware that asks for one of some keys as `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], more_open_paths: Sequence[str] = ()) -> None:
        """Guards an application.

        Args:
            more_open_paths: what asks for no key beside `OPEN_PATHS`.
        """
        self._app, self._keys = app, [key.encode() for key in keys]
        self._open_paths = {*OPEN_PATHS, *more_open_paths}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths or self._is_known(Headers(scope=scope)):
            return await self._app(scope, receive, send)
        error = ApiError(
            401, "the API key is wrong or missing: send Authorization: Bearer KEY", None, "invalid_api_key"
        )
        Access.of(scope).fail(error)
        headers = {"WWW-Authenticate": "Bearer"}
        await Response(error_bytes(error), 401, headers, "application/json")(scope, receive, send)

    def _is_known(self, headers: Headers) -> bool:
        kind, _, key = headers.get("Authorization", "").partition(" ")
        given = key.strip().encode(errors="surrogateescape")
        # All of them, each in constant time: how long it takes says nothing about any.
        found = [hmac.compare_digest(given, each) for each in self._keys]
        return kind.lower() == "bearer" and any(found)
