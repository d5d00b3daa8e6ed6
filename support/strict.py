"""Settings that somebody else wrote, checked."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ssv.support.errors import UserError


class Strict(BaseModel):
    """What is read from a file: an unknown key is an error, never ignored, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SettingError(UserError):
    """What a caller gave cannot be; the message names the settings, what they were and what they must be."""


class Given(Strict):
    """What callers make by its name, and files may have: a caller hears of a mistake as of every other one."""

    def __init__(self, /, **settings: Any) -> None:
        """Checks the settings.

        Raises:
            SettingError: one is unknown, missing or out of range; all of them are named.
        """
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise _setting_error(type(self), error) from None

    # As pydantic marks its own: what is read from a file is checked without it, and as strictly as was asked for.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def _setting_error(made: type[BaseModel], error: ValidationError) -> SettingError:
    found, cures = [], []
    for each in error.errors():
        name, said = ".".join(map(str, each["loc"])), each["msg"].removeprefix("Value error, ")
        if each["type"] == "missing":
            found.append(f"{name} is missing")
            cures.append("give what is missing")
        elif each["type"] == "extra_forbidden":
            found.append(f"{name} is unknown")
            cures.append(f"known: {', '.join(made.model_fields)}")
        elif each["type"] == "value_error":  # a check of ours says what to do
            found.append(f"{name}: {said}" if name else said)
        else:
            found.append(f"{name} {each['input']!r} cannot be")
            cures.append(re.sub(r"^\w+ should", "it must", said))
    return SettingError("; ".join(found), "; ".join(dict.fromkeys(cures)))


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
