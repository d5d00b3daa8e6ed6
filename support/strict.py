"""Settings that somebody else wrote, checked."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError


class Strict(BaseModel):
    """What is read from a file: an unknown key is an error, never ignored, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def problems(error: ValidationError, whole: str) -> str:
    """All that is wrong with settings, each with the key that it is about.

    Args:
        whole: what to call the settings as a whole.
    """
    return "; ".join(f"{'.'.join(map(str, each['loc'])) or whole}: {each['msg']}" for each in error.errors())
