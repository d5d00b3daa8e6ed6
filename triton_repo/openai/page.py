"""The page at `/`: a chat whose tokens show how they came about, two tiers beside each other if wanted.

One file for the browser, made of those in `web/`. It asks nobody but the server that it came from, and its policy has
the browser see to that.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from fastapi import Response

PATH = "/"
_WEB = Path(__file__).parent / "web"


@cache
def _made() -> tuple[bytes, dict[str, str]]:
    """The page, and its headers."""
    inner = {name: (_WEB / f"page.{kind}").read_text() for name, kind in (("style", "css"), ("script", "js"))}
    text = (_WEB / "page.html").read_text()
    for name, content in inner.items():
        text = text.replace(f"{{{{ {name} }}}}", content)
    # What is written in the page is run, and nothing else; nothing is read or sent elsewhere; nobody frames it.
    policy = {
        "default-src": "'none'",
        **{f"{name}-src": f"'sha256-{_digest(content)}'" for name, content in inner.items()},
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return text.encode(), {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }


def page() -> Response:
    """The response to who asks for it."""
    content, headers = _made()
    return Response(content, headers=headers, media_type="text/html")


def _digest(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
