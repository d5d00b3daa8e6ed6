"""Files of prompts."""

from __future__ import annotations

from pathlib import Path

from ssv.support.errors import UserError
from ssv.support.json_text import read_json_lines


def read_prompts(path: Path) -> list[str]:
    """Prompts of a JSON lines file.

    Raises:
        UserError: the file cannot be read, or a line that is not an object with a `prompt`, or not UTF-8; naming it.
    """
    prompts = []
    for number, given in read_json_lines(path):
        if not isinstance(given, dict) or "prompt" not in given:
            raise UserError(f"{path}:{number}: expected a JSON object with a `prompt`")
        prompt = given["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{path}:{number}: `prompt` must be a text that is not empty")
        if any("\ud800" <= char <= "\udfff" for char in prompt):
            raise UserError(
                f"{path}:{number}: `prompt` has half of a surrogate pair, which no text has", "make it whole"
            )
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts
