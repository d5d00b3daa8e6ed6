"""Settings that somebody else wrote, checked."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError


class Strict(BaseModel):
    """What is read from a file: an unknown key is an error, never ignored, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def problems(error: ValidationError, whole: str = "") -> str:
    """All that is wrong with settings, each with the key that it is about.

    Args:
        whole: what to call the settings as a whole; nothing where a message says it itself.
    """
    return "; ".join(_problem(each["loc"], each["msg"], whole) for each in error.errors())


def _problem(place: tuple[int | str, ...], message: str, whole: str) -> str:
    name = ".".join(map(str, place)) or whole
    message = message.removeprefix("Value error, ")  # pydantic's, before what a check of ours says
    return f"{name}: {message}" if name else message
