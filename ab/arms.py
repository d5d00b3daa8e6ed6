"""What is compared: NAME=URL with settings, as it is written on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from ssv.support.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,31}")

_NUMBERS = ("gpus", "price_per_hour", "price_per_1m_tokens")
_FOR_ANY = (*_NUMBERS, "temperature")
_FOR_TRITON = ("method", "max_divergence")
_SWITCHES = ("max_completion_tokens", "stream_options", "stream", "seed")
_FOR_OPENAI = ("model", *_SWITCHES)


@dataclass(frozen=True, slots=True)
class Price:
    """What an arm costs.

    Attributes:
        per_second: of its machine, in use or not.
        per_token: what an API takes instead.
    """

    per_second: float = 0.0
    per_token: float = 0.0


@dataclass(frozen=True, slots=True)
class Arm:
    """What is compared: an endpoint, and how it is asked.

    Attributes:
        url: without the settings.
        tier, max_divergence: asked of a server of ssv; None for its default.
        model: asked of an OpenAI endpoint.
        gpus, price_per_hour, price_per_1m_tokens, temperature: where they differ from those of the command line; the
            temperature "default" is the server's own, and not sent.
        max_completion_tokens: whether the limit of tokens is sent under that name, not as `max_tokens`.
        stream, stream_options, seed: whether an OpenAI endpoint is asked to stream, for its usage at the end of the
            stream, and with a seed.
    """

    name: str
    url: str
    tier: str | None = None
    max_divergence: float | None = None
    model: str | None = None
    gpus: float | None = None
    price_per_hour: float | None = None
    price_per_1m_tokens: float | None = None
    temperature: float | str | None = None
    max_completion_tokens: bool = False
    stream: bool = True
    stream_options: bool = True
    seed: bool = True

    @property
    def key_variable(self) -> str:
        """Environment variable with the key of its API."""
        return f"SSV_AB_KEY_{re.sub(r'[.-]', '_', self.name).upper()}"

    def has(self, setting: str) -> bool:
        """Whether a setting, as it is written behind the address, changes nothing."""
        key, _, text = setting.partition("=")
        value = _temperature(self.name, text) if key == "temperature" else _switch(self.name, key, text)
        return bool(getattr(self, key) == value)

    @property
    def is_openai(self) -> bool:
        """Whether the arm speaks OpenAI's API; otherwise it is asked over gRPC."""
        return self.url.startswith("http")

    def price(self, *, per_hour: float | None, gpus: float, utilisation: float) -> Price | None:
        """What it costs, given what the command line says for all; None if nobody says.

        Args:
            per_hour: of one GPU.
            utilisation: share of the time that is paid for in which there is work.
        """
        if self.price_per_1m_tokens is not None:
            return Price(per_token=self.price_per_1m_tokens / 1e6)
        hourly = self.price_per_hour if self.price_per_hour is not None else per_hour
        if hourly is None:
            return None
        return Price(per_second=(self.gpus or gpus) * hourly / 3600 / utilisation)


def parse_arm(text: str) -> Arm:
    """NAME=grpc://host:8001?method=balanced, NAME=http://host:8003/v1?model=NAME; grpcs and https speak TLS.

    Raises:
        UserError: naming what is wrong.
    """
    name, equals, url = text.partition("=")
    if not equals or not _NAME.fullmatch(name):
        raise UserError(f"{text!r} is no arm", "give NAME=grpc://host:port or NAME=http://host:port/v1?model=...")
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("grpc", "grpcs", "http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise UserError(f"arm {name}: {url!r} is no address", "give grpc://host:port or http://host:port/v1")
    if "@" in parts.netloc:
        raise UserError(
            f"arm {name}: its address has a name or a key in it, which reports would show",
            "give the key in SSV_AB_KEY_...",
        )
    known = _FOR_ANY + (_FOR_OPENAI if parts.scheme.startswith("http") else _FOR_TRITON)
    settings = parse_qsl(parts.query, keep_blank_values=True)
    given = dict(settings)
    if len(given) < len(settings):
        raise UserError(f"arm {name}: {parts.query!r} says something twice", "give each setting once")
    if unknown := [key for key in given if key not in known]:
        raise UserError(f"arm {name}: unknown setting {unknown[0]!r}; known for {parts.scheme}: {', '.join(known)}")
    if parts.scheme.startswith("http") and not given.get("model"):
        raise UserError(f"arm {name} names no model", "add ?model=... to its address")
    if "method" in given and "max_divergence" in given:
        raise UserError(f"arm {name} has a method and a max_divergence", "give one of them")
    address = urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))
    numbers: dict[str, Any] = {
        key: _number(name, key, given[key]) for key in (*_NUMBERS, "max_divergence") if key in given
    }
    return Arm(
        name,
        address,
        tier=given.get("method"),
        model=given.get("model"),
        temperature=_temperature(name, given["temperature"]) if "temperature" in given else None,
        **numbers,
        **{key: _switch(name, key, given[key]) for key in _SWITCHES if key in given},
    )


def check_arms(arms: Sequence[Arm]) -> None:
    """Raises UserError: fewer than two arms, or two of one name."""
    names = [arm.name for arm in arms]
    if len(arms) < 2:
        raise UserError("there is nothing to compare", "give --a and --b")
    if len(set(names)) < len(names):
        raise UserError(f"arms {', '.join(names)} must have different names", "choose others")
    by_variable: dict[str, str] = {}
    for arm in arms:
        if arm.is_openai and (other := by_variable.setdefault(arm.key_variable, arm.name)) != arm.name:
            raise UserError(
                f"arms {other} and {arm.name} would both be asked with the key in {arm.key_variable}",
                "choose names that differ in more than case and punctuation",
            )


def _switch(arm: str, key: str, text: str) -> bool:
    if text not in ("yes", "no"):
        raise UserError(f"arm {arm}: {key}={text} must be yes or no")
    return text == "yes"


def _temperature(arm: str, text: str) -> float | str:
    if text == "default":
        return text
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise UserError(
            f"arm {arm}: temperature={text} must be a number, 0 or above, or `default` for the server's own"
        )
    return value


def _number(arm: str, key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise UserError(f"arm {arm}: {key}={text} must be a number above 0")
    return value
