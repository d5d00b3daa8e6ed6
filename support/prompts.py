"""Files of prompts."""

from __future__ import annotations

from pathlib import Path

from ssv.support.errors import UserError
from ssv.support.json_text import parse_json


def read_text(path: Path) -> str:
    """A file's text, without the byte order mark that some editors put before it.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", "give a file that is there") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start})", "convert it, for example with iconv") from error


def read_prompts(path: Path) -> list[str]:
    """Prompts of a JSON lines file.

    Raises:
        UserError: the file cannot be read, or a line that is not an object with a `prompt`, or not UTF-8; naming it.
    """
    prompts = []
    # Not splitlines: U+2028 and others of its kind may stand in a JSON text as they are.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            prompt = parse_json(line)["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: expected a JSON object with a `prompt`") from error
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
