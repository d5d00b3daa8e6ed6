"""Docstrings begin with a sentence that says what is there, and whatever is public in a file has one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping

import pytest
from checkout import ROOT
from picture_of_rooms import rooms

SAID = ("ab/", "builder/", "bundle/", "client/", "model/", "runtime/", "triton_repo/")
"""Rooms whose public methods all say what they do."""

FILES = sorted(path for room in {room.partition("/")[0] for room in rooms()} for path in (ROOT / room).rglob("*.py"))

NO_SENTENCE = re.compile(r"Of |(Args|Attributes|Raises|Returns|Yields):")
"""How a docstring begins that goes on where its name ends, or has nothing but sections."""

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

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

    `main` may go without one, as it does what its file's says. For methods see `bare_methods`.
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


def classes(trees: Iterable[ast.Module]) -> dict[str, ast.ClassDef]:
    """Those at the top of files, by name."""
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def inherits(name: str, node: ast.ClassDef, known: Mapping[str, ast.ClassDef]) -> bool:
    """Whether a method of a class does what a base says: one of ours that says it, or a foreign one."""
    for base in node.bases:
        of = ast.unparse(base).partition("[")[0]
        if of in ("Protocol", "Generic", "BaseModel"):
            continue
        if of not in known:
            return True
        said = any(isinstance(x, FUNCTION) and x.name == name and ast.get_docstring(x) for x in known[of].body)
        if said or inherits(name, known[of], known):
            return True
    return False


def bare_methods(tree: ast.Module, known: Mapping[str, ast.ClassDef]) -> Iterator[str]:
    """Public methods of public classes that have no docstring, nor a base that has."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for each in node.body:
                if not isinstance(each, FUNCTION) or each.name.startswith("_") or ast.get_docstring(each):
                    continue
                if not inherits(each.name, node, known):
                    yield f"{node.name}.{each.name}"


def test_public_methods_say_what_they_do() -> None:
    trees = {path: ast.parse(path.read_text()) for path in FILES}
    known = classes(trees.values())
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path, tree in trees.items()
        if str(path.relative_to(ROOT)).startswith(SAID) and "runtime/engines/cuda" not in str(path)
        for name in bare_methods(tree, known)
    }
    assert not found


METHODS = '''
class Contract(Protocol):
    def said(self):
        """Says."""
    def unsaid(self): ...

class Ours(Contract):
    def said(self): ...
    def unsaid(self): ...
    def more(self): ...
    def _own(self): ...

class Theirs(other.Base):
    def forward(self): ...

class _Own:
    def f(self): ...
'''


def test_bare_methods_are_found() -> None:
    tree = ast.parse(METHODS)
    assert list(bare_methods(tree, classes([tree]))) == ["Contract.unsaid", "Ours.unsaid", "Ours.more"]


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
