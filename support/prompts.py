"""Files of prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssv.support.errors import UserError
from ssv.support.json_text import read_json_lines


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of a file; `category` is "" where the file does not say."""

    text: str
    category: str


def read_prompts(path: Path) -> list[str]:
    """Texts of the prompts of a JSON lines file.

    Raises:
        UserError: the file cannot be read, or a line that is not an object with a `prompt`, or not UTF-8; naming it.
    """
    return [prompt.text for prompt in read_categorized(path)]


def read_categorized(path: Path) -> list[Prompt]:
    """The prompts with their `category`, if they have one. Raises as `read_prompts` does."""
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
        category = given.get("category", "")
        if not isinstance(category, str):
            raise UserError(f"{path}:{number}: `category` must be a text")
        prompts.append(Prompt(prompt, category))
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts
