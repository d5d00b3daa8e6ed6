"""Docstrings begin with a sentence that says what is there, and whatever is public in a file has one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from checkout import ROOT
from picture_of_rooms import rooms

FILES = sorted(path for room in {room.partition("/")[0] for room in rooms()} for path in (ROOT / room).rglob("*.py"))

NO_SENTENCE = re.compile(r"Of |(Args|Attributes|Raises|Returns|Yields):")
"""How a docstring begins that goes on where its name ends, or has nothing but sections."""

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documented(node: ast.AST, name: str = "") -> Iterator[tuple[str, Documented]]:
    """Whatever can have a docstring, by its name in the file."""
    if isinstance(node, ast.Module):
        yield "the file", node
    for child in ast.iter_child_nodes(node):
        inner = name
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inner = f"{name}.{child.name}".lstrip(".")
            yield inner, child
        yield from documented(child, inner)


def wrong(text: str) -> Iterator[str]:
    """What of a file has no docstring, or one that does not begin with a sentence.

    Methods may go without one: many do what their class's, or that of a contract, says of them. So may `main`, which
    does what its file's says.
    """
    tree = ast.parse(text)
    for name, node in documented(tree):
        found = ast.get_docstring(node)
        if found is None:
            is_wanted = node in tree.body and not name.startswith("_") and name != "main"
            if is_wanted or (node is tree and tree.body):
                yield name
        elif NO_SENTENCE.match(found):
            yield name


def test_docstrings_begin_with_a_sentence_and_none_is_missing() -> None:
    found = {f"{path.relative_to(ROOT)}: {name}" for path in FILES for name in wrong(path.read_text())}
    assert not found


CLASS = '"""A file."""\n\n\nclass C:\n    """One."""\n\n'

PLANTED = {
    "the file": "x = 1\n",
    "f": '"""A file."""\n\n\ndef f() -> None:\n    pass\n',
    "g": '"""A file."""\n\n\nasync def g() -> None:\n    pass\n',
    "C": '"""A file."""\n\n\nclass C:\n    pass\n',
    "C.__init__": f'{CLASS}    def __init__(self) -> None:\n        """Args:"""\n',
    "C._f": f'{CLASS}    def _f(self) -> None:\n        """Of it."""\n',
    "_f.within": '"""A file."""\n\n\ndef _f() -> None:\n    def within() -> None:\n        """Raises: X"""\n',
}


@pytest.mark.parametrize(("name", "text"), PLANTED.items(), ids=PLANTED)
def test_what_is_wrong_is_found(name: str, text: str) -> None:
    assert list(wrong(text)) == [name]


def test_what_needs_no_docstring() -> None:
    text = '"""Offers f and C."""\n\n\ndef main() -> None:\n    pass\n\n\ndef _f() -> None:\n    pass\n'
    assert not list(wrong(text)) and not list(wrong(""))
