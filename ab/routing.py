"""Which arm live traffic goes to: by a stable hash, in given shares."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from ssv.support.errors import UserError
from ssv.support.files import write_json
from ssv.support.json_text import parse_json
from ssv.support.strict import Strict, problems
from ssv.support.yaml_text import read_yaml


class RoutingError(UserError):
    """A file that cannot be one of arms; the message names what is wrong."""


class LiveArm(Strict):
    """A part of the live traffic, and what answers it.

    Attributes:
        share: of the traffic.
        url: of another server; None for the one that routes.
        tier, max_divergence: asked of the server; None for its default.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    url: Annotated[str, Field(pattern=r"^grpcs?://[^/]+:\d+$")] | None = None
    tier: str | None = None
    max_divergence: Annotated[float, Field(ge=0, le=1)] | None = None

    @field_validator("url")
    @classmethod
    def _has_a_port(cls, url: str | None) -> str | None:
        if url is not None and not 0 < int(url.rpartition(":")[2]) < 65536:
            raise ValueError(f"{url} has no port between 1 and 65535")
        return url

    @model_validator(mode="after")
    def _says_one_thing(self) -> LiveArm:
        if self.tier is not None and self.max_divergence is not None:
            raise ValueError("give a tier or a max_divergence")
        return self


class Routing(Strict):
    """What the router is told, and the first record of its log repeats.

    Attributes:
        salt: with another, others are in which arm.
        log: JSON lines, appended to.
        arms: by name; the first is arm A: what others are compared with, and where their traffic goes when they fall
            back.
        shadow: arm that gets a copy of requests, whose answers nobody sees; all are answered by arm A then.
        shadow_share: of the requests, those that are copied.
    """

    salt: Annotated[str, Field(min_length=1)]
    log: Path
    arms: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]{0,31}$")], LiveArm]
    shadow: str | None = None
    shadow_share: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _adds_up(self) -> Routing:
        if len(self.arms) < 2:
            raise ValueError("there is nothing to compare: give two arms")
        if self.shadow is not None:
            if self.shadow not in list(self.arms)[1:]:
                raise ValueError(f"shadow {self.shadow!r} is none of the arms after the first: {', '.join(self.arms)}")
        elif abs(sum(arm.share for arm in self.arms.values()) - 1) > 1e-9:
            total = sum(arm.share for arm in self.arms.values())
            raise ValueError(f"the shares add up to {total:.10g}: they must be 1 together")
        return self

    @property
    def first(self) -> str:
        """Name of the arm that the others are compared with, and that takes over for those out of service."""
        return next(iter(self.arms))

    @property
    def fallback_path(self) -> Path:
        """Place of the file that names the arms that are out of service."""
        return fallback_path(self.log)

    def arm_of(self, unit: str) -> str:
        """The arm of a user or a request: always the same with the same salt and shares."""
        if self.shadow is not None:
            return self.first
        place = self._place("arm", unit)
        for name, arm in self.arms.items():
            place -= arm.share
            if place < 0:
                return name
        return name  # shares add up to 1 but for rounding

    def is_shadowed(self, unit: str) -> bool:
        """Whether the shadow arm gets a copy."""
        return self.shadow is not None and self._place("shadow", unit) < self.shadow_share

    def _place(self, what: str, unit: str) -> float:
        digest = hashlib.sha256(f"{self.salt}\0{what}\0{unit}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


# What to do about what is missing, or wrong, by where that is.
_CURES = {
    "salt": "add a line `salt: TEXT`, with any text in quotes; with another, users are in other arms",
    "log": "add a line `log: FILE`, which a line is written to for each request",
    "arms": "add `arms:` and below it two at least, as `NAME: {share: 0.5, tier: premium}`",
}
_OTHER_CURE = "compare it with the file in docs/comparing.md, under `Live traffic`"


def read_routing(path: Path) -> Routing:
    """Raises RoutingError: no such file, or not a file of arms."""
    try:
        return Routing.model_validate(read_yaml(path))
    except ValidationError as error:
        raise RoutingError(f"{path}: {problems(error, 'the file')}", _cure(error)) from error
    except UserError as error:
        raise RoutingError(error.what, error.cure) from error


def _cure(error: ValidationError) -> str:
    found = [each for each in error.errors() if each["type"] != "value_error"]  # checks of ours say what to do
    cures = {_CURES.get(".".join(map(str, each["loc"])), _OTHER_CURE): None for each in found}
    return "; ".join(cures)


def fallback_path(log: Path) -> Path:
    """The file that says which arms are out of service; deleting it puts them back."""
    return log.with_name(log.name + ".fallback")


class Fallback:
    """Arms that are out of service, as the file beside the log says: looked at before each request, read when it has
    changed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._arms: Mapping[str, str] = {}

    def arms(self) -> Mapping[str, str]:
        """Why, by arm. A file that cannot be read changes nothing."""
        try:
            status = self._path.stat()
            seen = (status.st_mtime_ns, status.st_ino)
            if seen != self._seen:
                self._arms, self._seen = _read_fallback(self._path), seen
        except FileNotFoundError:
            self._arms, self._seen = {}, None
        except (OSError, ValueError):
            pass
        return self._arms


def fall_back(path: Path, why: Mapping[str, str]) -> None:
    """Takes arms out of service, beside those that are. Args: why: by arm."""
    before: Mapping[str, str] = {}
    if path.exists():
        try:
            before = _read_fallback(path)
        except ValueError:
            before = {}
    write_json(path, {**before, **why})


def _read_fallback(path: Path) -> dict[str, str]:
    found: Any = parse_json(path.read_text())
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object")
    return {str(arm): str(why) for arm, why in found.items()}
