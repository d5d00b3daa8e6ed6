"""Files of prompts.

May import: nothing else of ssv.
"""

from __future__ import annotations

import json
from pathlib import Path


def read_prompts(path: Path) -> list[str]:
    """Prompts of a JSON lines file.

    Raises:
        ValueError: a line that is not an object with a `prompt`; naming it.
    """
    prompts = []
    # Not splitlines: texts may hold other characters that it takes for the end of a line.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: expected a JSON object with a `prompt`") from error
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{path}:{number}: `prompt` must be a text that is not empty")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts
