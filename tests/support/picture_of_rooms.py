"""The rooms as a Mermaid diagram, from the table in test_architecture.py.

    python tests/support/picture_of_rooms.py

prints what stands in docs/architecture.md.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

from checkout import ROOT


def rooms() -> dict[str, tuple[str, ...]]:
    """The table, read without running the tests' file."""
    for node in ast.parse((ROOT / "tests/unit/test_architecture.py").read_text()).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "ROOMS" and node.value is not None:
            return ast.literal_eval(node.value)
    raise LookupError("tests/unit/test_architecture.py has no table ROOMS")


def picture(table: Mapping[str, tuple[str, ...]]) -> str:
    """A Mermaid flowchart: an arrow from each room to those that it imports.

    Arrows to rooms that other arrows lead to are left out.
    """
    lines = ["flowchart TD"]
    lines += [f'    {_id(room)}["{room}"]' for room in reversed(table)]
    for room in reversed(table):
        lines += [f"    {_id(room)} --> {_id(of)}" for of in table[room] if not _leads(table, room, of)]
    return "\n".join(lines) + "\n"


def _leads(table: Mapping[str, tuple[str, ...]], room: str, of: str) -> bool:
    """Whether a room reaches another by way of a third."""
    return any(other != of and of in _reached(table, other) for other in table[room])


def _reached(table: Mapping[str, tuple[str, ...]], room: str) -> set[str]:
    return set(table[room]).union(*(_reached(table, other) for other in table[room]))


def _id(room: str) -> str:
    return room.replace("/", "_").replace(".", "_")


if __name__ == "__main__":
    print(picture(rooms()), end="")
