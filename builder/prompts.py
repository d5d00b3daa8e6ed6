"""Files of prompts.

May import: nothing else of ssv.
"""

from __future__ import annotations

import json
from pathlib import Path


def read_prompts(path: Path) -> list[str]:
    """Prompts of a JSON lines file.

    Raises:
        ValueError: the file cannot be read, or a line that is not an object with a `prompt`; naming it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): give a file of JSON lines with a `prompt` each"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): convert it") from error
    prompts = []
    # Not splitlines: U+2028 and others of its kind may stand in a JSON text as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: expected a JSON object with a `prompt`") from error
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{path}:{number}: `prompt` must be a text that is not empty")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ValueError(f"{path}:{number}: `prompt` holds half of a surrogate pair, which is no character")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts
