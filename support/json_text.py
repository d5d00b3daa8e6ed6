"""JSON that somebody else wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ssv.support.errors import UserError
from ssv.support.files import read_text

MAX_DEPTH = 100
"""Levels of a document.

Python's own limit depends on who calls, and whoever goes through the document next would meet it again.
"""


def parse_json(text: str | bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is not JSON, or nested deeper than `MAX_DEPTH`.
    """
    try:
        value = json.loads(text, object_pairs_hook=object_pairs_hook)
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [each for parent in level for each in _inside(parent)]
        if not level:
            return value
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def read_json_object(path: Path, error: type[UserError] = UserError, cure: str = "") -> dict[str, Any]:
    """The object that a JSON file consists of.

    Args:
        error, cure: what to raise of another file, and what to do about it.

    Raises:
        UserError: as `error` says: it is not JSON, or no object.
        OSError: it cannot be read.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as problem:
        raise error(f"{path} is not JSON ({problem})", cure) from problem
    if not isinstance(value, dict):
        raise error(f"{path} is not a JSON object", cure)
    return value


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The lines of a JSON lines file that are not blank, as (number from 1 on, value).

    Raises:
        UserError: it cannot be read, or a line is not JSON, naming it.
    """
    # Not splitlines: U+2028 and others of its kind may stand in a JSON text as they are.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                value = parse_json(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: it is not JSON ({error})") from error
            yield number, value


def _inside(value: Any) -> list[Any]:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [child for child in children if isinstance(child, dict | list)]
